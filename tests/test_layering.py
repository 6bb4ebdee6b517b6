"""Imports point down: tests > ei > mor > mor_kernels, and the light packages stay light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVEL = {"mor_kernels": 0, "mor": 1, "ei": 2}
FOLDER = {"mor_kernels": ROOT / "kernels/mor_kernels", "mor": ROOT / "mor", "ei": ROOT / "ei"}
ABOVE = {"tests", "benchmarks", "examples"}


def imported_packages(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", LEVEL)
def test_nothing_imports_upward(package):
    files = list(FOLDER[package].rglob("*.py"))
    assert files
    upward = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in imported_packages(path)
        if name in ABOVE or LEVEL.get(name, -1) > LEVEL[package]
    }
    assert not upward


def test_the_check_sees_an_upward_import(tmp_path):
    path = tmp_path / "module.py"
    path.write_text("def f():\n    from ei.models import build_model\n    import tests.conftest\n")
    assert set(imported_packages(path)) == {"ei", "tests"}


def rooms_of_ei() -> dict[str, set[str]]:
    """The modules and folders right below ei, and which others of them each imports when it is itself imported."""
    rooms: dict[str, set[str]] = {}
    for path in FOLDER["ei"].rglob("*.py"):
        room = path.relative_to(FOLDER["ei"]).parts[0].removesuffix(".py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ei.") and room != "__init__":
                rooms.setdefault(room, set()).add(node.module.split(".")[1])
    return {room: others - {room} for room, others in rooms.items()}


def test_no_two_rooms_of_ei_import_each_other():
    """graphlib finds a cycle of any length."""
    list(TopologicalSorter(rooms_of_ei()).static_order())


def test_only_the_plug_in_imports_peft():
    files = [path for path in FOLDER["mor"].rglob("*.py") if "peft" in imported_packages(path)]
    assert [path.name for path in files] == ["peft_plugin.py"]


def test_folders_that_must_not_be_packages():
    """kernels/__init__.py would shadow the library of that name, which peft imports; tests/mor would shadow mor."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not [path for name in ("benchmarks", "examples") for path in (ROOT / name).rglob("__init__.py")]


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_mor_needs_only_torch_numpy_and_safetensors():
    heavy = {"timm", "torchvision", "peft", "transformers", "sklearn", "open_clip", "tyro", "ei"}
    assert not modules_after("import mor") & heavy


def test_the_command_line_starts_without_torch():
    assert "torch" not in modules_after("import ei, ei.config, ei.cli")
