"""Short keys of tensors, to tell what was computed from them from what was not."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .compat import VIEWS_OTHER_SIZES

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AT_ONCE = 2**15
"""Words that are mixed together: few enough for the cache, and for a tight limit of memory."""


@torch.no_grad()
def checksums(tensors: Sequence[Tensor]) -> tuple[str, ...]:
    """One of each tensor, from its dtype, its shape and its bits in their order; computed where the tensor lies."""
    sums, kinds = [], []
    for tensor in tensors:
        local = getattr(tensor, "to_local", lambda tensor=tensor: tensor)().detach().contiguous()
        kinds.append(f"{local.dtype} {tuple(local.shape)}")
        local = local.reshape(-1)
        size = local.element_size()
        if not VIEWS_OTHER_SIZES:
            words = local.view(WORDS[size])
        elif local.numel() * size % 8:
            words = local.view(torch.uint8)
        else:
            words = (local.clone() if local.storage_offset() * size % 8 else local).view(torch.int64)
        while len(parts := words.split(_AT_ONCE)) > 1:
            words = torch.stack([_mixed(part) for part in parts])
        sums.append(_mixed(words))
    totals = torch.stack([total.to(sums[0].device) for total in sums]).tolist() if sums else []
    return tuple(f"{kind} {total}" for kind, total in zip(kinds, totals))


def _mixed(words: Tensor) -> Tensor:
    """A sum that counts every word with a factor of its place, modulo 2**64: exact, so the same on every device."""
    words = words.to(torch.int64)
    # Round numbers differ in their high bits alone, which a product would push out: bring them down first.
    return ((words ^ (words >> 32 & 0xFFFFFFFF)) * _factors(words.device)[: len(words)]).sum()


@functools.lru_cache(maxsize=None)
def _factors(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**63), 2**63 - 1, (_AT_ONCE,), generator=generator).to(device)
