"""How each host checkpoints its blocks, by release: what its switch takes, and what that kind can carry."""

from __future__ import annotations

from typing import Any, NamedTuple

from since import missing, needs
from torch import nn


class Way(NamedTuple):
    """One kind of checkpointing."""

    options: dict[str, Any]
    reentrant: bool
    carries_text: bool
    """Whether a text that needs a gradient gets it; if not, it is refused."""
    advice: str
    """What the refusal advises, as a regular expression: it must exist in this release."""


def ways(name: str) -> list[Way]:
    """Return the kinds that the switch of host `name` offers."""
    if name in ("clip", "siglip"):
        needs("checkpoints of CLIP")
        if missing("checkpointing kinds") is not None:
            return [Way({}, True, False, "turn gradient checkpointing off, which this release")]
        advice = r"gradient_checkpointing_kwargs=\{'use_reentrant': False\}"
        carries = missing("checkpointed layers") is None
        return [
            Way({"use_reentrant": False}, False, True, advice),
            Way({"use_reentrant": True}, True, carries, advice),
        ]
    old = missing("open_clip checkpoints" if name == "open_clip" else "timm checkpoints") is not None
    return [Way({}, old, not old, r"call set_grad_checkpointing\(False\)")]


def needs_graph(name: str) -> None:
    """Skip where the only kind is reentrant, which wants a block's input to need a gradient."""
    if name in ("clip", "siglip"):
        needs("checkpointing kinds")
    else:
        needs("open_clip checkpoints" if name == "open_clip" else "timm checkpoints")


def switch_on(model: nn.Module, options: dict[str, Any]) -> None:
    """Turn the host's own checkpointing on, as its release does it."""
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable(**({"gradient_checkpointing_kwargs": options} if options else {}))
    elif hasattr(model, "vision_model"):  # transformers before 4.11
        for tower in (model.vision_model, model.text_model):
            tower.encoder.config.gradient_checkpointing = True
    else:
        if not hasattr(model, "set_grad_checkpointing"):
            needs("timm switch")
        model.set_grad_checkpointing(True)
