"""Time calls, all in turns: drift of the machine then hits every case alike."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Case = TypeVar("Case")


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call, until the device has finished it."""
    synchronise(device)
    gc.disable()
    try:
        start = time.perf_counter()
        call()
        synchronise(device)
        return time.perf_counter() - start
    finally:
        gc.enable()


def turns(cases: Sequence[Case], rounds: int, seed: int = 0) -> Iterator[list[Case]]:
    """Yield all cases in a new order for each round."""
    shuffle = random.Random(seed).shuffle
    for _ in range(rounds):
        order = list(cases)
        shuffle(order)
        yield order
