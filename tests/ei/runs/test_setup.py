"""Where nothing can be written is said before anything is computed."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ei import evaluate, predict, train


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model is made."""
    for module in ("evaluate", "piecewise"):
        monkeypatch.setattr(f"ei.evaluation.{module}.load", lambda run: pytest.fail("loaded a model"))


@pytest.mark.fault("a file where predictions, or an evaluation, want a folder", "refused before anything is computed")
@pytest.mark.usefixtures("unloaded")
def test_a_file_where_a_folder_must_be(finished: Path, lasting_manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "p.csv.parts").write_text("mine")
    for out, what in (("file/p.csv", "file"), ("p.csv", "p.csv.parts")):
        with pytest.raises(ValueError, match=f"{what} exists and is not a folder; choose another with --out"):
            predict(finished, lasting_manifest, tmp_path / out)
    with pytest.raises(ValueError, match="file exists and is not a folder; choose another with --out"):
        evaluate(finished, lasting_manifest, tmp_path / "file/other")
    assert (tmp_path / "file").read_text() == (tmp_path / "p.csv.parts").read_text() == "mine"


@pytest.mark.fault("a folder that cannot be written to", "refused before anything is computed")
@pytest.mark.usefixtures("unloaded")
def test_a_read_only_folder(
    finished: Path, lasting_manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot be written to; choose another with --out"):
        predict(finished, lasting_manifest, tmp_path / "p.csv")
    with pytest.raises(ValueError, match="run cannot be written to; evaluation writes its files there"):
        evaluate(finished)


@pytest.mark.fault("a file as the cache of images", "refused before training")
def test_a_cache_that_is_a_file(manifest: Path, study_config: Any, tmp_path: Path) -> None:
    config = study_config(manifest)
    config = replace(config, data=replace(config.data, cache=str(manifest)))
    with pytest.raises(ValueError, match="^cache must be a folder, got .*manifest.csv$"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
