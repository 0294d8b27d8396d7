"""What to say of a model that no adapter supports: what in it is supported, or what keeps it from being so."""

from __future__ import annotations

from typing import Any, Callable

from torch import nn

from ..adapter import Tower
from .text_calls import call_with_text
from .wording import as_code, instead_of_whole

Ask = Callable[[nn.Module], "list[Tower]"]
"""Return the towers of a module, `[]` where it has none that is supported."""
OWN = (
    "A host of your own is one patchselect.Adapter: apply(model, adapter=MyAdapter()); examples/plain_vit.py is one, "
    "CONTRIBUTING.md says what it must answer"
)
TRAITS = (
    (("rotary", "rope"), "it uses rotary positions per patch"),
    (("relative_position", "rel_pos"), "its attention has relative positions per patch"),
    (("window", "swin"), "it attends in windows of the grid"),
)
"""Words in the names of modules, parameters and their classes, and what they say."""


def supported_inside(model: nn.Module, ask: Ask) -> tuple[str, bool] | None:
    """Return the path of the outermost supported part of `model`, and whether it reads text and image together.

    Parts that read both go first: they have the joint space that a tower alone lacks.
    """
    alone: str | None = None
    inside = ""
    for path, part in model.named_modules():
        if not path or (inside and path.startswith(inside)) or not any(True for _ in part.children()):
            continue
        towers = ask(part)
        if not towers:
            continue
        inside = path + "."
        methods = towers[0].adapter.methods(part, towers)
        if any(wrapper is call_with_text for _, wrappers in methods for wrapper in wrappers.values()):
            return path, True
        alone = path if alone is None else alone
    return None if alone is None else (alone, False)


def advice(model: nn.Module, path: str, reads_text: bool) -> str:
    """Return the sentence on a supported part at `path` of `model`, which is or is not a model of text and image."""
    name, part, code = type(model).__name__, model.get_submodule(path), as_code(model, path)
    if reads_text:
        return (
            f"{name} holds a {type(part).__name__}, which is supported: call patchselect.apply({code}). It is changed "
            f"in place, so {name} goes on calling it, under `with patchselect.guide({code}, text_features):` where its "
            "calls bring no text"
        )
    return instead_of_whole(model, path)


def reason(model: nn.Module) -> str:
    """Say what keeps a model that holds nothing supported from being patched, as far as its structure tells."""
    blocks = _blocks(model)
    if blocks is None:
        return "it has no sequence of transformer blocks"
    words = {part for name, _ in model.named_parameters() for part in name.lower().split(".")}
    words |= {type(part).__name__.lower() for part in model.modules()}
    words |= {name.lower().rpartition(".")[2] for name, _ in model.named_modules()}
    words |= {name.lower() for name in vars(blocks[0])}
    for traits, said in TRAITS:
        if any(trait in word for trait in traits for word in words):
            return said
    names = ", ".join(name for name, _ in blocks[0].named_children())
    return (
        f"its blocks ({type(blocks[0]).__name__} of {names}) are of a layout that no adapter reads yet, and only "
        "pre-norm blocks over one sequence of patches can be supported"
    )


def _blocks(model: nn.Module) -> list[Any] | None:
    """Return the longest sequence of modules of one class that attend, if there is one."""
    found: list[Any] = []
    for part in model.modules():
        held = list(part.children()) if isinstance(part, (nn.ModuleList, nn.Sequential)) else []
        alike = len(held) > len(found) and len({type(block) for block in held}) == 1
        if alike and any("att" in name.lower() for name, _ in held[0].named_modules()):
            found = held
    return found or None


def unsupported(model: nn.Module, asked: str, names: str, ask: Ask, refusal: TypeError | None) -> TypeError:
    """Return the error for a model of which `ask` finds no tower; `refusal` is what an adapter said of it."""
    found = supported_inside(model, ask)
    if found is not None and (found[1] or refusal is None):
        return TypeError(f"{advice(model, *found)}. Nothing was changed")
    if refusal is not None:
        return refusal
    return TypeError(
        f"{asked} {type(model).__module__}.{type(model).__qualname__}: {reason(model)}. Nothing was changed. Supported "
        f"are plain pre-norm ViT towers of the adapters {names}. {OWN}"
    )
