"""Committed results: one folder per machine, one JSON file per question, all with the same head."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "results"
HEAD = ("schema", "created", "commit", "machine", "versions", "settings", "results")
"""What each file has, besides what its question adds."""


def slug(machine: dict[str, Any]) -> str:
    """Name a machine, as `report_on` describes it, for a folder."""
    cores = "" if machine["device"] == "cuda" else f" {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", f"{machine['processor']}{cores}".lower())).strip("-")


def read(path: Path) -> dict[str, Any]:
    """Return what a committed file holds.

    Raises:
        ValueError: its head lacks something.
    """
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    missing = [name for name in HEAD if name not in report]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: write it with a command of benchmarks/")
    return report


def keep(report: dict[str, Any], question: str, folder: Path = FOLDER) -> Path:
    """Write a report where results are committed, without the folder of its run; returns its path."""
    settings = {name: value for name, value in report["settings"].items() if name != "output"}
    report = {**report, "settings": settings}
    path = folder / slug(report["machine"]) / f"{question}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return path
