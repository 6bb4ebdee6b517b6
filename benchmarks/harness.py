"""What every benchmark states: the machine, the versions, the commit; and how it sums up what it measured."""

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "peft", "timm", "numpy")


def setup(device: torch.device) -> dict[str, Any]:
    """Device, versions and commit, to be asked for before anything is measured: the checkout may move meanwhile."""
    on_gpu = device.type == "cuda"
    return {
        "device_name": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "device": device.type,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "git": git_state(),
        "load_average": os.getloadavg(),
    }


def git_state() -> dict[str, Any]:
    """The commit of this checkout, and which files differ from it."""
    changed = _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": _output("git", "rev-parse", "HEAD") or "unknown", "changed": (changed or "").splitlines()}


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def quantiles(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median, and the 20 % and 80 % quantiles."""
    low, median, high = np.quantile(values, [0.2, 0.5, 0.8])
    return {"median": round(float(median), 4), "q20": round(float(low), 4), "q80": round(float(high), 4)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.rstrip()
    except (OSError, subprocess.CalledProcessError):
        return None
