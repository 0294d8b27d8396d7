"""Interleaved timing: every round runs every case once, in a new order, so that drift hits all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from benchmarks.common.clock import timed, turns
from benchmarks.common.cost import peak_memory
from benchmarks.models.host import Host
from patchselect.wiring import blocks, merging

from .cases import Case, Inputs, Selection, Setting, mode, patched, runner

FEWEST_ROUNDS = 3
MOST_ROUNDS = 40


@dataclass
class Measured:
    """One case under one setting."""

    setting: Setting
    case: Case
    peak_memory: int
    """Bytes on top of weights and inputs."""
    seconds: list[float] = field(default_factory=list)
    """One call each, in the order of the rounds."""
    selecting: list[float] = field(default_factory=list)
    """The part of `seconds` that went into relevance, selection, fusion and merging."""


class SelectionClock:
    """The time that one call spends in relevance, selection and fusion (all of `select`), and in merging."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[Any, Any]] = []

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> float:
        """Return seconds since the last reading; after the device was synchronised."""
        marks, self.marks = self.marks, []
        if self.device.type != "cuda":
            return sum(end - start for start, end in marks)
        return sum(start.elapsed_time(end) for start, end in marks) / 1000

    @contextmanager
    def running(self) -> Iterator[None]:
        """Read the clock twice per reducing layer: about a microsecond, so it runs in every timed call."""

        def timing(function: Callable[..., Any]) -> Callable[..., Any]:
            def timed(*args: Any, **kwargs: Any) -> Any:
                start = self.mark()
                result = function(*args, **kwargs)
                self.marks.append((start, self.mark()))
                return result

            return timed

        with mock.patch.object(blocks, "select", timing(blocks.select)):
            with mock.patch.object(merging, "merge", timing(merging.merge)):
                yield


def measure(
    host: Host,
    setting: Setting,
    cases: Sequence[Case],
    inputs: Inputs,
    selection: Selection,
    seconds: float,
    rounds: int | None,
    bar: tqdm[Any],
    seed: int = 0,
) -> list[Measured]:
    """Time all cases of one setting.

    Args:
        host: the model, on its device and in its precision.
        setting: what they share.
        cases: what is compared.
        inputs: one batch.
        selection: what `patchselect.apply` takes besides the keep rate and the guidance.
        seconds: warm-up and rounds together may take about this long; at least `FEWEST_ROUNDS` rounds are run.
        rounds: exactly so many instead.
        bar: told about every call.
        seed: of the order of the cases.
    """
    device = inputs.images.device
    clock, results = SelectionClock(device), {}
    end = time.monotonic() + seconds

    @contextmanager
    def ready(case: Case) -> Iterator[Callable[[], object]]:
        bar.set_description_str(f"{setting} | {case}")
        with patched(host, case, selection):
            yield runner(host, case, setting, inputs)
        bar.update()

    with mode(host, setting.work), clock.running():
        with patched(host, cases[0], selection):
            runner(host, cases[0], setting, inputs)()  # the very first call allocates what all later ones reuse
        start = time.monotonic()
        for case in cases:  # the warm-up of each case is where its memory is measured
            with ready(case) as call:
                results[case] = Measured(setting, case, peak_memory(call, device))
            clock.read()
        if rounds is None:
            fitting = int((end - time.monotonic()) / (time.monotonic() - start))
            rounds = min(max(fitting, FEWEST_ROUNDS), MOST_ROUNDS)
        bar.total = bar.n + rounds * len(cases)
        for order in turns(cases, rounds, seed):
            for case in order:
                with ready(case) as call:
                    results[case].seconds.append(timed(call, device))
                results[case].selecting.append(clock.read())
            gc.collect()
    return list(results.values())
