"""Padded batches: images of several sizes at once are what they are one by one."""

from __future__ import annotations

import pytest
import torch
from checkpointing import switch_on
from hosts import Case, build, texts
from since import needs

import patchselect
from patchselect.functional import num_kept

SHAPES = ((3, 5), (2, 4), (5, 2), (2, 4), (1, 2))
LENGTH = 17
"""Of the batch: two places are padding in all rows."""


def batch(shapes=SHAPES, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Return images of these sizes in patches; padding is not zero, so that nothing may read it."""
    generator = torch.Generator().manual_seed(5)
    pixels = torch.stack([torch.randn(LENGTH, 768, generator=generator) for _ in SHAPES])
    counts = torch.tensor([height * width for height, width in shapes])
    return {
        "pixel_values": pixels[:, :length],
        "pixel_attention_mask": (torch.arange(length) < counts[:, None]).long(),
        "spatial_shapes": torch.tensor(shapes),
    }


def alone(row: int) -> dict[str, torch.Tensor]:
    """Return one image of the batch without padding."""
    count = SHAPES[row][0] * SHAPES[row][1]
    whole = batch()
    return {name: value[row : row + 1, :count] if value.shape[1] == LENGTH else value[row : row + 1]
            for name, value in whole.items()}  # fmt: skip


def run(case: Case, images, text=None, pairing="paired"):
    with torch.no_grad():
        if text is None:
            return case.image_side(case.model, images)
        with patchselect.guide(case.model, text, pairing):
            return case.image_side(case.model, images)


@pytest.fixture
def case() -> Case:
    return build("siglip2")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("relevance", ["keys", "features", "values", "joint"])
def test_a_batch_of_mixed_sizes_equals_the_images_one_by_one(case, relevance, attention):
    if attention == "eager":
        needs("attention by switch")
        case.model.set_attn_implementation("eager")
    text = texts(case, len(SHAPES))
    for rates, layers, fusion in (((0.5, 0.5), [1, 3], "mean"), ((0.7,), [2], "none"), ((1.0, 0.4), [0, 4], "sum")):
        patchselect.apply(case.model, list(rates), layers, relevance=relevance, fusion=fusion)
        found = run(case, batch(), text)
        for row in range(len(SHAPES)):
            torch.testing.assert_close(found[row], run(case, alone(row), text[row : row + 1])[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pairing", ["shared", "all"])
def test_pairings_of_a_padded_batch(case, pairing):
    text = texts(case, 3)
    patchselect.apply(case.model, 0.5, [1, 3])
    found = run(case, batch(), text, pairing).unflatten(0, (len(SHAPES), -1))
    for row in range(len(SHAPES)):
        torch.testing.assert_close(found[row], run(case, alone(row), text, pairing), rtol=1e-4, atol=1e-5)


def test_guidance_by_the_image_and_a_prefix(case):
    patchselect.apply(case.model, 0.5, [1, 3], guidance="image")
    found = run(case, batch())
    for row in range(len(SHAPES)):
        torch.testing.assert_close(found[row], run(case, alone(row))[0], rtol=1e-4, atol=1e-5)
    patchselect.apply(case.model, 0.5, [1, 3])
    images, text = batch(), texts(case, len(SHAPES))
    options = {name: value for name, value in images.items() if name != "pixel_values"}
    prefix = patchselect.encode_prefix(case.model, images["pixel_values"], **options)
    with torch.no_grad(), patchselect.guide(case.model, text, prefix=prefix):
        again = case.image_side(case.model, {**images, "pixel_values": prefix.images})
    torch.testing.assert_close(again, run(case, images, text), rtol=1e-5, atol=1e-5)


def test_scores_of_pairs(case):
    patchselect.apply(case.model, 0.5, [1, 3])
    text = texts(case, 3)
    found = patchselect.score_pairs(case.model, batch(), text, progress=False)
    for row in range(len(SHAPES)):
        own = patchselect.score_pairs(case.model, alone(row), text, progress=False)
        torch.testing.assert_close(found[row : row + 1], own, rtol=1e-4, atol=1e-5)


def test_several_grids_of_as_many_patches(case):
    handle = patchselect.apply(case.model, 0.5, [1, 3], guidance="image")
    images = batch()
    images = {name: value[:2] for name, value in images.items()}
    images["spatial_shapes"] = torch.tensor([[3, 5], [5, 3]])
    images["pixel_values"] = images["pixel_values"][:, :15]
    images["pixel_attention_mask"] = torch.ones(2, 15, dtype=torch.long)
    plain = run(case, images)
    with handle.record() as trace:
        torch.testing.assert_close(run(case, images), plain, rtol=1e-5, atol=1e-6)
    assert [entry.grid for entry in trace[0].images] == [(3, 5), (5, 3)]


def test_records_and_restored_grids_are_those_of_each_image(case):
    handle = patchselect.apply(case.model, 0.5, [1, 3])
    text = texts(case, len(SHAPES))
    with handle.record() as trace:
        with torch.no_grad(), patchselect.guide(case.model, text):
            tokens = case.tower(case.model)(*batch().values()).last_hidden_state
    assert [entry.num_tokens for entry in trace] == [num_kept(15, 0.5) + 1, num_kept(num_kept(15, 0.5) + 1, 0.5) + 1]
    grids = patchselect.restore(tokens, trace, fill=float("nan"))
    for row, (height, width) in enumerate(SHAPES):
        with handle.record() as single, torch.no_grad(), patchselect.guide(case.model, text[row : row + 1]):
            own = case.tower(case.model)(*alone(row).values()).last_hidden_state
        for entry, other in zip(trace.of_image(row), single):
            assert torch.equal(entry.kept, other.kept) and entry.grid == other.grid == (height, width)
            assert torch.equal(entry.holders, other.holders) and entry.num_tokens == other.num_tokens
            torch.testing.assert_close(entry.relevance, other.relevance, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(entry.pooled, other.pooled, rtol=1e-4, atol=1e-5)
        expected = patchselect.restore(own, single, fill=float("nan"))[0]
        torch.testing.assert_close(grids[row], expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        kept = trace[0].kept[row]
        count = num_kept(height * width, 0.5)
        assert (kept[:count] >= 0).all() and (kept[:count] < height * width).all() and (kept[count:] == -2).all()


def test_padding_is_never_read(case):
    patchselect.apply(case.model, 0.5, [1, 3])
    images, text = batch(), texts(case, len(SHAPES))
    expected = run(case, images, text)
    for row, (height, width) in enumerate(SHAPES):
        images["pixel_values"][row, height * width :] = 100.0
    torch.testing.assert_close(run(case, images, text), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [None, False])
def test_training_with_and_without_checkpointing(case, reentrant):
    needs("checkpointing kinds")
    text = texts(case, len(SHAPES)).requires_grad_()
    gradients = []
    for options in (None, {"use_reentrant": False}) if reentrant is False else (None,):
        case = build("siglip2")
        patchselect.apply(case.model.train(), 0.5, [1, 3])
        if options is not None:
            switch_on(case.model, options)
        text.grad = None
        with patchselect.guide(case.model, text):
            case.image_side(case.model, batch()).square().sum().backward()
        gradients.append([p.grad for p in case.tower(case.model).encoder.parameters()] + [text.grad])
    assert gradients[0][-1].abs().sum() > 0
    for first, second in zip(gradients[0], gradients[-1]):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)


def test_what_a_padded_batch_cannot_do_is_said(case):
    text = texts(case, len(SHAPES))
    images = batch()
    patchselect.apply(case.model, 0.5, [3], merge=0.5)
    with pytest.raises(ValueError, match="padded batch.*merge=0"):
        run(case, images, text)
    patchselect.apply(case.model, 0.5, [1, 3])
    images["pixel_attention_mask"] = images["pixel_attention_mask"].flip(1)
    with pytest.raises(ValueError, match="in front of the padding"):
        run(case, images, text)
    images = batch()
    plain = build("siglip2")
    reference = run(plain, images)
    patchselect.apply(plain.model, 1.0)
    assert torch.equal(run(plain, images, text), reference)
