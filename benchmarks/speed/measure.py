"""Interleaved timing: every round runs every case once, in a new order, until the speed-ups have settled."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

import patchselect
from benchmarks.common.clock import CLOCKS, captured, on_stream, timed, turns
from benchmarks.common.cost import peak_memory
from benchmarks.models.host import Host
from patchselect.wiring import blocks, merging
from patchselect.wiring.towers import find_towers

from . import steady
from .cases import AGAIN, Case, Inputs, Selection, Setting, mode, patched, runner
from .lockstep import Lockstep
from .steady import Parts

MOST_ROUNDS = 40


@dataclass(frozen=True)
class How:
    """How calls are timed."""

    clock: str = "wall"
    """One of `CLOCKS`."""
    rounds: int | None = None
    """Exactly so many; `None`: until everything has settled, or the time is up."""
    memory: bool = False
    """Measure peak memory too."""
    compiled: bool = False
    """Compile each case, the unpatched one too."""
    graphs: bool = False
    """Replay each case as one CUDA graph; a CPU has none, and calls."""
    seed: int = 0
    """Of the order of the cases."""


@dataclass
class Measured:
    """One case under one setting."""

    setting: Setting
    case: Case
    peak_memory: int | None = None
    """Bytes on top of weights and inputs."""
    seconds: list[float] = field(default_factory=list)
    """One call each, in the order of the rounds."""
    parts: list[Parts] = field(default_factory=list)
    """What `seconds` are made of."""
    selecting: list[float] = field(default_factory=list)
    """The part of `seconds` that went into relevance, selection, fusion and merging; empty where nobody can tell."""


class SelectionClock:
    """The time that one call spends in relevance, selection and fusion (all of `select`), and in merging."""

    def __init__(self, device: torch.device, clock: str) -> None:
        self.device, self.now = device, CLOCKS[clock]
        self.marks: defaultdict[int, list[tuple[Any, Any]]] = defaultdict(list)
        """By thread: calls in lockstep have one each."""

    def mark(self) -> Any:
        if self.device.type != "cuda":
            return self.now()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> float:
        """Return seconds since the last reading; after the device was synchronised."""
        marks = self.marks.pop(threading.get_ident(), [])
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
                self.marks[threading.get_ident()].append((start, self.mark()))
                return result

            return timed

        with mock.patch.object(blocks, "select", timing(blocks.select)):
            with mock.patch.object(merging, "merge", timing(merging.merge)):
                yield


def twin(host: Host) -> Host:
    """Return the model once more, of the same parameters: each case is patched, compiled and captured once."""
    held = itertools.chain(host.model.parameters(), host.model.buffers())
    return dataclasses.replace(host, model=copy.deepcopy(host.model, {id(tensor): tensor for tensor in held}))


def speed_ups(base: Measured, other: Measured) -> list[float]:
    """Return the speed-up that each half of the rounds would have found."""
    return steady.speed_ups(base.parts, other.parts)


def settled(base: Measured, other: Measured) -> bool:
    """Tell whether more rounds would change a speed-up but little."""
    return other is base or steady.settled(len(base.parts), speed_ups(base, other))


def measure(
    host: Host,
    setting: Setting,
    cases: Sequence[Case],
    inputs: Inputs,
    selection: Selection,
    how: How,
    end: float,
    bar: tqdm[Any],
) -> list[Measured]:
    """Time all cases of one setting.

    Args:
        host: the model, on its device and in its precision.
        setting: what they share.
        cases: what is compared, the unpatched model first.
        inputs: one batch.
        selection: what `patchselect.apply` takes besides the keep rate and the guidance.
        how: the clock, and what is done with each case before it is timed.
        end: of `time.monotonic`: no round begins that would pass it, but for the first.
        bar: told about every call.
    """
    device = inputs.images.device
    clock = None if how.compiled or how.graphs else SelectionClock(device, how.clock)
    whole = clock is None or device.type == "cuda" or setting.work != "forward"
    lockstep = Lockstep(CLOCKS[how.clock])
    results = {case: Measured(setting, case) for case in cases}
    base = results[cases[0]]
    with ExitStack() as stack:
        stack.enter_context(nullcontext() if clock is None else clock.running())
        stack.enter_context(on_stream(device))
        calls = {}
        for case in cases:
            bar.set_description_str(f"{setting} | warming up {case}")
            own = twin(host)
            stack.enter_context(mode(own, setting.work))
            stack.enter_context(patched(own, case, selection))
            if case.method == AGAIN:
                stack.enter_context(patchselect.guide(own.model, inputs.text))
            call = runner(own, case, setting, inputs, how.compiled)
            calls[case] = call = captured(call, device) if how.graphs else call
            if how.memory:
                results[case].peak_memory = peak_memory(call, device)
            elif device.type == "cuda" or how.compiled or setting.work != "forward" or case.method == AGAIN:
                call()
            else:  # what a first call has to prepare, one image shows
                runner(own, case, setting, inputs.first())()
            if not whole:
                (tower,) = find_towers(own.model)
                stack.enter_context(lockstep.at(tower.blocks))
            bar.update()
        if clock is not None:
            clock.read()

        def once(case: Case) -> None:
            """Run a case in lockstep."""
            calls[case]()
            if clock is not None:
                results[case].selecting.append(clock.read())

        def one_round(order: Sequence[Case]) -> Iterator[tuple[Case, Parts]]:
            bar.set_description_str(str(setting))
            if not whole:
                yield from zip(order, lockstep.run([partial(once, case) for case in order]))
                return
            for case in order:
                yield case, [timed(calls[case], device, how.clock)]
                if clock is not None:
                    results[case].selecting.append(clock.read())

        longest = 0.0
        for number, order in enumerate(turns(cases, how.rounds or MOST_ROUNDS, how.seed)):
            start = time.monotonic()
            enough = number and how.rounds is None
            if enough and (start + longest > end or all(settled(base, each) for each in results.values())):
                break
            bar.total = bar.n + len(cases) * max(1, (how.rounds or 1) - number)
            for case, parts in one_round(order):
                results[case].parts.append(parts)
                results[case].seconds.append(sum(parts))
                bar.update()
            gc.collect()
            longest = max(longest, time.monotonic() - start)
    return list(results.values())
