"""What a method answers: how it is put into a tower, and the knob that sets its cost."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Callable

from torch import Tensor, nn

import patchselect
from patchselect.adapter import Adapter

from . import ways

Encode = Callable[[Tensor], Tensor]
STEPS = 400
"""Of a keep rate of several layers."""


@dataclass(frozen=True)
class Host:
    """A model whose vision tower a method is put into."""

    model: nn.Module
    """What `patchselect.apply` takes: the whole model, or its tower."""
    encode: Encode
    """Images `(B, 3, S, S)` to what the questions read of them."""
    encode_at: Callable[[Tensor, tuple[int, int]], Tensor]
    """The same of images scaled to so many patches, high and wide."""
    layers: tuple[int, ...]
    """Where the paper's selections go: the 5th and 10th of 12 blocks, scaled."""
    depth: int
    grid: tuple[int, int]
    generic: Tensor
    """`(K, D)`: features of prompts that are no question, as a relevance that wants a background takes them."""
    joint: Adapter | None = None
    """An adapter through which texts in the joint space guide; `None` where the host's own does that."""

    @property
    def patches(self) -> int:
        """How many patches an image has."""
        return self.grid[0] * self.grid[1]


class Method:
    """One way to spend less. Subclass it in a file of `ways/` (or of yours), and list instances in `METHODS` there."""

    name: str
    source: str
    """Paper, and what of it is here."""
    reads_text: bool = True
    space: str = "joint"
    """Which text guides: `joint`, the text in the joint space, or `hidden`, the text encoder's [CLS] (where the host
    has both)."""

    def most(self, host: Host) -> int:
        """Return the largest knob; costs fall as the knob rises from 0."""
        return host.patches - 1

    def put(self, host: Host, knob: int) -> AbstractContextManager[Encode]:
        """Put the method into the host for a `with` block; yields what encodes images meanwhile."""
        raise NotImplementedError


class Selection(Method):
    """A method that is an `apply` of this package: relevance and reduction from anywhere.

    Args:
        name: of the row.
        source: where it comes from.
        layers: how many of the paper's layers select; with one, the knob counts the patches that go.
        relevance: a name, or a call with the host and the number of patches that stay that makes an object.
        options: further arguments of `apply`.
    """

    def __init__(self, name: str, source: str, relevance: Any, layers: int = 2, space: str = "joint", **options: Any):
        self.name, self.source, self.relevance, self.space = name, source, relevance, space
        self.layers, self.options = layers, options
        self.reads_text = options.get("guidance", "text") == "text"

    def most(self, host: Host) -> int:
        return STEPS - 1 if self.layers > 1 else host.patches - 1

    def arguments(self, host: Host, knob: int) -> dict[str, Any]:
        """Return what `apply` is called with."""
        whole = STEPS if self.layers > 1 else host.patches
        rate = (whole - knob) / whole
        made = self.relevance
        if callable(made):
            made = made(host, patchselect.num_kept(host.patches, rate))
        adapter = host.joint if self.reads_text and self.space == "joint" else None
        return dict(keep_rate=rate, layers=host.layers[: self.layers], relevance=made, adapter=adapter, **self.options)

    @contextmanager
    def put(self, host: Host, knob: int) -> Iterator[Encode]:
        handle = patchselect.apply(host.model, **self.arguments(host, knob))
        try:
            yield host.encode
        finally:
            handle.remove()


def methods(names: list[str] | None = None) -> list[Method]:
    """Return the methods of all files in `ways/`, in the order of their files; or those that contain one of `names`."""
    found: list[Method] = []
    for file in sorted(pkgutil.iter_modules(ways.__path__), key=lambda file: file.name):
        found += importlib.import_module(f"{ways.__name__}.{file.name}").METHODS
    return [m for m in found if not names or any(name in m.name for name in names)]
