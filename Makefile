# `make demo` and `make test` need nothing but Python 3.11 or newer: the first use makes .venv and installs into it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
# A process per core, each with one thread: the models of the tests are too small for several. A file's tests stay
# together, for the runs that they share.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=logical --maxprocesses=8 --dist=loadfile

.PHONY: demo test slow check bench zoo faults kernels-aot kernels-emulated kernels-gpu clean

demo: $(VENV)/.installed
	$(BIN)/ei demo

test: $(VENV)/.installed
	$(PYTEST)

slow: $(VENV)/.installed
	$(PYTEST) -m slow

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/bench_mor_linear_cpu.py

zoo: $(VENV)/.installed
	$(BIN)/python -W ignore tests/mor/zoo.py --write

# Everything that breaks something on purpose, with a hundred kills; about ten minutes.
faults: $(VENV)/.installed
	EI_KILLS=100 $(PYTEST) -m fault --fault-table=docs/faults.md

# Every shipped tile, compiled for five chips; needs no GPU and takes some minutes.
kernels-aot: $(VENV)/.installed
	PYTHONPATH=kernels $(BIN)/python tests/kernels/compile_matrix.py > compile_matrix.jsonl

# The errors of what the compiler made at the sizes of a ViT-B, in an emulator; ten to twenty minutes of one core.
kernels-emulated: $(VENV)/.installed
	PYTHONPATH=kernels OMP_NUM_THREADS=1 $(BIN)/python tests/kernels/emulated.py --rows 1576 6288 12608 \
		--shapes 768,2304 768,768 768,3072 3072,768 > benchmarks/results/emulated_errors.jsonl

# What only a card can show: the tests, then the whole comparison.
kernels-gpu: $(VENV)/.installed
	$(BIN)/python -m pytest -m gpu tests/kernels
	$(BIN)/python benchmarks/bench_mor_linear.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed, this is ' + sys.version if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis runs compile_matrix.jsonl
