"""The report of synthetic run folders: every section there, names escaped, nothing fetched from elsewhere."""

import base64
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from ei.config import Config, DataConfig, ModelConfig, TrainConfig
from ei.metrics.calibration import calibration
from ei.metrics.classification import summarise
from ei.report.against import compare_runs
from ei.report.page import write_report
from ei.runs.stored_logits import StoredLogits

SECTIONS = [
    "results",
    "decisions",
    "calibration",
    "curves",
    "errors",
    "training",
    "weights",
    "gates",
    "cost",
    "configuration",
]
HOSTILE = '<script>alert("1")</script> & $x$ 正常'
CLASSES = ("normal", "dry AMD", "wet AMD")
PHOTO = "data:image/jpeg;base64,"
DASH = "\N{EN DASH}"


class Page(HTMLParser):
    """Tags, pictures, and the text of each section of a page; tags that are left open or cross are errors."""

    VOID = ("meta", "img", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.images: list[dict[str, str]] = []
        self._text: dict[str, str] = {}
        self._open: list[str] = []
        self._section = "head"
        self.feed(self.html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
        self.tags.append(tag)
        if tag == "section":
            self._section = dict(attrs)["id"]
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "section":
            self._section = "tail"

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self._text[self._section] = self._text.get(self._section, "") + data

    def sections(self) -> list[str]:
        return [section for section in self._text if section not in ("head", "tail")]

    def text(self, section: str) -> str:
        return " ".join(self._text[section].split())

    def cells(self, section: str) -> str:
        """The text with its columns side by side."""
        return "".join(self._text[section].split())

    def figures(self) -> list[dict[str, str]]:
        """The drawings; what is no drawing is a photograph."""
        assert all(image["src"].startswith(("data:image/svg+xml;base64,", PHOTO)) for image in self.images)
        return [image for image in self.images if not image["src"].startswith(PHOTO)]

    def photos(self) -> list[dict[str, str]]:
        return [image for image in self.images if image["src"].startswith(PHOTO)]

    def drawings(self) -> list[str]:
        return [base64.b64decode(image["src"].partition(",")[2]).decode() for image in self.figures()]

    def drawn_texts(self) -> list[str]:
        return ["".join(ElementTree.fromstring(drawing).itertext()) for drawing in self.drawings()]

    def alt_of(self, words: str) -> str:
        (alt,) = [image["alt"] for image in self.images if words in image["alt"]]
        return alt


def make_run(
    folder: Path,
    *,
    classes: tuple[str, ...] = CLASSES,
    modalities: tuple[str, ...] = ("cfp", "oct"),
    splits: tuple[str, ...] = ("val", "test"),
    patients: int = 30,
    multi_label: bool = False,
    temperature: float = 0.0,
    optional: bool = True,
    seed: int = 0,
) -> Path:
    """A run folder as training and evaluation leave it; without ``optional``, its required files only."""
    folder.mkdir(parents=True)
    data = DataConfig(manifest="data/eyes.csv", modalities=modalities)
    Config(data=data, model=ModelConfig(backbone="tiny", ranks=(2, 4, 8))).save(folder / "config.yaml")
    generator = np.random.default_rng(0)
    noise = np.random.default_rng(seed)
    results: dict[str, Any] = {}
    rows: list[dict[str, str]] = []
    columns: dict[str, list[Any]] = {"ids": [], "patients": [], "splits": [], "labels": []}
    predicted: list[np.ndarray] = []
    for split in splits:
        labels = np.eye(len(classes), dtype=int)[generator.integers(0, len(classes), 60)]
        if multi_label:
            labels |= generator.random(labels.shape) < 0.2
        names = [f"patient {row % patients}" for row in range(60)]
        summaries = []
        for skill in (2.5, *np.linspace(1, 1.5, len(modalities))):
            logits = skill * labels + noise.normal(size=labels.shape) - 0.5 * multi_label
            predicted.append(logits.astype(np.float32))
            target = labels if multi_label else labels.argmax(axis=1)
            settings: dict[str, Any] = {"multi_label": multi_label, "bootstrap": 50}
            summaries.append(summarise(logits, target, names, classes, **settings))
            summaries[-1]["calibration"] = calibration(logits / (temperature or 1), target, names, classes, **settings)
            if temperature:
                summaries[-1]["uncalibrated"] = calibration(logits, target, names, classes, **settings)
        columns["ids"] += [f"{split}{row}" for row in range(60)]
        columns["patients"] += names
        columns["splits"] += [split] * 60
        columns["labels"] += target.tolist()
        results[split] = {
            "fused": summaries[0],
            "modalities": dict(zip(modalities, summaries[1:], strict=True)),
        }
        for row, (patient, flags) in enumerate(zip(names, labels, strict=True)):
            weights = generator.dirichlet(3 + 3 * np.arange(len(modalities)))
            label = ";".join(name for name, flag in zip(classes, flags, strict=True) if flag)
            record = {"id": f"{split}{row}", "patient": patient, "split": split, "label": label}
            record |= {f"fused:{name}": "0.5" for name in classes}
            rows.append(record | {f"weight:{n}": str(w) for n, w in zip(modalities, weights, strict=True)})
    metrics = {"classes": classes, "modalities": modalities, "multi_label": multi_label, "splits": results}
    metrics["temperatures"] = dict.fromkeys(("fused", *modalities), temperature) if temperature else {}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    if optional:
        sources = 1 + len(modalities)
        each = [np.stack(predicted[start : start + sources]) for start in range(0, len(predicted), sources)]
        stored = StoredLogits(
            classes=np.array(classes),
            sources=np.array(["fused", *modalities]),
            logits=np.concatenate(each, axis=1),
            **{name: np.array(column) for name, column in columns.items()},
        )
        (folder / "logits.npz").write_bytes(stored.as_bytes())
        write_optional_files(folder, modalities, rows)
        write_errors(folder, classes, modalities)
    return folder


def write_errors(folder: Path, classes: tuple[str, ...], modalities: tuple[str, ...], count: int = 2) -> None:
    """As evaluation does; the files are not there."""
    probs = np.random.default_rng(1).dirichlet(np.ones(len(classes)), (count, 1 + len(modalities))).tolist()
    samples = [
        {
            "id": f"eye {number}",
            "patient": f"person {number}",
            "labels": [0],
            "loss": 3.5 - number,
            "probabilities": dict(zip(("fused", *modalities), probs[number], strict=True)),
            "files": {name: [f"image{number}_{index}.png"] for index, name in enumerate(modalities)},
        }
        for number in range(count)
    ]
    (folder / "errors.json").write_text(json.dumps({"split": "test", "samples": samples}))


def write_optional_files(folder: Path, modalities: tuple[str, ...], rows: list[dict[str, str]]) -> None:
    with open(folder / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for stage in [*(f"stage1/{quote(name, safe=' ')}" for name in modalities), "stage2"]:
        (folder / stage).mkdir(parents=True)
        lines = [json.dumps(record) + "\n" for record in epochs(stage)]
        (folder / stage / "metrics.jsonl").write_text("".join(lines))
    blocks = [f"blocks.{block}.mlp.{layer}" for block in range(2) for layer in ("fc1", "fc2")]
    parts = [f"{role}/{name}" for role in ("primary", "auxiliary") for name in modalities]
    gates = {part: [gate_record(layer) for layer in blocks] for part in parts}
    (folder / "gates.json").write_text(json.dumps(gates))
    trained = {"primary ViTs": 1_234_567, "total": 1_234_567}
    (folder / "cost.json").write_text(json.dumps({"trained": trained, "frozen": 86_000_000, "flops": 35_200_000_000}))
    (folder / "stage2/best.safetensors").write_bytes(bytes(2_500_000))


def epochs(stage: str) -> list[dict[str, Any]]:
    terms = ("total", "fused", "modality", "auxiliary", "gate") if stage == "stage2" else ("total", "modality")
    return [
        {
            "epoch": epoch,
            "step": 10 * epoch,
            "lr": 1e-3,
            "loss": {name: 0.8**epoch / (index + 1) for index, name in enumerate(terms)} if epoch else None,
            "val": {
                name: 1 - (0.8 - 0.1 * index) * 0.8**epoch
                for index, name in enumerate(("mAP", "mAUC", "mS2", "accuracy"))
            },
            "images_per_second": 100.0,
            "seconds": 10.0,
            "memory_gib": 2.5 + 0.1 * epoch,
        }
        for epoch in range(8)
    ]


def gate_record(layer: str) -> dict[str, Any]:
    *gates, bypass = np.random.default_rng(len(layer) + int(layer[-1])).dirichlet([1, 1, 2, 4]).tolist()
    return {"layer": layer, "gates": gates, "bypass": bypass, "entropy": 1.125, "effective_rank": 3.375}


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run with its report; tests only read it."""
    run = make_run(tmp_path_factory.mktemp("runs") / "eyes")
    write_report(run)
    return run


@pytest.fixture(scope="module")
def page(reported: Path) -> Page:
    return Page(reported / "report.html")


@pytest.fixture
def run(reported: Path, tmp_path: Path) -> Path:
    """A copy of that run, without its report, to change."""
    copy = shutil.copytree(reported, tmp_path / "eyes")
    (copy / "report.html").unlink()
    return copy


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A run with few classes and the required files only, quick to draw."""
    return make_run(tmp_path / "small", classes=("a", "b"), splits=("test",), optional=False)


def change_metrics(run: Path, **changes: Any) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps(metrics | changes))


def test_every_section_is_there_with_its_pictures(page: Page) -> None:
    assert page.sections() == SECTIONS
    matrices, calibrations, curves, training, weights, gates = 2, 3, 2 * 3, 2 * 3, 2, 4
    assert len(page.drawn_texts()) == matrices + calibrations + curves + training + weights + gates
    assert all(len(image["alt"]) > 40 for image in page.images)
    assert not re.search(r"has no |No \w+ w(as|ere) recorded", page.html)


def test_headline_and_tables_show_the_figures(reported: Path, page: Page) -> None:
    def cells(figures: list[dict[str, float]]) -> str:
        return "".join(f"{f['value']:.3f}{f['low']:.3f}{DASH}{f['high']:.3f}" for f in figures)

    results = json.loads((reported / "metrics.json").read_text())["splits"]
    for measured in results.values():
        for source, summary in {"fused": measured["fused"], **measured["modalities"]}.items():
            assert source + cells(list(summary["overall"].values())) in page.cells("results")
        for name, entry in measured["fused"]["per_class"].items():
            others = [summary["per_class"][name]["AP"] for summary in measured["modalities"].values()]
            row = f"{name.replace(' ', '')}{entry['positives']}"
            assert row + cells([entry["AP"], entry["AUC"], entry["S2"], *others]) in page.cells("results")
    headline = results["test"]["fused"]["overall"]["mAP"]
    interval = f"{headline['low']:.3f}{DASH}{headline['high']:.3f}"
    assert f"mAP, fused {headline['value']:.3f} 95 %: {interval}" in page.text("head")
    assert page.text("results").startswith("Results test: 60 samples, 30 patients")
    assert "on average 0.33 here" in page.text("head")


def test_the_configuration_is_shown(page: Page) -> None:
    for setting in ("manifestdata/eyes.csv", "modalitiescfp, oct", "ranks2, 4, 8", "weight_decay0.0001"):
        assert setting in page.text("configuration")
    assert f"classes{DASH}" in page.text("configuration")


def test_nothing_is_fetched_and_nothing_runs(page: Page) -> None:
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    markup = re.sub(r"base64,[^\"]*", "", page.html)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\son\w+=", markup)
    for drawing in page.drawings():
        links = re.findall(r"(?:href|src)\s*=\s*[\"']([^\"']*)|url\(([^)]*)\)", drawing)
        assert all("".join(link).startswith(("#", "data:")) for link in links)
        assert "<script" not in drawing


@pytest.mark.fault("`<script>` and `<img>` in names of classes, modalities, runs", "text in the report, nothing runs")
def test_names_of_users_are_text_and_nothing_else(tmp_path: Path) -> None:
    image = '"><img src=x onerror=alert(1)>'
    run = make_run(
        tmp_path / "a <b>run</b>".replace("/", "\N{DIVISION SLASH}"),
        classes=(HOSTILE, "it's 50 %", "_b\x07"),
        modalities=(image, "a/b"),
        splits=("test",),
    )
    page = Page(write_report(run))
    assert "script" not in page.tags
    assert page.tags.count("b") == 3 + 2  # the numbers of the headline, and the worst errors
    assert len(page.images) == 1 + 3 + 6 + 6 + 1 + 4
    assert all(set(picture) == {"src", "alt"} for picture in page.images)
    assert "a <b>run<" in page.text("head")
    for name in (HOSTILE, "it's 50 %", image):
        assert name in page.text("results")
    assert f"Stage 1, {image}" in page.text("training") and "Stage 1, a/b" in page.text("training")
    drawn = page.drawn_texts()
    assert any("正常" in text and "<script>" in text and "$x$" in text for text in drawn)
    assert any("_b" in text for text in drawn)


@pytest.mark.usefixtures("undrawn")
def test_what_a_run_lacks_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", classes=("a", "b"), splits=("val",), patients=3, optional=False)
    page = Page(write_report(run))
    assert page.sections() == SECTIONS
    assert "has no training records" in page.text("training")
    assert "has no predictions" in page.text("weights")
    assert "has no record of gates" in page.text("gates")
    assert "has no record of its errors" in page.text("errors")
    assert "has no record of its parameters" in page.text("cost")
    assert "in the val split" in page.text("head")
    assert "no interval" in page.text("head")
    assert "No intervals: fewer than 5 patients" in page.text("results")
    assert "None" not in page.text("results") + page.text("head")


@pytest.mark.usefixtures("undrawn")
def test_records_with_gaps_are_said(small: Path) -> None:
    without_val = [json.dumps(record | {"val": None}) + "\n" for record in epochs("stage2")]
    for stage, lines in (("stage1/oct", [json.dumps(epochs("stage1")[0])]), ("stage2", without_val)):
        (small / stage).mkdir(parents=True)
        (small / stage / "metrics.jsonl").write_text("".join(lines))
    (small / "predictions.csv").write_text("id,patient,split,label,fused:a\n1,p,test,a,0.5\n")
    (small / "gates.json").write_text("{}")
    page = Page(write_report(small))
    assert "No validation was recorded" in page.text("training")
    assert "No losses were recorded" in page.text("training")
    assert "have no modality weights" in page.text("weights")
    assert "has no record of gates" in page.text("gates")


@pytest.mark.usefixtures("undrawn")
def test_a_model_without_predictions_per_modality_has_a_report(small: Path) -> None:
    results = json.loads((small / "metrics.json").read_text())["splits"]["test"]
    change_metrics(small, splits={"test": results | {"modalities": {}}})
    page = Page(write_report(small))
    assert page.html.count("<li>") == 1
    assert "oct" not in page.text("results")


@pytest.mark.usefixtures("undrawn")
def test_absent_classes_are_named_and_have_no_figures(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", modalities=("oct",), splits=("test",), optional=False)
    logits, labels, names = np.random.default_rng(0).normal(size=(9, 3)), np.arange(9) % 2, list("abcdefghi")
    summary = summarise(logits, labels, names, CLASSES, multi_label=False, bootstrap=0)
    change_metrics(run, splits={"test": {"fused": summary, "modalities": {"oct": summary}}})
    page = Page(write_report(run))
    assert "left out of the means: wet AMD." in page.text("results")
    assert f"wetAMD0{4 * DASH}" in page.cells("results")
    assert "wet AMD" not in page.text("curves")
    assert "No intervals: resampling is switched off" in page.text("results")


@pytest.mark.usefixtures("undrawn")
def test_several_labels_have_counts_instead_of_a_confusion_matrix(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", classes=("a", "b;c"), splits=("test",), multi_label=True)
    page = Page(write_report(run))
    per_class = json.loads((run / "metrics.json").read_text())["splits"]["test"]["fused"]["per_class"]
    for name, entry in per_class.items():
        assert name + "".join(map(str, entry["counts"].values())) in page.cells("decisions")
    assert not any("Confusion" in image["alt"] for image in page.images)
    assert f"b;c ({per_class['b;c']['positives']}):" in page.alt_of("Mean modality weights")
    assert "one per sample and class" in page.text("head")


@pytest.mark.usefixtures("undrawn")
def test_weights_are_means_by_true_class(small: Path) -> None:
    (small / "predictions.csv").write_text(
        "id,patient,split,label,weight:cfp,weight:oct\n"
        "1,p,test,a,0.2,0.8\n2,p,test,a,0.4,0.6\n3,q,test,b,0.9,0.1\n4,q,val,a,0,1\n"
    )
    page = Page(write_report(small))
    alt = page.alt_of("weights on test")
    assert "all (3): cfp 0.50, oct 0.50; a (2): cfp 0.30, oct 0.70; b (1): cfp 0.90, oct 0.10." in alt
    assert page.alt_of("weights on val").endswith("all (1): cfp 0.00, oct 1.00; a (1): cfp 0.00, oct 1.00.")


@pytest.mark.usefixtures("undrawn")
def test_classes_that_were_escaped_in_the_table_are_recognised(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", classes=("=a", "-b"), modalities=("cfp", "oct"), splits=("test",))
    (run / "predictions.csv").write_text(
        "id,split,label,weight:cfp,weight:oct\n1,test,'=a,0.2,0.8\n2,test,'-b,0.9,0.1\n"
    )
    alt = Page(write_report(run)).alt_of("weights on test")
    assert "=a (1): cfp 0.20, oct 0.80; -b (1): cfp 0.90, oct 0.10." in alt


def test_gate_maps_show_ranks_bypass_and_means(page: Page) -> None:
    assert "primary/oct: mean entropy 1.12 nats, mean effective rank 3.38" in page.text("gates")
    (text,) = [
        text
        for text, image in zip(page.drawn_texts(), page.figures(), strict=True)
        if "of primary/oct;" in image["alt"]
    ]
    for word in ("rank 2", "rank 4", "rank 8", "bypass", "blocks.1.mlp.fc2"):
        assert word in text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "metrics.json",
            None,
            "has not been evaluated yet .*metrics.json is missing.; 'ei evaluate .*' does it, with --manifest and",
        ),
        ("config.yaml", None, "is no run: it has no config.yaml"),
        ("config.yaml", "a: [", "config.yaml is not YAML"),
        ("config.yaml", "just words", "config.yaml must hold sections"),
        ("metrics.json", "{", "metrics.json is not JSON"),
        ("metrics.json", b"\xff\xff", "cannot read .*metrics.json"),
        ("metrics.json", "[]", "metrics.json must hold a JSON object, got list"),
        ("metrics.json", '{"classes": []}', "metrics.json lacks modalities, multi_label, splits"),
        ("stage2/metrics.jsonl", '{"epoch": 0, "loss": null, "val": null}\n{"epo', "jsonl, line 2, is not JSON"),
        ("stage2/metrics.jsonl", '{"epoch": 0}\n', "jsonl, line 1, lacks loss, val"),
        ("predictions.csv", "id,patient\n1,p\n", "predictions.csv lacks split, label"),
        ("predictions.csv", 'split,label\ntest,"nor\n', "predictions.csv is not a CSV file"),
        ("predictions.csv", "split,label\ntest,normal,1\n", "sample 1, must have 2 cells"),
        ("predictions.csv", "split,label\ntest\n", "sample 1, must have 2 cells"),
        ("predictions.csv", "split,label\ntest,normal\ntest,odd\n", "sample 2, has a label that is .*'odd'"),
        ("predictions.csv", "split,label,weight:oct\ntest,normal,x\n", "must have a number as weight:oct"),
        ("predictions.csv", "split,label,weight:oct\ntest,normal,nan\n", "must have a number as weight:oct"),
        ("errors.json", '{"split": "test"}', "errors.json lacks samples"),
        ("errors.json", '{"split": "test", "samples": [{"id": "a"}]}', "errors.json, sample 1, lacks patient, labels"),
        ("cost.json", "{}", "cost.json lacks trained, frozen, flops"),
        ("gates.json", '{"primary/oct": [{"layer": "a"}]}', "gates.json, primary/oct lacks gates, bypass"),
    ],
)
def test_damaged_files_are_named(run: Path, file: str, content: str | bytes | None, message: str) -> None:
    if content is None:
        (run / file).unlink()
    elif isinstance(content, bytes):
        (run / file).write_bytes(content)
    else:
        (run / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("place", "message"),
    [
        (("per_class",), "oct of val lacks per_class"),
        (("overall", "mAUC"), "oct of val lacks mAUC"),
        (("per_class", "normal"), "oct of val lacks normal"),
        (("per_class", "normal", "counts"), "oct of val, class normal, lacks counts"),
        (("calibration", "Brier"), "oct of val, calibration, lacks Brier"),
    ],
)
def test_incomplete_metrics_are_named(run: Path, place: tuple[str, ...], message: str) -> None:
    splits = json.loads((run / "metrics.json").read_text())["splits"]
    parent = splits["val"]["modalities"]["oct"]
    for key in place[:-1]:
        parent = parent[key]
    del parent[place[-1]]
    change_metrics(run, splits=splits)
    with pytest.raises(ValueError, match=f"metrics.json, {message}"):
        write_report(run)


def test_calibration_shows_what_chance_gives_too(reported: Path, page: Page) -> None:
    block = json.loads((reported / "metrics.json").read_text())["splits"]["test"]["fused"]["calibration"]
    error, brier = block["ECE"], block["Brier"]
    chance = f"bychance{error['by_chance']:.3f},upto{error['by_chance_95']:.3f}"
    cells = f"{brier['value']:.3f}{brier['low']:.3f}{DASH}{brier['high']:.3f}"
    assert f"fused{error['value']:.3f}{chance}{cells}" in page.cells("calibration")
    assert f"fused: ECE {error['value']:.3f}" in page.text("calibration")
    assert "Temperature" not in page.text("calibration")
    bins = block["of"]["predicted class"]["reliability"]
    first = f"{bins[0]['probability']:.2f} and {bins[0]['share']:.2f} of {bins[0]['count']};"
    assert first in page.alt_of("Reliability of fused")


def test_with_temperatures_both_calibrations_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", splits=("test", "val"), temperature=1.7)
    page = Page(write_report(run))
    fused = json.loads((run / "metrics.json").read_text())["splits"]["test"]["fused"]
    for name, temperature, block in (("fused", 1.7, "calibration"), ("fused,without", 1, "uncalibrated")):
        assert f"{name}{temperature:.3f}{fused[block]['ECE']['value']:.3f}by" in page.cells("calibration")
    assert "fitted on the val rows" in page.text("calibration")
    (text,) = [
        text
        for text, image in zip(page.drawn_texts(), page.figures(), strict=True)
        if "Reliability of fused" in image["alt"]
    ]
    assert "with temperature" in text and "without" in text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(("temperature", "remarked"), [(1.7, False), (812.0, True)])
def test_a_temperature_far_from_1_is_remarked_on(tmp_path: Path, temperature: float, remarked: bool) -> None:
    page = Page(write_report(make_run(tmp_path / "run", splits=("test", "val"), temperature=temperature)))
    assert ("a temperature beyond 0.05 to 20 (fused 812" in page.text("calibration")) == remarked


@pytest.mark.usefixtures("undrawn")
def test_calibration_of_several_labels_is_shown_by_class(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path / "run", classes=("a", "b"), splits=("test",), multi_label=True)))
    assert "a: ECE" in page.text("calibration") and "b: ECE" in page.text("calibration")
    assert "Reliability of a" in page.alt_of("Reliability of a:")
    assert "Reliability of cfp" not in page.html


