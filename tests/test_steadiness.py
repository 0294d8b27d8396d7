"""The speed benchmark stops when it knows enough, and says where it does not. No wall-clock assertion."""

from __future__ import annotations

import functools
import time

import pytest
import torch
from since import BENCHMARKS, needs, slow

needs(*BENCHMARKS, module=True)
from tqdm import tqdm

from benchmarks.common.photographs import SOURCES, load_photos
from benchmarks.common.show import canvas, ratio, spread
from benchmarks.models.loading import load
from benchmarks.speed import __main__ as command
from benchmarks.speed import measure as timing
from benchmarks.speed import plot, report, steady
from benchmarks.speed import run as run_module
from benchmarks.speed.cases import AGAIN, Case, Selection, Setting
from benchmarks.speed.lockstep import Lockstep
from benchmarks.speed.measure import How, measure, settled, twin
from benchmarks.speed.run import inputs_of
from benchmarks.speed.steady import FEWEST_ROUNDS, SETTLED

CASES = [Case("unpatched"), Case("text", 0.5), Case("random", 0.5)]


@pytest.fixture
def host(tiny):
    return load(tiny)


def measured(host, monkeypatch, seconds, end=float("inf"), cases=CASES, **how):
    """Measure with a clock that shows what `seconds(number of the call)` says."""
    calls = iter(range(10**6))

    def timed(call, device, name):
        call()
        return seconds(next(calls))

    monkeypatch.setattr(timing, "timed", timed)
    if not how.get("graphs"):
        monkeypatch.setattr(Lockstep, "run", lambda self, runs: [[timed(run, None, "")] for run in runs])
    inputs = inputs_of(host, load_photos(SOURCES[:1]), 2)
    with tqdm(disable=True) as bar:
        return measure(
            host, Setting(host.image_size, 2, "fp32"), cases, inputs, Selection(), How("cpu", **how), end, bar
        )


def test_rounds_end_when_all_have_settled(host, monkeypatch):
    found = measured(host, monkeypatch, lambda call: 1.0)
    assert [len(each.seconds) for each in found] == [FEWEST_ROUNDS] * 3
    assert all(settled(found[0], each) for each in found)
    assert all(share > 0 for each in found[1:] for share in each.selecting)


def test_rounds_go_on_while_one_has_not(host, monkeypatch):
    monkeypatch.setattr(timing, "MOST_ROUNDS", 7)
    found = measured(host, monkeypatch, lambda call: 1.0 + 0.3 * (call % 2))
    assert len(found[0].seconds) == 7
    assert not all(settled(found[0], each) for each in found)


def test_time_that_is_up_ends_all_but_the_first_round(host, monkeypatch):
    found = measured(host, monkeypatch, lambda call: 1.0, end=time.monotonic())
    assert [len(each.seconds) for each in found] == [1] * 3
    assert not settled(found[0], found[1]), "one round tells nothing of its scatter"


def test_exactly_so_many_rounds(host, monkeypatch):
    found = measured(host, monkeypatch, lambda call: 1.0, end=time.monotonic(), rounds=5)
    assert len(found[0].seconds) == 5


def test_a_call_takes_what_its_parts_take_in_the_faster_half():
    calls = [[1.0, 5.0], [3.0, 2.0], [2.0, 2.5], [9.0, 9.0]]
    assert steady.seconds_of(calls) == (1.0 + 2.0) / 2 + (2.0 + 2.5) / 2
    assert steady.seconds_of(calls[:3]) == (1.0 + 2.0) / 2 + (2.0 + 2.5) / 2, "of three, two are half"
    found = {name: steady.seconds_of(calls, estimate) for name, estimate in steady.ESTIMATES.items()}
    assert (found["the least"], found["median"], found["mean of the middle half"]) == (3.0, 6.25, 6.25)
    assert found["mean of all"] == 15 / 4 + 18.5 / 4
    with pytest.raises(ValueError, match="same number of parts"):
        steady.seconds_of([[1.0, 5.0], [3.0]])


