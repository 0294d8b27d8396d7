"""Changing what methods of one module object do, and putting it back exactly.

A module gets a subclass of its own class, made on the fly: its parameters, its name, its place in the model and every
`isinstance` stay as they are, `torch.compile` sees the change, and `deepcopy` and `pickle` work, because the class is
rebuilt from the original class and the functions that stand in for its methods. (`torch.nn.utils.parametrize` changes
modules in the same way.)
"""

from __future__ import annotations

import copyreg
import functools
import inspect
from collections.abc import Mapping
from typing import Any, Tuple

from torch import nn

from ..adapter import Wrapper
from ..compat import forget_compiled
from ..hooked import has_own_forward

Overrides = Tuple[Tuple[str, Wrapper], ...]
_classes: dict[tuple[type, Overrides], type] = {}


def _override(base: type, name: str, wrapper: Wrapper) -> Any:
    original = getattr(base, name)

    @functools.wraps(original)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # A method that was bound before the selection was removed, or a new instance made by `type(model)(config)`.
        if getattr(self, "_patchselect", None) is None:
            return original(self, *args, **kwargs)
        return wrapper(self, name, functools.partial(original, self), *args, **kwargs)

    return method


def _refuse_script(self: nn.Module) -> nn.Module:
    """Stand in the way of `torch.jit.script`, which compiles the source of the host's own methods."""
    if getattr(self, "_patchselect", None) is None:
        return self
    raise TypeError(
        f"torch.jit.script compiles the source of {type(self).__name__}, which knows nothing of a selection: use "
        "torch.compile, torch.export, or torch.jit.trace with the text features as input; or patchselect.remove first"
    )


def _reduce(self: nn.Module, protocol: Any) -> Any:
    swapped: Any = next(cls for cls in type(self).__mro__ if "_patchselect_base" in vars(cls))
    made, args, *rest = super(swapped, self).__reduce_ex__(protocol)
    if made is not copyreg.__newobj__ or args != (swapped,):  # type: ignore[attr-defined]
        return (made, args, *rest)
    return (_blank, (swapped._patchselect_base, swapped._patchselect_overrides), *rest)


def _blank(base: type, overrides: Overrides) -> Any:
    cls: Any = swapped_class(base, overrides)
    return cls.__new__(cls)


def swapped_class(base: type, overrides: Overrides) -> type:
    """Return the subclass of `base`, of its name, whose named methods are the given wrappers; one per pair."""
    key = (base, overrides)
    if key not in _classes:
        namespace = {name: _override(base, name, wrapper) for name, wrapper in overrides}
        namespace.update(
            {
                "__module__": base.__module__,
                "__qualname__": base.__qualname__,
                "__doc__": base.__doc__,
                "__reduce_ex__": _reduce,
                "__prepare_scriptable__": _refuse_script,
                "_patchselect_base": base,
                "_patchselect_overrides": overrides,
            }
        )
        _classes[key] = type(base)(base.__name__, (base,), namespace)
    return _classes[key]


def own_class(cls: Any) -> Any:
    """Return the class that a module has without a selection, or its class where `is_stuck` says so."""
    return cls if is_stuck(cls) else _without_swap(cls)


def is_stuck(cls: type) -> bool:
    """Tell whether a class of somebody else on top of a swapped one calls `super()`, and so cannot be made again."""
    swapped = next((parent for parent in cls.__mro__ if "_patchselect_base" in vars(parent)), object)
    above = [kind for kind in cls.__mro__ if kind is not swapped and issubclass(kind, swapped)]
    return swapped is not object and any("__class__" in _free_names(x) for kind in above for x in vars(kind).values())


def _free_names(value: Any) -> tuple[str, ...]:
    function = inspect.unwrap(getattr(value, "__func__", getattr(value, "fget", value)) or value)
    code = getattr(function, "__code__", None)
    return code.co_freevars if code is not None else ()


def swap(module: nn.Module, overrides: Mapping[str, Wrapper]) -> None:
    """Let `wrapper(module, name, original, *args, **kwargs)` stand in for each named method of this one object."""
    base = vars(type(module)).get("_patchselect_base", type(module))
    _clear(module)
    module.__class__ = swapped_class(base, tuple(overrides.items()))
    forget_compiled()


def unswap(module: nn.Module) -> bool:
    """Give the module its own class back, under whatever subclasses others (FSDP2) have put on top since.

    Returns:
        Whether that could be done: not if somebody else has given it another class.
    """
    kind = type(module)
    if not hasattr(kind, "_patchselect_base") or is_stuck(kind):
        return False
    _clear(module)
    module.__class__ = _without_swap(kind)
    forget_compiled()
    return True


def _clear(module: nn.Module) -> None:
    """Take a `forward` of the module's own class away that was left in it, since it has another class from now on."""
    if not has_own_forward(module):
        vars(module).pop("forward", None)


def _without_swap(cls: type) -> type:
    if "_patchselect_base" in vars(cls):
        return cls._patchselect_base  # type: ignore[attr-defined, no-any-return]
    if not any("_patchselect_base" in vars(parent) for parent in cls.__mro__):
        return cls
    namespace = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, tuple(_without_swap(parent) for parent in cls.__bases__), namespace)
