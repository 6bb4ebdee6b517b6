"""From files to samples. What is exported here needs no torch; datasets and transforms are not."""

from ei.data.images import ImageError
from ei.data.manifest import SPLITS, Manifest, ManifestError, Row, read_manifest

__all__ = ["SPLITS", "ImageError", "Manifest", "ManifestError", "Row", "read_manifest"]
