"""Does a block treat a token alike wherever it stands, and whatever stands in other rows?

Asked of each block that runs on a shorter sequence. Those that select were compared with their two halves
(`guard.check_halves`), which says nothing of the others, nor of what attention or MLP make of a token's place: a
relative position bias, a convolution over the grid, windows that are rows of the batch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..adapter import Tower
from .swapping import own_class
from .twins import asked, call_of, difference_of, has_no_kernels, is_elsewhere, own_output, said, tensors_of

ORDER = (2, 0, 1)
"""In which order the patches come the second time."""
COARSE = 0.1
"""How far a row may depend on others, of what a block adds: quantised layers round to the range of the batch."""


def check_order(tower: Tower, index: int) -> None:
    """Raise a TypeError if a block depends on where a token stands, or on other rows; asked as `guard.check_halves`."""
    block = tower.blocks[index]
    if is_elsewhere(block):
        return
    with asked(tower, block) as (twin, tokens):
        own, tokens, error = own_output(tower, twin, tokens)
        if error is None:
            refuse_order(tower, index, twin, own, tokens)
        elif not has_no_kernels(error, tokens):
            raise TypeError(_refusal(tower, index, f"could not be asked, as it raised {said(error)}"))


def refuse_order(tower: Tower, index: int, twin: Any, own: Any, tokens: Tensor) -> None:
    """Raise the same, given a copy of the block and what it returns of `tokens`; places of rotary towers go along."""
    try:
        own = _tokens(own, tokens)
        moved = _moved(tower, twin, tokens, rows=2)
        if difference_of(own, moved, tokens) is None:
            return
        # Quantised layers round to the range of the whole batch, so each question is asked for itself.
        if difference_of(own, _moved(tower, twin, tokens, rows=1), tokens) is not None:
            found = "makes something else of a patch where it stands elsewhere in the sequence"
        elif difference_of(own, moved, tokens, COARSE) is None:
            return
        else:
            found = "makes something else of an image beside another one in the batch"
    except Exception as raised:
        if has_no_kernels(raised, tokens):
            return
        found = f"raised {said(raised)} on the same tokens in another order"
    raise TypeError(_refusal(tower, index, found))


def _moved(tower: Tower, twin: Any, tokens: Tensor, rows: int) -> Tensor:
    """Run a block on its tokens in another order, with another image beside them; return them in their own order."""
    first = tokens if tower.batch_first else tokens.transpose(0, 1)
    order = torch.tensor(ORDER, device=tokens.device)
    prefix = torch.arange(tower.num_prefix_tokens, device=tokens.device)
    given = first[:, torch.cat([prefix, order + tower.num_prefix_tokens])]
    if rows > 1:
        given = torch.cat([given, -0.5 * first.flip(1)])
    args, kwargs = call_of(tower, twin, given if tower.batch_first else given.transpose(0, 1))
    if tower.rotary:
        args, kwargs = tower.adapter.at_places(tower, twin, order.expand(rows, -1), *args, **kwargs)
    torch.manual_seed(0)
    own = functools.partial(type(twin).forward, twin)
    made = tower.adapter.run(tower, twin, own, *args, **kwargs)
    found = _tokens(made, given if tower.batch_first else given.transpose(0, 1))
    found = found if tower.batch_first else found.transpose(0, 1)
    found = found[:1, torch.cat([prefix, order.argsort() + tower.num_prefix_tokens])]
    return found if tower.batch_first else found.transpose(0, 1)


def _tokens(output: Any, tokens: Tensor) -> Tensor:
    """Return the tokens in what a block returns, which may have attention maps beside them.

    Raises:
        ValueError: there are none of the shape of those that came.
    """
    found = next((tensor for tensor in tensors_of(output) if tensor.shape == tokens.shape), None)
    if found is None:
        raise ValueError(f"it returns no tokens {tuple(tokens.shape)}")
    return found


def _refusal(tower: Tower, index: int, what: str) -> str:
    kind = own_class(type(tower.blocks[index]))
    return (
        f"block {index} of {type(tower.module).__name__} cannot follow a selection: with fewer patches it must compute "
        f"for each what it computes among all, and the forward of {kind.__module__}.{kind.__qualname__} {what}. Select "
        "after the last block of this kind (layers), without merge, or say how places follow the patches: "
        "apply(model, adapter=…) with a patchselect.Adapter of your own (rotary towers, at_places)"
    )
