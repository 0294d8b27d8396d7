"""Base models: trained, kept, and read again; one of them is committed."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import CHECKPOINTS
from benchmarks.accuracy.world.sampling import Sampler
from benchmarks.accuracy.world.scenes import VARIED, Layout, make_scenes
from benchmarks.common.machine import commit

from .model import PATCH, USUAL, MiniAlbef, Shape
from .train import pretrain

RESULTS = Path("results/accuracy")
TRAIN_SCENES = 8000
BATCH = 32
STEPS = (1000, 1000)
"""Of both stages: matching with known boxes, and the same with ITC and selection alignment."""
RATES = (2e-3, 1.5e-3)
NAMES = ("-stage1", "")
"""Of the files after each of them: the last one is the base."""


def train_sampler(seed: int, layout: Layout = VARIED, count: int = TRAIN_SCENES) -> Sampler:
    """Return scenes for training; every seed has its own, and none shares a photograph with the tests."""
    return Sampler(make_scenes(count, 1000 + seed, False, layout), layout.size // PATCH, seed)


def train_base(seed: int, folder: Path = RESULTS, shape: Shape = USUAL, steps: Sequence[int] = STEPS) -> None:
    """Train and write `albef-{seed}{shape}.pt`, and what came before it (`NAMES`), each with a JSON beside it.

    All scenes are recoloured and mixed (`VARIED`), for photographs are few. What the folder has is taken from there.
    """
    source = commit()
    torch.manual_seed(seed)
    model, sampler, stages = MiniAlbef(shape=shape), train_sampler(seed), []
    for index, name in enumerate(NAMES):
        path = folder / f"albef-{seed}{shape}{name}.pt"
        if path.exists():
            model, stages = load(path), json.loads(path.with_suffix(".json").read_text())["stages"]
            continue
        pretrain(model, sampler, steps[index], BATCH, RATES[index], index > 0, f"base {seed}{shape}, stage {index + 1}")
        stages = [*stages, {"steps": steps[index], "commit": source}]
        save(model, path, seed=seed, stages=stages)


def save(model: torch.nn.Module, path: Path, **facts: Any) -> None:
    """Write the weights in half precision, and how they came about beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: value.half() for name, value in model.state_dict().items()}, path)
    command = "python -m benchmarks.accuracy " + " ".join(sys.argv[1:])
    made = {"command": command, "torch": torch.__version__, **facts}
    path.with_suffix(".json").write_text(json.dumps(made, indent=1) + "\n")


def load(path: Path) -> MiniAlbef:
    """Load a base in single precision and evaluation mode. It takes images of any size: positions are resampled."""
    weights = torch.load(path, map_location="cpu", weights_only=True)
    model = MiniAlbef(shape=Shape.of(weights))
    model.load_state_dict(weights)
    return model.eval()


def arguments(shape: Shape) -> list[str]:
    """Return how commands are told about a shape; nothing of the committed base's."""
    given = {"--depth": (shape.depth, Shape.depth), "--registers": (shape.registers, Shape.registers)}
    return [word for name, (value, usual) in given.items() if value != usual for word in (name, str(value))]


def digest(model: torch.nn.Module) -> str:
    """Return eight letters that say which weights these are: nothing is taken over that others made."""
    parts = (value.numpy().tobytes() for value in model.state_dict().values())
    return hashlib.sha256(b"".join(parts)).hexdigest()[:8]


def file_of(seed: int, folder: Path, stage: int = 2, shape: Shape = USUAL) -> Path | None:
    """Return where a base that was trained before is: in this folder, else among the committed ones."""
    name = f"albef-{seed}{shape}{NAMES[stage - 1]}.pt"
    return next((place / name for place in (folder, CHECKPOINTS) if (place / name).exists()), None)


def base(seed: int, folder: Path = RESULTS, stage: int = 2, shape: Shape = USUAL) -> MiniAlbef:
    """Return a base that was trained before: of this folder, or the committed one.

    Raises:
        FileNotFoundError: it was not; names the command that trains it.
    """
    path = file_of(seed, folder, stage, shape)
    if path is None:
        given = " ".join(["--seed", str(seed), *arguments(shape), "--output", str(folder)])
        command = f"python -m benchmarks.accuracy train {given}"
        raise FileNotFoundError(f"no base {seed}{shape} after stage {stage} in {folder}: train it with `{command}`")
    return load(path)
