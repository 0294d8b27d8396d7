"""Hooks of users around a layer whose weights are read: do they change what it computes?"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compat import is_compiling
from .reading import gathered, held, place_of

_unheard: ContextVar[bool] = ContextVar("patchselect_unheard", default=False)


@contextmanager
def unheard() -> Iterator[None]:
    """Read weights without asking hooks, which would see what they are asked with: `apply` calls nobody's hooks."""
    token = _unheard.set(True)
    try:
        yield
    finally:
        _unheard.reset(token)


def has_own_forward(module: nn.Module) -> bool:
    """Tell whether a module carries a `forward` in front of that of its class.

    Where transformers 4.57 has collected hidden states it leaves that of the class behind, bound, which is none: the
    host's own, or the one that a selection has put in its place.
    """
    held = vars(module).get("forward")
    if held is None:
        return False
    kind = type(module)
    of_class = (vars(kind).get("forward"), getattr(vars(kind).get("_patchselect_base", kind), "forward", None))
    return getattr(held, "__self__", None) is not module or getattr(held, "__func__", module) not in of_class


def asks_hooks(module: nn.Module) -> bool:
    """Tell whether a module has hooks of users, and now is a time to ask them."""
    return hooks_of_users(module) and (is_compiling() or not _unheard.get())


def hooks_of_users(module: nn.Module) -> bool:
    """Tell whether hooks of somebody stand around the forward of a module, who may change what it computes.

    Those of torch that make weights or bring them do not, nor those with which transformers collects outputs.
    """
    hooks = module._forward_hooks, module._forward_pre_hooks
    return any(not _harmless(hook) for held in hooks for hook in held.values())


def _harmless(hook: Any) -> bool:
    place = getattr(getattr(hook, "func", hook), "__module__", None) or ""
    return place.startswith(("torch.nn.utils.", "torch.distributed.", "transformers.utils.output_capturing"))


def changed_by_hooks(linear: nn.Linear) -> bool:
    """Tell whether hooks of users change what a linear layer returns, by one token of ones; they see that token.

    Raises:
        TypeError: they do, and its weights are in shards (a later block under FSDP2), where it cannot be read by them.
    """
    if not asks_hooks(linear):
        return False
    if is_compiling():
        return True
    place = place_of(linear)
    device, weight = torch.device(place["device"]).type, held(linear, "weight")
    if device == "meta":  # nothing can be seen there
        return False
    if hasattr(weight, "full_tensor"):
        whole = copy.copy(linear)
        whole._parameters = {
            n: None if p is None else nn.Parameter(gathered(p.detach())) for n, p in linear._parameters.items()
        }
        if changed_by_hooks(whole):
            raise TypeError(
                f"a forward hook changes what {type(linear).__name__} returns, whose weights are in shards while they "
                'are read here: drop it, or use relevance="keys", which reads layers where they run'
            )
        return False
    token = torch.ones(1, 1, linear.in_features, **place)
    with torch.no_grad(), torch.autocast(device, enabled=False):
        plain = F.linear(token, weight, None if linear.bias is None else held(linear, "bias"))
        try:
            found = linear(token)
        except Exception:
            return True
    return bool(found.shape != plain.shape or not torch.allclose(found, plain, rtol=1e-3, atol=1e-6))


@torch.no_grad()
def refuse_bent(linear: Any, weight: Tensor, bias: Tensor) -> None:
    """Raise a ValueError if a layer with hooks is not the matrix `(out, in)` and bias that were read off."""
    tokens = torch.linspace(-1, 1, 2 * linear.in_features, device=weight.device, dtype=weight.dtype).view(1, 2, -1)
    expected, found = F.linear(tokens, weight, bias), linear(tokens)
    if (expected - found).abs().max() > 0.05 * found.abs().max():
        raise ValueError("its hooks make it something else than a matrix and a bias")


@torch.no_grad()
def refuse_changed_norm(norm: nn.Module, scale: Tensor) -> None:
    """Raise a TypeError if hooks change what a norm of this scale `(D,)` returns."""
    token = torch.linspace(-1, 1, scale.shape[-1], device=scale.device, dtype=scale.dtype)[None, None]
    if not torch.equal(norm(token), type(norm).forward(norm, token)):
        raise TypeError(f"a forward hook changes what {type(norm).__name__} returns, whose scale is read here: drop it")
