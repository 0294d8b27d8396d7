"""How the small ALBEF-like model is trained: a base in two stages, then arms with selection."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import patchselect
from benchmarks.accuracy.world.captions import EMOJI, captions
from benchmarks.accuracy.world.sampling import Batch, Sampler
from patchselect.losses import itc_loss, itm_loss, selection_alignment_loss

from .arms import RELEVANCE, reduced
from .model import MiniAlbef

TEMPERATURE = 0.1
CAPTIONS = 3
"""Of each kind for one scene of a base's batch: matching learns by far faster for little more work."""
KEEP_RATES = (0.7, 0.5, 0.3, 0.15)


def fit(model: nn.Module, loss: Callable[[int], Tensor], steps: int, rate: float, name: str) -> None:
    """Fit with AdamW, a short warm-up and a cosine down to nothing.

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
    """Return `(2 B, L)`: the captions that fit, then those that do not."""
    return torch.cat([batch.fitting, batch.other])


def matching_loss(logits: Tensor) -> Tensor:
    """Compute the loss of `(2 B, 2)` logits: the first half fits, the second does not."""
    return itm_loss(*logits.chunk(2))


def region_words(model: MiniAlbef, patches: Tensor, batch: Batch) -> Tensor:
    """Ask which thing is in a patch: every patch of a known box against what the text encoder says of every word.

    Args:
        model: whose text encoder names the things.
        patches: `(B, P, WIDTH)`, normalised as at the end of the encoder, without [CLS] and registers.
        batch: `masks` must speak of these patches.
    """
    row, thing, patch = batch.masks.nonzero(as_tuple=True)
    words = model.text(captions([[concept] for concept in range(len(EMOJI))]).to(patches.device))[:, 2]
    cosines = F.normalize(patches[row, patch], dim=-1) @ F.normalize(words, dim=-1).T
    return F.cross_entropy(cosines / TEMPERATURE, batch.objects[row, thing])


@contextmanager
def selection_inputs(model: MiniAlbef) -> Iterator[list[Tensor]]:
    """Collect the tokens `(B, N, WIDTH)` that the selection layers of its shape are given, one entry for each pass."""
    seen: list[Tensor] = []
    blocks = [model.vision.blocks[layer] for layer in model.shape.layers]
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for block in blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def pretrain(
    model: MiniAlbef, sampler: Sampler, steps: int, size: int, rate: float, aligned: bool, name: str = "base"
) -> None:
    """Train matching and region-word alignment with known boxes, and what makes attention mean something.

    Without boxes matching does not leave chance in this budget. The words are asked for at the end of the encoder and
    where selection will take place: a model of this size does not place them there by itself.

    Args:
        model: in place.
        sampler: of scenes.
        steps: how many.
        size: scenes of a batch.
        rate: highest learning rate.
        aligned: with ITC on the image's [CLS] and selection alignment, of the text's attention (TRIPS's relevance) and
            of the image [CLS]'s (EViT's) in turns, so that neither is at a disadvantage.
        name: for the progress bar.
    """

    def encode(images: Tensor, text: Tensor, guidance: str) -> tuple[Tensor, patchselect.Trace]:
        relevance = "keys" if guidance == "text" else None
        handle = patchselect.apply(model.vision, 1.0, model.shape.layers, guidance, relevance)
        with handle.record() as trace, patchselect.guide(model.vision, text) if guidance == "text" else nullcontext():
            tokens = model.encode_image(images)
        handle.remove()
        return tokens, trace

    def loss(step: int) -> Tensor:
        batch = sampler.draw(size, CAPTIONS)
        ids = both(batch)
        text = model.text(ids)
        with selection_inputs(model) as middle:
            if aligned:
                tokens, trace = encode(batch.images, text[:size, 0], ("text", "image")[step % 2])
            else:
                tokens = model.encode_image(batch.images)
        total = matching_loss(model.match(tokens.repeat(2 * CAPTIONS, 1, 1), text, ids))
        for patches in (tokens, *(model.vision.norm(seen) for seen in middle)):
            total = total + region_words(model, patches[:, model.shape.prefix :], batch)
        if aligned:
            own = model.text_proj(text[:size, 0])
            contrastive = itc_loss(model.vision_proj(tokens[:, 0]), own, TEMPERATURE)
            total = total + contrastive + alignment(model, trace, own)
        return total

    fit(model, loss, steps, rate, name)


def alignment(model: MiniAlbef, trace: patchselect.Trace, text: Tensor) -> Tensor:
    """Compute selection alignment, the mean over the selection layers; `text` `(B, JOINT)`."""
    losses = [
        selection_alignment_loss(model.vision.norm(layer.pooled)[: len(text)], text, TEMPERATURE, model.vision_proj)
        for layer in trace
    ]
    return torch.stack(losses).mean()


@dataclass(frozen=True)
class Arm:
    """One way to go on training with selection."""

    guidance: str
    """`none`, `values` or one of `METHODS`, as in `arms.reduced`."""
    aligned: bool = False
    """With what makes its relevance mean something: selection alignment, and for `image` ITC on the [CLS] too."""

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
    layers: tuple[int, ...] | None = None,
) -> None:
    """Train matching with selection, the keep rate drawn anew in each step; every pair is encoded with its own text."""
    draw = random.Random(seed)

    def loss(step: int) -> Tensor:
        batch = sampler.draw(size)
        ids = both(batch)
        text = model.text(ids)
        own = model.text_proj(text[:size, 0])
        by_text = arm.guidance in RELEVANCE
        images = batch.images.repeat(2, 1, 1, 1) if by_text else batch.images
        with reduced(model, arm.guidance, draw.choice(keep_rates), layers) as encode:
            with patchselect.handle_of(model.vision).record() if arm.aligned else nullcontext() as trace:
                tokens = encode(images, text[:, 0])
        total = matching_loss(model.match(tokens if by_text else tokens.repeat(2, 1, 1), text, ids))
        if arm.aligned:
            total = total + alignment(model, trace, own)
            if not by_text:
                total = total + itc_loss(model.vision_proj(tokens[:size, 0]), own, TEMPERATURE)
        return total

    fit(model, loss, steps, rate, str(arm))
