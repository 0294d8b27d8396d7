"""ToMe: similar patches merge in every block (Bolya et al., ICLR 2023), or in the first third of the blocks alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.common.tome import front, token_merging

from ..method import Encode, Host, Method


class Tome(Method):
    """The knob counts the patches that merge away."""

    reads_text = False

    def __init__(self, name: str, source: str, early: bool) -> None:
        self.name, self.source, self.early = name, source, early

    @contextmanager
    def put(self, host: Host, knob: int) -> Iterator[Encode]:
        with token_merging(host.model, knob, first=front(host.depth) if self.early else None):
            yield host.encode


PAPER = "Bolya et al., ICLR 2023"
METHODS = [
    Tome("ToMe, even", f"{PAPER}, as published", False),
    Tome("ToMe-front", f"{PAPER}, all in the first third of the blocks", True),
]
