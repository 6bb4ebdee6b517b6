"""One volume, three planes, three labels: hippocampus MRI as .npy volumes and a manifest, as a knee in three planes is.

    python examples/04_hippocampus_planes.py hippocampus_48x64x48.npz OUT

The file holds 260 cropped volumes of the Medical Segmentation Decathlon (task 4, CC BY-SA 4.0, arXiv:1902.09063) as
arrays volumes (N, 48, 64, 48) uint8, labels (N, 3), split (N,) and case (N,). A label says whether the whole, the
anterior or the posterior hippocampus is smaller than in two thirds of the training cases. It was derived from expert
outlines of the very structure that was cropped, and the zero padding shows the size of the crop (which correlates with
the volume, r = 0.46): an exercise in volumes and planes, not a clinical question.
"""

import csv
import sys
from pathlib import Path

import numpy as np

LABELS = ("small_total", "small_anterior", "small_posterior")
SPLITS = {"train": "train", "valid": "val", "test": "test"}
# The first axis of a volume counts its slices.
PLANES = {"axial": (2, 0, 1), "coronal": (1, 0, 2), "sagittal": (0, 1, 2)}

if len(sys.argv) != 3:
    sys.exit(__doc__)
if not Path(sys.argv[1]).is_file():
    sys.exit(f"there is no file {sys.argv[1]}; the head of {__file__} says what it must hold")
source, out = np.load(sys.argv[1], allow_pickle=False), Path(sys.argv[2])
if missing := {"volumes", "labels", "split", "case"} - set(source.files):
    sys.exit(f"{sys.argv[1]} lacks the arrays {', '.join(sorted(missing))}")
volumes, labels, splits, cases = (source[name] for name in ("volumes", "labels", "split", "case"))

for plane in PLANES:
    (out / plane).mkdir(parents=True, exist_ok=True)
with (out / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
    table = csv.writer(file)
    table.writerow(["id", "split", *LABELS, *PLANES])
    for case, split, flags, volume in zip(cases, splits, labels, volumes, strict=True):
        for plane, axes in PLANES.items():
            np.save(out / plane / f"{case}.npy", np.ascontiguousarray(volume.transpose(axes)))
        table.writerow([case, SPLITS[str(split)], *map(int, flags), *(f"{plane}/{case}.npy" for plane in PLANES)])
print(f"{out / 'manifest.csv'}: {len(cases)} cases, with labels {labels.sum(0).tolist()} times ({', '.join(LABELS)})")
