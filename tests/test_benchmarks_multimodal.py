"""The benchmark of language models with shortened prompts, on a model small enough for a test."""

from __future__ import annotations

import json

import pytest
from since import BENCHMARKS, needs

needs(*BENCHMARKS, "encoded images", module=True)
from benchmarks.multimodal import __main__ as multimodal

pytestmark = pytest.mark.usefixtures("flops")


def test_every_stage_of_every_case_is_measured(tmp_path, capsys):
    output = tmp_path / "found.json"
    arguments = ["--tower", "tiny", "--language", "tiny", "--layers", "1", "--keep-rate", "0.25", "--words", "3"]
    arguments += ["--rounds", "2", "--threads", "1", "--prompt-words", "5", "--batch", "2", "--output", str(output)]
    found = multimodal.main(arguments)
    assert json.loads(output.read_text())["results"] == found["results"]
    records = {record["method"]: record for record in found["results"]}
    assert tuple(records) == multimodal.CASES
    assert [record["prompt_tokens"] for record in found["results"]] == [5 + 16, *[5 + 5] * 4]
    bytes_of_a_token = 2 * 2 * 2 * 8 * 4 * 2  # layers, keys and values, heads, width, float32, rows
    for record in found["results"]:
        assert record["cache_bytes"] == (record["prompt_tokens"] + 3) * bytes_of_a_token
        assert all(len(seconds) == 2 for seconds in record["seconds"].values())
    ratios = {name: record["flop_ratio"] for name, record in records.items()}
    assert ratios["after the tower"]["tower"] == 1 < ratios["image"]["tower"], "nothing is saved there"
    for name in ("text", "image", "random"):
        assert ratios[name]["prefill"] == ratios["after the tower"]["prefill"] > 1.9
    assert capsys.readouterr().out.count("\n| ") == 5 * 4
