"""Where the tensors of a module are at this moment, and what it computes with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .compat import is_compiling, partial_average


def held(module: nn.Module, path: str) -> Tensor:
    """Return a parameter of `module`, or of a part of it, as it computes with it: `held(attention, "out_proj.weight")`.

    Hooks of torch (`prune`, `weight_norm`, `spectral_norm`) make it anew before each forward, and accelerate brings it
    from where it is offloaded to; between two calls the attribute is of the last one, or empty.
    """
    way, _, name = path.rpartition(".")
    owner = module.get_submodule(way) if way else module
    remade = remade_by_hook(owner, name)
    if remade is not None:
        return remade
    found: Tensor = getattr(owner, name)
    return _fetched(module, path, found) if found.is_meta else found


def remade_by_hook(module: nn.Module, name: str) -> Tensor | None:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod) and hook._tensor_name == name:
            return hook.apply_mask(module)
        if isinstance(hook, WeightNorm) and hook.name == name:
            return hook.compute_weight(module)
        if isinstance(hook, SpectralNorm) and hook.name == name:
            made_of, u, v = (getattr(module, f"{name}_{part}") for part in ("orig", "u", "v"))
            flat = hook.reshape_weight_to_matrix(made_of)
            return made_of / torch.dot(u.clone(), torch.mv(flat, v.clone()))  # the next forward writes into u and v
    return None


def accelerate_hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def _fetched(module: nn.Module, path: str, empty: Tensor) -> Tensor:
    """Bring a tensor from where accelerate has put it, if it has; `path` may lead through parts of `module`."""
    steps = path.split(".")
    for depth in range(len(steps)):
        owner, rest = module.get_submodule(".".join(steps[:depth])), ".".join(steps[depth:])
        for hook in accelerate_hooks(owner):
            if getattr(hook, "weights_map", None) is not None and rest in hook.weights_map:
                return hook.weights_map[rest].to(hook.execution_device)  # type: ignore[no-any-return]
    return empty


def plain_tensors(tensor: Tensor) -> list[Tensor]:
    """Return what a tensor holds: itself, or the parts of a quantised one."""
    if hasattr(tensor, "full_tensor") or not hasattr(type(tensor), "__tensor_flatten__"):
        return [tensor]
    whole: Any = tensor
    return [plain for name in whole.__tensor_flatten__()[0] for plain in plain_tensors(getattr(tensor, name))]


def place_of(module: nn.Module) -> dict[str, Any]:
    """Return device and dtype that a module computes with, as keyword arguments, wherever its weights are now."""
    tensors = [*module.parameters(), *module.buffers()]
    wide = (tensor.dtype for tensor in tensors if tensor.is_floating_point() and tensor.element_size() > 1)
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    if device.type == "meta":
        hooks = (hook for part in module.modules() for hook in accelerate_hooks(part))
        device = next((hook.execution_device for hook in hooks if hasattr(hook, "weights_map")), device)
    return {"device": device, "dtype": next(wide, torch.get_default_dtype())}


def evaluating(module: Any) -> Any:
    """Return a module that computes as this one does in evaluation, of the same parameters; `module` is not touched."""
    if not any(part.training for part in module.modules()):
        return module
    twin = module.__new__(type(module))
    twin.__dict__.update(vars(module))
    parts = {name: None if part is None else evaluating(part) for name, part in module._modules.items()}
    twin.__dict__.update(training=False, _modules=type(module._modules)(parts))
    return twin


def gathered(weight: Tensor) -> Tensor:
    """Return a parameter that FSDP2 holds in shards as a whole, and every other tensor as it is.

    Only weights of modules that are not running need this. The gradient of each rank's share is averaged over the
    ranks, as FSDP2 does with every other gradient.
    """
    if is_compiling() or not hasattr(weight, "full_tensor"):
        return weight
    sharded: Any = weight
    return sharded.full_tensor(grad_placements=[partial_average()] * sharded.device_mesh.ndim)
