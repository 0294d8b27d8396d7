"""Training with selection from the first step, as the papers do."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

import patchselect
from benchmarks.accuracy.world.sampling import Batch, Sampler
from patchselect.losses import itc_loss

from .model import LAYERS, MiniAlbef
from .train import TEMPERATURE, alignment, both, fit, matching_loss, region_words, selection_inputs


def surviving(tokens: Tensor, batch: Batch, kept: Tensor | None) -> tuple[Tensor, Batch]:
    """Return patches that are left, and the batch whose masks speak of them: for losses over known boxes.

    Args:
        tokens: `(B, 1 + P, WIDTH)`, [CLS] first, the fused token last where there is one.
        batch: whose masks speak of all patches.
        kept: `(B or more, K)`, `trace[i].kept` of the last selection that these tokens went through; `None`: of none.
    """
    patches = tokens[:, 1:]
    if kept is None:
        return patches, batch
    kept = kept[: len(batch.images)]
    index = kept.clamp_min(0).unsqueeze(1).expand(-1, batch.masks.shape[1], -1)
    masks = batch.masks.gather(2, index) & (kept >= 0).unsqueeze(1)
    # The token that the others were fused into covers no object.
    return patches, replace(batch, masks=F.pad(masks, (0, patches.shape[1] - kept.shape[1])))


def train_from_scratch(
    model: MiniAlbef, sampler: Sampler, keep_rate: float, aligned: bool, steps: tuple[int, int], size: int
) -> None:
    """Train both stages of a base with selection in every step; keep rate 1 is a base without.

    Args:
        model: untrained, in place.
        sampler: of scenes.
        keep_rate: of each selection layer.
        aligned: with selection alignment from the first step; without it nothing trains the relevance.
        steps: of stage 1 and stage 2.
        size: scenes per step; with selection every scene is encoded twice, with a caption that fits and one that does
            not.
    """
    handle = patchselect.apply(model.vision, keep_rate, LAYERS, relevance="keys") if keep_rate < 1 else None

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
        passed = [None, *(layer.kept for layer in trace)] if trace else [None] * 3
        for seen, kept in zip((*(model.vision.norm(one) for one in middle), tokens), passed):
            total = total + region_words(model, *surviving(seen[:size], batch, kept))
        if contrastive:
            total = total + itc_loss(model.vision_proj(tokens[:size, 0]), own, TEMPERATURE)
        return total + alignment(model, trace, own) if aligned and handle else total

    fit(model, lambda step: loss(step, False), steps[0], 2e-3, f"stage 1, keep {keep_rate:g}")
    fit(model, lambda step: loss(step, True), steps[1], 1.5e-3, f"stage 2, keep {keep_rate:g}")
    if handle:
        handle.remove()