@pytest.mark.usefixtures("undrawn")
def test_metrics_from_before_calibration_have_a_report(small: Path) -> None:
    splits = json.loads((small / "metrics.json").read_text())["splits"]
    for summary in (splits["test"]["fused"], *splits["test"]["modalities"].values()):
        del summary["calibration"]
    metrics = json.loads((small / "metrics.json").read_text())
    del metrics["temperatures"]
    (small / "metrics.json").write_text(json.dumps(metrics | {"splits": splits}))
    assert "evaluated before calibration was measured" in Page(write_report(small)).text("calibration")


def with_images(run: Path, **changes: Any) -> Path:
    """Its worst errors, whose images lie beside the manifest: 8 bits, and 12 bits in 16."""
    data = run.parent / "data"
    data.mkdir()
    Image.fromarray(np.full((30, 20), 200, np.uint8)).save(data / "image0_0.png")
    np.save(data / "volume.npy", np.full((3, 10, 10), 4000, np.uint16))
    errors = json.loads((run / "errors.json").read_text())
    errors["samples"][0] |= {"files": {"cfp": ["image0_0.png"], "oct": ["volume.npy"]}} | changes
    (run / "errors.json").write_text(json.dumps(errors))
    config = Config(
        data=DataConfig(manifest=str(data / "eyes.csv"), modalities=("cfp", "oct"), intensity=("type", "0:4095"))
    )
    config.save(run / "config.yaml")
    return run


