"""Two runs on the same samples: how much better one is than the other, and whether other patients could turn it.

Reads what evaluation wrote (files, never a model). Imports no torch.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ei.metrics.classification import decided, mcnemar, paired_difference
from ei.runs.folder import RunFolder, require_run
from ei.runs.stored_logits import StoredLogits


@dataclass(frozen=True)
class Difference:
    """This run minus the other, for one source of predictions on one split."""

    source: str
    samples: int
    patients: int
    measures: dict[str, dict[str, float | None]]
    """mAP, mAUC, mS2 and accuracy, as :func:`ei.metrics.classification.paired_difference` gives them."""
    only_this: int
    """Samples that only this run gets right: their class, or with several labels all of their decisions."""
    only_other: int
    """Samples that only the other run gets right."""
    mcnemar: float | None
    """Exact p of these two numbers; None if a patient has several samples, which are not independent."""


def compare_runs(run: Path, other: Path, *, bootstrap: int, seed: int) -> dict[str, list[Difference]]:
    """Split -> the difference of the fused prediction and of each modality that both runs have.

    Args:
        run: an evaluated run.
        other: another one, evaluated on the same samples.
        bootstrap: resamplings of the patients, the same for both runs.
        seed: of the resampling.

    Raises:
        ValueError: it is the same run, one has no logits, or they have other classes, or were evaluated on other
            samples.
    """
    if run.resolve() == other.resolve():
        raise ValueError(f"{run} and {other} are the same run, which does not differ from itself")
    ours, theirs = (_stored(path) for path in (run, other))
    if list(ours.classes) != list(theirs.classes):
        raise ValueError(
            f"runs must have the same classes in the same order to be compared: {run} has {', '.join(ours.classes)};"
            f" {other} has {', '.join(theirs.classes)}"
        )
    shared = [split for split in ("test", "val") if split in ours.splits and split in theirs.splits]
    if not shared:
        raise ValueError(f"{run} and {other} were not evaluated on a split of the same name")
    differences = {}
    for split in shared:
        mine, others = ours.of_split(split), theirs.of_split(split)
        require_same_samples(mine, others, f"the {split} rows of {run} and {other}")
        found = (
            _difference(mine, others, source, bootstrap, seed)
            for source in mine.sources.tolist()
            if source in others.sources
        )
        differences[split] = [difference for difference in found if difference]
    return differences


def _stored(run: Path) -> StoredLogits:
    folder = RunFolder(run)
    if not folder.logits.is_file():
        require_run(run)
        raise ValueError(f"{run} has no {folder.logits.name}; 'ei evaluate {run}' writes it")
    return StoredLogits.read(folder.logits)


def require_same_samples(ours: StoredLogits, theirs: StoredLogits, what: str) -> None:
    """Raise a ValueError if the samples of a split, sorted by id, are others, or of other labels or patients."""
    only = [sorted(set(one.ids.tolist()) - set(two.ids.tolist())) for one, two in ((ours, theirs), (theirs, ours))]
    if any(only):
        raise ValueError(
            f"{what} are not the same samples: {len(only[0])} are only in the first and {len(only[1])} only in the"
            f" second, such as '{(only[0] or only[1])[0]}'; runs can be compared on the same rows only"
        )
    for name, one, two in (("label", ours.labels, theirs.labels), ("patient", ours.patients, theirs.patients)):
        if one.shape != two.shape:
            raise ValueError(f"{what} have one label in one run and several in the other")
        differs = (one != two).reshape(len(one), -1).any(axis=1)
        if differs.any():
            raise ValueError(
                f"{what} differ in the {name} of {differs.sum()} samples, such as '{ours.ids[differs][0]}'; runs can be"
                " compared on the same rows only"
            )


def _difference(ours: StoredLogits, theirs: StoredLogits, source: str, bootstrap: int, seed: int) -> Difference | None:
    """None where no sample has this modality in both runs."""
    pair = [stored.logits[stored.sources.tolist().index(source)].astype(float) for stored in (ours, theirs)]
    rows = np.isfinite(pair[0]).all(axis=1) & np.isfinite(pair[1]).all(axis=1)
    if not rows.any():
        return None
    mine, others = (logits[rows] for logits in pair)
    labels, patients = ours.labels[rows], ours.patients[rows].tolist()
    multi_label = labels.ndim == 2
    truth = labels.astype(bool) if multi_label else np.eye(len(ours.classes), dtype=bool)[labels]
    right, other_right = ((decided(logits, multi_label) == truth).all(axis=1) for logits in (mine, others))
    return Difference(
        source=source,
        samples=len(labels),
        patients=len(set(patients)),
        measures=paired_difference(
            mine,
            others,
            labels,
            patients,
            ours.classes.tolist(),
            multi_label=multi_label,
            bootstrap=bootstrap,
            seed=seed,
        ),
        only_this=int((right & ~other_right).sum()),
        only_other=int((other_right & ~right).sum()),
        mcnemar=mcnemar(right, other_right) if len(set(patients)) == len(patients) else None,
    )
