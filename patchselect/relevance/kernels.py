"""Products of a text with patches: the arithmetic of every relevance, as functions of tensors. No host, no state.

Shapes: `B` images, `n` patches, `T` texts for every image, `D` width, `H` heads. Rows of texts `B'` are 1, `B`, or a
divisor of `B` (then they repeat in tiles).
Source: TRIPS, Jiang et al., EMNLP 2022 (2022.emnlp-main.273) §3.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Return scores in at least float32, whatever the dtype of the tokens, before they become weights."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_tiles(per_text: Tensor, rows: int) -> Tensor:
    """Fit `(B', T, D)` to `rows` images: as it is if `B'` is 1 or `rows`, in tiles if `rows` is a multiple of it."""
    return per_text if per_text.shape[0] in (1, rows) else per_text.repeat(rows // per_text.shape[0], 1, 1)


def key_relevance(
    query: Tensor, patches: Tensor, key_weight: Tensor, num_heads: int, scale: float | None = None
) -> Tensor:
    """Compute text-aware attention against the layer's keys, which are not computed (TRIPS §3.2; `relevance="keys"`).

    `q . (W_k x + b_k)`: the bias is the same for every patch and vanishes in the softmax, and `q W_k` folds into one
    `D`-vector a head, so the scores are a `(n, D) x (D, H)` product and no attention kernel is touched.

    Args:
        query: `(B', T, D)`, already projected by `W_q` (with its bias); `B` is a multiple of `B'`.
        patches: `(B, n, D)`, after the block's pre-attention norm.
        key_weight: `(D, D)`, `W_k` as in `torch.nn.Linear`.
        num_heads: `H`.
        scale: what the logits are multiplied with; `None` is `(D / H) ** -0.5`.

    Returns:
        `(B, T, n)`: softmax over the patches, mean over the heads; each row is >= 0 and sums to 1.
    """
    head_width = query.shape[-1] // num_heads
    q = rearrange(query, "b t (h e) -> h (b t) e", h=num_heads)
    u = q @ rearrange(key_weight, "(h e) d -> h e d", h=num_heads)
    u = rearrange(u, "h (b t) d -> b (t h) d", b=query.shape[0]) * (head_width**-0.5 if scale is None else scale)
    return _head_attention(wide(in_tiles(u, patches.shape[0])) @ wide(patches).transpose(-1, -2), num_heads)


def real_key_relevance(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Compute the same attention against keys that exist, for layers whose keys are normalised per head.

    Args:
        query: `(B', T, H, E)`, projected and normalised; `B` is a multiple of `B'`.
        keys: `(B, n, H, E)`, projected and normalised.
        scale: what the logits are multiplied with.

    Returns:
        `(B, T, n)`, as `key_relevance`.
    """
    query = rearrange(in_tiles(query.flatten(2), keys.shape[0]), "b t (h e) -> b h t e", h=keys.shape[2])
    scores = query @ rearrange(keys, "b n h e -> b h e n") * scale
    return _head_attention(rearrange(scores, "b h t n -> b (t h) n"), keys.shape[2])


def _head_attention(scores: Tensor, num_heads: int) -> Tensor:
    """Turn `(B, T * H, n)` logits into `(B, T, n)` attention, averaged over the heads."""
    attention = wide(scores).softmax(dim=-1)
    return rearrange(attention, "b (t h) n -> b t h n", h=num_heads).mean(dim=2)


def feature_relevance(query: Tensor, patches: Tensor) -> Tensor:
    """Compute the paper's literal text: `a = softmax(q . x / sqrt(D))` (TRIPS §3.2; `relevance="features"`).

    Args:
        query: `(B', T, D)`, projected by `W_q`; `B` is a multiple of `B'`.
        patches: `(B, n, D)`, after the block's self-attention and its residual.

    Returns:
        `(B, T, n)`, each row >= 0 with sum 1.
    """
    query = in_tiles(query, patches.shape[0])
    return (wide(query) @ wide(patches).transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)


