"""Texts as a host brings them along, and as `score_pairs` keeps them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor, nn

from .calls import padded


class TextRun(NamedTuple):
    """One run of a text encoder: what was called, with what, and what came out."""

    module: nn.Module
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def matches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Check whether a call is this one: the same tensors, equal flags; flags that are off or absent are equal."""
        names = {name for name in (*self.kwargs, *kwargs) if name != "return_dict"}
        pairs = [(self.kwargs.get(name), kwargs.get(name)) for name in names]
        return len(args) == len(self.args) and all(_same(a, b) for a, b in (*zip(self.args, args), *pairs))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return bool(a == b) or (a in (None, False) and b in (None, False))


class TextCall(NamedTuple):
    """The text of one call of the whole model, already encoded, and what the host need not compute again."""

    features: Tensor
    """`(B, D_text)`, what `guide` would be given."""
    remembered: tuple[TextRun, ...]
    images_per_text: int = 1
    """How many images come with each text (NLVR2: 2, in tiles: all first images before all second ones)."""
    compares_all: bool = False
    """Whether it compares every image with every text (a dual encoder), so that its texts may be candidates."""


@dataclass(frozen=True)
class Texts:
    """Encoded texts, one a row."""

    features: Tensor
    """`(M, D_text)`: what `guide` takes."""
    states: Mapping[str, Tensor] = field(default_factory=dict)
    """What a fusion encoder reads besides, each with M rows: hidden states `(M, L, D)`, mask `(M, L)`."""

    def __len__(self) -> int:
        return self.features.shape[0]

    def __getitem__(self, rows: Any) -> Texts:
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> Texts:
        return self._each(lambda tensor: tensor.to(device))

    def repeat(self, times: int) -> Texts:
        """Repeat all texts `times` times over: the rows of `pairing="all"`."""
        return self._each(lambda tensor: tensor.repeat(times, *[1] * (tensor.dim() - 1)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Texts:
        return Texts(change(self.features), {name: change(state) for name, state in self.states.items()})

    @classmethod
    def cat(cls, parts: Sequence[Texts]) -> Texts:
        """Stack batches below each other; shorter ones are padded with zeros, which a mask reads as padding."""
        if len(parts) == 1:
            return parts[0]
        states = {}
        for name in parts[0].states:
            length = max(part.states[name].shape[1] for part in parts)
            states[name] = torch.cat([padded(part.states[name], length) for part in parts])
        return cls(torch.cat([part.features for part in parts]), states)
