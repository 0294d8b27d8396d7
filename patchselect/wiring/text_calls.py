"""Calls that bring a text along: the text half runs first, and is answered from memory when the host comes to it."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Callable

from torch import nn

from ..adapter import TextCall, TextRun
from ..compat import is_dynamo_compiling
from .guidance import check_text, current, scope
from .state import Wiring

Original = Callable[..., Any]


def call_with_text(model: nn.Module, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Run a method of the whole model that gets image and text together: the text guides the image.

    The text is encoded first; when the host comes to its own text encoder with the same arguments, `recall_text`
    answers from memory. A text given by `guide` wins over the one of the call.
    """
    wiring: Wiring = model._patchselect  # type: ignore[assignment]
    tower, guidance = wiring.towers[0], current(wiring)
    fanned_out = guidance is not None and guidance.pairing == "all" and guidance.text.shape[-2] > 1
    if fanned_out and tower.adapter.fuses(model, tower, name, args, kwargs):
        raise ValueError(refusal_of_all(f"{type(model).__name__}.{name}"))
    if wiring.plan.guidance != "text" or guidance is not None:
        return original(*args, **kwargs)
    call = tower.adapter.text_of_call(model, tower, name, args, kwargs)
    if call is None:
        return _without_text(f"{type(model).__name__}.{name}", original, *args, **kwargs)
    check_text(wiring, call.features)
    pairing = _pairing(wiring, call, f"{type(model).__name__}.{name}")
    exact = call.images_per_text if pairing == "paired" else 0
    with scope(wiring, call.features, pairing, exact=exact, memo=call.remembered, repeat="tile"):
        return original(*args, **kwargs)


def refusal_of_all(name: str) -> str:
    """Say why a call cannot have a row per image and text, and what can."""
    return (
        f'{name} reads each image beside the text of its own row, and pairing="all" gives a row per image and text: '
        "repeat the images, images.repeat_interleave(len(texts), dim=0), and give text i for image i, "
        "text_features.repeat(len(images), 1), or use patchselect.score_pairs(model, images, texts)"
    )


_textless: ContextVar[str | None] = ContextVar("patchselect_textless", default=None)


def _without_text(name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Run a call that brings no text, and remember its name for the error that may follow."""
    if is_dynamo_compiling():
        return original(*args, **kwargs)
    token = _textless.set(name)
    try:
        return original(*args, **kwargs)
    finally:
        _textless.reset(token)


def where_text_may_come_from(wiring: Wiring) -> str:
    """Return the part of an error that says how a call may bring its text; nothing for a model that takes none."""
    if not reads_text(wiring):
        return ""
    name = _textless.get()
    if name is None:
        return "call the whole model with image and text together, "
    return f"bring it with the call of {name} (no text was found among its arguments), "


def _pairing(wiring: Wiring, call: TextCall, name: str) -> str:
    """Return which texts of a call guide which of its images, which is never guessed from how many there are.

    Raises:
        ValueError: the call compares all images with all texts, and `apply` was not told what that means; or it does
            not, and was told to share its texts.
    """
    said = wiring.plan.pairing
    if not call.compares_all:
        if said == "shared":
            raise ValueError(
                f'{name} pairs text i with image i, so pairing="shared" of patchselect.apply has no meaning for it: '
                "apply without pairing=, or give texts that all images share with patchselect.guide(model, "
                'text_features, pairing="shared")'
            )
        return "paired"
    if said is None and len(call.features) > 1:
        raise ValueError(
            f"{name} compares every image with every text, so it cannot be told from the call which text chooses the "
            'patches of which image. Say it: patchselect.apply(model, pairing="paired") where text i belongs to image '
            'i (contrastive training), patchselect.apply(model, pairing="shared") where the texts are candidates for '
            "every image (class prompts: one selection per image for all of them), or patchselect.score_pairs(model, "
            "images, texts), where each text chooses for itself"
        )
    return said or "shared"  # a single text guides every image either way


def remembered(module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TextRun | None:
    """Return the run of this text encoder that `call_with_text` has made already, if this call would repeat it."""
    guidance = current(module._patchselect)  # type: ignore[arg-type]
    for run in () if guidance is None else guidance.memo:
        if run.module is module and run.method == name and run.matches(args, kwargs):
            return run  # type: ignore[no-any-return]
    return None


def recall_text(module: nn.Module, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Answer a call of a text encoder that `call_with_text` has run already from memory."""
    run = remembered(module, name, args, kwargs)
    if run is None:
        return original(*args, **kwargs)
    # Hosts write into the outputs that they get: each gets its own container.
    return type(run.result)(**run.result) if isinstance(run.result, dict) else run.result


def reads_text(wiring: Wiring) -> bool:
    """Tell whether some method of the patched model takes image and text together."""
    changed = (getattr(type(module), "_patchselect_overrides", ()) for module in wiring.patched)
    return any(wrapper is call_with_text for overrides in changed for _, wrapper in overrides)
