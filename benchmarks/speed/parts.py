"""Where time and FLOPs of a call go: stretches of vision blocks that end with a selection layer, and all else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from torch import nn

from benchmarks.common.show import markdown


def stretches(depth: int, layers: Sequence[int]) -> list[tuple[str, slice]]:
    """Return blocks that see sequences of one length, named as people count them: `blocks 1-5` ends with layer 4."""
    ends = sorted({*(layer + 1 for layer in layers if layer < depth), depth})
    starts = [0, *ends[:-1]]
    return [(f"blocks {start + 1}-{end}", slice(start, end)) for start, end in zip(starts, ends)]


def spent_by_part(
    call: Callable[[], object], blocks: Sequence[nn.Module], layers: Sequence[int], clock: Callable[[], float]
) -> dict[str, float]:
    """Return what `clock` advances by in each stretch of `blocks` (if any), in all the rest, and in all."""
    found: dict[str, float] = {}
    hooks = []
    for name, place in stretches(len(blocks), layers) if blocks else ():
        found[name] = 0.0

        def enter(module: nn.Module, given: Any, name: str = name) -> None:
            found[name] -= clock()

        def leave(module: nn.Module, given: Any, output: Any, name: str = name) -> None:
            found[name] += clock()

        for block in blocks[place]:
            hooks += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    start = clock()
    call()
    whole = clock() - start
    for hook in hooks:
        hook.remove()
    return {**found, "all else": whole - sum(found.values()), "all": whole}


def as_parts(flops: Mapping[str, float], rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return GFLOPs and median seconds of each part."""
    return {part: {"gflops": count / 1e9, "seconds": median(r[part] for r in rounds)} for part, count in flops.items()}


def parts_table(records: Sequence[Mapping[str, Any]]) -> str:
    """Tabulate one row per part; for each method its seconds per pair, then for each its GFLOPs per pair."""
    names = [r["method"] if r["keep_rate"] is None else f"keep {r['keep_rate']}" for r in records]
    rows = [["part", *(f"{name}, s" for name in names), *(f"{name}, GFLOPs" for name in names)]]
    for part in records[0]["parts"]:
        cells = [record["parts"][part] for record in records]
        rows.append([part, *(f"{cell['seconds']:.3f}" for cell in cells), *(f"{cell['gflops']:.1f}" for cell in cells)])
    return markdown(rows)
