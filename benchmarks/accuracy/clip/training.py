"""A small CLIP of open_clip's own classes, trained on emoji scenes with the contrastive loss alone.

No boxes, no loss on patches or on attention: what its tokens mean is what InfoNCE made of them, as in a published CLIP.
`python -m benchmarks.accuracy clip --train --seed 0` makes a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.report import machine, versions
from patchselect.losses import itc_loss

from .base import commit
from .captions import PAD, caption_ids, vocabulary_size
from .scenes import Layout, make_scenes

SIZE, PATCH, WIDTH, DEPTH = 64, 8, 64, 6
LAYERS = (2, 4)
"""Selection inside the 3rd and the 5th of 6 blocks."""
CONTEXT = 25
MOST = 8
"""Objects that a training caption names at most; the questions name one or two."""
END = vocabulary_size()
"""The last token of every caption and the largest id: open_clip pools the text there."""
CHECKPOINTS = Path(__file__).with_name("checkpoints")


class Stem(nn.Sequential):
    """Three strided convolutions in the place of `conv1`: small models need them to see edges."""

    stride = (PATCH, PATCH)

    def __init__(self, width: int) -> None:
        steps = (3, width // 4, width // 2, width)
        convolutions = [nn.Conv2d(a, b, 3, 2, 1) for a, b in zip(steps, steps[1:])]
        super().__init__(convolutions[0], nn.GELU(), convolutions[1], nn.GELU(), convolutions[2])


def build() -> Any:
    """An `open_clip.model.CLIP`: ViT of 6 blocks, width 64, 64 patches; text of 2 layers; 0.44 million parameters."""
    from open_clip.model import CLIP

    vision = dict(layers=DEPTH, width=WIDTH, head_width=16, patch_size=PATCH, image_size=SIZE)
    text = dict(context_length=CONTEXT, vocab_size=END + 1, width=WIDTH, heads=4, layers=2)
    model = CLIP(WIDTH, vision, text)
    model.visual.conv1 = Stem(WIDTH)
    return model


def tokenize(named: Sequence[Sequence[int]]) -> Tensor:
    """`(B, CONTEXT)` token ids of captions that name these concepts, at most `MOST` each."""
    rows = [[token for token in caption_ids(one) if token != PAD] + [END] for one in named]
    return torch.tensor([row + [PAD] * (CONTEXT - len(row)) for row in rows])


@dataclass(frozen=True)
class Stage:
    """Part of the training: which scenes, and how many of their objects a caption names at least."""

    until: float
    """Share of all steps at which it ends."""
    scenes: int
    layout: Layout
    fewest: int


STAGES = (
    Stage(0.11, 3000, Layout(size=SIZE, objects=(1, 1), glyph=(17, 70), varied=True), 1),
    Stage(0.30, 5000, Layout(size=SIZE, objects=(1, 4), varied=True), 4),
    Stage(0.45, 5000, Layout(size=SIZE, objects=(3, 6), varied=True), 4),
    Stage(1.00, 12000, Layout(size=SIZE, varied=True), 2),
)
"""From one drawing of any size to scenes as in the questions: InfoNCE on full scenes stays at chance for long. All are
recoloured and mixed, for photographs are few."""


@dataclass
class Training:
    """What a run was told and what came of it."""

    seed: int
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
    """`fewest` to `MOST` of the objects of a scene (or all, if there are fewer), in random order."""
    number = int(random.integers(min(fewest, len(objects)), min(MOST, len(objects)) + 1))
    return tuple(objects[i] for i in random.permutation(len(objects))[:number])


def varied(images: Tensor, random: np.random.Generator) -> Tensor:
    """The batch moved by up to 4 pixels, and mirrored every other time."""
    down, across = random.integers(0, 9, 2)
    moved = F.pad(images, (4, 4, 4, 4), mode="reflect")[..., down : down + SIZE, across : across + SIZE]
    return moved.flip(-1) if random.random() < 0.5 else moved


def train(plan: Training, stages: Sequence[Stage] = STAGES, watch: Callable[[Any], float] | None = None) -> Any:
    """A model trained with InfoNCE alone; `plan.losses` and `plan.watched` (what `watch` said) are filled in."""
    torch.manual_seed(plan.seed)
    random = np.random.default_rng(plan.seed)
    model = build()
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
            scenes = make_scenes(stage.scenes, 100 * plan.seed + number, layout=stage.layout)
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


def save(model: Any, path: Path, about: dict[str, Any]) -> None:
    """Weights in half precision, and what is known about them in a JSON beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: value.half() for name, value in model.state_dict().items()}, path)
    path.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")


def load(seed: int, folder: Path = CHECKPOINTS) -> Any:
    """The model of a committed checkpoint, in single precision.

    Raises:
        FileNotFoundError: there is none for this seed; says how to make it.
    """
    path = folder / f"clip-{seed}.pt"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: make it with python -m benchmarks.accuracy clip --train --seed {seed}")
    model = build()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.float().eval()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--train", action="store_true", help="train a checkpoint")
    add("--seed", type=int, default=0, help="of the checkpoint to train")
    add("--steps", type=int, default=Training.steps)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--checkpoints", type=Path, default=CHECKPOINTS, help="folder of the checkpoints")


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Train, save, load again and score on the validation scenes."""
    from .questions import score

    torch.set_num_threads(options.threads)
    plan, began, source = Training(options.seed, options.steps), (time.time(), time.process_time()), commit()
    model = train(plan, watch=lambda model: score(model, 512)["accuracy"])
    about: dict[str, Any] = {
        "command": f"python -m benchmarks.accuracy clip --train --seed {plan.seed} --steps {plan.steps}",
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
