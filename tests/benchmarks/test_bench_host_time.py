import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_measures_every_layer_without_a_card(tmp_path):
    """In a process of its own: the stand-in driver would stay, and Triton must not be the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    subprocess.run(
        [sys.executable, "benchmarks/bench_host_time.py", "--rounds", "3", "--out", str(tmp_path)],
        cwd=ROOT, env=environment | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}, check=True, timeout=280,
    )  # fmt: skip
    results = json.loads((tmp_path / "host_time.json").read_text())
    for dtype in ("bf16", "fp32"):
        times = results[dtype]["microseconds"]
        assert set(times) == {"frozen", "mor", "peft_lora"}
        for by_mode in times.values():
            assert 0 < by_mode["forward"][1] < by_mode["forward_backward"][1]
    assert "| fp32 | peft LoRA r=8 |" in (tmp_path / "host_time.md").read_text()
