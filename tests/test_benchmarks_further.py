"""Speed commands besides the main one run on small models, and what they write is what the pages read."""

from __future__ import annotations

import pytest
import torch
from since import BENCHMARKS, needs, slow

needs("projected tower", "counting", *BENCHMARKS, module=True)
import transformers

from benchmarks.common import results
from benchmarks.speed import arithmetic, pairs, processes, resolution, sized_attention
from benchmarks.speed.encoder import vit

SMALL = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, projection_dim=512)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def small(size: int, patch_size: int = 16, depth: int = 12):
    config = transformers.CLIPVisionConfig(**SMALL, num_hidden_layers=depth, patch_size=patch_size, image_size=size)
    return transformers.CLIPVisionModelWithProjection(config).eval()


def test_pairs_cost_what_their_ways_say(tiny, tmp_path, capsys):
    options = ["--model", tiny, "--texts", "2", "--rounds", "2", "--device", "cpu", "--output", str(tmp_path)]
    paired, every, prefix, shared = pairs.main(options)["results"]
    assert paired["gflops"] > every["gflops"] > prefix["gflops"] and paired["gflops"] > shared["gflops"]
    assert paired["flop_ratio"] == paired["time_ratio"]["median"] == 1
    assert results.read(tmp_path / "pairs.json")["results"][0] == paired
    assert capsys.readouterr().out.count("\n| ") == 5


def test_a_larger_image_costs_as_much_with_fewer_patches(tmp_path, capsys):
    options = ["--own-size", "64", "--sizes", "64", "80", "512", "--layers", "1", "--rounds", "1", "--batch", "1"]
    own, larger, refused = resolution.main([*options, "--device", "cpu", "--output", str(tmp_path)], small)["results"]
    assert own["share"] == 1 > larger["rate"] and 0.9 < larger["share"] <= 1 < larger["unpatched"]
    assert larger["time_ratio"]["median"] > 0 and "budget must be in" in refused["refused"]
    assert results.read(tmp_path / "resolution.json")["settings"]["clock"] == "cpu"


def test_ways_to_count_sizes_agree(tmp_path):
    options = ["--tokens", "9", "--batch", "1", "--rounds", "1", "--dtype", "float32", "--device", "cpu"]
    (found,) = sized_attention.main([*options, "--output", str(tmp_path / "found.json")])["results"]
    assert found["apart"] < 1e-5 and found["ratios"]["mask"]["median"] > 0


def test_what_is_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(arithmetic, "TOKENS", ((8, 0.5, 0.5),))
    monkeypatch.setattr(arithmetic, "BATCHES", (1, 2))
    found = arithmetic.main(
        ["--output", str(tmp_path / "found.json")], lambda patch_size: small(64, patch_size, depth=6), (16,)
    )["results"][0]
    assert found["classes"]["one"] < found["classes"]["many"][1] < found["classes"]["many"][0]
    assert found["floor"] < found["classes"]["one"] and found["merging"][0]["tokens"] == 9


@slow
def test_processes_get_the_scores_of_one(tmp_path):
    options = ["--model", "ViT-S-32-alt", "--processes", "1", "2", "--images", "2", "--texts", "1", "--rounds", "1"]
    found = processes.main([*options, "--output", str(tmp_path / "found.json")])["results"]
    assert [record["processes"] for record in found] == [1, 2] and found[0]["apart"] == 0 and found[1]["apart"] < 1e-5


def test_the_encoder_of_these_commands_has_the_size_that_they_name():
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in vit(32).parameters()) > 80e6
