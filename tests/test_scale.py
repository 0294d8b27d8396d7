"""Curves of the speed-up over image size, texts, batch and depth. No wall-clock assertion."""

from __future__ import annotations

from unittest import mock

from since import BENCHMARKS, needs

needs(*BENCHMARKS, module=True)
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from benchmarks.speed import __main__ as command
from benchmarks.speed import scale


def test_curves_over_everything(tmp_path, capsys):
    def build(size, depth):
        config = CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=depth, num_attention_heads=2, patch_size=8,
            image_size=32, projection_dim=512,
        )  # fmt: skip
        return CLIPVisionModelWithProjection(config).eval()

    arguments = "--over size texts --size 32 48 --texts 1 30 --layers 1 2 --rounds 3 --device cpu"
    with mock.patch.dict(scale.POINT, {"size": 32, "depth": 4}):
        found = scale.main([*arguments.split(), "--output", str(tmp_path)], build)["results"]
    assert [(r["over"], r["value"]) for r in found] == [("size", 32), ("size", 48), ("texts", 1), ("texts", 30)]
    small, large, one, many = found
    assert small["gflops"] < large["gflops"] and small["flop_ratio"] < large["flop_ratio"]
    assert one["flop_ratio"] > many["flop_ratio"], "more texts cost more"
    assert all(r["speed_up"]["median"] > 0 and r["rounds"] == 3 and not r["settled"] for r in found)
    assert (tmp_path / "scale.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "scale.json").exists()
    assert "texts per image" in capsys.readouterr().out


def test_curves_by_a_flag(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(scale, "main", lambda arguments: asked.append(arguments) or {})
    command.main(["--scale", "--device", "cpu", "--output", str(tmp_path)])
    assert asked == [["--device", "cpu", "--output", str(tmp_path)]]
