"""Features of image-text pairs, drawn at random in float64, and their cosine."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

pairs = st.tuples(st.integers(2, 7), st.integers(1, 9), st.integers(0, 10_000))


def features(shape: tuple[int, int, int], count: int = 4) -> list[Tensor]:
    size, width, seed = shape
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, width, generator=generator, dtype=torch.float64) * 3 for _ in range(count)]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))
