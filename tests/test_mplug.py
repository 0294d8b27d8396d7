"""What is particular to mPLUG and OpenAI CLIP: checkpointed blocks, wider towers, captions, frames."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch
from doubles import mplug
from doubles.clip import CheckpointedTower, Clip
from doubles.text import pictures, sentences
from heads import build, loss_of
from since import since

import patchselect

LAYERS = [1, 3]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


HEADS = ("mplug-answering", "real-mplug-retrieval", "real-mplug-vqa")


@pytest.mark.parametrize("name", [f"{head}-{size}" for head in HEADS for size in ("base", "large")])
def test_two_forwards_and_one_backward_have_the_gradients_without_checkpointing(name):
    """A text kept at the side gives the recomputation of the first call the text of the second, and no error."""
    found = {}
    for checkpointing in (True, False):
        head = build(name)
        head.model.train().use_checkpoint = checkpointing
        patchselect.apply(head.model, 0.5, LAYERS)
        total = torch.stack([loss_of(head.call(head.batch(seed), seed=seed)) for seed in (1, 2)]).sum()
        total.backward()
        found[checkpointing] = gradients(head.model)
    assert found[True].keys() == found[False].keys()
    for key, expected in found[False].items():
        torch.testing.assert_close(
            found[True][key], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()) + 1e-9
        )


@since("checkpoints without reentry")
@pytest.mark.parametrize("guidance", ["text", "image"])
def test_pooled_patches_train_in_blocks_that_are_checkpointed_by_default(guidance):
    found = {}
    for checkpointing in (True, False):
        head = build("mplug-answering-base")
        head.model.train().use_checkpoint = checkpointing
        handle = patchselect.apply(head.model, 0.5, LAYERS, guidance=guidance)
        with handle.record() as trace:
            loss = loss_of(head.call())
        (loss + sum(entry.pooled.square().sum() for entry in trace)).backward()
        found[checkpointing] = gradients(head.model)
    assert found[True].keys() == found[False].keys()
    for key, expected in found[False].items():
        torch.testing.assert_close(
            found[True][key], expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()) + 1e-9
        )


@since("checkpoints without reentry")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_gradient_of_the_text_itself(use_reentrant, monkeypatch):
    """The text reaches the loss through the selection alone here."""
    found = {}
    checkpoint = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint,
        "checkpoint",
        lambda *args, **options: checkpoint(*args, **{**options, "use_reentrant": use_reentrant}),
    )
    for checkpointing in (True, False):
        torch.manual_seed(0)
        tower = CheckpointedTower().train()
        patchselect.apply(tower, 0.5, LAYERS)
        text = torch.randn(3, 32, requires_grad=True)
        loss = torch.zeros(())
        for factor in (1.0, -2.0):
            with patchselect.guide(tower, text * factor):
                loss = loss + tower(pictures(3), True, checkpointing)[:, 3:, :5].square().sum()
        loss.backward()
        found[checkpointing] = text.grad
    assert found[False].abs().sum() > 0
    torch.testing.assert_close(found[True], found[False])


def test_a_text_goes_back_through_the_layer_that_narrows_the_image():
    torch.manual_seed(0)
    model = mplug.Answering(large=True)
    online, momentum = patchselect.apply(model, 0.5, LAYERS).towers
    text = torch.randn(2, 32)
    assert torch.equal(online.adapter.lift(online, text), text @ model.narrow.weight)
    with torch.no_grad():
        model.narrow_slow.weight.mul_(2)
    assert torch.equal(momentum.adapter.lift(momentum, text), text @ model.narrow_slow.weight)


def test_a_wider_tower_without_that_layer_is_refused():
    model = mplug.Grounding(large=True)
    model.narrow = torch.nn.Identity()
    with pytest.raises(TypeError, match="no way to the vision width 48"):
        patchselect.apply(model)


@pytest.mark.parametrize(
    "name", ["mplug-captioning-base", "mplug-video-large", "real-mplug-caption-base", "real-mplug-caption_vatex-large"]
)
def test_captioning_has_no_text_of_its_own(name):
    head = build(name)
    args, kwargs = head.batch(0)
    patchselect.apply(head.model, 0.5, LAYERS)
    with pytest.raises(ValueError, match=r"runs no text encoder.*patchselect\.guide.*guidance=\"image\""):
        head.model(*args, **kwargs)
    patchselect.apply(head.model, 0.5, LAYERS, guidance="image")
    assert loss_of(head.model(*args, **kwargs)).isfinite()


@pytest.mark.parametrize("name", ["mplug-video-base", "real-mplug-caption_vatex-base"])
def test_the_text_of_a_video_guides_all_of_its_frames(name):
    head = build(name)
    handle = patchselect.apply(head.model.eval(), 0.5, LAYERS)
    videos, frames = head.batch(0)[0][0].shape[:2]
    texts = head.text_features()[:videos]
    with torch.no_grad(), handle.record() as trace:
        head.call(text=texts)
    with torch.no_grad(), handle.record() as expected:
        head.call(text=texts.repeat_interleave(frames, dim=0))
    assert frames > 1 and [len(entry.kept) for entry in trace] == [videos * frames] * 2
    assert all(torch.equal(one.kept, two.kept) for one, two in zip(trace, expected))


def test_a_prefix_serves_the_towers_of_mplug():
    torch.manual_seed(0)
    model = mplug.Grounding(large=True).eval()
    patchselect.apply(model, 0.5, LAYERS)
    text = torch.randn(3, 32)
    with torch.no_grad():
        prefix = patchselect.encode_prefix(model, pictures(3), skip_last_layer=True)
        with patchselect.guide(model, text):
            expected = model.eyes.visual(pictures(3), skip_last_layer=True)
        with patchselect.guide(model, text, prefix=prefix):
            found = model.eyes.visual(prefix.images, skip_last_layer=True)
    torch.testing.assert_close(found, expected)


def test_openai_clip_encodes_its_text_once():
    torch.manual_seed(0)
    model = Clip().eval()
    text = sentences(3).input_ids
    reference = model(pictures(3), text)
    handle = patchselect.apply(model, 1.0, LAYERS)
    assert handle.relevance == "values"
    assert all(map(torch.equal, model(pictures(3), text), reference))
    handle = patchselect.apply(model, 0.5, LAYERS)
    model.calls = 0
    with handle.record() as trace:
        model(pictures(3), text)
    assert model.calls == 1 and [entry.num_tokens for entry in trace] == [10, 7]
    with patchselect.guide(model, model.encode_text(text), pairing="all"):
        assert model.encode_image(pictures(2)).shape == (6, 24)


def test_the_real_openai_clip():
    directory = os.environ.get("OPENAI_CLIP_DIR")
    if not directory:
        pytest.skip("set OPENAI_CLIP_DIR to a checkout of openai/CLIP")
    spec = importlib.util.spec_from_file_location("openai_clip_model", Path(directory) / "clip" / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    sizes = dict(
        embed_dim=32, image_resolution=64, vision_width=128, vision_patch_size=16, context_length=6, vocab_size=99,
        transformer_width=64, transformer_heads=1, transformer_layers=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = module.CLIP(vision_layers=6, **sizes).eval()
    images, text = pictures(3, 64), sentences(3).input_ids
    reference = model(images, text)
    patchselect.apply(model, 1.0)
    assert all(map(torch.equal, model(images, text), reference))
    handle = patchselect.apply(model, 0.5, LAYERS)
    with handle.record() as trace:
        model(images, text)
    assert [entry.num_tokens for entry in trace] == [10, 7]
    module.convert_weights(model)
    assert model(images.half(), text)[0].isfinite().all()
    handle.remove()
    resnet = module.CLIP(vision_layers=(1, 1, 1, 1), **{**sizes, "vision_width": 64})
    with pytest.raises(TypeError, match="no sequence of patches"):
        patchselect.apply(resnet)
