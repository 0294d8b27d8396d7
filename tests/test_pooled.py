"""The last block on the pooled token alone: the same pooled output, refused where patches are read."""

from __future__ import annotations

import pytest
import torch
from hosts import HOSTS, VISION, build
from since import BENCHMARKS, needs

import patchselect

POOLED = {"clip", "chinese_clip", "alt_clip", "metaclip2", "clip_vision_projected", "open_clip", "timm_class_token",
          "dual_encoder"}  # fmt: skip


@pytest.mark.parametrize("name", list(HOSTS))
def test_the_pooled_output_is_the_same_or_the_model_is_refused(name):
    case = build(name)
    images, text = case.images(2), torch.randn(2, case.text_width)
    for rate in (1.0, 0.5):
        handle = patchselect.apply(case.model, rate, [1, 3])
        with torch.no_grad(), patchselect.guide(case.model, text):
            expected = case.image_side(case.model, images)
        if name not in POOLED:
            with pytest.raises(ValueError, match="outputs of the last block|normalises its queries"):
                patchselect.skip_unread_outputs(case.model)
            continue
        patchselect.skip_unread_outputs(case.model)
        last, lengths, axis = handle.towers[0].blocks[-1], [], int(handle.towers[0].batch_first)
        last.mlp.register_forward_hook(
            lambda module, args, out, lengths=lengths, axis=axis: lengths.append(args[0].shape[axis])
        )
        with torch.no_grad(), patchselect.guide(case.model, text):
            found = case.image_side(case.model, images)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert lengths == [case.prefix]


def test_it_goes_together_with_a_prefix_and_goes_away_with_the_selection():
    case = build("open_clip")
    classes = [type(part) for part in case.model.modules()]
    handle = patchselect.apply(case.model, 0.5, [1, 3])
    images, text = case.images(2), torch.randn(3, case.text_width)
    expected = patchselect.score_pairs(case.model, images, text)
    patchselect.skip_unread_outputs(case.model)
    torch.testing.assert_close(patchselect.score_pairs(case.model, images, text), expected)
    handle.remove()
    assert [type(part) for part in case.model.modules()] == classes


def test_a_last_block_that_selects_is_refused_and_training_runs_as_always():
    case = build("clip")
    with pytest.raises(ValueError, match="not patched"):
        patchselect.skip_unread_outputs(case.model)
    patchselect.apply(case.model, 0.5, [1, 5])
    with pytest.raises(ValueError, match="block 5 selects patches"):
        patchselect.skip_unread_outputs(case.model)
    patchselect.apply(case.model, 0.5, [1, 3])
    patchselect.skip_unread_outputs(case.model)
    lengths = []
    last = case.tower(case.model).encoder.layers[5]
    last.mlp.register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
    case.model.train()
    with patchselect.guide(case.model, torch.randn(1, case.text_width)):
        case.image_side(case.model, case.images(1)).sum().backward()
    assert lengths[0] > 1 and last.mlp.fc1.weight.grad.abs().sum() > 0


def test_its_benchmark_counts_what_it_saves(tmp_path, capsys, flops):
    needs("projected tower", *BENCHMARKS)
    import transformers

    from benchmarks.speed import last_block

    def tiny(size: int):
        config = transformers.CLIPVisionConfig(**{**VISION, "image_size": size}, projection_dim=512)
        return transformers.CLIPVisionModelWithProjection(config).eval()

    arguments = ["--image-size", "64", "--layers", "1", "3", "--rounds", "1", "--device", "cpu"]
    found = last_block.main([*arguments, "--output", str(tmp_path / "found.json")], tiny)["results"]
    saved = [record["saved"] for record in found]
    assert [record["keep_rate"] for record in found] == [1.0, 0.7, 0.5]
    assert 1 / 6 > saved[0] > saved[1] > saved[2] > 0
    assert all(record["moved"] < 1e-5 and record["speed_up"]["median"] > 0 for record in found)
    assert capsys.readouterr().out.count("\n| ") == 4
