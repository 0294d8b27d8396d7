"""Padded batches: images of several sizes at once are what they are one by one."""

from __future__ import annotations

import pytest
import torch
from checkpointing import switch_on
from hosts import Case, build, texts
from hosts.of_open_clip import patches_of
from since import needs

import patchselect
from patchselect.functional import num_kept
from patchselect.wiring.towers import find_towers

SHAPES = ((3, 5), (2, 4), (5, 2), (2, 4), (1, 2))
LENGTH = 17
"""Of the batch: two places are padding in all rows."""
KINDS = ("siglip2", "timm_naflex", "timm_naflex_rotary", "open_clip_naflex")


def batch(case: Case, shapes=SHAPES, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Return images of these sizes in patches; padding is not zero, so that nothing may read it."""
    found = patches_of(shapes, length)
    if hasattr(case.tower(case.model), "embeds"):  # NaFlexVit
        return found
    return {
        "pixel_values": found["patches"],
        "pixel_attention_mask": found["patch_valid"].to(torch.long),
        "spatial_shapes": torch.tensor(shapes),
    }


def alone(case: Case, row: int) -> dict[str, torch.Tensor]:
    """Return one image of the batch without padding."""
    count = SHAPES[row][0] * SHAPES[row][1]
    return {name: value[row : row + 1] if name == "spatial_shapes" else value[row : row + 1, :count]
            for name, value in batch(case).items()}  # fmt: skip


def pixels_of(images: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(iter(images.values()))


def tokens_of_call(case: Case, images: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the tokens that the tower gives, padding and prefix tokens included."""
    tower = case.tower(case.model)
    if "patches" in images:
        return tower.forward_features(**images)["patches"]
    return tower(*images.values()).last_hidden_state


def attend_in_steps(case: Case) -> None:
    """Let the host compute the map of its attention itself."""
    if hasattr(case.model, "set_attn_implementation"):
        case.model.set_attn_implementation("eager")
        return
    fused = [part for part in case.tower(case.model).blocks.modules() if hasattr(part, "fused_attn")]
    assert fused
    for part in fused:
        part.fused_attn = False


def run(case: Case, images, text=None, pairing="paired"):
    with torch.no_grad():
        if text is None:
            return case.image_side(case.model, images)
        with patchselect.guide(case.model, text, pairing):
            return case.image_side(case.model, images)


@pytest.fixture(params=KINDS)
def case(request) -> Case:
    return build(request.param)


@pytest.mark.parametrize(
    ("relevance", "attention"),
    [(name, "sdpa") for name in ("keys", "features", "values", "joint")] + [("keys", "eager")],
)
def test_a_batch_of_mixed_sizes_equals_the_images_one_by_one(case, relevance, attention):
    if attention == "eager":
        needs("attention by switch")
        attend_in_steps(case)
    text = texts(case, len(SHAPES))
    for rates, layers, fusion in (((0.5, 0.5), [1, 3], "mean"), ((0.7,), [2], "none"), ((1.0, 0.4), [0, 4], "sum")):
        patchselect.apply(case.model, list(rates), layers, relevance=relevance, fusion=fusion)
        found = run(case, batch(case), text)
        for row in range(len(SHAPES)):
            torch.testing.assert_close(
                found[row], run(case, alone(case, row), text[row : row + 1])[0], rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("pairing", ["shared", "all"])
def test_pairings_of_a_padded_batch(case, pairing):
    text = texts(case, 3)
    patchselect.apply(case.model, 0.5, [1, 3])
    found = run(case, batch(case), text, pairing).unflatten(0, (len(SHAPES), -1))
    for row in range(len(SHAPES)):
        torch.testing.assert_close(found[row], run(case, alone(case, row), text, pairing), rtol=1e-4, atol=1e-5)


def test_guidance_by_the_image_and_a_prefix(case):
    patchselect.apply(case.model, 0.5, [1, 3], guidance="image")
    found = run(case, batch(case))
    for row in range(len(SHAPES)):
        torch.testing.assert_close(found[row], run(case, alone(case, row))[0], rtol=1e-4, atol=1e-5)
    patchselect.apply(case.model, 0.5, [1, 3])
    images, text = batch(case), texts(case, len(SHAPES))
    prefix = patchselect.encode_prefix(case.model, images)
    with torch.no_grad(), patchselect.guide(case.model, text, prefix=prefix):
        again = case.image_side(case.model, {**images, next(iter(images)): prefix.images})
    torch.testing.assert_close(again, run(case, images, text), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["siglip2", "open_clip_naflex"])
def test_scores_of_pairs(name):
    case = build(name)
    patchselect.apply(case.model, 0.5, [1, 3])
    text = texts(case, 3)
    found = patchselect.score_pairs(case.model, batch(case), text, progress=False)
    for row in range(len(SHAPES)):
        own = patchselect.score_pairs(case.model, alone(case, row), text, progress=False)
        torch.testing.assert_close(found[row : row + 1], own, rtol=1e-4, atol=1e-5)


def test_several_grids_of_as_many_patches(case):
    handle = patchselect.apply(case.model, 0.5, [1, 3], guidance="image")
    images = batch(case, [(3, 5), (5, 3)], 15)
    plain = run(case, images)
    with handle.record() as trace:
        torch.testing.assert_close(run(case, images), plain, rtol=1e-5, atol=1e-6)
    assert [entry.grid for entry in trace[0].images] == [(3, 5), (5, 3)]


def test_images_of_one_size_may_be_padded_too(case):
    """Processors pad one image as well."""
    patchselect.apply(case.model, 0.5, [1, 3])
    text = texts(case, 2)
    plain = run(case, batch(case, [(3, 5)] * 2, 15), text)
    longer = batch(case, [(3, 5)] * 2, 20)
    first, short = next(iter(longer)), pixels_of(batch(case, [(3, 5)] * 2, 15))
    longer[first][:, :15] = short
    torch.testing.assert_close(run(case, longer, text), plain, rtol=1e-4, atol=1e-5)
    alone = {name: value[:1] for name, value in longer.items()}
    torch.testing.assert_close(run(case, alone, text[:1]), plain[:1], rtol=1e-4, atol=1e-5)


def test_records_and_restored_grids_are_those_of_each_image(case):
    handle = patchselect.apply(case.model, 0.5, [1, 3])
    text = texts(case, len(SHAPES))
    with handle.record() as trace:
        with torch.no_grad(), patchselect.guide(case.model, text):
            tokens = tokens_of_call(case, batch(case))
    first = num_kept(15, 0.5) + 1
    assert [entry.num_tokens - case.prefix for entry in trace] == [first, num_kept(first, 0.5) + 1]
    grids = patchselect.restore(tokens, trace, fill=float("nan"))
    for row, (height, width) in enumerate(SHAPES):
        with handle.record() as single, torch.no_grad(), patchselect.guide(case.model, text[row : row + 1]):
            own = tokens_of_call(case, alone(case, row))
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
    images, text = batch(case), texts(case, len(SHAPES))
    expected = run(case, images, text)
    for row, (height, width) in enumerate(SHAPES):
        pixels_of(images)[row, height * width :] = 100.0
    torch.testing.assert_close(run(case, images, text), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reentrant", [None, False])
@pytest.mark.parametrize("name", KINDS)
def test_training_with_and_without_checkpointing(name, reentrant):
    needs("checkpointing kinds")
    gradients, text = [], texts(build(name), len(SHAPES)).requires_grad_()
    for options in (None, {"use_reentrant": False}) if reentrant is False else (None,):
        case = build(name)
        patchselect.apply(case.model.train(), 0.5, [1, 3])
        if options is not None and hasattr(case.model, "gradient_checkpointing_enable"):
            switch_on(case.model, options)
        elif options is not None:
            case.tower(case.model).set_grad_checkpointing()
        text.grad = None
        with patchselect.guide(case.model, text):
            case.image_side(case.model, batch(case)).square().sum().backward()
        blocks = find_towers(case.model)[0].blocks
        gradients.append([p.grad for block in blocks for p in block.parameters()] + [text.grad])
    assert gradients[0][-1].abs().sum() > 0
    for first, second in zip(gradients[0], gradients[-1]):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-5)


def test_what_a_padded_batch_cannot_do_is_said(case):
    text, plain = texts(case, len(SHAPES)), run(case, batch(case))
    patchselect.apply(case.model, 0.5, [3], merge=0.5)
    with pytest.raises(ValueError, match="padded batch.*merge=0"):
        run(case, batch(case), text)
    patchselect.apply(case.model, 0.5, [1, 3])
    images = batch(case)
    mask = "pixel_attention_mask" if "pixel_attention_mask" in images else "patch_valid"
    images[mask] = images[mask].flip(1)
    with pytest.raises(ValueError, match="in front of the padding"):
        run(case, images, text)
    patchselect.apply(case.model, 1.0)
    assert torch.equal(run(case, batch(case), text), plain)