def standardise(scores: Tensor) -> Tensor:
    """Subtract the mean over the patches and divide by the population standard deviation; `(..., n)` to `(..., n)`.

    Scores that are all equal become zeros (up to rounding), which a softmax turns into uniform weights.
    """
    scores = wide(scores)
    centred = scores - scores.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    floor = (8 * torch.finfo(scores.dtype).eps * scores.detach().abs().amax(dim=-1, keepdim=True)).square()
    equal = variance <= floor
    return torch.where(equal, torch.zeros_like(centred), centred * variance.masked_fill(equal, 1.0).rsqrt())


def combine_attention(attention: Tensor) -> Tensor:
    """Give each patch its highest weight over all texts, `(B, T, n)` to `(B, n)`; the sum is 1 again."""
    if attention.shape[1] == 1:
        return attention.squeeze(1)
    most = attention.amax(dim=1)
    return most / most.sum(dim=-1, keepdim=True)


def combine_scores(scores: Tensor) -> Tensor:
    """Give each patch its highest score over all texts, `(B, T, n)` to weights `(B, n)` that sum to 1.

    For unnormalised scores (`values`, `joint`): the maximum over the texts of the standardised scores, then the softmax
    of its standardisation.
    """
    standard = standardise(scores)
    if scores.shape[1] == 1:
        return standard.squeeze(1).softmax(dim=-1)
    return standardise(standard.amax(dim=1)).softmax(dim=-1)


def value_direction(direction: Tensor, value_weight: Tensor, output_weight: Tensor) -> Tensor:
    """Pull a direction of the residual stream back through one layer's value-output path: `w = g W_o W_v`.

    Args:
        direction: `g`, `(..., D)`.
        value_weight: `W_v`, `(D, D)` as in `torch.nn.Linear`.
        output_weight: `W_o`, `(D, D)` as in `torch.nn.Linear`.
    """
    return direction @ output_weight @ value_weight


def normalised_scores(direction: Tensor, patches: Tensor, eps: float) -> Tensor:
    """Compute `LN(x) . v` for a LayerNorm without scale and shift, without normalising the patches.

    `LN(x) . v = x . (v - mean(v)) / std(x)`: two matrix products and a norm instead of a pass that writes `(n, D)`.

    Args:
        direction: `v`, `(B', T, D)`; `B` is a multiple of `B'`.
        patches: `x`, `(B, n, D)`.
        eps: of the norm.

    Returns:
        `(B, T, n)`, in at least float32.
    """
    patches, direction = wide(patches), wide(in_tiles(direction, patches.shape[0]))
    width = patches.shape[-1]
    centred = direction - direction.mean(dim=-1, keepdim=True)
    probes = torch.cat([centred, torch.full_like(centred[:, :1], 1 / width)], dim=1)
    scores, mean = (probes @ patches.transpose(-1, -2)).split([direction.shape[1], 1], dim=1)
    square = torch.linalg.vector_norm(patches, dim=-1).square().unsqueeze(1) / width
    # Where all entries of a patch are nearly the same, the difference may round to less than nothing.
    return scores * ((square - mean.square()).clamp_min(0) + eps).rsqrt()


def linear_scores(direction: Tensor, patches: Tensor) -> Tensor:
    """Compute `x . v`: `(B', T, D)` and `(B, n, D)` to `(B, T, n)`, in at least float32."""
    return wide(in_tiles(direction, patches.shape[0])) @ wide(patches).transpose(-1, -2)


def joint_scores(text: Tensor, patches: Tensor) -> Tensor:
    """Compute the cosine of text and patch in the joint space (`joint`): `(B', T, E)`, `(B, n, E)` to `(B, T, n)`."""
    dtype = torch.promote_types(wide(text).dtype, wide(patches).dtype)
    text = F.normalize(in_tiles(text, patches.shape[0]).to(dtype), dim=-1)
    return text @ F.normalize(patches.to(dtype), dim=-1).transpose(-1, -2)


def random_relevance(like: Tensor) -> Tensor:
    """Draw uniform noise `(B, n)` that sums to 1 over the patches of `like` `(B, n, D)`: the honest baseline."""
    noise = torch.rand(
        like.shape[0], like.shape[1], device=like.device, dtype=torch.promote_types(like.dtype, torch.float32)
    )
    return noise / noise.sum(dim=-1, keepdim=True)
