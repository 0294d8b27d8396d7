"""How the small ALBEF-like model is trained: a base in two stages, then arms with selection."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import patchselect
from patchselect.losses import itc_loss, selection_alignment_loss

from .arms import RELEVANCE, lifted
from .captions import EMOJI, captions
from .model import LAYERS, MiniAlbef
from .sampling import Batch, Sampler

TEMPERATURE = 0.1
KEEP_RATES = (0.7, 0.5, 0.3, 0.15)


def fit(model: nn.Module, loss: Callable[[int], Tensor], steps: int, rate: float, name: str) -> None:
    """AdamW with a short warm-up and a cosine down to nothing.

    Args:
        model: in place.
        loss: of a step, counted from 0.
        steps: how many.
        rate: highest learning rate.
        name: for the progress bar.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, rate, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for step in (bar := tqdm(range(steps), name, mininterval=5)):
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{value.item():.3f}", refresh=False)
    model.eval()


def both(batch: Batch) -> Tensor:
    """`(2 B, L)`: the captions that fit, then those that do not."""
    return torch.cat([batch.fitting, batch.other])


def matching_loss(logits: Tensor) -> Tensor:
    """Cross-entropy of `(2 B, 2)` logits: the first half fits, the second does not."""
    target = (torch.arange(len(logits), device=logits.device) < len(logits) // 2).long()
    return F.cross_entropy(logits, target)


def region_words(model: MiniAlbef, tokens: Tensor, batch: Batch) -> Tensor:
    """Which thing is in this box: the mean of its patches against what the text encoder says of every word."""
    present = (batch.objects >= 0) & batch.masks.any(-1)
    weight = batch.masks.float()
    regions = weight @ tokens[:, 1:] / weight.sum(-1, keepdim=True).clamp_min(1)
    words = model.text(captions([[concept] for concept in range(len(EMOJI))]).to(tokens.device))[:, 2]
    cosines = F.normalize(regions[present], dim=-1) @ F.normalize(words, dim=-1).T
    return F.cross_entropy(cosines / TEMPERATURE, batch.objects[present])


def stage_one(model: MiniAlbef, sampler: Sampler, steps: int, size: int, rate: float) -> None:
    """Matching and region-word alignment with known boxes; without boxes matching does not leave chance."""

    def loss(step: int) -> Tensor:
        batch = sampler.draw(size)
        tokens, ids = model.encode_image(batch.images), both(batch)
        return matching_loss(model.match(tokens.repeat(2, 1, 1), model.text(ids), ids)) + region_words(
            model, tokens, batch
        )

    fit(model, loss, steps, rate, "stage 1")


def stage_two(model: MiniAlbef, sampler: Sampler, steps: int, size: int, rate: float) -> None:
    """Matching, ITC on the image's [CLS] (which gives EViT's attention a meaning) and selection alignment (TRIPS's)."""
    handle = patchselect.apply(model.vision, 1.0, LAYERS, relevance="keys")

    def loss(step: int) -> Tensor:
        batch = sampler.draw(size)
        ids = both(batch)
        text = model.text(ids)
        with handle.record() as trace, patchselect.guide(model.vision, text[:size, 0]):
            tokens = model.encode_image(batch.images)
        own = model.text_proj(text[:size, 0])
        contrastive = itc_loss(model.vision_proj(tokens[:, 0]), own, TEMPERATURE)
        return (
            matching_loss(model.match(tokens.repeat(2, 1, 1), text, ids)) + contrastive + alignment(model, trace, own)
        )

    fit(model, loss, steps, rate, "stage 2")
    handle.remove()


def alignment(model: MiniAlbef, trace: patchselect.Trace, text: Tensor) -> Tensor:
    """Selection alignment, the mean over the selection layers; `text` `(B, JOINT)`."""
    losses = [
        selection_alignment_loss(model.vision.norm(layer.pooled)[: len(text)], text, TEMPERATURE, model.vision_proj)
        for layer in trace
    ]
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class Arm:
    """One way to go on training with selection."""

    guidance: str
    """`none`, `text`, `values`, `image` or `random`, as in `arms.reduced`."""
    aligned: bool = False
    """Keep the loss that makes its relevance mean something: selection alignment, or ITC on the [CLS] for `image`."""

    def __str__(self) -> str:
        return self.guidance + (" + alignment" if self.aligned else "")


def tune(
    model: MiniAlbef,
    sampler: Sampler,
    arm: Arm,
    steps: int,
    size: int,
    seed: int,
    rate: float = 5e-4,
    keep_rates: Sequence[float] = KEEP_RATES,
    layers: Sequence[int] = LAYERS,
) -> None:
    """Train matching with selection, the keep rate drawn anew in each step; every pair is encoded with its own text."""
    draw = random.Random(seed)

    def loss(step: int) -> Tensor:
        batch = sampler.draw(size)
        ids = both(batch)
        text = model.text(ids)
        own = model.text_proj(text[:size, 0])
        if arm.guidance == "none":
            tokens = model.encode_image(batch.images).repeat(2, 1, 1)
            return matching_loss(model.match(tokens, text, ids))
        relevance = RELEVANCE.get(arm.guidance)
        guidance = "text" if relevance else arm.guidance
        handle = patchselect.apply(model.vision, draw.choice(keep_rates), layers, guidance, relevance)
        with handle.record() if arm.aligned else nullcontext() as trace:
            if relevance:
                with patchselect.guide(model.vision, lifted(model, arm.guidance, text[:, 0])):
                    tokens = model.encode_image(batch.images.repeat(2, 1, 1, 1))
            else:
                tokens = model.encode_image(batch.images).repeat(2, 1, 1)
        handle.remove()
        total = matching_loss(model.match(tokens, text, ids))
        if arm.aligned and relevance:
            total = total + alignment(model, trace, own)
        elif arm.aligned:
            total = total + itc_loss(model.vision_proj(tokens[:size, 0]), own, TEMPERATURE)
        return total

    fit(model, loss, steps, rate, str(arm))
