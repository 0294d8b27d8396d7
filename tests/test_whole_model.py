"""The benchmark of whole models, on a model small enough for a test."""

from __future__ import annotations

import json

import pytest
import torch
from doubles import albef
from doubles.text import pictures, sentences

pytest.importorskip("tqdm")
whole_model = pytest.importorskip("benchmarks.whole_model")


def tiny(work: str, size: int, batch: int, length: int):
    model = albef.Retrieval().train(work == "train")

    def step() -> torch.Tensor:
        return torch.stack(model(pictures(batch), sentences(batch))).sum()

    return whole_model.Whole("tiny", model, step, step, step)


def test_every_case_is_measured_against_the_unpatched_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(whole_model.HOSTS, "blip", tiny)
    output = tmp_path / "found.json"
    arguments = ["--rounds", "2", "--layers", "1", "3", "--image-size", "32", "--output", str(output), "--threads", "1"]
    found = whole_model.main(arguments)
    assert json.loads(output.read_text())["records"] == found["records"]
    cases = [(r["work"], r["method"], r["keep_rate"]) for r in found["records"]]
    assert cases == [
        ("pair", "unpatched", None),
        ("pair", "text", 0.7),
        ("pair", "text", 0.5),
        ("train", "unpatched", None),
        ("train", "text", 0.7),
        ("train", "text", 0.5),
        ("train", "text, honest negatives", 0.7),
        ("train", "text, honest negatives", 0.5),
    ]
    for start in (0, 3):
        whole, most, least = (record["gflops_per_pair"] for record in found["records"][start : start + 3])
        assert whole > most > least > 0
    assert all(len(record["seconds"]) == 2 for record in found["records"])
    assert capsys.readouterr().out.count("\n| ") == 9


def test_albef_says_what_it_needs(monkeypatch):
    monkeypatch.delenv("ALBEF_DIR", raising=False)
    with pytest.raises(SystemExit, match="ALBEF_DIR and PATCHSELECT_TARGETS"):
        whole_model.main(["--host", "albef"])
