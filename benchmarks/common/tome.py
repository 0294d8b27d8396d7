"""Token merging (ToMe, Bolya et al., ICLR 2023, arXiv 2210.09461) as a baseline, written from the paper.

Per layer, between attention and MLP (§3): patches are split alternately into two sets A and B; each of A draws an
edge to the most similar one of B (cosine of the attention's keys, averaged over the heads); the `r` most similar
edges are kept and their ends averaged, weighted by how many patches each token stands for (its size `s`). Later
attention counts a token as often as its size: `softmax(Q K^T / sqrt(d) + log s)`. Prefix tokens are never merged.

The attention runs either as the published equation says, as a map in plain torch, or through torch's fused
`scaled_dot_product_attention` with `log s` as its mask, which is newer than the paper and the stronger rival.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from patchselect.adapter import Tower
from patchselect.wiring.towers import find_towers


class Matching(NamedTuple):
    """Which tokens of A stay `(B, a - r)`, which go `(B, r)`, and with which of B those merge `(B, r)`."""

    stay: Tensor
    go: Tensor
    into: Tensor


def match(keys: Tensor, removed: int) -> Matching:
    """Match tokens by bipartite soft matching (§3, "Bipartite Soft Matching").

    Args:
        keys: `(B, n, E)`, what patches are compared by.
        removed: `r` in `[1, n // 2]`, how many patches go.
    """
    keys = F.normalize(keys, dim=-1)
    similarity, partner = (keys[:, ::2] @ keys[:, 1::2].transpose(-1, -2)).max(dim=-1)
    order = similarity.argsort(dim=-1, descending=True)
    go = order[:, :removed]
    return Matching(order[:, removed:].sort(dim=-1).values, go, partner.gather(1, go))


def merge(tokens: Tensor, sizes: Tensor, keys: Tensor, removed: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Merge `removed` patches into others.

    Args:
        tokens: `(B, P + n, D)`.
        sizes: `(B, P + n, 1)`, how many patches each token stands for.
        keys: `(B, P + n, E)`, the keys, averaged over the heads.
        removed: `r`; 0 returns what came, more than `n // 2` counts as `n // 2`.
        prefix: `P`, tokens in front that are never merged.

    Returns:
        Tokens `(B, P + n - r, D)` and sizes `(B, P + n - r, 1)`.
    """
    removed = min(removed, (tokens.shape[1] - prefix) // 2)
    if removed <= 0:
        return tokens, sizes
    found = match(keys[:, prefix:], removed)

    def summed(x: Tensor) -> Tensor:
        a, b = x[:, prefix::2], x[:, prefix + 1 :: 2]
        stay, go, into = (index.unsqueeze(-1).expand(-1, -1, x.shape[-1]) for index in found)
        return torch.cat([x[:, :prefix], a.gather(1, stay), b.scatter_add(1, into, a.gather(1, go))], dim=1)

    total = summed(sizes)
    return summed(tokens * sizes) / total, total


def schedule(total: int, depth: int, first: int | None = None) -> list[int]:
    """Return `total` removals spread evenly over `depth` layers: the paper's constant `r`, also where it is no integer.

    With `first`, over the first so many layers alone.
    """
    over = depth if first is None else first
    steps = [(layer + 1) * total // over - layer * total // over for layer in range(over)]
    return steps + [0] * (depth - over)


def front(depth: int) -> int:
    """Return the first third of `depth` layers: removals save the most FLOPs there; it did best at equal FLOPs."""
    return max(1, round(depth / 3))


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, sizes: Tensor | None, fused: bool) -> Tensor:
    """Attend in proportion, `softmax(Q K^T * scale + log s) V`, on `(B, H, N, E)`; `sizes` `(B, N, 1)`, or all 1."""
    bias = None if sizes is None else sizes.log().to(query.dtype).transpose(1, 2).unsqueeze(1)
    if fused:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
    logits = (query * scale) @ key.transpose(-2, -1)
    return (logits if bias is None else logits + bias).softmax(dim=-1) @ value


def run_block(
    tower: Tower,
    block: Any,
    removed: int,
    first: bool,
    fused: bool,
    state: dict[str, Tensor | None],
    *args: Any,
    **_: Any,
) -> Any:
    """Run one block with merging; `state` carries the sizes from block to block of one forward pass."""
    x: Tensor = args[0] if tower.batch_first else args[0].transpose(0, 1)
    weights = tower.adapter.projections(block)
    if weights.key_norm is not None:
        raise TypeError("this ToMe baseline does not know query and key norms")
    if tower.rotary:
        raise TypeError("ToMe does not say where a merged token stands, which rotary positions ask")
    if weights.qkv is None or weights.out is None:
        raise TypeError(f"this ToMe baseline does not know the attention of {type(block).__name__}")
    sizes = None if first else state["sizes"]
    parts = weights.qkv(weights.norm(x))
    query, key, value = (rearrange(part, "b n (h e) -> b h n e", h=weights.num_heads) for part in parts)
    mixed = attend(query, key, value, float(weights.scale), sizes, fused)
    branch = weights.out(rearrange(mixed, "b h n e -> b n (h e)"))
    x = x + (branch if weights.output_scale is None else branch * weights.output_scale)
    if removed:
        sizes = torch.ones_like(x[..., :1]) if sizes is None else sizes
        x, sizes = merge(x, sizes, key.mean(dim=1), removed, tower.num_prefix_tokens)
    state["sizes"] = sizes
    return tower.adapter.finish(tower, block, x if tower.batch_first else x.transpose(0, 1), None)


@contextmanager
def token_merging(model: nn.Module, removed: int, fused: bool = True, first: int | None = None) -> Iterator[None]:
    """Let the vision tower of `model` merge `removed` patches in all, spread over its blocks, while this lasts.

    `fused` chooses between the attention map in plain torch and torch's fused attention; `first` merges in the first
    so many blocks alone.
    """
    (tower,) = find_towers(model)
    state: dict[str, Tensor | None] = {}
    steps = schedule(removed, len(tower.blocks), first)
    try:
        for index, (block, step) in enumerate(zip(tower.blocks, steps)):
            block.forward = partial(run_block, tower, block, step, index == 0, fused, state)  # type: ignore[method-assign]
        yield
    finally:
        for block in tower.blocks:
            vars(block).pop("forward", None)


def matching_flops(target: float, count: Callable[[int], float], most: int, guess: int | None = None) -> int:
    """Return how many patches ToMe must remove in all to cost `target`, by bisection; costs fall as removals grow.

    Args:
        target: FLOPs to meet.
        count: FLOPs with that many removals.
        most: the largest number of removals.
        guess: where the answer is likely to be: where it is within 1 of that, 2 to 4 counts find it.
    """
    count = lru_cache(maxsize=None)(count)
    low, high = 0, most
    for near in () if guess is None else (guess, guess - 1, guess + 1):
        if 0 <= near < most and count(near) >= target >= count(near + 1):
            low, high = near, near + 1
            break
    low_cost, high_cost = count(low), count(high)
    while high - low > 1 and low_cost > target > high_cost:
        # Regula falsi, kept inside of the bracket: costs are almost linear, so a few counts are enough.
        middle = min(high - 1, max(low + 1, low + round((high - low) * (low_cost - target) / (low_cost - high_cost))))
        cost = count(middle)
        if cost >= target:
            low, low_cost = middle, cost
        else:
            high, high_cost = middle, cost
    return low if low_cost - target <= target - high_cost else high
