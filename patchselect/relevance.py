"""From a block, its tokens and a text to one weight per patch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import functional as op
from .adapter import Adapter, Projections, Tower, gathered, norm_eps
from .compat import is_compiling

if TYPE_CHECKING:
    from .patching import Layer


class Directions(NamedTuple):
    """What one selection layer reads its patches with, each `(B, T, D)` or `(1, T, D)`.

    `layer` is compared and never looked for in a dict or a tuple: under torch.compile it can be a symbol, which some
    releases do not find there.
    """

    layer: int
    own: Tensor
    folded: Tensor | None
    """The sum over all later layers."""


def relevance_of(
    layer: Layer,
    block: nn.Module,
    normed: Tensor,
    tokens: Tensor,
    prefix: int,
    text: Tensor | None,
    stash: list[Directions] | None = None,
) -> Tensor:
    """Relevance `(B, T, n)` of the patches for each text, or `(B, n)` for one selection per image.

    Args:
        layer: the selection layer.
        block: the block it sits in, as it runs.
        normed: `(B, P + n, D)`, the block's input after its pre-attention norm.
        tokens: `(B, P + n, D)`, after attention.
        prefix: `P`.
        text: `(B', T, D_text)`, where B is a multiple of B'; `None` unless the guidance is `"text"`.
        stash: where the first selection layer of an inference pass leaves what later ones would compute again.
    """
    if layer.guidance == "random":
        return op.random_relevance(tokens[:, prefix:])
    adapter, tower = layer.tower.adapter, layer.tower
    with torch.autocast("cpu" if tokens.is_meta else tokens.device.type, enabled=False):
        if layer.relevance in ("keys", "features"):
            weights = adapter.projections(block)
            if text is None:
                query = _guiding_token(layer, normed, prefix)
            else:
                query = _normalised(weights.norm, adapter.lift(tower, text))
            return _attention(layer.relevance, weights, query, normed[:, prefix:], tokens[:, prefix:])
        if text is None:
            text = _projected(tower, _guiding_token(layer, tokens, prefix))
        if layer.relevance == "joint":
            return op.joint_scores(text, _projected(tower, tokens[:, prefix:]))
        return _value_scores(layer, normed[:, prefix:], tokens[:, prefix:], text, stash)


def combine(layer: Layer, scores: Tensor) -> Tensor:
    """`(B, T, n)` of `relevance_of` to one selection per image, `(B, n)`."""
    if scores.dim() == 2:
        return scores
    attends = layer.relevance in ("keys", "features")
    return op.combine_attention(scores) if attends else op.combine_scores(scores)


def separate(layer: Layer, scores: Tensor) -> Tensor:
    """`(B, T, n)` of `relevance_of` to one selection per image and text, `(B, T, n)`."""
    return scores if layer.relevance in ("keys", "features") else op.standardise(scores).softmax(dim=-1)


def _guiding_token(layer: Layer, tokens: Tensor, prefix: int) -> Tensor:
    """What guides without a text of its own, `(B, 1, D)`: the image [CLS] or, where a model has none, the mean patch.

    In a single stream the text is one of the tokens, and guidance by text means its [CLS].
    """
    if layer.tower.single_stream and layer.guidance != "text":
        return tokens[:, prefix - 1 : prefix]
    if layer.tower.has_class_token:
        return tokens[:, :1]
    return tokens[:, prefix:].mean(dim=1, keepdim=True)


def _attention(kind: str, weights: Projections, query: Tensor, normed: Tensor, patches: Tensor) -> Tensor:
    """`keys` and `features`: `softmax(q . k / sqrt(d_h))` or `softmax(q . x / sqrt(d))`, `(B, T, n)`."""
    dtype = weights.query.dtype
    query = F.linear(query.to(dtype), weights.query, weights.query_bias)
    if kind == "features":
        return op.feature_relevance(query.to(patches.dtype), patches)
    normed = normed.to(dtype)
    if weights.key_norm is None:
        return op.key_relevance(query, normed, weights.key, weights.num_heads, weights.scale)
    keys = F.linear(normed, weights.key, weights.key_bias)
    query, keys = (rearrange(x, "b n (h e) -> b n h e", h=weights.num_heads) for x in (query, keys))
    query = query if weights.query_norm is None else weights.query_norm(query)
    return op.real_key_relevance(query, weights.key_norm(keys), weights.scale)


def _value_scores(
    layer: Layer, normed: Tensor, patches: Tensor, text: Tensor, stash: list[Directions] | None
) -> Tensor:
    """`values`: `s_i = sum over l >= j of LN_l(x_i) . w_l` with `w_l = g W_o^l W_v^l`, up to a constant; `(B, T, n)`.

    The selection layer's own term reads its normed input, the later ones the tokens after its attention. Those all
    normalise the same tokens, so their terms fold into one vector: `sum of gamma_l * w_l` against the plain
    normalised tokens. Where there are more texts than patches, the patches go forward through the same weights.
    """
    adapter, tower = layer.tower.adapter, layer.tower
    found = stash.pop(0) if stash and stash[0].layer == layer.index else None
    if found is None:
        goal = adapter.read_back(tower, text)
        if not is_compiling() and patches.shape[:2].numel() < goal.shape[:2].numel():
            values = _through_values(adapter, tower, layer.index, normed, patches)
            return op.linear_scores(goal.to(values.dtype), values)
        later = () if stash is None else tuple(index for index in layer.handle.layers if index > layer.index)
        found, left = _value_directions(adapter, tower, layer.index, later, goal)
        if stash is not None:
            stash[:] = left
    # What the first layer of pairing="all" left for (1, T) or (B, T) texts is for (T, 1) or (B * T, 1) texts here.
    own, folded = (
        x if x is None or x.shape[:2] == text.shape[:2] else x.flatten(0, 1).unsqueeze(1)
        for x in (found.own, found.folded)
    )
    assert own is not None
    scores = op.linear_scores(own, normed)
    if folded is None:
        return scores
    return scores + op.normalised_scores(folded, patches, norm_eps(adapter.projections(tower.blocks[-1]).norm))


def _value_directions(
    adapter: Adapter, tower: Tower, first: int, later: Sequence[int], goal: Tensor
) -> tuple[Directions, list[Directions]]:
    """Return `w_j` and `sum over l > j of gamma_l * w_l` (if any) of layer `first`, and those of the `later` ones."""
    own = goal
    folded: Tensor | None = None
    beyond: Tensor | None = None
    left: list[Directions] = []
    for index in reversed(range(first, len(tower.blocks))):
        weights = adapter.projections(tower.blocks[index])
        output = gathered(weights.output)
        scaled = goal if weights.output_scale is None else goal * gathered(weights.output_scale)
        own, beyond = op.value_direction(scaled.to(output.dtype), gathered(weights.value), output), folded
        gamma = getattr(weights.norm, "weight", None)
        term = own if gamma is None else own * gathered(gamma)
        folded = term if folded is None else folded + term
        if index in later:
            left.append(Directions(index, own, beyond))
    return Directions(first, own, beyond), left[::-1]


def _through_values(adapter: Adapter, tower: Tower, first: int, normed: Tensor, patches: Tensor) -> Tensor:
    """What each patch adds to a token that attends to it alone, summed over the layers from `first` on; `(B, n, D)`.

    Without the biases and minus the mean over the patches: what is the same for all of them ranks none, and in half
    precision it would drown what is not.
    """
    total: Tensor | None = None
    eps = norm_eps(adapter.projections(tower.blocks[-1]).norm)
    wide = torch.promote_types(patches.dtype, torch.float32)
    plain = F.layer_norm(patches.to(wide), patches.shape[-1:], eps=eps)
    for index in range(first, len(tower.blocks)):
        weights = adapter.projections(tower.blocks[index])
        gamma = getattr(weights.norm, "weight", None)
        read = normed if index == first else plain if gamma is None else plain * gathered(gamma)
        read = (read - read.mean(dim=1, keepdim=True)).to(weights.value.dtype)
        added = F.linear(F.linear(read, gathered(weights.value)), gathered(weights.output)).to(wide)
        added = added if weights.output_scale is None else added * gathered(weights.output_scale)
        total = added if total is None else total + added
    assert total is not None
    return total


def _normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """The block's own norm, fed in the dtype of its weights: autocast is off here."""
    weight = getattr(norm, "weight", None)
    return norm(x if weight is None else x.to(weight.dtype))


def _projected(tower: Tower, tokens: Tensor) -> Tensor:
    """Tokens in the joint space, fed to the final norm in the dtype of its weights: autocast is off here."""
    weight = getattr(tower.final_norm, "weight", None)
    return tower.adapter.project(tower, tokens if weight is None else tokens.to(weight.dtype))


def check_values(adapter: Adapter, tower: Tower) -> None:
    """Refuse `relevance="values"` where the value-output path of a block cannot be read backwards."""
    eps = set()
    for index, block in enumerate(tower.blocks):
        weights = adapter.projections(block)
        reason = weights.nonlinear_values
        if reason is None and not isinstance(weights.norm, (nn.LayerNorm, nn.Identity)):
            reason = f"its pre-attention norm is {type(weights.norm).__name__}, not a LayerNorm"
        if reason is not None:
            raise ValueError(f'relevance="values" cannot read block {index} backwards: {reason}; use relevance="keys"')
        eps.add(norm_eps(weights.norm))
    if len(eps) > 1:
        raise ValueError(f'relevance="values" needs one LayerNorm eps in all blocks, found {sorted(eps)}')
