"""Real multimodal images as a manifest: brain MRI patches in four sequences, is there a lesion in the centre?

    python examples/02_brain_mri_patches.py ms_patches_48.npz OUT

The file holds 48 x 48 mm patches of three patients of an open multiple-sclerosis data set (Lesjak et al.,
Neuroinformatics 2017, CC BY), as arrays FLAIR, T1, T2, T1POST (N, 48, 48) uint8, label (N,) and patient (N,).
OUT gets one PNG per patch and sequence, and a manifest per fold that leaves one patient out for testing.
Three patients are a demonstration, not a study.
"""

import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image

SEQUENCES = ("FLAIR", "T1", "T2", "T1POST")
CLASSES = ("no_lesion", "lesion")

if len(sys.argv) != 3:
    sys.exit(__doc__)
if not Path(sys.argv[1]).is_file():
    sys.exit(f"there is no file {sys.argv[1]}; the head of {__file__} says what it must hold")
source, out = np.load(sys.argv[1], allow_pickle=False), Path(sys.argv[2])
if missing := {*SEQUENCES, "label", "patient"} - set(source.files):
    sys.exit(f"{sys.argv[1]} lacks the arrays {', '.join(sorted(missing))}")
patients = source["patient"]

for sequence in SEQUENCES:
    folder = out / sequence
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(source[sequence]):
        Image.fromarray(pixels).save(folder / f"{number:04d}.png")

for held_out in np.unique(patients):
    manifest = out / f"leave_out_{held_out:02d}.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["id", "patient", "split", "label", *SEQUENCES])
        for number, (patient, label) in enumerate(zip(patients, source["label"], strict=True)):
            split = "test" if patient == held_out else "train"
            images = [f"{sequence}/{number:04d}.png" for sequence in SEQUENCES]
            table.writerow([f"patch{number:04d}", f"patient{patient:02d}", split, CLASSES[label], *images])
    held = patients == held_out
    lesions = source["label"][held].mean()
    print(f"{manifest}: {(~held).sum()} train and {held.sum()} test patches, {lesions:.2f} of these with a lesion")
