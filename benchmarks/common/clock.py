"""Time calls, all in turns: drift of the machine then hits every case alike."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

Case = TypeVar("Case")

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
"""What a clock reads, in seconds; `cpu`: what the threads of this process spent, whatever other processes do."""


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def on_stream(device: torch.device) -> AbstractContextManager[Any]:
    """Let what runs inside use a stream of its own, as graphs want it; a CPU has none."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def captured(call: Callable[[], Any], device: torch.device, warm: int = 3) -> Callable[[], Any]:
    """Return a call as one CUDA graph, which launches everything at once; on a CPU the call itself.

    Inputs and outputs keep their memory. `warm` calls come first, on the current stream.
    """
    if device.type != "cuda":
        return call
    for _ in range(warm):
        call()
    synchronise(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = call()

    def replay() -> Any:
        graph.replay()
        return held

    return replay


def readings(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Return the seconds of one call by every clock, until the device has finished it."""
    synchronise(device)
    gc.disable()
    try:
        start = {name: read() for name, read in CLOCKS.items()}
        call()
        synchronise(device)
        return {name: read() - start[name] for name, read in CLOCKS.items()}
    finally:
        gc.enable()


def timed(call: Callable[[], object], device: torch.device, clock: str = "wall") -> float:
    """Return the seconds of one call, until the device has finished it."""
    return readings(call, device)[clock]


def turns(cases: Sequence[Case], rounds: int, seed: int = 0) -> Iterator[list[Case]]:
    """Yield all cases once for each round: in a new order, then in its reverse, then in a new one.

    Over two rounds each case has the same mean place, so that a steady drift of the machine falls out.
    """
    shuffle = random.Random(seed).shuffle
    order = list(cases)
    for number in range(rounds):
        if number % 2 == 0:
            shuffle(order)
        yield order[:: -1 if number % 2 else 1]
