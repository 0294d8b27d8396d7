"""How a host shows the weights that its attention computes with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compat import is_compiling
from .hooked import asks_hooks, changed_by_hooks, has_own_forward, hooks_of_users, refuse_bent, refuse_changed_norm
from .reading import accelerate_hooks, evaluating, gathered, held, place_of, remade_by_hook

UNIT = 256.0
"""How long the unit vectors are that a layer is read off with: its bias, which is taken away again, counts little."""
_QKV = ("query", "key", "value")


@dataclass
class Projections:
    """The weights of one self-attention, `(D, D)` as in `nn.Linear`: views of the host's own parameters.

    Where a layer does not show its weight (LoRA, quantisation), `affine` asks the layer for it.
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
    def packed(cls, packed: Any, output: Any, **rest: Any) -> Projections:
        """Read a linear layer to `(3D,)`, in the order q, k, v, and that of the output; `rest` are the other fields."""
        if shows_weight(packed) and shows_weight(output):
            return cls.fused(*affine(packed), output=affine(output)[0], **rest)
        return _Hidden({"packed": packed, "output": output}, rest)

    @classmethod
    def separate(cls, query: Any, key: Any, value: Any, output: Any, **rest: Any) -> Projections:
        """Read four linear layers; `rest` are the other fields."""
        layers = query, key, value
        rest.setdefault("qkv", lambda normed: [layer(normed) for layer in layers])
        rest.setdefault("out", output)
        linears = {"query": query, "key": key, "value": value, "output": output}
        if not all(map(shows_weight, linears.values())):
            return _Hidden(linears, rest)
        (query, query_bias), (key, key_bias) = affine(query), affine(key)
        return cls(query, query_bias, key, key_bias, affine(value)[0], affine(output)[0], **rest)


class _Hidden(Projections):
    """The same of layers that do not show their weights: what nobody asks for is not computed."""

    def __init__(self, linears: dict[str, Any], rest: dict[str, Any]) -> None:
        self._linears = linears
        self.__dict__.update(rest)

    def __getattr__(self, name: str) -> Any:
        linears = self.__dict__.get("_linears", {})
        part = name[: -len("_bias")] if name.endswith("_bias") else name
        if part in linears:
            found = dict(zip((part, f"{part}_bias"), affine(linears[part])))
        elif "packed" in linears and part in _QKV:
            pieces = [[None] * 3 if whole is None else whole.chunk(3) for whole in affine(linears["packed"])]
            found = dict(zip((*_QKV, *(f"{each}_bias" for each in _QKV)), (*pieces[0], *pieces[1])))
        else:
            raise AttributeError(name)
        self.__dict__.update(found)
        return found[name]


def shown(weights: Projections) -> bool:
    """Tell whether the layers showed their weights, so that to read them again costs nothing."""
    return not isinstance(weights, _Hidden)


def is_linear(module: Any) -> bool:
    """Tell a linear layer, whatever stands around it or became of its weight, by its widths."""
    widths = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return isinstance(module, nn.Module) and all(isinstance(width, int) for width in widths)


def products_of(module: nn.Module) -> int:
    """Count the weights that each token meets in a module, with its adapters merged, whatever form they are kept in."""
    if is_linear(module):
        return int(module.in_features * module.out_features)  # type: ignore[operator]
    own = sum(part.numel() for part in module.parameters(recurse=False) if part.dim() == 2)
    return own + sum(map(products_of, module.children()))


