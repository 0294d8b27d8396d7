"""How a host shows the weights that its attention computes with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compat import is_compiling, partial_average


@dataclass
class Projections:
    """The weights of one self-attention, `(D, D)` as in `nn.Linear`: views of the host's own parameters.

    Where a wrapper (LoRA) stands around one of them, `affine` computes it from that wrapper.
    """

    query: Tensor
    query_bias: Tensor | None
    key: Tensor
    key_bias: Tensor | None
    value: Tensor
    output: Tensor
    num_heads: int
    scale: float
    norm: nn.Module
    """The pre-attention norm."""
    output_scale: Tensor | None = None
    """LayerScale of the attention branch, `(D,)`."""
    query_norm: Callable[[Tensor], Tensor] | None = None
    """Norm of the queries per head, `(..., H, E)`; with one, keys cannot be folded and are computed."""
    key_norm: Callable[[Tensor], Tensor] | None = None
    nonlinear_values: str | None = None
    """Why `relevance="values"` cannot read this attention backwards, if it cannot."""
    qkv: Callable[[Tensor], Sequence[Tensor]] | None = None
    """Normed tokens `(B, N, D)` to queries, keys and values, each `(B, N, H * E)`, by the host's own layers."""
    out: Callable[[Tensor], Tensor] | None = None
    """What the heads read, side by side, `(B, N, H * E)`, to what is added to the residual, by the host's own layers.

    Without these two, attention cannot count sizes (`merge`, `sizes`).
    """
    dropout: float = 0.0
    """Probability with which an attention weight is dropped in training."""

    @classmethod
    def fused(cls, weight: Tensor, bias: Tensor | None, **rest: Any) -> Projections:
        """Split one `(3D, D)` projection in the order q, k, v and its bias; `rest` are the other fields."""
        query, key, value = weight.chunk(3, dim=0)
        query_bias, key_bias, _ = (None, None, None) if bias is None else bias.chunk(3, dim=0)
        rest.setdefault("qkv", lambda normed: F.linear(normed, weight, bias).chunk(3, dim=-1))
        return cls(query=query, query_bias=query_bias, key=key, key_bias=key_bias, value=value, **rest)

    @classmethod
    def separate(cls, query: Any, key: Any, value: Any, output: Any, **rest: Any) -> Projections:
        """Read four linear layers; `rest` are the other fields."""
        layers = query, key, value
        rest.setdefault("qkv", lambda normed: [layer(normed) for layer in layers])
        rest.setdefault("out", output)
        (query, query_bias), (key, key_bias) = affine(query), affine(key)
        (value, _), (output, _) = affine(value), affine(output)
        return cls(query, query_bias, key, key_bias, value, output, **rest)


def thirds(linear: nn.Module) -> Callable[[Tensor], Sequence[Tensor]]:
    """Return the `qkv` of a host that has all three in one linear layer."""
    return lambda normed: linear(normed).chunk(3, dim=-1)


def rate(dropout: Any) -> float:
    """Return the probability of a dropout that may be a module, a number or missing."""
    return float(getattr(dropout, "p", dropout) or 0.0) if not isinstance(dropout, nn.Identity) else 0.0


def mean_key(weights: Projections, normed: Tensor) -> Tensor:
    """Return the keys of normed tokens `(B, N, D)`, averaged over the heads: `(B, N, E)`.

    The mean of the heads' weights makes them, unless each head normalises its keys.
    """
    if weights.key_norm is not None:
        keys = F.linear(normed.to(weights.key.dtype), weights.key, weights.key_bias)
        found: Tensor = weights.key_norm(keys.unflatten(-1, (weights.num_heads, -1)))
        return found.mean(dim=-2)
    key = weights.key.unflatten(0, (weights.num_heads, -1)).mean(dim=0)
    bias = None if weights.key_bias is None else weights.key_bias.unflatten(0, (weights.num_heads, -1)).mean(dim=0)
    return F.linear(normed.to(key.dtype), key, bias)


def affine(linear: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight `(out, in)` and bias `(out,)` of a linear layer, with what a wrapper around it (LoRA) adds.

    What a wrapper does is read off from the unit vectors, which costs a product of the size of its weight with itself.
    """
    if all(name == "parametrizations" for name, _ in linear.named_children()):
        return linear.weight, linear.bias
    weight = linear.weight
    device = "cpu" if weight.is_meta else weight.device.type
    units = torch.eye(linear.in_features, device=weight.device, dtype=weight.dtype)
    with torch.autocast(device, enabled=False):
        bias = linear(torch.zeros_like(units[:1]))
        return (linear(units) - bias).T, bias[0]


def gathered(weight: Tensor) -> Tensor:
    """Return a parameter that FSDP2 holds in shards as a whole, and every other tensor as it is.

    Only weights of modules that are not running need this. The gradient of each rank's share is averaged over the
    ranks, as FSDP2 does with every other gradient.
    """
    if is_compiling() or not hasattr(weight, "full_tensor"):
        return weight
    sharded: Any = weight
    return sharded.full_tensor(grad_placements=[partial_average()] * sharded.device_mesh.ndim)


def present(module: nn.Module | None) -> bool:
    """Check whether an optional part of a host is there and does something."""
    return module is not None and not isinstance(module, nn.Identity)


def norm_eps(norm: nn.Module) -> float:
    """Return the epsilon of a norm; 1e-5 where it names none."""
    return float(getattr(norm, "eps", 1e-5) or 1e-5)


def through_norm(direction: Tensor, norm: nn.Module | None) -> Tensor:
    """Pull a direction `(..., D)` back through a LayerNorm: times the norm's scale, minus its mean."""
    if norm is None or not present(norm):
        return direction
    weight = getattr(norm, "weight", None)
    scaled = direction if weight is None else direction * gathered(weight)
    return scaled - scaled.mean(dim=-1, keepdim=True)


def normalised(norm: nn.Module, x: Tensor) -> Tensor:
    """Apply a host's norm to `x` in the dtype of its weights, for code that runs with autocast off."""
    weight = getattr(norm, "weight", None)
    return norm(x if weight is None else x.to(weight.dtype))


def pool_cost(pool: nn.Module | None) -> tuple[int, int]:
    """Return the multiply-adds of an attentional pooler: queries, output and MLP once, and those per token it reads."""
    weights = {} if pool is None else {n: p for n, p in pool.named_parameters() if p.dim() == 2}
    kv = [p for n, p in weights.items() if "kv.weight" in n]
    packed = [p for n, p in weights.items() if n.endswith("in_proj_weight")]
    split = [p for n, p in weights.items() if n.endswith(("k_proj_weight", "v_proj_weight"))]
    queries = getattr(pool, "query", None)
    count = queries.shape[0] if isinstance(queries, nn.Parameter) and queries.dim() == 2 else 1
    per_token = sum(p.numel() for p in kv) + sum(2 * p.numel() // 3 for p in packed) + sum(p.numel() for p in split)
    if not per_token:
        return 0, 0
    rest = sum(p.numel() for n, p in weights.items() if n != "query" and "probe" not in n) - per_token
    width = (kv or packed or split)[0].shape[-1]
    return count * rest, per_token + 2 * count * width
