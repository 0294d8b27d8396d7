"""A model in evaluation mode for one caller, while others go on using it as it is."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from ..wiring.state import STATE, Wiring


def without_dropout(wiring: Wiring) -> Wiring:
    """Return a selection whose modules are all in evaluation mode: this one, if they are, else a copy of it.

    Switching a model that other threads train would switch their dropout off too. So the modules of a model in training
    mode are copied, and share every parameter and buffer with the original: a copy costs no memory to speak of.
    """
    if not any(module.training for module in wiring.model.modules()):
        return wiring
    memo: dict[int, Any] = {}
    for module in wiring.model.modules():
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        memo.update({id(tensor): tensor for tensor in held if isinstance(tensor, Tensor)})
    model = copy.deepcopy(wiring.model, memo)
    model.train(False)
    state = vars(model)[STATE]
    return state if isinstance(state, Wiring) else state.wiring
