"""What to advise where a host's own switch checkpoints its blocks reentrantly."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn


def advice_of_transformers(model: Any, tower: nn.Module) -> str | None:
    """Return what this release of transformers offers; `None` where its switch is off."""
    on = any(getattr(part, "gradient_checkpointing", False) for part in tower.modules())
    if not on and not getattr(getattr(tower, "config", None), "gradient_checkpointing", False):  # before 4.11
        return None
    switch = getattr(model, "gradient_checkpointing_enable", None)
    if switch is not None and "gradient_checkpointing_kwargs" in inspect.signature(switch).parameters:  # 4.35
        return "call gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
    return "turn gradient checkpointing off, which this release of transformers does reentrantly alone"


def advice_of_set_grad_checkpointing(tower: nn.Module) -> str | None:
    """Return what open_clip and timm offer; `None` where their switch is off."""
    if not any(getattr(part, "grad_checkpointing", False) for part in tower.modules()):
        return None
    return "call set_grad_checkpointing(False), as this release checkpoints reentrantly alone"
