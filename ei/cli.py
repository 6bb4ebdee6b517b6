"""The command line. torch is imported only once a command runs, so that help comes at once."""

import io
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from ei import explain_missing
from ei.config import BaselineConfig, Config, DataConfig, ModelConfig, Names, TrainConfig, find_config
from ei.data.derm7pt import Derm7pt
from ei.data.mmc_amd import MmcAmd
from ei.data.mrnet import MRNet
from ei.data.phantom import Phantom
from ei.data.prepare import Source
from ei.data.prepare import prepare as prepare_source
from ei.evaluation.shard import Shard
from ei.interrupts import ElsewhereError, Interrupted
from ei.progress import is_read, is_speaker

USAGE = """\
usage: ei COMMAND [OPTIONS]

Classify patients with two or more imaging modalities by Early Intervention on a frozen Vision Transformer.

commands:
  demo       train on pairs of handwritten digits and show what intervention does (no files, no network)
  phantom    draw patients with known signs in two modalities, and write their images and manifest
  prepare    write the manifest of MMC-AMD, Derm7pt or MRNet from the folder that was downloaded
  check      look for everything that is wrong with a manifest and its images, without torch
  train      train on a manifest, both stages, and evaluate
  compare    train several methods under one protocol, and write one table of all
  evaluate   evaluate a run on its validation and test rows again
  report     write a run's report again, and compare it with another run, without torch
  predict    predict the rows of another manifest
  params     count what a model would train, without its weights

'ei COMMAND --help' tells more. EI_TRACEBACK=1 in the environment shows where an error comes from.
"""

Command = TypeVar("Command")


def _path(words: list[str]) -> Path:
    """Of a shell's variable that is not set, there is an empty word, which would be the folder that one is in."""
    if not words[0]:
        raise ValueError("a path must not be empty")
    return Path(words[0])


APath = Annotated[
    Path,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=_path,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    ),
]


@dataclass(frozen=True)
class Demo:
    """Train on pairs of handwritten digits: each image alone can tell only half of the class."""

    out: APath = Path("runs/demo")
    """Folder to write to; a demo that is there is replaced."""
    seed: int = 0
    """Of everything that is random."""

    def __post_init__(self) -> None:
        TrainConfig(seed=self.seed)  # which refuses what cannot be one


@dataclass(frozen=True)
class Draw:
    """Draw patients, fundus-like discs and OCT-like layers, whose signs are known; a cartoon for tests and trials."""

    out: APath
    """Folder to write to, new or empty."""
    phantom: Annotated[Phantom, tyro.conf.arg(name="")] = field(default_factory=Phantom)


Prepare = (
    Annotated[MmcAmd, tyro.conf.subcommand("mmc-amd")]
    | Annotated[Derm7pt, tyro.conf.subcommand("derm7pt")]
    | Annotated[MRNet, tyro.conf.subcommand("mrnet")]
)


@dataclass(frozen=True)
class Check:
    """Read a manifest and all of its images; exit code 1 if something is wrong. --config FILE gives the columns."""

    manifest: tyro.conf.Positional[APath]
    """The CSV with the samples."""
    modalities: Names = ()
    """Columns with image paths; empty: all columns whose first cell names an image."""
    labels: Names = DataConfig.labels
    """As for 'ei train'."""
    classes: Names = DataConfig.classes
    """As for 'ei train'."""
    intensity: Names = DataConfig.intensity
    """As for 'ei train'."""
    allow_outside: bool = DataConfig.allow_outside
    """As for 'ei train'."""
    allow_missing: bool = DataConfig.allow_missing
    """As for 'ei train'."""
    unlabelled: bool = False
    """It is a manifest for 'ei predict': labels and splits are not looked at."""
    fresh: bool = False
    """Read files again that have not changed since they were last read."""
    json: bool = False
    """Print everything as JSON; otherwise the first of each kind."""


@dataclass(frozen=True)
class Train:
    """Train both stages and evaluate. --config FILE reads a YAML file first; flags come on top of it. The names
    derm7pt-clip, derm7pt-dinov2, mmc-amd-clip, mmc-amd-dinov2, mrnet-clip and mrnet-dinov2 are those of shipped files.
    """

    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    out: APath = Path("runs/latest")
    """Folder of the run: new, empty, or that of a run that was stopped, which then goes on."""


@dataclass(frozen=True)
class Compare:
    """Train several methods with several seeds under one protocol, and write comparison.csv, .html, .tex and .json.
    --config FILE as for 'ei train'; --manifest may name several files, separated by commas: folds. The same command
    goes on with a comparison that was stopped.
    """

    methods: Names
    """FUSION or FUSION:ADAPTER (as ei, late, ei:lora, ei:mor-no-bypass), uni:MODALITY[:ADAPTER], or YAML files;
    the others are compared with the first."""
    config: Annotated[Config, tyro.conf.arg(name="")] = field(default_factory=Config)
    """What all methods share."""
    seeds: int = 3
    """So many, from --seed on."""
    share_stage1: bool = True
    """Train a first stage that several methods have once for each seed, instead of for each of them."""
    plan: bool = False
    """Only show what would be trained, and what is trained already."""
    out: APath = Path("runs/comparison")
    """Folder of the comparison: METHOD/seed-K, and the tables."""


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a run's best model again, and write everything that the run folder holds of it, the report last."""

    run: tyro.conf.Positional[APath]
    """Folder of the run."""
    manifest: APath | None = None
    """Another table with labels to evaluate on, all rows together; patients that the run has seen are refused."""
    out: APath | None = None
    """Folder for what comes out of that."""


