"""The benchmark of whole models, on a model small enough for a test."""

from __future__ import annotations

import json

import pytest
import torch
from doubles import albef
from doubles.text import pictures, sentences
from since import BENCHMARKS, needs

needs(*BENCHMARKS, module=True)
from benchmarks.speed import whole_model

pytestmark = pytest.mark.usefixtures("flops")


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
    assert json.loads(output.read_text())["results"] == found["results"]
    cases = [(r["work"], r["method"], r["keep_rate"]) for r in found["results"]]
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
        whole, most, least = (record["gflops_per_pair"] for record in found["results"][start : start + 3])
        assert whole > most > least > 0
    assert all(len(record["seconds"]) == 2 for record in found["results"])
    assert capsys.readouterr().out.count("\n| ") == 9


def test_the_profile_adds_up_and_its_parts_are_those_of_the_sequence(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(whole_model.HOSTS, "blip", tiny)
    arguments = ["--rounds", "2", "--layers", "1", "3", "--image-size", "32", "--threads", "1", "--profile"]
    found = whole_model.main([*arguments, "--output", str(tmp_path / "found.json")])["results"]
    whole, most, least = (record["parts"] for record in found[:3])
    assert list(whole) == ["blocks 1-2", "blocks 3-4", "blocks 5-6", "all else", "all"]
    assert all(record["parts"] is None for record in found[3:]), "a training step has no stretches of time"
    for parts in (whole, most, least):
        assert all(cell["seconds"] > 0 and cell["gflops"] > 0 for cell in parts.values())
        assert sum(cell["gflops"] for cell in parts.values()) == pytest.approx(2 * parts["all"]["gflops"])
    for part in whole:
        assert whole[part]["gflops"] > most[part]["gflops"] > least[part]["gflops"], part
    # Two blocks on 17 tokens: products with the weights of attention (4 D D) and MLP (4 D D), and the attention.
    assert whole["blocks 1-2"]["gflops"] == pytest.approx(2 * 2 * (17 * 8 * 32**2 + 2 * 17 * 17 * 32) / 1e9)
    assert capsys.readouterr().out.count("\n| ") == 9 + 7


def test_albef_says_what_it_needs(monkeypatch):
    monkeypatch.delenv("ALBEF_DIR", raising=False)
    with pytest.raises(SystemExit, match="ALBEF_DIR and PATCHSELECT_TARGETS"):
        whole_model.main(["--host", "albef"])
