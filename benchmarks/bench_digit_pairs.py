"""What a branch knows of the whole class, by every way to fuse: pairs of digits, of which a branch sees one.

    python benchmarks/bench_digit_pairs.py --work runs/digit-pairs

A class is the parity of both digits, so a branch that is not told about the other digit can be right about half of the
time and no more, however it was trained; the fused prediction has both halves. The data are `ei demo`'s, and so is the
backbone, a tiny ViT that was trained on single digits. Broken off, the same command goes on.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness import setup, store

import ei
import mor
from ei.comparison.compare import compare
from ei.demo import MODALITIES, demo_config, pretrain, write_pairs

RESULTS = Path(__file__).parent / "results"
VERSIONS, CODE = ("torch", "timm"), (Path(ei.__file__).parent, Path(mor.__file__).parent)
TOLD, BLIND = "ei", "late"
OTHERS = ("coscat", "late:average", "early", "cross", "mm-mil", "unimodel")
METHODS = (BLIND, TOLD, *(f"uni:{modality}" for modality in MODALITIES), *OTHERS)


def table(content: Mapping[str, Any]) -> str:
    """Accuracy as Markdown, mean of the seeds with its 95 % interval; a dash where there is no such prediction."""
    lines = [f"| | fused | {' | '.join(f'{modality} branch' for modality in MODALITIES)} |", "|---|---|---|---|"]
    for method in content["methods"]:
        found = [method["sources"].get(source) for source in ("fused", *MODALITIES)]
        figures = [each["measures"]["accuracy"] if each else None for each in found]
        texts = [f"{f['value']:.3f} [{f['low']:.3f}, {f['high']:.3f}]" if f else "-" for f in figures]
        lines.append(f"| {method['name']} | {' | '.join(texts)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, default=Path("runs/digit-pairs"), help="the data, the runs, all four files"
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="only these, separated by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "digit_pairs.json")
    arguments = parser.parse_args()

    made_by, work = setup(VERSIONS, CODE), arguments.work
    manifest, weights = work / "data/manifest.csv", work / "backbone.safetensors"
    if not weights.is_file():
        write_pairs(work / "data", seed=0)
        pretrain(weights, seed=0)
    names = arguments.methods.split(",")
    content = compare(demo_config(manifest, weights, seed=0), names, work / "methods", seeds=arguments.seeds)
    content["protocol"]["data"]["manifest"], content["protocol"]["model"]["weights"] = manifest.name, weights.name
    store(arguments.out, content | {"setup": made_by}, table(content))


if __name__ == "__main__":
    main()