@dataclass(frozen=True)
class Report:
    """Write report.html again from the files of a run. --against OTHER adds the difference to another run."""

    run: tyro.conf.Positional[APath]
    """Folder of the run."""
    against: APath | None = None
    """Folder of another run, evaluated on the same rows."""


@dataclass(frozen=True)
class Predict:
    """Predict every row of a manifest; it needs the columns id and those of the run's modalities.

    Broken off, the same command goes on; what is done so far lies beside the CSV in OUT.parts."""

    run: tyro.conf.Positional[APath]
    """Folder of the run."""
    manifest: APath
    """The CSV with the samples."""
    out: APath = Path("predictions.csv")
    """The CSV to write."""
    shard: str = ""
    """I/N: predict the I-th of N shares only, on any machines that share a folder; the last writes the CSV."""

    def __post_init__(self) -> None:
        if self.shard:
            Shard.parse(self.shard)


@dataclass(frozen=True)
class Params:
    """Count trainable parameters by part; nothing is downloaded or computed. --config FILE as for 'ei train'."""

    modalities: Names
    """Names of the modalities."""
    classes: int
    """Number of classes."""
    image_size: int = DataConfig.image_size
    """As for 'ei train'; the number of tokens depends on it, which counts with --adapter full and losa."""
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = field(default_factory=ModelConfig)
    baseline: Annotated[BaselineConfig, tyro.conf.arg(name="")] = field(default_factory=BaselineConfig)