@pytest.mark.usefixtures("undrawn")
def test_the_worst_errors_are_shown_with_their_images(small: Path) -> None:
    write_errors(small, ("a", "b"), ("cfp", "oct"))
    page = Page(write_report(with_images(small)))
    assert [image["alt"] for image in page.photos()] == ["cfp of sample eye 0", "oct of sample eye 0"]
    for image, brightness in zip(page.photos(), (200, 249), strict=True):
        decoded = Image.open(io.BytesIO(base64.b64decode(image["src"].removeprefix(PHOTO))))
        assert abs(np.asarray(decoded).mean() - brightness) < 3
    text = page.text("errors")
    assert "The 2 samples of test" in text and "These are images of patients" in text
    assert "eye 0, patient person 0; log loss 3.50" in text
    probs = json.loads((small / "errors.json").read_text())["samples"][0]["probabilities"]
    assert "a,true" + "".join(f"{values[0]:.3f}" for values in probs.values()) in page.cells("errors")


@pytest.mark.fault("images of the worst errors that are gone", "said where they would be; the report is written")
@pytest.mark.usefixtures("undrawn")
def test_images_that_cannot_be_shown_are_said_and_stop_nothing(small: Path) -> None:
    write_errors(small, ("a", "b"), ("cfp", "oct"))
    page = Page(write_report(with_images(small, files={"cfp": ["image0_0.png", "no.png"], "oct": []})))
    assert len(page.photos()) == 1
    text = page.text("errors")
    assert text.count("cannot be shown: ") == 3 and "no.png: does not exist" in text  # and both of the second
    assert "oct no image" in text


