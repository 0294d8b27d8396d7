"""Calls in lockstep: one moves at a time, from block to block; what they compute and where they stand is their own."""

from __future__ import annotations

import contextvars
import time

import pytest
import torch
from since import BENCHMARKS, needs

needs(*BENCHMARKS, module=True)
from tqdm import tqdm

import patchselect
from benchmarks.common.photographs import SOURCES, load_photos
from benchmarks.models.loading import load
from benchmarks.speed import measure as timing
from benchmarks.speed.cases import AGAIN, Case, Selection, Setting
from benchmarks.speed.lockstep import Lockstep
from benchmarks.speed.measure import How, measure
from benchmarks.speed.run import inputs_of
from patchselect.wiring.towers import find_towers


class Walk:
    """A call through blocks of its own, which writes down each step."""

    def __init__(self, name, steps, seen):
        self.blocks = torch.nn.ModuleList(torch.nn.Identity() for _ in range(steps))
        self.name, self.seen = name, seen

    def __call__(self):
        for number, block in enumerate(self.blocks):
            self.seen.append(f"{self.name}{number}")
            block(torch.zeros(1))
        self.seen.append(f"{self.name} ends")


def test_calls_take_turns_block_by_block():
    seen, ticks = [], iter(range(100))
    lockstep = Lockstep(lambda: next(ticks))
    long, short = Walk("a", 3, seen), Walk("b", 1, seen)
    with lockstep.at([*long.blocks, *short.blocks]):
        parts = lockstep.run([long, short])
        assert seen == ["a0", "b0", "a1", "b ends", "a2", "a ends"]
        assert parts == [[1] * 4, [1] * 2], "a lap is from the turn to the end of the block"
        assert lockstep.run([short]) == [[1] * 2], "another round"
        before = next(ticks)
        short()
        assert next(ticks) == before + 1, "a call outside of a round is not timed"
    assert not any(block._forward_hooks for block in (*long.blocks, *short.blocks))


def test_what_others_take_is_not_counted():
    """The clock runs for all; a part holds its own time alone."""
    slow, quick = (lambda: time.sleep(0.2)), (lambda: None)
    (took,), (other,) = Lockstep(time.perf_counter).run([slow, quick])
    assert took >= 0.2 > 0.1 > other


def test_an_error_is_raised_when_all_have_ended():
    seen = []
    walk = Walk("a", 2, seen)

    def fail():
        raise RuntimeError("of the second call")

    lockstep = Lockstep(time.perf_counter)
    with lockstep.at(walk.blocks), pytest.raises(RuntimeError, match="of the second call"):
        lockstep.run([walk, fail])
    assert seen == ["a0", "a1", "a ends"] and not lockstep.waiting


def test_each_call_sees_the_context_and_the_threads_of_who_runs_it():
    variable, found = contextvars.ContextVar("variable"), []
    variable.set("outside")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        Lockstep(time.perf_counter).run([lambda: found.append((variable.get(), torch.get_num_threads()))] * 2)
    finally:
        torch.set_num_threads(threads)
    assert found == [("outside", 1)] * 2


def test_cases_in_lockstep_compute_what_they_compute_alone(tiny, monkeypatch):
    host, alone, seen = load(tiny), {}, {}
    cases = [Case("unpatched"), Case("text", 0.5), Case(AGAIN, 0.3), Case("random", 0.5)]
    inputs = inputs_of(host, load_photos(SOURCES[:2]), 2)
    with torch.no_grad():
        alone["unpatched"] = host.encode_image(inputs.images)
        for method, rate in (("text", 0.5), (AGAIN, 0.3)):
            handle = patchselect.apply(host.model, rate)
            with patchselect.guide(host.model, inputs.text):
                alone[method] = host.encode_image(inputs.images)
            handle.remove()
    original = timing.runner

    def watched(*arguments):
        call = original(*arguments)
        return lambda: seen.update({arguments[1].method: call()})

    monkeypatch.setattr(timing, "runner", watched)
    with tqdm(disable=True) as bar:
        setting = Setting(host.image_size, 2, "fp32")
        found = measure(host, setting, cases, inputs, Selection(), How("cpu", rounds=2), float("inf"), bar)
    for method, features in alone.items():
        torch.testing.assert_close(seen[method], features, atol=1e-5, rtol=1e-4)
    depth = len(find_towers(host.model)[0].blocks)
    for each in found:
        assert [len(parts) for parts in each.parts] == [depth + 1] * 2
        assert [sum(parts) for parts in each.parts] == each.seconds
        selects = each.case.method != "unpatched"
        assert all((part > 0) == selects and part < all_of_it for part, all_of_it in zip(each.selecting, each.seconds))
