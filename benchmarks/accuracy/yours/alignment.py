"""A short alignment: contrastive fine-tuning under selection, resumable and on several processes."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import List, Tuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

import patchselect
from benchmarks.models.host import Host, autocast
from patchselect.losses import gather_features, itc_loss, selection_alignment_loss

from .pairs import Pairs
from .resume import resume, save


@dataclass(frozen=True)
class Plan:
    """What is trained, and how."""

    relevance: str | None = None
    """`None`: the adapter's default."""
    keep_rates: tuple[float, ...] = (0.5, 0.3)
    """One is drawn for each step; (1.0,) trains without selection."""
    layers: tuple[int, ...] | None = None
    pairing: str = "shared"
    """`shared`: one selection per image serves all captions of the batch, as in classification; nothing leaks.
    `paired`: each image is selected by its own caption: its features tell whose they are (docs/training.md)."""
    alignment: float = 0.0
    """Weight of `selection_alignment_loss`, which needs `paired`."""
    steps: int = 150
    batch: int = 128
    """Pairs per process."""
    rate: float = 3e-4
    seed: int = 0
    precision: str = "fp32"

    def check(self) -> None:
        """Raise a ValueError for what cannot be."""
        if self.pairing not in ("shared", "paired"):
            raise ValueError(f"pairing must be 'shared' or 'paired', got {self.pairing!r}")
        if self.alignment and self.pairing != "paired":
            raise ValueError("selection alignment pulls what a caption selected towards it: it needs pairing='paired'")

    def keep_rate(self, step: int) -> float:
        """Draw a keep rate that is the same on all processes, and after a resume."""
        return float(np.random.default_rng([self.seed, step]).choice(self.keep_rates))


class Objective(nn.Module):
    """The loss of a batch as a module, so that DDP sees one forward pass."""

    def __init__(self, host: Host, plan: Plan) -> None:
        super().__init__()
        self.model, self.host, self.plan = host.model, host, plan

    def forward(self, images: Tensor, tokens: dict[str, Tensor]) -> Tensor:
        """Return InfoNCE over the captions of all processes, plus selection alignment at each selection layer."""
        text = self.host.encode_text(tokens)
        texts = gather_features(text)
        # What captions share out must be all that the images are compared with: those of one process tell its images.
        guiding = texts if self.plan.pairing == "shared" else text
        handle = patchselect.handle_of(self.model)
        with handle.record() as trace, patchselect.guide(self.model, guiding, self.plan.pairing):
            image = self.host.encode_image(images)
        scale = getattr(self.model, "logit_scale", None)
        temperature = 0.07 if scale is None else 1 / scale.exp().clamp(max=100)
        loss = itc_loss(image, text, temperature, image_candidates=gather_features(image), text_candidates=texts)
        if self.plan.alignment:
            tower = handle.towers[0]
            weight = self.plan.alignment / len(trace)
            for entry in trace:
                projected = tower.adapter.project(tower, entry.pooled.unsqueeze(1)).squeeze(1)
                loss = loss + weight * selection_alignment_loss(gather_features(projected), texts, temperature)
        return loss


class Batches(Sampler[List[Tuple[int, int]]]):
    """Places in the data and number of the epoch, for the steps that are left; a function of the seed alone."""

    def __init__(self, pairs: int, plan: Plan, start: int, rank: int = 0, world: int = 1) -> None:
        self.pairs, self.plan, self.start, self.rank, self.world = pairs, plan, start, rank, world
        self.per_epoch = pairs // (plan.batch * world)
        if not self.per_epoch:
            raise ValueError(f"{pairs} pairs do not fill a batch of {plan.batch} on {world} process(es): lower --batch")

    def __len__(self) -> int:
        return self.plan.steps - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.plan.steps):
            epoch, place = divmod(step, self.per_epoch)
            order = np.random.default_rng([self.plan.seed, epoch, 1]).permutation(self.pairs)
            first = (place * self.world + self.rank) * self.plan.batch
            yield [(int(row), epoch) for row in order[first : first + self.plan.batch]]


def align(
    host: Host, pairs: Pairs, plan: Plan, folder: Path | None = None, save_every: int = 0, workers: int = 0,
    stop: int | None = None, progress: bool = True,
) -> list[float]:  # fmt: skip
    """Fine-tune `host.model` in place, in float32; it comes back without selection.

    Args:
        host: the model, on its device.
        pairs: what to train on.
        plan: how.
        folder: where `last.pt` is written every `save_every` steps and at the end; if one is there, training goes on
            from it, to the same weights as without the interruption. `None` keeps nothing.
        save_every: steps; 0: at the end alone.
        workers: processes that load data.
        stop: end before this step, as an interruption would, but with a checkpoint.
        progress: show a bar (on the first process).

    Returns:
        The losses of the steps that ran, of this process.

    Raises:
        ValueError: a plan that cannot be, fewer pairs than a batch, or a `last.pt` of another run: other plan, model,
            weights, pairs or number of processes.
        FloatingPointError: a loss or a gradient that is not finite; the weights are those of the step before.
    """
    plan.check()
    grouped = dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
    weights = [p for p in host.model.float().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, plan.rate, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.rate, total_steps=plan.steps, pct_start=0.1)
    state = {"model": host.model, "optimizer": optimizer, "schedule": schedule}
    run = {"plan": repr(plan), "model": host.name, "weights": host.weights, "data": pairs.name}
    run.update({"pairs": str(len(pairs)), "processes": str(world)})
    start = resume(folder, run, state)
    loader = DataLoader(pairs, batch_sampler=Batches(len(pairs), plan, start, rank, world), num_workers=workers)
    patchselect.apply(host.model, plan.keep_rate(start), plan.layers, "text", plan.relevance)
    objective: nn.Module = Objective(host, plan)
    if world > 1:
        objective = nn.parallel.DistributedDataParallel(objective, find_unused_parameters=True)
    device, losses, step = weights[0].device, [], start
    host.model.train()
    hidden = rank > 0 or not progress
    for step, (images, tokens) in enumerate(
        tqdm(loader, "aligning", plan.steps, initial=start, disable=hidden, mininterval=5, file=sys.stderr), start + 1
    ):
        # Replaces the selection of the step before and touches no weight.
        patchselect.apply(host.model, plan.keep_rate(step - 1), plan.layers, "text", plan.relevance)
        with autocast(plan.precision, device):
            loss = objective(images.to(device), {name: ids.to(device) for name, ids in tokens.items()})
        loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        if not math.isfinite(loss.item() + norm.item()):
            patchselect.remove(host.model)
            raise FloatingPointError(
                f"step {step}: loss {loss.item():g}, norm of the gradient {norm.item():g}; a lower --rate, --precision "
                "fp32 or other pairs may help"
            )
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        last = step in (plan.steps, stop)
        if folder is not None and rank == 0 and (last or (save_every and step % save_every == 0)):
            save(folder, run, state, step)
        if last:
            break
    patchselect.remove(host.model)
    host.model.eval()
    return losses
