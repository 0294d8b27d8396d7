"""What a relevance or a reduction from outside answers: asked once, at `apply`, about a few made-up tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..adapter import Tower
from ..compat import fork_rng, without_modes
from ..reading import place_of
from ..reduction import Alike, Places, Reduced, Reduction
from ..relevance import Relevance
from .plan import Plan

ROWS, TEXTS, PATCHES, KEEP = 2, 3, 8, 3
"""Of what they are asked; all different, so that no shape is right by chance."""
OWN = __name__.split(".")[0] + "."


def check_objects(plan: Plan, tower: Tower) -> None:
    """Raise if an object that is not built in gives other shapes or numbers than its base class promises.

    Raises:
        TypeError: it returns something of another kind.
        ValueError: other shapes, weights that are no weights, or indices that point elsewhere; says which.
    """
    asked = [thing for thing in (plan.relevance, plan.reduction) if not type(thing).__module__.startswith(OWN)]
    if asked and plan.selects:
        with without_modes(), torch.no_grad(), fork_rng(devices=[], device_type="cuda"):
            for thing in asked:
                if isinstance(thing, Relevance):
                    _check_relevance(thing, plan, tower)
                else:
                    _check_reduction(thing, tower)


def _check_relevance(relevance: Relevance, plan: Plan, tower: Tower) -> None:
    seen, text = relevance.sample(tower, plan.layers[0], PATCHES, plan.guidance, ROWS, TEXTS)
    texts = 1 if text is None else TEXTS
    kind = seen.all_tokens.device.type
    with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
        if type(relevance).weigh is Relevance.weigh:
            name = "scores_by_image" if text is None else "scores"
            scores = relevance.scores_by_image(seen) if text is None else relevance.scores(seen, text)
            _expect(relevance, name, scores, (ROWS, texts, PATCHES), "(B, T, n), of the patches alone")
        apart = relevance.weigh(seen, text, True)
        together = relevance.weigh(seen, text, False)
    _expect_weights(relevance, "weights", apart, (ROWS, texts, PATCHES), "(B, T, n)")
    _expect_weights(relevance, "combine", together, (ROWS, PATCHES), "(B, n)")


def _expect(thing: Any, name: str, found: Any, shape: tuple[int, ...], words: str) -> None:
    if not isinstance(found, Tensor):
        raise TypeError(f"{name} of {thing!r} must return a tensor {words}, got {type(found).__name__}")
    if tuple(found.shape) != shape:
        raise ValueError(
            f"{name} of {thing!r} must return {words}: {shape} where it was asked, got {tuple(found.shape)}"
        )


def _expect_weights(thing: Any, name: str, found: Any, shape: tuple[int, ...], words: str) -> None:
    _expect(thing, name, found, shape, words)
    if found.is_meta:
        return
    sums = found.double().sum(dim=-1)
    if not (found >= 0).all() or not torch.allclose(sums, torch.ones_like(sums), atol=0.02):
        raise ValueError(
            f"{name} of {thing!r} must return weights that are at least 0 and sum to 1 over the patches; they are "
            f"{found.min():.3g} to {found.max():.3g}, and sum to {sums.min():.3g} to {sums.max():.3g} (scores must be "
            "finite: a patch that shall not stay needs a low one, not -inf)"
        )


def _check_reduction(reduction: Reduction, tower: Tower) -> None:
    prefix = tower.num_prefix_tokens or 2
    place = place_of(tower.blocks[0])
    tokens = torch.linspace(-1, 1, ROWS * (prefix + PATCHES) * tower.width, **place).view(ROWS, -1, tower.width)
    weights = torch.linspace(-1, 1, ROWS * TEXTS * PATCHES, **place).view(ROWS, TEXTS, PATCHES).sin().softmax(dim=-1)
    indices = torch.arange(PATCHES, device=tokens.device).expand(ROWS, -1)
    places = Places(indices, (2, PATCHES // 2)) if reduction.reads_places else None
    for relevance in (weights[:, 0], weights):
        rows = ROWS * (TEXTS if relevance.dim() == 3 else 1)
        more = (Alike(tokens, torch.ones_like(tokens[..., 0])),) if reduction.reads_keys else ()
        found = reduction.reduce(tokens, relevance, KEEP, prefix, places, *more)
        if not isinstance(found, Reduced):
            raise TypeError(f"reduce of {reduction!r} must return a Reduced, got {type(found).__name__}")
        after = prefix + KEEP + reduction.num_fused(PATCHES, KEEP)
        _expect(reduction, "reduce: tokens", found.tokens, (rows, after, tower.width), "(R, P + k + num_fused, D)")
        _expect(reduction, "reduce: kept", found.kept, (rows, KEEP), "(R, k)")
        _expect(reduction, "reduce: into", found.into, (rows, prefix + PATCHES), "(R, P + n)")
        if not tokens.is_meta:
            _check_places(reduction, found, prefix)


def _check_places(reduction: Reduction, found: Reduced, prefix: int) -> None:
    kept, into, after = found.kept, found.into, found.tokens.shape[1]
    if kept.min() < 0 or kept.max() >= PATCHES:
        raise ValueError(f"kept of {reduction!r} must count patches from 0, without prefix tokens, got {kept.tolist()}")
    if into.min() < -1 or into.max() >= after:
        raise ValueError(f"into of {reduction!r} must be places in the new sequence (0 to {after - 1}) or -1")
    stay = torch.cat([torch.arange(prefix, device=kept.device).expand(len(kept), -1), kept + prefix], dim=1)
    first = torch.arange(prefix + KEEP, device=kept.device).expand(len(kept), -1)
    if not torch.equal(into.gather(1, stay), first.to(into.dtype)):
        raise ValueError(
            f"into of {reduction!r} says other places than kept: prefix token i goes to place i, kept patch i to P + i"
        )