@pytest.mark.parametrize("rounds", [1, 2, 3, 4, 5, 6, 7, 40])
def test_halves_are_halves_and_always_the_same(rounds):
    found = steady.halves(rounds)
    assert {len(set(half)) for half in found} == {-(-rounds // 2)} and 1 <= len(found) <= steady.WAYS
    assert found == steady.halves(rounds) and {one for half in found for one in half} == set(range(rounds))
    assert len({tuple(sorted(half)) for half in found}) == len(found)


def test_settled_is_what_every_half_of_the_rounds_says():
    base = [[1.0, 1.0]] * 6
    disturbed = steady.speed_ups(base, [[0.5, 0.5]] * 5 + [[0.5, 5.0]])
    assert disturbed == [2.0] * 20, "what disturbs one part of one round is left out"
    assert steady.settled(FEWEST_ROUNDS, [2.0] * 20) and not steady.settled(FEWEST_ROUNDS - 1, [2.0] * 10)
    fast_once = steady.speed_ups(base, [[0.5, 0.5]] * 5 + [[0.5, 0.4]])
    assert steady.farthest(fast_once) > SETTLED and not steady.settled(6, fast_once), "two kinds of halves, apart"
    assert steady.settled(6, [2.0] * 19 + [2.0 * (1 + SETTLED - 1e-9)])
    assert not steady.settled(6, [2.0] * 19 + [2.0 * (1 - SETTLED - 1e-9)]), "one half is enough"


def test_whole_calls_are_compared_by_the_same_rule():
    base, own = [2.0] * 6, [1.0] * 6
    found = steady.compared(base, own)
    assert (found["median"], found["rounds"], found["settled"]) == (2.0, 6, True) and ratio(
        found
    ) == "2.00 [2.00, 2.00]"
    assert steady.known(base, [base, own]) and not steady.known(base[:5], [own[:5]]), "too few rounds"
    apart = [1.0, 1.3] * 3
    assert not steady.known(base, [own, apart])
    assert ratio(steady.compared(base, apart)).startswith("not settled: ") and "in 6 rounds" in ratio(
        steady.compared(base, apart)
    )
    assert ratio(spread([1.0, 1.5, 2.0])) == "not settled: 1.50 ±17%", "an older file, of single rounds"


def test_twins_share_their_parameters_alone(host):
    other = twin(host)
    assert all(a is b for a, b in zip(host.model.parameters(), other.model.parameters()))
    assert not {id(part) for part in host.model.modules()} & {id(part) for part in other.model.modules()}
    before = [type(part) for part in host.model.modules()]
    with timing.patched(other, Case("text", 0.5), Selection()):
        assert [type(part) for part in host.model.modules()] == before
        assert [type(part) for part in other.model.modules()] != before


def test_a_text_again_selects_what_it_selected(host, monkeypatch):
    seen = {}
    original = timing.runner

    def watched(*arguments):
        call = original(*arguments)
        return lambda: seen.update({arguments[1].method: call()})

    monkeypatch.setattr(timing, "runner", watched)
    measured(host, monkeypatch, lambda call: 1.0, cases=[CASES[0], CASES[1], Case(AGAIN, 0.5)], rounds=2)
    torch.testing.assert_close(seen["text"], seen[AGAIN], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(seen["unpatched"], seen[AGAIN], atol=1e-3)


def record(method, middle, low, high, rounds=5, sure=True, off=0.02):
    return {
        "image_size": 32, "batch": 1, "precision": "fp32", "work": "forward", "view": "tower", "method": method,
        "label": method, "keep_rate": 0.5, "rounds": rounds, "images_per_second": spread([1.0]), "settled": sure,
        "speed_up": {"median": middle, "q1": low, "q3": high}, "gflops_per_image": 1.0, "flop_ratio": 1.5,
        "efficiency": 1.0, "peak_memory_bytes": None, "selecting_share": None, "farthest_half": off,
    }  # fmt: skip


def test_what_has_not_settled_is_said_and_drawn_pale():
    sure, unsure = record("text", 1.5, 1.49, 1.52), record("random", 1.5, 1.3, 1.6, sure=False, off=0.13)
    shown = report.table([sure, unsure, record("image", 1.5, 1.5, 1.5, rounds=1, sure=False)])
    assert "1.500 [1.490, 1.520]" in shown and "not settled: one round" in shown
    assert "not settled: 1.50 ±13% in 5 rounds" in shown
    _, (axis,) = canvas(4, 3)
    plot._panel(axis, [sure, unsure], [{"keep_rate": 1.0, "flop_ratio": 1.0}])
    strengths = {container.get_label(): container.lines[0].get_alpha() for container in axis.containers}
    assert strengths == {"guided by text": 1.0, "at random, not settled": 0.3}


@pytest.mark.parametrize("panels", [1, 2, 4])
def test_the_legend_is_inside_of_the_picture(panels):
    """The longest there is: each method, settled and not."""
    shown = [
        {**record(method, 1.5, 1.4, 1.6, sure=sure), "batch": batch, "keep_rate": 0.5 if sure else 0.3}
        for batch in range(panels) for method in plot.STYLES for sure in (True, False)
    ]  # fmt: skip
    head = {"model": {"name": "ViT"}, "machine": {"processor": "CPU", "threads": 1}}
    figure = plot.figure_of({**head, "results": shown, "flop_limit": {"32/tower": [{"keep_rate": 1, "flop_ratio": 1}]}})
    figure.canvas.draw()
    legend, whole = figure.legends[0].get_window_extent(), figure.bbox
    assert len(figure.legends[0].get_texts()) == 1 + 2 * len(plot.STYLES)
    assert whole.x0 <= legend.x0 and legend.x1 <= whole.x1 and whole.y0 <= legend.y0 and legend.y1 <= whole.y1


def test_the_first_lines_say_what_and_how_long(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        command.main(f"--model {tiny} --device cpu --seconds 77 --output {tmp_path}".split())
    first, second, third, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"How much faster {tiny} gets on this machine (") and "one thread, CPU time" in first
    assert "guided by text, merging, merging before one selection; keep rates 0.3, 0.5, 0.7; batch 1, 4" in second
    assert third == "This takes at most 77 seconds, less if all speed-ups settle before."
    torch.set_num_threads(threads)


def test_the_default_is_what_a_newcomer_asks(tiny, tmp_path, capsys):
    found = command.main(f"--model {tiny} --device cpu --rounds 1 --output {tmp_path}".split())
    shown = [(r["batch"], r["method"], r["keep_rate"]) for r in found["results"]]
    one = [("unpatched", 1.0), *(("text", rate) for rate in (0.3, 0.5, 0.7)), ("merged", 0.5), ("tome front", 0.5)]
    assert shown == [(batch, *case) for batch in (1, 4) for case in one]
    assert found["settings"]["clock"] == "cpu" and found["machine"]["threads"] == 1
    assert all(r["peak_memory_bytes"] is None for r in found["results"])


def test_compiled_cases_are_all_compiled(tiny, tmp_path, monkeypatch, capsys):
    compiled = []

    def compile_eagerly(call, **options):
        compiled.append(call)
        return functools.partial(call)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    found = command.main(
        f"--model {tiny} --device cpu --rounds 1 --compile --cuda-graphs --precision bf16 --batch 2 "
        f"--output {tmp_path}".split()
    )
    assert len(compiled) == 6
    assert all(r["selecting_share"] is None and r["precision"] == "bf16" for r in found["results"])
    assert "all cases, the unpatched one too, are compiled; all cases, the unpatched one too, are CUDA graphs" in (
        capsys.readouterr().out
    )


def test_cpu_time_of_an_accelerator_is_refused():
    with pytest.raises(SystemExit, match="--clock cpu"):
        command.main(["--device", "cuda", "--clock", "cpu"])


@slow
def test_a_batch_that_there_is_no_time_for_is_left_out(tiny, tmp_path, monkeypatch, capsys):
    """After a first setting that took long, the next would not end in time."""
    original = run_module.measure

    def slow(*arguments):
        found = original(*arguments)
        now = time.monotonic()
        monkeypatch.setattr(run_module.time, "monotonic", lambda: now + 1000)
        return found

    monkeypatch.setattr(run_module, "measure", slow)
    found = command.main(
        f"--model {tiny} --device cpu --batch 3 1 --keep-rate 0.5 --merge 0 --tome --seconds 500 "
        f"--output {tmp_path}".split()
    )
    assert {r["batch"] for r in found["results"]} == {1}
    assert any("batch 3, fp32, forward, tower was left out" in note for note in found["notes"])
    assert "Note: batch 3, fp32, forward, tower was left out" in capsys.readouterr().out


def test_something_is_measured_however_late_it_is(tiny, tmp_path, capsys):
    found = command.main(
        f"--model {tiny} --device cpu --batch 2 1 --keep-rate 0.5 --merge 0 --tome --seconds 0.001 "
        f"--output {tmp_path}".split()
    )
    assert [(r["batch"], r["rounds"]) for r in found["results"]] == [(1, 1)] * 2
    assert not any(r["settled"] for r in found["results"] if r["method"] == "text")
