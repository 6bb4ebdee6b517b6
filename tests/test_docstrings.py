"""The examples in docstrings give what they say."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("mor", "ei")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.stem not in ("__init__", "__main__")
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    if name == "mor.peft_plugin":
        pytest.importorskip("peft")
    result = doctest.testmod(import_module(name))
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    names = [name for name in MODULES if name != "mor.peft_plugin"]
    assert sum(bool(test.examples) for name in names for test in finder.find(import_module(name))) >= 20
