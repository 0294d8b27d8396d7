"""Attention that counts how many patches each token stands for (proportional attention, ToMe §3), as one fused call.

A mask `(B, 1, 1, N)` of `log s` does it. The other way, a key that is one number wider, `q' = [q, 1 / scale]` and
`k' = [k, log s]`, keeps kernels that take no mask, but copies queries, keys and values: on CPUs it takes 1.1 to 1.7
times as long, where the mask costs nothing that can be measured (`python -m benchmarks.speed.sized_attention`).
"""

from __future__ import annotations

from typing import Callable

from torch import Tensor

from .compat import fused_attention
from .weights import Projections


def sized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sizes: Tensor,
    scale: float | Tensor | None = None,
    dropout: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Return `softmax(q k^T * scale + log s) v`: a key of size s counts as s equal keys of size 1.

    Args:
        query, key, value: `(B, H, N, E)`.
        sizes: `(B, N)`, above 0.
        scale: of the logits; `None` is `E ** -0.5`, a tensor must broadcast to `(B, H, N, E)`.
        dropout: probability with which an attention weight is dropped, in [0, 1).
        mask: added to the logits, `(B, 1, 1, N)` or what broadcasts to `(B, H, N, N)`.

    Returns:
        `(B, H, N, E)`.
    """
    if isinstance(scale, Tensor):
        query, scale = query * scale, 1.0
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    bias = sizes.log().to(query.dtype)[:, None, None]
    return fused_attention(query, key, value, bias if mask is None else bias + mask.to(query.dtype), scale, dropout)


def attention_branch(
    weights: Projections, normed: Tensor, sizes: Tensor, training: bool = False, mask: Tensor | None = None,
    turn: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run a host's attention with sizes, by its own linear layers.

    Args:
        weights: of the host's attention, with `qkv` and `out`.
        normed: `(B, N, D)`, the block's input after its pre-attention norm.
        sizes: `(B, N)`.
        training: whether attention weights are dropped.
        mask: as of `sized_attention`.
        turn: of queries and keys `(B, N, H, E)` by the places of their tokens.

    Returns:
        What is added to the residual, `(B, N, D)`, and the keys, averaged over the heads and not turned, `(B, N, E)`.
    """
    assert weights.qkv is not None and weights.out is not None
    query, key, value = (x.unflatten(-1, (weights.num_heads, -1)) for x in weights.qkv(normed))
    query = query if weights.query_norm is None else weights.query_norm(query)
    key = key if weights.key_norm is None else weights.key_norm(key)
    turned = (query, key) if turn is None else (turn(query), turn(key))
    q, k, v = (x.to(value.dtype).transpose(1, 2) for x in (*turned, value))
    dropout = weights.dropout if training else 0.0
    read = sized_attention(q, k, v, sizes=sizes, scale=weights.scale, dropout=dropout, mask=mask)
    return weights.out(read.transpose(1, 2).flatten(2)), key.mean(dim=2)
