"""The op alone, as functions of tensors: relevance, keep, fuse, merge. No host, no state.

Shapes: `B` images, `N` tokens of which the first `P` are prefix tokens ([CLS], registers) and the other
`n = N - P` patches, `T` texts for every image, `D` width, `H` heads.
Source: TRIPS, Jiang et al., EMNLP 2022 (2022.emnlp-main.273); EViT, Liang et al., ICLR 2022 (2202.07800); ToMe, Bolya
et al., ICLR 2023 (2210.09461).
"""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import sized_attention
from .compat import is_exporting
from .relevance.kernels import (
    combine_attention,
    combine_scores,
    feature_relevance,
    joint_scores,
    key_relevance,
    linear_scores,
    normalised_scores,
    random_relevance,
    real_key_relevance,
    standardise,
    value_direction,
)

Fusion = Literal["mean", "sum", "none"]
FUSIONS: tuple[str, ...] = ("mean", "sum", "none")


def as_ratio(keep_rate: float) -> tuple[int, int]:
    """Return the nearest fraction with a denominator of at most a million, so that float dust does not count."""
    rate = Fraction(keep_rate).limit_denominator(10**6)
    return rate.numerator, rate.denominator


def num_kept(num_patches: int, keep_rate: float | tuple[int, int]) -> int:
    """Return how many of `num_patches` patches stay: `ceil(keep_rate * n)`, at least 1.

    Float dust does not count: 0.1 of 30 is 3, and 5/6 of 6 is 5. `keep_rate` may also be what `as_ratio` returned.
    """
    numerator, denominator = keep_rate if isinstance(keep_rate, tuple) else as_ratio(keep_rate)
    kept = max(1, -(-numerator * num_patches // denominator))
    return int(kept) if isinstance(kept, Tensor) else kept  # torch.jit.trace makes tensors of sizes


def num_tokens_after(
    num_patches: int, keep_rate: float | tuple[int, int], num_prefix_tokens: int, fusion: Fusion = "mean"
) -> int:
    """Return the length of the sequence after one selection layer: prefix, kept patches and the fused token, if any."""
    kept = num_kept(num_patches, keep_rate)
    return num_prefix_tokens + kept + num_fused(num_patches, kept, fusion)


def num_fused(num_patches: int, num_keep: int, fusion: Fusion = "mean") -> int:
    """Return how many tokens the patches that do not stay become: 1, or 0 if none goes or all are dropped."""
    return int(fusion != "none" and num_keep < num_patches)


def destinations(kept: Tensor, num_patches: int, num_prefix_tokens: int, rest: Tensor | int = -1) -> Tensor:
    """Return where every token went, `(B, P + n)`: its place in the shortened sequence, or -1 if it was dropped.

    Args:
        kept: `(B, k)`, the patches that stay, in the order of their tokens.
        num_patches: `n`.
        num_prefix_tokens: `P`; prefix tokens stay where they are.
        rest: place of the token that the other patches went into, -1 for none; or `(B, n)` of such places.
    """
    rows, places = kept.shape[0], torch.arange(kept.shape[1], device=kept.device) + num_prefix_tokens
    if not isinstance(rest, Tensor):
        rest = torch.full((rows, num_patches), rest, device=kept.device, dtype=kept.dtype)
    patches = rest.scatter(1, kept, places.to(kept.dtype).expand(rows, -1))
    prefix = torch.arange(num_prefix_tokens, device=kept.device, dtype=kept.dtype).expand(rows, -1)
    return torch.cat([prefix, patches], dim=1)


def most_relevant(weights: Tensor, num_keep: int) -> Tensor:
    """Return ascending indices of the `num_keep` largest weights of each row; the first of equals stay."""
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
    kept = most_relevant(weights, num_keep)
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


def merge_schedule(
    num_patches: int, keep_rate: float | tuple[int, int], merge: float | tuple[int, int], num_blocks: int
) -> tuple[int, ...]:
    """Return how many patches each of the `num_blocks` blocks before the first selection merges away.

    `R = round(merge * (n - T))` in all, with `T = ceil(keep_rate * n) + 1` the patch tokens after the selection; block
    i takes `floor((i + 1) R / j) - floor(i R / j)` of them, never more than half of what comes.

    Args:
        num_patches: `n`, the patches of the image.
        keep_rate: share of them that the first selection keeps.
        merge: share in [0, 1) of the removed patches that leaves by merging.
        num_blocks: `j`.
    """
    numerator, denominator = merge if isinstance(merge, tuple) else as_ratio(merge)
    whole, rest = divmod(numerator * max(0, num_patches - num_kept(num_patches, keep_rate) - 1), denominator)
    total = whole + int(2 * rest > denominator or (2 * rest == denominator and whole % 2 == 1))  # round(), in integers
    counts, left = [], num_patches
    for block in range(num_blocks):
        counts.append(min((block + 1) * total // num_blocks - block * total // num_blocks, left // 2))
        left -= counts[-1]
    return tuple(counts)


def merge_similar(
    tokens: Tensor, sizes: Tensor, keys: Tensor, num_merge: int, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Merge the most similar patches: one round of bipartite matching (ToMe §3).

    Each even patch looks for the odd patch whose key has the highest cosine; the `num_merge` best pairs become one
    token, in the place of the odd patch: `x = (s_u x_u + s_v x_v) / (s_u + s_v)`, `s = s_u + s_v`. Several even patches
    may go into one odd patch. Ties go to the first; the tokens stay in their order. Sums are one-hot matrix products.

    Args:
        tokens: `(B, P + n, D)`.
        sizes: `(B, P + n)`, how many patches each token stands for; above 0.
        keys: `(B, P + n, E)`, what is compared: the keys of the block's attention, averaged over the heads. No gradient
            flows through them.
        num_merge: `r` in `[0, n // 2]`; 0 returns what came.
        num_prefix_tokens: `P` >= 0, tokens in front that take no part.

    Returns:
        Tokens `(B, P + n - r, D)`, sizes `(B, P + n - r)`, and where each token that came went, `(B, P + n)`.

    Raises:
        ValueError: `num_merge` outside of its range.
    """
    found, out_sizes, into, _ = merge_pairs(tokens, sizes, keys, num_merge, num_prefix_tokens)
    return found, out_sizes, into


def merge_pairs(
    tokens: Tensor, sizes: Tensor, keys: Tensor, num_merge: int, num_prefix_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what `merge_similar` says; return also which patch each patch token is in the place of, `(B, n - r)`."""
    prefix, patches, width = num_prefix_tokens, tokens.shape[1] - num_prefix_tokens, tokens.shape[-1]
    if not 0 <= num_merge <= patches // 2:
        raise ValueError(f"num_merge must be in [0, {patches // 2}], half of the {patches} patches; got {num_merge}")
    rows, everything = tokens.shape[0], torch.arange(tokens.shape[1], device=tokens.device)
    if num_merge == 0:
        return tokens, sizes, everything.expand(rows, -1), everything[:patches].expand(rows, -1)
    wide = torch.promote_types(keys.dtype, torch.float32)
    compared = F.normalize(keys[:, prefix:].detach().to(wide), dim=-1)
    best, target = (compared[:, ::2] @ compared[:, 1::2].transpose(1, 2)).max(dim=-1)
    picked = most_relevant(best, num_merge)  # (B, r), among the even patches
    target = target.gather(1, picked)  # (B, r), among the odd ones

    even, odd = tokens[:, prefix::2], tokens[:, prefix + 1 :: 2]
    even_sizes, odd_sizes = sizes[:, prefix::2], sizes[:, prefix + 1 :: 2]
    hits = target.unsqueeze(1) == torch.arange(odd.shape[1], device=tokens.device).view(1, -1, 1)
    moved = hits.to(sizes.dtype) * even_sizes.gather(1, picked).unsqueeze(1)  # (B, odd, r)
    total = odd_sizes + moved.sum(dim=-1)
    start = torch.arange(rows, device=tokens.device).view(-1, 1)
    sources = even.flatten(0, 1).index_select(0, (picked + start * even.shape[1]).flatten()).view(rows, -1, width)
    share, shares = odd_sizes / total, moved / total.unsqueeze(-1)
    merged = odd * share.unsqueeze(-1).to(tokens.dtype) + shares.to(tokens.dtype) @ sources

    # Who stays, in order: a patch that went has no place of its own, and writes into one more column that is cut off.
    stays = torch.ones_like(best.new_empty(rows, patches), dtype=torch.long).scatter(1, 2 * picked, 0)
    place = stays.cumsum(dim=1) - 1
    left = patches - num_merge
    own = torch.where(stays > 0, place, torch.full_like(place, left))
    order = place.new_zeros(rows, left + 1).scatter(1, own, everything[:patches].expand(rows, -1))[:, :left]
    into = place.scatter(1, 2 * picked, place.gather(1, 2 * target + 1))
    here = everything[:patches]
    column = torch.div(here, 2, rounding_mode="floor") + (here % 2) * even.shape[1]  # of a patch in [even, odd]
    column = column.expand(rows, -1).gather(1, order) + prefix
    index = torch.cat([everything[:prefix].expand(rows, -1), column], dim=1)
    apart = torch.cat([tokens[:, :prefix], even, merged], dim=1)
    out = apart.flatten(0, 1).index_select(0, (index + start * apart.shape[1]).flatten()).view(rows, -1, width)
    out_sizes = torch.cat([sizes[:, :prefix], even_sizes, total], dim=1).gather(1, index)
    return out, out_sizes, torch.cat([everything[:prefix].expand(rows, -1), into + prefix], dim=1), order


__all__ = [
    "FUSIONS",
    "Fusion",
    "as_ratio",
    "combine_attention",
    "combine_scores",
    "destinations",
    "feature_relevance",
    "joint_scores",
    "keep_and_fuse",
    "key_relevance",
    "linear_scores",
    "merge_schedule",
    "merge_similar",
    "normalised_scores",
    "num_fused",
    "num_kept",
    "num_tokens_after",
    "random_relevance",
    "real_key_relevance",
    "sized_attention",
    "standardise",
    "value_direction",
]
