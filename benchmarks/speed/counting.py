"""FLOPs of every case, per image."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.common.cost import count_flops
from benchmarks.common.lengths import Lengthwise
from benchmarks.common.tome import front, matching_flops
from benchmarks.models.host import Host
from patchselect.wiring.plan import check_layers
from patchselect.wiring.towers import find_towers

from .cases import AGAIN, MERGED, Case, Inputs, Selection, Setting, patched, runner

LARGE = 1e11
"""FLOPs that take a core longer than counting them on fake tensors does."""


class FlopBook:
    """Counts each case once; a count is per image, forward, and does not depend on the batch or the precision."""

    def __init__(self, host: Host, selection: Selection, inputs: Inputs) -> None:
        self.host, self.selection, self.inputs = host, selection, inputs
        self.known: dict[tuple[str, Case], float] = {}

    def of(self, case: Case, view: str = "tower") -> float:
        """FLOPs per image (or per text, for the text encoder); those of `AGAIN` are those of a first image."""
        case = dataclasses.replace(case, method="text") if case.method == AGAIN else case
        if (view, case) not in self.known:
            setting = Setting(self.host.image_size, len(self.inputs.images), "fp32", view=view)

            def call() -> object:
                return runner(self.host, case, setting, self.inputs.fake())()

            unpatched = case.method == "unpatched"
            large = unpatched or self.of(Case("unpatched"), view) * len(self.inputs.images) > LARGE
            with patched(self.host, case, self.selection):
                self.known[view, case] = count_flops(call, fake=large) / len(self.inputs.images)
        return self.known[view, case]

    def tome_removals(self, case: Case, method: str = "tome") -> int:
        """Return how many patches this kind of ToMe must remove for its FLOPs to come closest to those of `case`."""
        patches, depth = self.size()
        count = lambda removed: self.of(Case(method, case.keep_rate, removed))  # noqa: E731
        guess = self.lengths().merged_like(self.share(case), front(depth) if method == "tome front" else None)
        return matching_flops(self.of(case), count, patches - depth, guess)

    def merged_rate(self, case: Case) -> float:
        """Return which keep rate one selection after merging needs for its FLOPs to come closest to those of `case`."""
        patches, _ = self.size()
        count = lambda removed: self.of(Case(MERGED, case.keep_rate, own_rate=1 - removed / patches))  # noqa: E731
        guess = round(patches * (1 - self.lengths().rate_like(self.share(case), self.selection.merge)))
        return 1 - matching_flops(self.of(case), count, patches - 1, guess) / patches

    def share(self, case: Case) -> float:
        """Return the FLOPs of a case, those of the unpatched model being 1."""
        return self.of(case) / self.of(Case("unpatched"))

    def lengths(self) -> Lengthwise:
        """Return the tower as its lengths are reckoned: good for a guess."""
        (tower,) = find_towers(self.host.model)
        patches, depth = self.size()
        heads = max(1, tower.width // 64)
        return Lengthwise(patches, depth, tower.width, check_layers(self.selection.layers, depth), heads)

    def size(self) -> tuple[int, int]:
        """Return patches of an image, and blocks of the tower."""
        (tower,) = find_towers(self.host.model)
        height, width = tower.adapter.grid(tower, self.inputs.images)
        return height * width, len(tower.blocks)

    def limit(self, rates: Sequence[float], view: str) -> list[dict[str, float]]:
        """Return the FLOP ratio of text guidance at these keep rates, and at 1."""
        base = self.of(Case("unpatched"), view)
        points = [{"keep_rate": rate, "flop_ratio": base / self.of(Case("text", rate), view)} for rate in rates]
        return [*points, {"keep_rate": 1.0, "flop_ratio": 1.0}]
