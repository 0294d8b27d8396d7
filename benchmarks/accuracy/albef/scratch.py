"""Training with selection from the first step, as the papers do."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor

import patchselect
from benchmarks.accuracy.world.sampling import Batch, Sampler
from patchselect.losses import itc_loss

from .arms import selecting
from .model import MiniAlbef
from .train import TEMPERATURE, alignment, both, fit, matching_loss, region_words, selection_inputs


def own_tokens(entry: patchselect.Selected) -> Tensor:
    """Return `(B, P)`: the token that each place of the grid is in after a selection; -1 is in a fused one or none."""
    holders, survived = entry.holders, entry.kept.shape[1]
    assert holders is not None
    own = (holders >= 0) & (holders < survived)
    own &= entry.kept.gather(1, holders.clamp(0, survived - 1)) >= 0
    return holders.masked_fill(~own, -1)


def surviving(tokens: Tensor, batch: Batch, holders: Tensor | None) -> tuple[Tensor, Batch]:
    """Return patches that are left, and the batch whose masks speak of them: for losses over known boxes.

    A token that patches have merged into is of a thing that more than half of them are of.

    Args:
        tokens: `(B, 1 + P, WIDTH)`, [CLS] first, the fused token last where there is one.
        batch: whose masks speak of all patches.
        holders: `(B or more, P)`, the one of these tokens that each place is in, -1: in none; `None`: all are there.
    """
    patches = tokens[:, 1:]
    if holders is None:
        return patches, batch
    own = holders[: len(batch.images)]
    inside, index = own >= 0, own.clamp_min(0)
    things, shape = batch.masks.shape[1], (len(own), patches.shape[1])
    sizes = patches.new_zeros(shape).scatter_add(1, index, inside.to(patches))
    covered = (batch.masks & inside.unsqueeze(1)).to(patches)
    each = index.unsqueeze(1).expand(-1, things, -1)
    covered = patches.new_zeros(shape[0], things, shape[1]).scatter_add(2, each, covered)
    return patches, replace(batch, masks=2 * covered > sizes.unsqueeze(1))


def train_from_scratch(
    model: MiniAlbef, sampler: Sampler, method: str, keep_rate: float, aligned: bool, steps: tuple[int, int], size: int
) -> None:
    """Train both stages of a base with selection in every step; method "none" is a base without.

    Args:
        model: untrained, in place.
        sampler: of scenes.
        method: `none`, `text` or `merged`, as in `arms.reduced`.
        keep_rate: of each of two selections; "merged" spends what they do.
        aligned: with selection alignment from the first step; without it nothing trains the relevance.
        steps: of stage 1 and stage 2.
        size: scenes per step; with selection every scene is encoded twice, with a caption that fits and one that does
            not.
    """
    handle = None if method == "none" else selecting(model, method, keep_rate)

    def loss(step: int, contrastive: bool) -> Tensor:
        batch = sampler.draw(size)
        ids = both(batch)
        text = model.text(ids)
        own = model.text_proj(text[:size, 0])
        with selection_inputs(model) as middle, handle.record() if handle else nullcontext() as trace:
            if handle:
                with patchselect.guide(model.vision, text[:, 0]):
                    tokens = model.encode_image(batch.images.repeat(2, 1, 1, 1))
            else:
                tokens = model.encode_image(batch.images).repeat(2, 1, 1)
        total = matching_loss(model.match(tokens, text, ids))
        passed = [trace[0].members, own_tokens(trace[0]), own_tokens(trace[-1])] if trace else [None] * 3
        for seen, holders in zip((*(model.vision.norm(one) for one in middle), tokens), passed):
            total = total + region_words(model, *surviving(seen[:size], batch, holders))
        if contrastive:
            total = total + itc_loss(model.vision_proj(tokens[:size, 0]), own, TEMPERATURE)
        return total + alignment(model, trace, own) if aligned and handle else total

    fit(model, lambda step: loss(step, False), steps[0], 2e-3, f"stage 1, {method}")
    fit(model, lambda step: loss(step, True), steps[1], 1.5e-3, f"stage 2, {method}")
    if handle:
        handle.remove()
