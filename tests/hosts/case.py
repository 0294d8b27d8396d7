"""A model and how to call it, and what it is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 99


@dataclass
class Case:
    """A model and how to call it."""

    model: nn.Module
    image_side: Callable[[nn.Module, Any], Tensor]
    """Pooled image features `(B, E)` from images."""
    text_width: int
    images: Callable[[int], Any]
    tower: Callable[[nn.Module], nn.Module]
    prefix: int
    patches: int
    grid: tuple[int, int]
    pair: Callable[[nn.Module, Any, Tensor], Tensor] | None = None
    """`(N, M)` logits or image features from a call with image and text together."""
    text_side: Callable[[nn.Module, Tensor], Tensor] | None = None
    relevances: tuple[str, ...] = ("keys", "features", "values", "joint")
    extra: dict[str, Any] = field(default_factory=dict)


def ids(batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY - 2, (batch, 7), generator=generator)
    tokens[:, 0], tokens[:, -1] = VOCABULARY - 2, VOCABULARY - 1
    return tokens


def pixels(height: int = 64, width: int = 64) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(7))


def pooled(output: Any) -> Tensor:
    """transformers 5 returns an output object where 4 returned the tensor."""
    return output if isinstance(output, Tensor) else output.pooler_output
