"""How a small CLIP is made: trained on emoji scenes with the contrastive loss alone.

No boxes, no loss on patches or on attention: what its tokens mean is what InfoNCE made of them, as in a published CLIP.
`python -m benchmarks.accuracy clip --train --seed 0` makes a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.accuracy import CHECKPOINTS
from benchmarks.accuracy.world.scenes import Layout, make_scenes
from benchmarks.common.machine import commit, machine, versions
from patchselect.losses import itc_loss

from .model import MOST, PATCH, SIZE, build, load, save, tokenize
from .questions import score


@dataclass(frozen=True)
class Stage:
    """Part of the training: which scenes, and how many of their objects a caption names at least."""

    until: float
    """Share of all steps at which it ends."""
    scenes: int
    layout: Layout
    fewest: int


STAGES = (
    Stage(0.11, 3000, Layout(objects=(1, 1), glyph=(17, 70), varied=True), 1),
    Stage(0.30, 5000, Layout(objects=(1, 4), varied=True), 4),
    Stage(0.45, 5000, Layout(objects=(3, 6), varied=True), 4),
    Stage(1.00, 12000, Layout(varied=True), 2),
)
"""From one drawing of any size to scenes as in the questions: InfoNCE on full scenes stays at chance for long. All are
recoloured and mixed, for photographs are few, and drawn at the size of the model."""


@dataclass
class Training:
    """What a run was told and what came of it."""

    seed: int
    size: int = SIZE
    """Of the images, in pixels."""
    steps: int = 2200
    batch: int = 128
    rate: float = 2e-3
    weight_decay: float = 0.05
    temperature: float = 0.1
    """At the start; it is learned."""
    losses: list[float] = field(default_factory=list)
    """Mean loss of every twentieth of the steps."""
    watched: list[float] = field(default_factory=list)
    """Accuracy on the validation questions after every tenth of the steps; nothing is decided by it."""


def named_in(objects: Sequence[int], fewest: int, random: np.random.Generator) -> tuple[int, ...]:
    """Return `fewest` to `MOST` of the objects of a scene (or all, if there are fewer), in random order."""
    number = int(random.integers(min(fewest, len(objects)), min(MOST, len(objects)) + 1))
    return tuple(objects[i] for i in random.permutation(len(objects))[:number])


def varied(images: Tensor, random: np.random.Generator) -> Tensor:
    """Move the batch by up to 4 pixels, and mirror it every other time."""
    size = images.shape[-1]
    down, across = random.integers(0, 9, 2)
    moved = F.pad(images, (4, 4, 4, 4), mode="reflect")[..., down : down + size, across : across + size]
    return moved.flip(-1) if random.random() < 0.5 else moved


def train(plan: Training, stages: Sequence[Stage] = STAGES, watch: Callable[[Any], float] | None = None) -> Any:
    """Train a model with InfoNCE alone; `plan.losses` and `plan.watched` (what `watch` said) are filled in."""
    torch.manual_seed(plan.seed)
    random = np.random.default_rng(plan.seed)
    model = build(plan.size)
    model.logit_scale.data.fill_(float(np.log(1 / plan.temperature)))
    weights = list(model.parameters())
    groups = [
        {"params": [p for p in weights if p.dim() > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in weights if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, plan.rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.rate, total_steps=plan.steps, pct_start=0.1)
    seen: list[float] = []
    model.train()
    with tqdm(total=plan.steps, desc=f"seed {plan.seed}", mininterval=10, file=sys.stderr) as bar:
        for number, stage in enumerate(stages):
            bar.set_description_str(f"seed {plan.seed}: drawing {stage.scenes} scenes")
            scenes = make_scenes(stage.scenes, 100 * plan.seed + number, layout=replace(stage.layout, size=plan.size))
            bar.set_description_str(f"seed {plan.seed}: stage {number + 1}")
            while bar.n < round(stage.until * plan.steps):
                rows = torch.from_numpy(random.integers(0, len(scenes), plan.batch))
                captions = [named_in(scenes.objects[row], stage.fewest, random) for row in rows.tolist()]
                image, text, scale = model(varied(scenes.images(rows), random), tokenize(captions))
                loss = itc_loss(image, text, 1 / scale.clamp(max=100))
                loss.backward()
                nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                seen.append(loss.item())
                bar.set_postfix(loss=f"{np.mean(seen[-50:]):.3f}", refresh=False)
                bar.update()
                if watch is not None and bar.n % max(1, plan.steps // 10) == 0:
                    plan.watched.append(round(watch(model), 4))
                    bar.write(f"step {bar.n}: loss {np.mean(seen[-50:]):.3f}, accuracy {plan.watched[-1]:.3f}")
                    model.train()
    plan.losses = [round(float(part.mean()), 4) for part in np.array_split(np.array(seen), min(20, len(seen)))]
    return model.eval()


def pixels(value: str) -> int:
    """Read `--size`."""
    size = int(value)
    if size < 2 * PATCH or size % PATCH:
        raise argparse.ArgumentTypeError(f"takes a multiple of {PATCH} from {2 * PATCH}, got {size}")
    return size


ALONE = {"seed": 0, "size": SIZE, "steps": Training.steps}
"""Options that nothing but `--train` reads, with their defaults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--train", action="store_true", help="train a checkpoint")
    add("--seed", type=int, default=ALONE["seed"], help="of the checkpoint to train")
    add("--size", type=pixels, default=ALONE["size"], help=f"of its images, in pixels; {PATCH} to a patch")
    add("--steps", type=int, default=ALONE["steps"], help="of its training")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of the checkpoints")


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Train, save, load again and score on the validation scenes."""
    torch.set_num_threads(options.threads)
    plan = Training(options.seed, options.size, options.steps)
    began, source = (time.time(), time.process_time()), commit()
    model = train(plan, watch=lambda model: score(model, 512)["accuracy"])
    about: dict[str, Any] = {
        "command": f"python -m benchmarks.accuracy clip --train --seed {plan.seed} --steps {plan.steps}"
        + (f" --size {plan.size}" if plan.size != SIZE else ""),
        "commit": source,
        "seconds": round(time.time() - began[0]),
        "cpu_seconds": round(time.process_time() - began[1]),
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "training": vars(plan),
        "drawings": "OpenMoji (https://openmoji.org, CC BY-SA 4.0)",
    }
    path = options.checkpoints / f"clip-{plan.seed}.pt"
    save(model, path, about)
    # Scored as it will be loaded: from half precision.
    about["validation"] = score(load(plan.seed, options.checkpoints))
    path.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    sys.stdout.write(f"{path}: {json.dumps(about['validation'])}\n")
    return about
