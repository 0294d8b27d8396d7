"""Calls in lockstep: one runs a block, then the next one does, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import contextvars
import gc
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .steady import Parts


class Runner:
    """One of the calls: what it runs, and the seconds of its parts."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        self.parts: Parts = []
        self.turn = threading.Semaphore(0)
        self.context = contextvars.copy_context()


class Lockstep:
    """Run calls as threads of which one moves at a time, and hands on where a block ends.

    A part of a call is what lies before the end of its first block, between the ends of two, or after its last.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.start = 0.0
        self.waiting: deque[Runner] = deque()
        """The first one moves."""
        self.mine = threading.local()

    @contextmanager
    def at(self, blocks: Sequence[nn.Module]) -> Iterator[None]:
        """Let calls hand on at the end of each of these blocks while this lasts."""
        hooks = [block.register_forward_hook(self._end_of_block) for block in blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def run(self, calls: Sequence[Callable[[], object]]) -> list[Parts]:
        """Run each once, in turns that begin in this order; return the seconds of their parts. Errors are raised."""
        runners, threads = [Runner(call) for call in calls], torch.get_num_threads()
        self.waiting.extend(runners)
        gc.disable()
        try:
            with ThreadPoolExecutor(len(runners)) as pool:
                done = [pool.submit(runner.context.run, self._run, runner, threads) for runner in runners]
                runners[0].turn.release()
            for each in done:
                each.result()
        finally:
            gc.enable()
        return [runner.parts for runner in runners]

    def _run(self, runner: Runner, threads: int) -> None:
        torch.set_num_threads(threads)  # each thread has its own
        self.mine.runner = runner
        self._wait(runner)
        try:
            runner.call()
        finally:
            self._lap(runner)
            self.waiting.popleft()
            if self.waiting:
                self.waiting[0].turn.release()

    def _end_of_block(self, *_: Any) -> None:
        runner = getattr(self.mine, "runner", None)
        if runner is None:  # a call outside of `run`
            return
        self._lap(runner)
        self.waiting.rotate(-1)
        self.waiting[0].turn.release()
        self._wait(runner)

    def _wait(self, runner: Runner) -> None:
        runner.turn.acquire()
        self.start = self.clock()

    def _lap(self, runner: Runner) -> None:
        runner.parts.append(self.clock() - self.start)