def run(words: Sequence[str]) -> int:
    """Carry out a command; returns the exit code (2: wrong usage, 1: it could not be done)."""
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(version("mixture-of-ranks"))
        return 0
    if words[0] not in COMMANDS:
        print(f"ei: there is no command '{words[0]}'; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        code = COMMANDS[words[0]](words[1:]) or 0
        if "WORLD_SIZE" in os.environ:
            from ei.processes import Processes

            Processes.leave()
        return code
    except (ValueError, OSError, ArithmeticError, ImportError) as error:
        has_had_enough = isinstance(error, BrokenPipeError) and not is_read()  # a pipe to a worker breaks, too
        if has_had_enough or "EI_TRACEBACK" in os.environ:
            raise
        reason = explain_missing(error) if isinstance(error, ModuleNotFoundError) else error
        print(f"ei {words[0]}{_which_process()}: {reason}", file=sys.stderr)
        return 1
    except ElsewhereError:
        return 1
    except Interrupted as interrupted:
        if is_speaker():
            stopped = f"ei {words[0]}: stopped by {interrupted} and saved; the same command goes on from there"
            print(stopped, file=sys.stderr)
        return interrupted.exit_code
    except KeyboardInterrupt:
        print(f"ei {words[0]}: interrupted", file=sys.stderr)
        return 130


def demo(words: Sequence[str]) -> None:
    command = _parse(Demo, "demo", words)
    from ei.demo import run_demo

    run_demo(command.out, seed=command.seed)


def phantom(words: Sequence[str]) -> None:
    command = _parse(Draw, "phantom", words)
    from ei.data.phantom import CLASSES, MODALITIES, attainable_accuracy, write_phantom
    from ei.runs.setup import require_usable

    require_usable(command.out)
    manifest = write_phantom(command.out, command.phantom)
    best = ", ".join(f"{view} {value:.3f}" for view, value in attainable_accuracy(command.phantom).items())
    where = " where nothing is missing" if command.phantom.missing else ""
    print(f"the best accuracy there can be{where}: {best}")
    print(f"wrote {manifest} and the images of {command.phantom.samples} eyes")
    flags = ["--modalities", ",".join(MODALITIES), "--classes", ",".join(CLASSES), "--image-size"]
    flags += [str(command.phantom.size), *(["--allow-missing"] if command.phantom.missing else [])]
    print("next:", shlex.join(["ei", "train", "--manifest", str(manifest), *flags]))


def prepare(words: Sequence[str]) -> None:
    for line in prepare_source(_parse(cast(type[Source], Prepare), "prepare", words)):
        print(line)


def check(words: Sequence[str]) -> int:
    path, words = _take_config(list(words))
    columns = ("modalities", "labels", "classes", "intensity", "allow_outside", "allow_missing")
    known = DataConfig() if path is None else Config.load(path).data
    defaults = {name: getattr(known, name) for name in columns}
    command = _parse(Check, "check", words, default=Check(manifest=tyro.MISSING, **defaults))
    from ei.check import check_manifest

    config = DataConfig(**{name: getattr(command, name) for name in columns})
    report = check_manifest(command.manifest, config, labelled=not command.unlabelled, cache=not command.fresh)
    for line in [report.as_json()] if command.json else report.lines():
        print(line)
    return 0 if report.is_good else 1


def train(words: Sequence[str]) -> None:
    path, words = _take_config(list(words))
    base = Train() if path is None else Train(config=Config.load(path))
    command = _parse(Train, "train", words, default=base)
    if not command.config.data.manifest:
        raise ValueError("train needs --manifest FILE, or a --config that names one")
    from ei.training import train

    folder = train(command.config, command.out)
    _show(folder)


def compare(words: Sequence[str]) -> int:
    path, words = _take_config(list(words))
    base = Compare(methods=tyro.MISSING, config=Config() if path is None else Config.load(path))
    command = _parse(Compare, "compare", words, default=base)
    if not command.config.data.manifest:
        raise ValueError("compare needs --manifest FILE, or a --config that names one")
    if command.plan:
        from ei.comparison.plan import make_plan

        for line in make_plan(command.config, command.methods, seeds=command.seeds, out=command.out).lines():
            print(line)
        return 0
    from ei.comparison.compare import compare
    from ei.comparison.files import text_lines

    table = compare(
        command.config, command.methods, command.out, seeds=command.seeds, share_stage1=command.share_stage1
    )
    for line in [*text_lines(table), f"tables: {command.out / 'comparison.html'}, .csv, .tex, .json"]:
        print(line)
    return 1 if any(method["failed"] for method in table["methods"]) else 0


def evaluate(words: Sequence[str]) -> None:
    command = _parse(Evaluate, "evaluate", words)
    from ei.evaluation.evaluate import evaluate

    evaluate(command.run, command.manifest, command.out)
    _show(command.out or command.run)


def report(words: Sequence[str]) -> None:
    command = _parse(Report, "report", words)
    from ei.report.page import write_report

    print(f"report: {write_report(command.run, command.against)}")


def predict(words: Sequence[str]) -> None:
    command = _parse(Predict, "predict", words)
    from ei.evaluation.piecewise import predict

    if predict(command.run, command.manifest, command.out, command.shard):
        print(f"wrote {command.out}")


def params(words: Sequence[str]) -> None:
    path, words = _take_config(list(words))
    known = Config() if path is None else Config.load(path)
    default = Params(
        modalities=known.data.modalities or tyro.MISSING,
        classes=len(known.data.classes) or (len(known.data.labels) if known.data.multi_label else tyro.MISSING),
        image_size=known.data.image_size,
        model=known.model,
        baseline=known.baseline,
    )
    command = _parse(Params, "params", words, default=default)
    data = DataConfig(modalities=command.modalities, image_size=command.image_size)
    import torch

    from ei.models import build_model, count_trainable

    config = Config(data=data, model=command.model, baseline=command.baseline)
    with torch.device("meta"):
        counts = count_trainable(build_model(config, command.classes))
    width = max(map(len, counts))
    for part, count in counts.items():
        print(f"{part:<{width}}  {count:>13,}")


def _show(folder: Path) -> None:
    from ei.evaluation.tables import metrics_table

    for line in metrics_table(folder) if is_speaker() else ():
        print(line)


def _which_process() -> str:
    """Of those that torchrun has started; most faults all of them find, some only one."""
    return "" if is_speaker() else f" (process {os.environ['RANK']})"


COMMANDS: dict[str, Callable[[Sequence[str]], int | None]] = {
    "demo": demo,
    "phantom": phantom,
    "prepare": prepare,
    "check": check,
    "train": train,
    "compare": compare,
    "evaluate": evaluate,
    "report": report,
    "predict": predict,
    "params": params,
}


def _parse(kind: type[Command], name: str, words: Sequence[str], default: Command | None = None) -> Command:
    given: dict[str, Any] = {} if default is None else {"default": default}
    told = io.StringIO()
    try:
        with redirect_stderr(told):
            return tyro.cli(kind, prog=f"ei {name}", args=list(words), config=(tyro.conf.OmitArgPrefixes,), **given)
    except SystemExit as stopped:
        if (refused := _refused_setting(stopped)) is None:
            raise
        told = io.StringIO()
        raise refused from None
    finally:
        sys.stderr.write(told.getvalue())


def _refused_setting(stopped: SystemExit) -> ValueError | None:
    """What a dataclass had against its values, which tyro puts in a box of its own and exits."""
    error = stopped.__context__
    while error is not None:
        frames = traceback.walk_tb(error.__traceback__)
        if isinstance(error, ValueError) and any(frame.f_code.co_name == "__post_init__" for frame, _ in frames):
            return error
        error = error.__context__
    return None


def _take_config(words: list[str]) -> tuple[Path | None, list[str]]:
    """The value of --config, and the other words."""
    for index, word in enumerate(words):
        if word.startswith("--config="):
            return find_config(word.partition("=")[2]), words[:index] + words[index + 1 :]
        if word == "--config":
            if index + 1 == len(words):
                raise ValueError("--config needs the name of a YAML file, or of a configuration that is shipped")
            return find_config(words[index + 1]), words[:index] + words[index + 2 :]
    return None, words
