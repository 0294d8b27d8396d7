"""The checkpoint of an alignment that was interrupted, and whose it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

FILE = "last.pt"


def save(folder: Path, run: dict[str, str], state: dict[str, Any], step: int) -> None:
    """Write beside and move into place, so that an interruption leaves the one before.

    Args:
        folder: where `last.pt` goes.
        run: what tells this run from others, in words.
        state: what has a `state_dict`.
        step: steps that are done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = {**{name: part.state_dict() for name, part in state.items()}, "step": step, "run": run}
    content["random"] = torch.get_rng_state()
    torch.save(content, folder / f"{FILE}.part")
    os.replace(folder / f"{FILE}.part", folder / FILE)


def resume(folder: Path | None, run: dict[str, str], state: dict[str, Any]) -> int:
    """Return the steps that `last.pt` has behind it, loaded into `state`; 0 without one.

    Raises:
        ValueError: the `last.pt` of another run; names what differs.
    """
    if folder is None or not (folder / FILE).is_file():
        return 0
    content = torch.load(folder / FILE, map_location="cpu", weights_only=True)
    before = content.get("run", {})
    differs = [
        f"{name} {before.get(name)} there, {value} here" for name, value in run.items() if before.get(name) != value
    ]
    if differs:
        raise ValueError(f"{folder / FILE} is of another run: {'; '.join(differs)}. Give another --output")
    for name, part in state.items():
        part.load_state_dict(content[name])
    torch.set_rng_state(content["random"])
    return int(content["step"])
