"""What figures were measured on: the machine, the releases and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("patchselect", "torch", "open_clip_torch", "transformers", "timm", "numpy")


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the processor and how busy it is; ask before the run, whose own load would count otherwise."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "device": device.type,
        "processor": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": load,
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def _processor() -> str:
    """Name the processor; Linux knows more than `platform.processor`."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the releases of the packages that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=None)
def commit() -> str:
    """Return the commit of the code that runs, marked where files were changed; asked for once, when a run starts."""
    here = Path(__file__).parent
    answer = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True
    )
    return answer.stdout.strip() or "unknown"
