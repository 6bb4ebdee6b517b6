"""docs/ablations.md, line by line: every ablation trains, and takes stage 1 over where the table says so."""

import re
from pathlib import Path

import pytest
import torch

from ei.cli import run
from ei.config import Config
from ei.data.phantom import Phantom, write_phantom
from ei.runs.checkpoint import read_checkpoint

DOCS = Path(__file__).parents[2] / "docs" / "ablations.md"
TABLE = re.findall(r"^\| .+ \| `(.+)` \| (taken|none|own) \|$", DOCS.read_text(), re.MULTILINE)
# They are built, without weights; here they would take long to train.
LARGE = [(flags, stage1) for flags, stage1 in TABLE if flags.startswith("--backbone")]
SMALL = "--backbone tiny --image-size 8 --epochs 1 --batch-size 6 --device cpu --no-pretrained"


def test_the_table_is_read() -> None:
    assert len(TABLE) == DOCS.read_text().count("\n|") - 2 > 20
    assert len(LARGE) == 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, without rows to evaluate on; its manifest lies in data/."""
    folder = tmp_path_factory.mktemp("ablations")
    manifest = write_phantom(folder / "data", Phantom(samples=20, size=24))
    lines = [line for line in manifest.read_text().splitlines() if ",val," not in line and ",test," not in line]
    manifest.write_text("\n".join(lines))
    assert run([*command(manifest), "--out", str(folder / "base")]) == 0
    return folder / "base"


def command(manifest: Path) -> list[str]:
    return ["train", "--manifest", str(manifest), "--modalities", "cfp,oct", *SMALL.split()]


@pytest.mark.parametrize(("flags", "stage1"), [line for line in TABLE if line not in LARGE])
def test_an_ablation(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str, stage1: str) -> None:
    words = [*command(base.parent / "data/manifest.csv"), *flags.split(), "--out", str(tmp_path / "run")]
    taking = [*words, "--stage1-from", str(base)]
    if stage1 == "own":
        assert run(taking) == 1
        assert "stage1_from" in capsys.readouterr().err
    assert run(taking if stage1 == "taken" else words) == 0
    there = {path.name for path in (tmp_path / "run").glob("stage1/*")}
    assert there == (set() if stage1 == "none" else {"cfp", "oct"})
    if stage1 == "taken":
        ours, theirs = (read_checkpoint(folder / "stage1/oct/best.safetensors") for folder in (tmp_path / "run", base))
        assert all(torch.equal(ours.parameters[name], tensor) for name, tensor in theirs.parameters.items())
        assert not list((tmp_path / "run").glob("stage1/*/metrics.jsonl"))
    config, before = (Config.load(folder / "config.yaml") for folder in (tmp_path / "run", base))
    changed = {
        name
        for section, values in config.to_dict().items()
        for name, value in values.items()
        if value != before.to_dict()[section][name]
    }
    named = {word[2:].removeprefix("no-").replace("-", "_") for word in flags.split() if word.startswith("--")}
    assert changed - {"stage1_from"} == named
    assert read_checkpoint(tmp_path / "run/stage2/best.safetensors").notes["epoch"] == 1


@pytest.mark.parametrize(("flags", "stage1"), LARGE)
def test_a_large_backbone(capsys: pytest.CaptureFixture[str], flags: str, stage1: str) -> None:
    assert run(["params", "--config", "mmc-amd-clip", *flags.split()]) == 0
    assert int(capsys.readouterr().out.split()[-1].replace(",", "")) >= 7_099_026
    assert stage1 == "own"
