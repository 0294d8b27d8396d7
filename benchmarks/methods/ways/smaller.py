"""A smaller image: what the FLOPs buy without any method."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..method import Encode, Host, Method


class Smaller(Method):
    """The knob counts the patches that the image has less, near a square."""

    name, source, reads_text = "smaller image", "no method at all", False

    def sides(self, host: Host, knob: int) -> tuple[int, int]:
        """Return height and width in patches, the nearest to a square of all that have as many patches or less."""
        left = host.patches - knob
        shapes = ((h, w) for h in range(1, host.grid[0] + 1) for w in range(h, min(h + 2, host.grid[1]) + 1))
        return max((s for s in shapes if s[0] * s[1] <= left), key=lambda s: (s[0] * s[1], s[0] - s[1]))

    @contextmanager
    def put(self, host: Host, knob: int) -> Iterator[Encode]:
        yield lambda images: host.encode_at(images, self.sides(host, knob))


METHODS = [Smaller()]
