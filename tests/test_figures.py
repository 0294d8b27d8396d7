"""Every figure of a page that names a file is what the file says."""

from __future__ import annotations

import copy
import importlib
import json

import pytest
from since import BENCHMARKS, needs

needs(*BENCHMARKS, module=True)

from benchmarks import everything, pages
from benchmarks.common import results
from benchmarks.common.command import parse
from benchmarks.common.show import spread

FILES = sorted(results.FOLDER.glob("*/*.json"))


def named(path):
    return str(path.relative_to(pages.ROOT))


@pytest.mark.parametrize("page", pages.PAGES, ids=named)
def test_pages_say_what_their_files_say(page):
    text = page.read_text(encoding="utf-8")
    assert pages.filled(text) == text, "python -m benchmarks.pages makes the figures of the pages anew"
    assert text.count("<!-- figures:") == text.count("<!-- end of figures -->") == len(pages.BLOCK.findall(text))


def test_a_wrong_figure_is_noticed():
    page = (pages.ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    block = pages.BLOCK.search(page).group()
    digit = next(letter for letter in reversed(block) if letter.isdigit())
    place = page.index(block) + block.rindex(digit)
    changed = page[:place] + str((int(digit) + 1) % 10) + page[place + 1 :]
    assert pages.filled(changed) == pages.filled(page) != changed


def test_there_are_files():
    assert FILES


@pytest.mark.parametrize("file", FILES, ids=named)
def test_files_have_the_head_of_the_schema(file):
    report = results.read(file)
    assert report["schema"] == 1 and report["commit"] != "unknown" and report["results"]
    assert file.parent.name == results.slug(report["machine"]), "a folder per machine"
    assert file.stem in (*everything.QUESTIONS, *everything.STUDIES)
    assert {"processor", "device", "cores", "threads"} <= set(report["machine"]) and "torch" in report["versions"]


def record(**more):
    return {
        "batch": 8, "method": "text", "label": "text", "keep_rate": 0.5, "rounds": 3, "flop_ratio": 1.5,
        "settled": True, "speed_up": spread([1.5, 1.52, 1.54]), "selecting_share": spread([0.01]), "efficiency": 1.0,
        "precision": "fp32", **more,
    }  # fmt: skip


@pytest.fixture
def report():
    head = dict(schema=1, created="2026-01-02T03:04:05+00:00", commit="abc", versions={"torch": "2.14.1"})
    machine = dict(processor="Some(R) CPU @ 2 GHz", device="cpu", cores=2, threads=1, load_before=0.1)
    shown = [record(), record(keep_rate=0.3, settled=False), record(batch=1), record(batch=1, method="random")]
    settings = dict(batch=[8, 1], clock="cpu", compile=False)
    return {**head, "machine": machine, "settings": settings, "model": {"name": "ViT"}, "results": shown}


def test_what_is_kept_can_be_read_and_shown(report, tmp_path):
    path = results.keep(report, "speed", tmp_path / "benchmarks" / "results")
    assert path.parent.name == "some-cpu-2-ghz-2-cores" and results.read(path) == report
    block = "<!-- figures: {} benchmarks/results/{} -->\nold\n<!-- end of figures -->"
    short = pages.filled(block.format("short", f"{path.parent.name}/speed.json"), tmp_path)
    assert "old" not in short and "| 0.5 | 1.50 | 1.52 [1.51, 1.53] |" in short and "At batch 1: 1.52 [1.51" in short
    assert "not settled: 1.52 ±1%" in short and "one thread, CPU time, torch 2.14.1, commit abc, 2026-01-02" in short
    table = pages.filled(block.format("machines", ""), tmp_path).replace("results/ -->", "")
    assert "`benchmarks/results/some-cpu-2-ghz-2-cores/speed.json`" in table
    assert "There is no file for NVIDIA GPUs" in table
    for name in ("speed", "again", "precision"):
        assert "1.52" in pages.filled(block.format(name, f"{path.parent.name}/speed.json"), tmp_path)


def test_what_is_not_measured_is_said(tmp_path):
    block = "<!-- figures: scale benchmarks/results/none/scale.json -->\n<!-- end of figures -->"
    assert "Not measured yet: `python -m benchmarks.everything --only scale`" in pages.filled(block, tmp_path)
    with pytest.raises(ValueError, match="no such table"):
        pages.filled(block.replace("scale ", "other "), tmp_path)


def test_a_file_without_its_head_is_refused(report, tmp_path):
    del report["commit"]
    (tmp_path / "speed.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="lacks commit"):
        results.read(tmp_path / "speed.json")


def test_everything_keeps_one_file_a_question_and_makes_the_pages(report, tmp_path, monkeypatch, capsys):
    asked, made = [], []

    def run(arguments):
        asked.append(arguments)
        return copy.deepcopy(report)

    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(results.keep, "__defaults__", (tmp_path,))
    monkeypatch.setattr(
        everything, "QUESTIONS", {name: (run, about) for name, (_, about) in everything.QUESTIONS.items()}
    )
    monkeypatch.setattr(pages, "main", lambda arguments: made.append(1))
    everything.main(["--only", "speed", "batch1", "estimators", "--device", "cpu", "--output", str(tmp_path / "out")])
    assert [path.name for path in sorted(tmp_path.glob("some-cpu*/*"))] == [
        "batch1.json",
        "estimators.json",
        "speed.json",
    ]
    assert made == [1] and "--device" in asked[0] and "--device" not in asked[2]
    assert "again" in asked[1]


def test_options_of_everything_exist():
    """Each question's options are read by the command that gets them."""
    for name, (run, options) in everything.QUESTIONS.items():
        module = importlib.import_module(run.__module__)
        parse(name, "", module.add_arguments, options.split())
