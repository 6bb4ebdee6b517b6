"""Writing files so that a reader never sees half of one."""

import os
from pathlib import Path


def write_atomically(path: Path, payload: bytes) -> None:
    """Write beside ``path``, flush to the disk, then rename over it: there is the old file or the new one.

    Raises:
        OSError: the disk is full, or the folder cannot be written; what was there is still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
