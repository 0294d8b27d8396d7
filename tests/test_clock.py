"""Calls are timed in turns, on streams and as graphs where there are any. No wall-clock assertion."""

from __future__ import annotations

import contextlib
from statistics import mean
from types import SimpleNamespace
from unittest import mock

import torch
from since import BENCHMARKS, needs

needs(*BENCHMARKS, module=True)
from benchmarks.common import clock


def test_order_cancels_a_steady_drift():
    rounds = list(clock.turns("abcd", 6, seed=3))
    assert {len(set(order)) for order in rounds} == {4}
    for first, second in zip(rounds[::2], rounds[1::2]):
        assert first == second[::-1]
        assert {mean([first.index(case), second.index(case)]) for case in "abcd"} == {1.5}
    assert len({"".join(order) for order in rounds[::2]}) > 1


# What an accelerator adds, with its functions replaced: there is none where these tests run.


def test_on_a_cpu_streams_and_graphs_are_nothing():
    call = object()
    assert clock.captured(call, torch.device("cpu")) is call
    assert isinstance(clock.on_stream(torch.device("cpu")), contextlib.nullcontext)


def test_graphs_are_captured_once_and_replayed():
    events = []
    graph = SimpleNamespace(replay=lambda: events.append("replay"))

    @contextlib.contextmanager
    def capture(given):
        assert given is graph
        events.append("begin")
        yield
        events.append("end")

    def call():
        events.append("call")
        return "out"

    cuda = dict(CUDAGraph=lambda: graph, graph=capture, synchronize=lambda device: events.append("wait"))
    with mock.patch.multiple(torch.cuda, **cuda):
        replay = clock.captured(call, torch.device("cuda"), warm=2)
        assert events == ["call", "call", "wait", "begin", "call", "end"]
        assert replay() == "out" and clock.timed(replay, torch.device("cuda")) > 0
    assert events[6:] == ["replay", "wait", "replay", "wait"]
