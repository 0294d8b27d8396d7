"""The op, as functions of tensors: relevance, keep, fuse. No host, no state.

Shapes: `B` images, `N` tokens of which the first `P` are prefix tokens ([CLS], registers) and the other
`n = N - P` patches, `T` texts for every image, `D` width, `H` heads.
Source: TRIPS, Jiang et al., EMNLP 2022 (2022.emnlp-main.273); EViT, Liang et al., ICLR 2022 (2202.07800).
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .compat import is_exporting

Fusion = Literal["mean", "sum", "none"]
FUSIONS: tuple[str, ...] = ("mean", "sum", "none")


def as_ratio(keep_rate: float) -> tuple[int, int]:
    """A rate as the nearest fraction with a denominator of at most a million, so that float dust does not count."""
    rate = Fraction(keep_rate).limit_denominator(10**6)
    return rate.numerator, rate.denominator


def num_kept(num_patches: int, keep_rate: float | tuple[int, int]) -> int:
    """How many of `num_patches` patches stay: `ceil(keep_rate * n)`, at least 1.

    Float dust does not count: 0.1 of 30 is 3, and 5/6 of 6 is 5. `keep_rate` may also be what `as_ratio` returned.
    """
    numerator, denominator = keep_rate if isinstance(keep_rate, tuple) else as_ratio(keep_rate)
    return max(1, -(-numerator * num_patches // denominator))


def num_tokens_after(num_patches: int, keep_rate: float, num_prefix_tokens: int, fusion: Fusion = "mean") -> int:
    """Length of the sequence after one selection layer: prefix, kept patches and the fused token, if any."""
    kept = num_kept(num_patches, keep_rate)
    return num_prefix_tokens + kept + int(fusion != "none" and kept < num_patches)


def _wide(x: Tensor) -> Tensor:
    """Scores are turned into weights in at least float32, whatever the dtype of the tokens."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _for_rows(per_text: Tensor, rows: int) -> Tensor:
    """`(B', T, D)` for `rows` images: as it is if `B'` is 1 or `rows`, in tiles if `rows` is a multiple of `B'`."""
    return per_text if per_text.shape[0] in (1, rows) else per_text.repeat(rows // per_text.shape[0], 1, 1)


def key_relevance(
    query: Tensor, patches: Tensor, key_weight: Tensor, num_heads: int, scale: float | None = None
) -> Tensor:
    """Text-aware attention against the layer's keys, without computing the keys (TRIPS §3.2; `relevance="keys"`).

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
    return _head_attention(_wide(_for_rows(u, patches.shape[0])) @ _wide(patches).transpose(-1, -2), num_heads)


def real_key_relevance(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """The same attention against keys that exist, for layers whose keys are normalised per head.

    Args:
        query: `(B', T, H, E)`, projected and normalised; `B` is a multiple of `B'`.
        keys: `(B, n, H, E)`, projected and normalised.
        scale: what the logits are multiplied with.

    Returns:
        `(B, T, n)`, as `key_relevance`.
    """
    query = rearrange(_for_rows(query.flatten(2), keys.shape[0]), "b t (h e) -> b h t e", h=keys.shape[2])
    scores = query @ rearrange(keys, "b n h e -> b h e n") * scale
    return _head_attention(rearrange(scores, "b h t n -> b (t h) n"), keys.shape[2])


def _head_attention(scores: Tensor, num_heads: int) -> Tensor:
    """`(B, T * H, n)` logits to `(B, T, n)` attention, averaged over the heads."""
    attention = _wide(scores).softmax(dim=-1)
    return rearrange(attention, "b (t h) n -> b t h n", h=num_heads).mean(dim=2)


def feature_relevance(query: Tensor, patches: Tensor) -> Tensor:
    """The paper's literal text: `a = softmax(q . x / sqrt(D))` (TRIPS §3.2; `relevance="features"`).

    Args:
        query: `(B', T, D)`, projected by `W_q`; `B` is a multiple of `B'`.
        patches: `(B, n, D)`, after the block's self-attention and its residual.

    Returns:
        `(B, T, n)`, each row >= 0 with sum 1.
    """
    query = _for_rows(query, patches.shape[0])
    return (_wide(query) @ _wide(patches).transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)


def standardise(scores: Tensor) -> Tensor:
    """Scores minus their mean over the patches, over their population standard deviation; `(..., n)` to `(..., n)`.

    Scores that are all equal become zeros (up to rounding), which a softmax turns into uniform weights.
    """
    scores = _wide(scores)
    centred = scores - scores.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    floor = (8 * torch.finfo(scores.dtype).eps * scores.detach().abs().amax(dim=-1, keepdim=True)).square()
    equal = variance <= floor
    return torch.where(equal, torch.zeros_like(centred), centred * torch.where(equal, 1.0, variance).rsqrt())


def combine_attention(attention: Tensor) -> Tensor:
    """Several texts, one selection: a patch counts by the text that needs it most. `(B, T, n)` to `(B, n)`, sum 1."""
    if attention.shape[1] == 1:
        return attention.squeeze(1)
    most = attention.amax(dim=1)
    return most / most.sum(dim=-1, keepdim=True)


def combine_scores(scores: Tensor) -> Tensor:
    """The same for unnormalised scores (`values`, `joint`): `(B, T, n)` to weights `(B, n)` that sum to 1.

    The maximum over the texts of the standardised scores, then the softmax of its standardisation.
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
    """`LN(x) . v` for a LayerNorm without scale and shift, without normalising the patches.

    `LN(x) . v = x . (v - mean(v)) / std(x)`: two matrix products and a norm instead of a pass that writes `(n, D)`.

    Args:
        direction: `v`, `(B', T, D)`; `B` is a multiple of `B'`.
        patches: `x`, `(B, n, D)`.
        eps: of the norm.

    Returns:
        `(B, T, n)`, in at least float32.
    """
    patches, direction = _wide(patches), _wide(_for_rows(direction, patches.shape[0]))
    width = patches.shape[-1]
    centred = direction - direction.mean(dim=-1, keepdim=True)
    probes = torch.cat([centred, torch.full_like(centred[:, :1], 1 / width)], dim=1)
    scores, mean = (probes @ patches.transpose(-1, -2)).split([direction.shape[1], 1], dim=1)
    square = torch.linalg.vector_norm(patches, dim=-1).square().unsqueeze(1) / width
    # Where all entries of a patch are nearly the same, the difference may round to less than nothing.
    return scores * ((square - mean.square()).clamp_min(0) + eps).rsqrt()


def linear_scores(direction: Tensor, patches: Tensor) -> Tensor:
    """`x . v`: `(B', T, D)` and `(B, n, D)` to `(B, T, n)`, in at least float32."""
    return _wide(_for_rows(direction, patches.shape[0])) @ _wide(patches).transpose(-1, -2)


def joint_scores(text: Tensor, patches: Tensor) -> Tensor:
    """Cosine of text and patch in the joint space (`joint`): `(B', T, E)`, `(B, n, E)` to `(B, T, n)`."""
    dtype = torch.promote_types(_wide(text).dtype, _wide(patches).dtype)
    text = F.normalize(_for_rows(text, patches.shape[0]).to(dtype), dim=-1)
    return text @ F.normalize(patches.to(dtype), dim=-1).transpose(-1, -2)


def random_relevance(like: Tensor) -> Tensor:
    """Uniform noise that sums to 1 over the patches of `like` `(B, n, D)`: the honest baseline. `(B, n)`."""
    noise = torch.rand(
        like.shape[0], like.shape[1], device=like.device, dtype=torch.promote_types(like.dtype, torch.float32)
    )
    return noise / noise.sum(dim=-1, keepdim=True)


def _most_relevant(weights: Tensor, num_keep: int) -> Tensor:
    """Ascending indices of the `num_keep` largest weights of each row; the first of equals stay."""
    if is_exporting():  # exporters know topk, which ONNX defines with the same order of equals
        return weights.topk(num_keep, dim=-1).indices.sort(dim=-1).values
    return weights.sort(dim=-1, descending=True, stable=True).indices[..., :num_keep].sort(dim=-1).values


def keep_and_fuse(
    tokens: Tensor, relevance: Tensor, num_keep: int, num_prefix_tokens: int = 1, fusion: Fusion = "mean"
) -> tuple[Tensor, Tensor]:
    """Keep the most relevant patches and fuse the rest into one token (TRIPS §3.2, EViT §3.2).

    The fused token is a weighted matrix product, `x_f = sum a_i x_i` over the patches that go; with `fusion="mean"`
    the weights are renormalised to sum to 1, which keeps it at the scale of a token.

    Args:
        tokens: `(B, P + n, D)`.
        relevance: `(B, n)`, or `(B, T, n)` to select T times from each image; weights >= 0, any scale. Pass signed
            scores through a softmax first: weights that cancel out would blow up the fused token.
        num_keep: `k` in `[1, n]`; the first of equals stay.
        num_prefix_tokens: `P` >= 0, tokens in front that always stay.
        fusion: `"mean"`, `"sum"` or `"none"` (the rest is dropped).

    Returns:
        `(B, P + k + 1, D)` (no fused token if nothing was left to fuse or `fusion="none"`) and the kept patches
        `(B, k)`, ascending indices among the n; with `(B, T, n)` both have `B * T` rows, image-major. A row with a
        NaN among its weights has one in its tokens (the fused one or, without, the first).
    """
    single = relevance.dim() == 2
    weights = relevance.unsqueeze(1) if single else relevance
    num_patches, width = weights.shape[-1], tokens.shape[-1]
    kept = _most_relevant(weights, num_keep)
    unknown = weights.isnan().any(dim=-1, keepdim=True)
    prefix = torch.arange(num_prefix_tokens, device=tokens.device).expand(*kept.shape[:2], -1)
    start = torch.arange(tokens.shape[0], device=tokens.device).view(-1, 1, 1) * tokens.shape[1]
    index = torch.cat([prefix, kept + num_prefix_tokens], dim=-1) + start
    # Rows of a flat matrix: several times faster than gather() with an expanded index.
    out = tokens.flatten(0, 1).index_select(0, index.flatten()).view(*index.shape, width)
    if fusion != "none" and num_keep < num_patches:
        rest = weights.scatter(-1, kept, 0.0)
        if fusion == "mean":
            total = rest.sum(dim=-1, keepdim=True)
            even = torch.ones_like(weights).scatter(-1, kept, 0.0) / (num_patches - num_keep)
            rest = torch.where(total > 0, rest / total.masked_fill(~(total > 0), 1.0), even)
        rest = rest.masked_fill(unknown, float("nan"))
        fused = rest.to(tokens.dtype) @ tokens[:, num_prefix_tokens:]
        out = torch.cat([out, fused.unsqueeze(2)], dim=2)
    elif num_keep < num_patches:
        out[:, :, 0].masked_fill_(unknown, float("nan"))
    return out.flatten(0, 1), kept.flatten(0, 1)