@pytest.mark.usefixtures("undrawn")
def test_of_many_files_some_are_shown(small: Path) -> None:
    write_errors(small, ("a", "b"), ("cfp", "oct"))
    page = Page(write_report(with_images(small, files={"cfp": ["image0_0.png"] * 5, "oct": ["volume.npy"]})))
    assert len(page.photos()) == 3 + 1
    assert "cfp, 2 more" in page.text("errors")


@pytest.mark.usefixtures("undrawn")
def test_images_can_be_switched_off_afterwards(small: Path) -> None:
    write_errors(small, ("a", "b"), ("cfp", "oct"))
    with_images(small)
    config = Config.load(small / "config.yaml")
    for wanted, count in ((1, 2), (0, 0)):
        Config(data=config.data, train=TrainConfig(report_images=wanted)).save(small / "config.yaml")
        page = Page(write_report(small))
        assert len(page.photos()) == count
    assert "Switched off" in page.text("errors")


@pytest.mark.usefixtures("undrawn")
def test_classes_that_matter_are_the_true_and_the_predicted_ones(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", splits=("test",))
    probs = {"fused": [0.1, 0.7, 0.2], "cfp": [0.2, 0.5, 0.3], "oct": None}
    sample = json.loads((run / "errors.json").read_text())["samples"][0] | {"probabilities": probs}
    (run / "errors.json").write_text(json.dumps({"split": "test", "samples": [sample]}))
    cells = Page(write_report(run)).cells("errors")
    assert f"normal,true0.1000.200{DASH}dryAMD0.7000.500{DASH}" in cells and "wetAMD" not in cells


@pytest.mark.usefixtures("undrawn")
def test_of_several_labels_the_true_and_the_taken_ones_matter(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", splits=("test",), multi_label=True)
    probs = {"fused": [0.1, 0.7, 0.2], "cfp": [0.4, 0.1, 0.6], "oct": [0.1, 0.1, 0.1]}
    sample = json.loads((run / "errors.json").read_text())["samples"][0] | {"probabilities": probs}
    nothing = sample | {"labels": [], "probabilities": {"fused": [0.1, 0.4, 0.2]}}
    (run / "errors.json").write_text(json.dumps({"split": "test", "samples": [sample, nothing]}))
    cells = Page(write_report(run)).cells("errors")
    assert "normal,true0.1000.4000.100dryAMD0.7000.1000.100wetAMD0.2000.6000.100" in cells
    assert "ProbabilityfuseddryAMD0.400" in cells


@pytest.mark.usefixtures("undrawn")
def test_names_in_the_worst_errors_are_text_and_nothing_else(small: Path) -> None:
    write_errors(small, ("a", "b"), ("cfp", "oct"))
    with_images(small, id=HOSTILE, patient='"><img src=x onerror=alert(2)>')
    errors = json.loads((small / "errors.json").read_text())
    errors["split"] = "<b>split</b>"
    errors["samples"][1]["files"]["cfp"] = ["<script>alert(3)</script>.png"]
    errors["samples"][1]["probabilities"]["<i>source</i>"] = [0.5, 0.5]
    (small / "errors.json").write_text(json.dumps(errors))
    page = Page(write_report(small))
    assert not {"script", "i"} & set(page.tags) and all(set(image) == {"src", "alt"} for image in page.images)
    assert HOSTILE in page.text("errors") and "<script>alert(3)</script>.png" in page.text("errors")
    assert f"cfp of sample {HOSTILE}" in [image["alt"] for image in page.photos()]


def test_parameters_and_cost(page: Page) -> None:
    text = page.cells("cost")
    assert "trained,primaryViTs1,234,567" in text and "frozen,heldonceforallbranches86,000,000" in text
    assert "takes35.2GFLOP" in text and "has2.5MB" in text
    assert "Stage27" + "7" + "1min20s" + "100" + "3.2GiB" in text  # 7 epochs, the last one the best


@pytest.mark.usefixtures("undrawn")
def test_cost_of_a_stage_without_records_of_time(small: Path) -> None:
    (small / "stage2").mkdir()
    records = [{"epoch": epoch, "loss": None, "val": None} for epoch in range(3)]
    (small / "stage2/metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert f"Stage2220.0s{DASH}{DASH}" in Page(write_report(small)).cells("cost")


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_shows_differences_intervals_and_p(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, splits=("test",), seed=seed) for seed, name in enumerate(("ours", "<b>theirs"))]
    page = Page(write_report(runs[0], runs[1]))
    assert page.sections() == [SECTIONS[0], "comparison", *SECTIONS[1:]]
    found = compare_runs(*runs, bootstrap=TrainConfig.bootstrap, seed=0)["test"]
    assert [row.source for row in found] == ["fused", "cfp", "oct"]
    for row in found:
        cells = [
            f"{signed(e['value'])}{signed(e['low'])}to{signed(e['high'])}p{e['p']:.3f}" for e in row.measures.values()
        ]
        assert f"{row.source}60{''.join(cells)}{row.only_this}{row.only_other}" in page.cells("comparison")
    assert "Compared with <b>theirs" in page.text("comparison")
    assert "comparison" not in Page(write_report(runs[0])).sections()


def signed(value: float | None) -> str:
    assert value is not None
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_that_is_refused_leaves_the_report_as_it_was(run: Path, tmp_path: Path) -> None:
    write_report(run)
    before = (run / "report.html").read_bytes()
    with pytest.raises(ValueError, match="no logits.npz"):
        write_report(run, make_run(tmp_path / "other", optional=False))
    assert (run / "report.html").read_bytes() == before


def test_no_torch_is_imported() -> None:
    code = "import sys, ei.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_subsets_of_modalities_have_a_table(small: Path) -> None:
    splits = json.loads((small / "metrics.json").read_text())["splits"]
    write_report(small)
    assert "subsets" not in Page(small / "report.html").sections()
    splits["test"]["subsets"] = {"cfp": splits["test"]["modalities"]["cfp"], "oct": None, "cfp+oct": None}
    change_metrics(small, splits=splits)
    write_report(small)
    page = Page(small / "report.html")
    assert page.sections()[:2] == ["results", "subsets"]
    of_cfp = splits["test"]["modalities"]["cfp"]["overall"]
    assert f"cfp60{of_cfp['mAP']['value']:.3f}" in page.cells("subsets")
    assert f"oct0{4 * DASH}cfp+oct0{4 * DASH}" in page.cells("subsets")


def test_a_modality_may_lack_rows_and_classes_that_the_fused_prediction_has(small: Path) -> None:
    splits = json.loads((small / "metrics.json").read_text())["splits"]
    modalities = splits["test"]["modalities"]
    fewer = summarise([[1.0, 0.0], [0.0, 1.0]], [0, 0], ["p", "q"], ("a", "b"), multi_label=False)
    splits["test"]["modalities"] = {"cfp": fewer}
    change_metrics(small, splits=splits)
    write_report(small)
    page = Page(small / "report.html")
    assert "cfp (2 samples)" in page.text("results") and "oct" not in page.text("results")
    assert modalities["oct"]["samples"] == 60
    assert not any("cfp" in text for text in page.drawn_texts())


def test_subsets_that_are_no_figures_are_named(small: Path) -> None:
    splits = json.loads((small / "metrics.json").read_text())["splits"]
    splits["test"]["subsets"] = {"cfp": {"samples": 3}}
    change_metrics(small, splits=splits)
    with pytest.raises(ValueError, match=r"metrics.json, 'cfp' of test lacks patients, overall"):
        write_report(small)


def test_the_first_stage_of_auxiliary_vits_is_drawn(finished, undrawn, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.copytree(finished / "stage1/oct", tmp_path / "run/stage1-auxiliary/oct")
    text = write_report(tmp_path / "run").read_text()
    assert "Stage 1, auxiliary oct" in text and "Stage 1, auxiliary cfp" not in text


@pytest.mark.fault("a disk that is full while a report is written", "the old report stays, whole")
def test_there_is_never_half_a_report(run: Path, undrawn: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that has a report counts as finished."""
    (run / "report.html").write_text("old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("ei.report.page.os.replace", full)
        write_report(run)
    assert (run / "report.html").read_text() == "old" and not list(run.glob(".report*"))
    assert write_report(run).read_text().startswith("<!DOCTYPE html>")
