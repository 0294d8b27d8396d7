"""Whether parts of a model are what they were: no other module, parameter or `forward` in its place, and no hook.

To read all weights of a tower again costs a pass with one image more than what is read with them; to see that they
still stand where they stood costs next to nothing.
"""

from __future__ import annotations

from operator import is_
from typing import Any, Collection, NamedTuple

from torch import Tensor, nn

from ..hooked import hooks_of_users


class Held(NamedTuple):
    """A parameter, how often autograd saw it written to, and where and how it lies in memory."""

    parameter: Tensor
    version: int
    address: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @classmethod
    def of(cls, parameter: Tensor) -> Held:
        where = parameter.data_ptr(), tuple(parameter.shape), tuple(parameter.stride())
        return cls(parameter, parameter._version, *where)

    def stands(self) -> bool:
        """Tell whether nothing was written that autograd has seen, and no other memory was put in."""
        now = self.parameter
        return (
            now._version == self.version
            and now.data_ptr() == self.address
            and now.stride() == self.stride
            and now.shape == self.shape
        )


class Standing(NamedTuple):
    """One module, and what it held."""

    module: nn.Module
    owns: bool
    """Whether a parameter that matters is its own: then a hook may change what it computes with it."""
    kind: type
    forward: Any
    children: tuple[nn.Module | None, ...]
    parameters: tuple[Tensor | None, ...]

    @classmethod
    def of(cls, module: nn.Module, owns: bool) -> Standing:
        own = tuple(module._modules.values()), tuple(module._parameters.values())
        return cls(module, owns, type(module), module.__dict__.get("forward"), *own)

    def stands(self) -> bool:
        """Tell whether class, `forward`, parts and parameters are the same, and no hook of a user counts."""
        module = self.module
        return (
            type(module) is self.kind
            and module.__dict__.get("forward") is self.forward
            and not (self.owns and hooks_of_users(module))
            and all_same(module._modules.values(), self.children)
            and all_same(module._parameters.values(), self.parameters)
        )


def standing(module: nn.Module, parameters: Collection[int]) -> list[Standing]:
    """Note what `module` and its parts hold on the way to parameters; nothing if none of them is there.

    Args:
        module: where to look.
        parameters: by their `id`.
    """
    below = [each for child in module.children() for each in standing(child, parameters)]
    owns = any(id(own) in parameters for own in module._parameters.values())
    return [Standing.of(module, owns), *below] if owns or below else []


def all_same(now: Collection[Any], before: Collection[Any]) -> bool:
    """Tell whether two collections hold the same objects in the same order."""
    return len(now) == len(before) and all(map(is_, now, before))
