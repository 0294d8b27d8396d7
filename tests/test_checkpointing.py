"""Gradient checkpointing: blocks that run again have their own text or are refused, and nothing is kept afterwards."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect

import pytest
import torch
from checkpointing import needs_graph, switch_on, ways
from hosts import build
from since import needs
from torch.utils.checkpoint import checkpoint

import patchselect
from patchselect.wiring import recomputation

TABLES = recomputation.TABLES
KINDS = {"use_reentrant": False} if "use_reentrant" in inspect.signature(checkpoint).parameters else {}
CHECKPOINTED = ["clip", "siglip", "open_clip", "timm_class_token", "open_clip_siglip"]


def gradients(name: str, options, relevance: str, detached: bool = False):
    """Two forward calls with different texts, then one backward of their sum, outside of any guide."""
    torch.manual_seed(0)
    case = build(name)
    case.model.train()
    patchselect.apply(case.model, 0.5, relevance=relevance)
    if options is not None:
        switch_on(case.model, options)
    images = case.images(2)
    texts = [torch.randn(2, case.text_width, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    texts = [text.requires_grad_(not detached) for text in texts]
    losses = []
    for weight, text in zip((1.0, 3.0), texts):
        with patchselect.guide(case.model, text):
            losses.append(weight * case.image_side(case.model, images).square().sum())
    with patchselect.guide(case.model, torch.randn(2, case.text_width)):
        sum(losses).backward()
    found = {key: value.grad for key, value in case.model.named_parameters()}
    return {**found, **{f"text {index}": text.grad for index, text in enumerate(texts)}}


@pytest.mark.parametrize("relevance", ["keys", "values"])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_checkpointing_changes_no_gradient(name, relevance):
    """Or a text that would lose its gradient is refused, with advice that this release of the host can follow."""
    for way in ways(name):
        if not way.carries_text:
            with pytest.raises(RuntimeError, match=f"{way.advice}.*or give guide.. detached text features"):
                gradients(name, way.options, relevance)
        expected = gradients(name, None, relevance, detached=not way.carries_text)
        found = gradients(name, way.options, relevance, detached=not way.carries_text)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert (value is None) == (found[key] is None), key
            if value is not None:
                torch.testing.assert_close(
                    found[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
                )


@pytest.mark.parametrize("name", ["clip", "open_clip", "timm_class_token", "albef", "openai_clip"])
def test_training_steps_leave_no_noted_text_behind(name):
    """With and without checkpointing of every block, the text trained or not."""
    if name == "clip":
        needs("checkpoints of CLIP")
    case = build(name)
    case.model.train()
    patchselect.apply(case.model, 0.5)
    blocks = patchselect.wiring.towers.find_towers(case.model)[0].blocks
    images = case.images(2)
    gc.collect()
    before = [len(table) for table in TABLES]
    for checkpointed in (False, True):
        if checkpointed:
            for block in blocks:
                block.forward = functools.partial(checkpoint, block.forward, **KINDS)
        for step in range(4):
            text = torch.randn(2, case.text_width, requires_grad=bool(step % 2) and (bool(KINDS) or not checkpointed))
            with patchselect.guide(case.model, text), patchselect.handle_of(case.model).record():
                loss = case.image_side(case.model, images.clone().requires_grad_()).square().sum()
            assert len(recomputation.TEXTS) > before[0], "nothing was noted at all"
            loss.backward()
            del loss, text
            gc.collect()
            assert [len(table) for table in TABLES] == before, (checkpointed, step)


@pytest.mark.parametrize("guidance", ["text", "image"])
@pytest.mark.parametrize("name", ["clip", "open_clip", "timm_class_token"])
def test_checkpointing_where_nothing_before_the_selection_trains(name, guidance):
    found = []
    needs_graph(name)
    for options in (None, ways(name)[0].options):
        case = build(name)
        case.model.train().requires_grad_(False)
        for block in patchselect.wiring.towers.find_towers(case.model)[0].blocks[2:]:
            block.requires_grad_(True)
        handle = patchselect.apply(case.model, 0.5, layers=[2, 4], guidance=guidance)
        if options is not None:
            switch_on(case.model, options)
        text = torch.randn(2, case.text_width, generator=torch.Generator().manual_seed(0))
        with handle.record() as trace, contextlib.ExitStack() as stack:
            if guidance == "text":
                stack.enter_context(patchselect.guide(case.model, text))
            out = case.image_side(case.model, case.images(2))
        (out.square().sum() + sum(entry.pooled.square().sum() for entry in trace)).backward()
        found.append([p.grad for p in case.model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    for plain, recomputed in zip(*found):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5)


def test_inference_notes_nothing_for_recomputation(monkeypatch):
    case = build("clip")
    patchselect.apply(case.model, 0.5)
    monkeypatch.setattr(recomputation.FirstRuns, "keep", lambda *_: pytest.fail("noted"))
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet(), patchselect.handle_of(case.model).record(), patchselect.guide(case.model, torch.randn(2, 24)):
            case.image_side(case.model, case.images(2))


def test_nothing_is_kept_for_recomputation_once_it_cannot_happen():
    gc.collect()
    before = len(recomputation.TEXTS)
    case = build("open_clip")
    patchselect.apply(case.model, 0.5)
    with patchselect.guide(case.model, torch.randn(2, 24, requires_grad=True)):
        loss = case.image_side(case.model.train(), case.images(2)).sum()
    assert len(recomputation.TEXTS) > before
    loss.backward()
    del loss
    gc.collect()
    assert len(recomputation.TEXTS) == before


def tokens_for(case):
    """Tokens of two images as a block of this release takes them: batch first or second."""
    first = patchselect.wiring.towers.find_towers(case.model)[0].batch_first
    return torch.randn(*((2, 17) if first else (17, 2)), 64, requires_grad=True)


def test_reentrant_checkpointing_that_would_lose_the_gradient_of_the_text_is_refused():
    case = build("open_clip")
    case.model.train()
    patchselect.apply(case.model, 0.5)
    block = case.model.visual.transformer.resblocks[1]
    x = tokens_for(case)
    text = torch.randn(2, 24, requires_grad=True)
    with patchselect.guide(case.model, text):
        out = checkpoint(block, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        out.sum().backward()
    other = x.detach().clone().requires_grad_()
    with patchselect.guide(case.model, text.detach()):
        out = checkpoint(block, other, use_reentrant=True)
    out.sum().backward()
    assert other.grad is not None


def test_one_input_guided_by_two_texts_is_never_recomputed_with_the_wrong_one():
    case = build("open_clip")
    case.model.train()
    patchselect.apply(case.model, 0.5)
    block = case.model.visual.transformer.resblocks[1]
    x = tokens_for(case)
    outs = []
    for _ in range(2):
        with patchselect.guide(case.model, torch.randn(2, 24)):
            outs.append(checkpoint(block, x, use_reentrant=False))
    with pytest.raises(RuntimeError, match="guided by two texts"):
        sum(outs).sum().backward()


def test_recording_counts_each_call_once_under_checkpointing():
    case = build("open_clip")
    handle = patchselect.apply(case.model.train(), 0.5)
    switch_on(case.model, {})
    with handle.record() as trace:
        for _ in range(2):
            with patchselect.guide(case.model, torch.randn(2, 24)):
                case.image_side(case.model, case.images(2)).sum().backward()
    assert [entry.layer for entry in trace] == [1, 4, 1, 4]


@pytest.mark.parametrize("guidance", ["text", "image"])
def test_pooled_patches_train_under_checkpointing(guidance):
    needs_graph("open_clip")
    found = []
    for switched in (False, True):
        case = build("open_clip")
        handle = patchselect.apply(case.model.train(), 0.5, guidance=guidance)
        if switched:
            switch_on(case.model, {})
        text = torch.randn(2, 24, generator=torch.Generator().manual_seed(0))
        with handle.record() as trace:
            if guidance == "text":
                with patchselect.guide(case.model, text):
                    out = case.image_side(case.model, case.images(2))
            else:
                out = case.image_side(case.model, case.images(2))
        (out.sum() + sum(entry.pooled.square().sum() for entry in trace)).backward()
        found.append([p.grad for p in case.model.visual.parameters()])
    for plain, recomputed in zip(*found):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5)


def test_reentrant_checkpointing_without_the_graph_of_pooled_patches_is_an_error_where_they_train():
    """Looking at them is none, nor is a loss of something else."""
    case = build("clip")
    handle, way = patchselect.apply(case.model.train(), 0.5), ways("clip")[-1]
    images, text = case.images(2), torch.randn(2, 24)
    with torch.no_grad(), handle.record() as expected, patchselect.guide(case.model, text):
        case.image_side(case.model, images)
    switch_on(case.model, way.options)
    with handle.record() as trace, patchselect.guide(case.model, text):
        out = case.image_side(case.model, images)
    for entry, plain in zip(trace, expected):
        torch.testing.assert_close(entry.pooled.detach(), plain.pooled)
    out.sum().backward()
    with handle.record() as trace, patchselect.guide(case.model, text):
        out = case.image_side(case.model, images)
    with pytest.raises(RuntimeError, match=way.advice):
        (out.sum() + trace[0].pooled.square().sum()).backward()
    with torch.no_grad(), handle.record() as trace, patchselect.guide(case.model, text):
        case.image_side(case.model, images)
    assert not any(entry.pooled.requires_grad for entry in trace)