def matrix(linear: Any) -> Tensor:
    """Return the matrix `(out, in)` that a linear layer applies, of a module that need not be running."""
    return gathered(affine(linear)[0])


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
    """Return weight `(out, in)` and bias `(out,)` that a linear layer applies, whatever its attributes say.

    What a wrapper (LoRA), a quantised layer or one with a `forward` of its own applies is read off from the unit
    vectors, which costs a product of the size of its weight with itself. Dropout is off meanwhile. Nothing is kept:
    what such a layer computes may depend on more than its tensors.

    Raises:
        TypeError: the layer cannot be asked; says why, and what to do.
    """
    if shows_weight(linear):
        return held(linear, "weight"), None if linear.bias is None else held(linear, "bias")
    if is_compiling():
        if any(isinstance(part, nn.Dropout) and part.p > 0 and part.training for part in linear.modules()):
            raise TypeError(
                f"the dropout inside of {type(linear).__name__} hides the matrix that it applies from a compiled "
                "graph: set that dropout to 0 (lora_dropout=0), or train without torch.compile"
            )
        return _read_off(linear)
    try:
        return _read_off(evaluating(linear))
    except Exception as error:
        raise TypeError(
            f"{type(linear).__module__}.{type(linear).__qualname__} does not show the matrix that it applies, which "
            f"the relevance is computed from (asked with unit vectors, it said: {error}): merge or dequantise this "
            "layer, or leave the attention and the projections of the vision tower as they are"
        ) from error


def output_of(attention: Any) -> Tensor:
    """Return the matrix of the output layer `out_proj` of an attention.

    `nn.MultiheadAttention` never calls that layer but takes its weight, whatever stands around it.
    """
    if isinstance(attention, nn.MultiheadAttention):
        return held(attention, "out_proj.weight")
    return affine(attention.out_proj)[0]


def shows_weight(linear: Any) -> bool:
    """Tell whether `held(linear, "weight")` is what a linear layer applies."""
    if type(linear).forward is not nn.Linear.forward or not runs_own_class(linear) or changed_by_hooks(linear):
        return False
    weight = linear._parameters.get("weight")
    if weight is None:  # made of other parameters: by a property each time it is read, or by a hook that we know
        return hasattr(type(linear), "weight") or remade_by_hook(linear, "weight") is not None
    whole = hasattr(weight, "full_tensor") or not hasattr(type(weight), "__tensor_flatten__")  # sharded, or quantised
    return whole and weight.dim() == 2


def runs_own_class(module: nn.Module) -> bool:
    """Tell whether no `forward` stands in front of that of its class, but such as bring its weights."""
    if not has_own_forward(module):
        return True
    own = getattr(module.__dict__.get("_old_forward"), "__func__", None)
    return own is type(module).forward and all(hasattr(hook, "weights_map") for hook in accelerate_hooks(module))


def _read_off(linear: Any) -> tuple[Tensor, Tensor]:
    place = place_of(linear)
    device = torch.device(place["device"]).type
    units = torch.eye(linear.in_features, **place) * UNIT
    with torch.autocast("cpu" if device == "meta" else device, enabled=False):
        bias = linear(torch.zeros_like(units[:1])[None])[0]
        found = ((linear(units[None])[0] - bias) / UNIT).T, bias[0]
        if hooks_of_users(linear) and not is_compiling() and device != "meta":
            refuse_bent(linear, *found)
    return found


def present(module: nn.Module | None) -> bool:
    """Check whether an optional part of a host is there and does something."""
    return module is not None and not isinstance(module, nn.Identity)


def norm_scale(norm: nn.Module) -> Tensor | None:
    """Return the scale `(D,)` of a norm that need not be running; `None` where it has none.

    Raises:
        TypeError: it is hidden in a wrapper (LN tuning), or a hook changes what the norm returns.
    """
    if isinstance(getattr(norm, "base_layer", None), nn.Module):
        raise TypeError(f"{type(norm).__name__} hides the scale of the norm in it, which is read here: merge it first")
    if getattr(norm, "weight", None) is None:
        return None
    scale = gathered(held(norm, "weight"))
    if asks_hooks(norm) and not is_compiling() and not scale.is_meta:
        refuse_changed_norm(norm, scale)
    return scale


def norm_eps(norm: nn.Module) -> float:
    """Return the epsilon of a norm; 1e-5 where it names none."""
    return float(getattr(norm, "eps", 1e-5) or 1e-5)


def through_norm(direction: Tensor, norm: nn.Module | None) -> Tensor:
    """Pull a direction `(..., D)` back through a LayerNorm: times the norm's scale, minus its mean."""
    if norm is None or not present(norm):
        return direction
    weight = norm_scale(norm)
    scaled = direction if weight is None else direction * weight
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
