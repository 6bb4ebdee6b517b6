"""What pip installs is what the checkout holds, and works away from it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"mor": ROOT / "mor", "ei": ROOT / "ei", "mor_kernels": ROOT / "kernels" / "mor_kernels"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three packages as pip lays them out."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(ROOT)]
    subprocess.run(command, check=True, timeout=280)
    return folder


@pytest.mark.slow
def test_every_file_is_installed(installed):
    def files(folder: Path) -> set[str]:
        paths = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        return {str(path.relative_to(folder)) for path in paths}

    for name, source in PACKAGES.items():
        assert files(installed / name) == files(source)


@pytest.mark.slow
def test_it_works_away_from_the_checkout(installed, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    for name in PACKAGES:
        (where,) = run("-c", f"import {name}; print({name}.__file__)").split()
        assert Path(where).is_relative_to(installed)
    run("-m", "ei", "phantom", "--out", "data", "--samples", "24", "--size", "32")
    train = ["--modalities", "cfp,oct", "--backbone", "tiny", "--adapter", "full", "--image-size", "32"]
    run("-m", "ei", "train", "--manifest", "data/manifest.csv", *train, "--epochs", "1", "--out", "run")
    assert "<html" in (tmp_path / "run" / "report.html").read_text()
