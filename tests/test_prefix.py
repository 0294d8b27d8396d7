"""A prefix gives the numbers that the pixels give, skips what it holds, and is refused once it no longer fits."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from checkpointing import switch_on
from hosts import HOSTS, Case, build, ids, take, texts
from since import loaded, missing, needs
from torch import Tensor, nn
from torch.utils.data import DataLoader

import patchselect


def split(images) -> tuple[Tensor, dict]:
    """What the tower is called with: pixels and, for SigLIP 2, the other arguments."""
    if not isinstance(images, dict):
        return images, {}
    return images["pixel_values"], {key: value for key, value in images.items() if key != "pixel_values"}


def from_prefix(case: Case, images, prefix: patchselect.Prefix, text: Tensor, pairing: str = "paired") -> Tensor:
    inputs = {**images, "pixel_values": prefix.images} if isinstance(images, dict) else prefix.images
    with torch.no_grad(), patchselect.guide(case.model, text, pairing, prefix=prefix):
        return case.image_side(case.model, inputs)


def from_pixels(case: Case, images, text: Tensor, pairing: str = "paired") -> Tensor:
    with torch.no_grad(), patchselect.guide(case.model, text, pairing):
        return case.image_side(case.model, images)


@pytest.mark.parametrize("name", list(HOSTS))
def test_the_numbers_are_those_from_the_pixels(name):
    case = build(name)
    images = case.images(3)
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    pixels, options = split(images)
    prefix = patchselect.encode_prefix(case.model, pixels, **options)
    assert len(prefix) == 3 and prefix.images.shape == pixels.shape
    for text, pairing in ((texts(case, 3), "paired"), (texts(case, 4), "shared"), (texts(case, 4), "all")):
        expected = from_pixels(case, images, text, pairing)
        torch.testing.assert_close(from_prefix(case, images, prefix, text, pairing), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(HOSTS))
def test_blocks_before_the_selection_do_not_run_again_and_later_ones_not_for_the_prefix(name):
    case = build(name)
    images = case.images(2)
    pixels, options = split(images)
    patchselect.apply(case.model, 0.5, layers=[2, 4])
    blocks = patchselect.wiring.towers.find_towers(case.model)[0].blocks
    ran: list[int] = []
    for index, block in enumerate(blocks):
        # Of the two images; what tells whether a prefix still fits are a few tokens in one row.
        mlp = block.mlp if hasattr(block, "mlp") else block.intermediate  # ViT before transformers 5
        mlp.register_forward_hook(lambda _, x, y, index=index: ran.append(index) if 2 in x[0].shape[:2] else None)
    prefix = patchselect.encode_prefix(case.model, pixels, **options)
    assert ran == [0, 1]
    ran.clear()
    from_prefix(case, images, prefix, texts(case, 2))
    assert ran == [2, 3, 4, 5]
    ran.clear()
    from_pixels(case, images, texts(case, 2))
    assert ran == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["clip", "siglip2", "open_clip", "albef", "mplug", "timm_registers"])
def test_a_hook_that_comes_or_goes_is_noticed(name):
    case = build(name)
    images = case.images(2)
    pixels, options = split(images)
    patchselect.apply(case.model, 0.5, layers=[2, 4])
    prefix = patchselect.encode_prefix(case.model, pixels, **options)
    block = patchselect.wiring.towers.find_towers(case.model)[0].blocks[1]
    embedding = next(part for part in case.tower(case.model).modules() if isinstance(part, (nn.Conv2d, nn.Linear)))
    from_prefix(case, images, prefix, texts(case, 2))
    for part in (block.mlp, embedding):
        hook = part.register_forward_hook(lambda module, given, found: 1.01 * found)
        with pytest.raises(ValueError, match="do not compute what they did"):
            from_prefix(case, images, prefix, texts(case, 2))
        hook.remove()
        from_prefix(case.model.train() and case, images, prefix, texts(case, 2))  # dropout is none of its business
        case.model.eval()


def test_each_image_may_have_its_own_texts():
    case = build("clip")
    images, text = case.images(3), texts(case, 3, 2)
    for relevance in case.relevances:
        patchselect.apply(case.model, 0.5, layers=[1, 3], relevance=relevance)
        expected = from_pixels(case, images.repeat_interleave(2, dim=0), text.flatten(0, 1))
        torch.testing.assert_close(from_pixels(case, images, text, "all"), expected, rtol=1e-5, atol=1e-5)
        prefix = patchselect.encode_prefix(case.model, images)
        torch.testing.assert_close(from_prefix(case, images, prefix, text, "all"), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="2 images came"):
        from_pixels(case, images[:2], text, "all")
    with pytest.raises(ValueError, match="text_features must be"):
        patchselect.guide(case.model, text, "paired")


def test_images_can_be_chosen_stored_and_asked_in_another_copy():
    case = build("open_clip")
    images, text = case.images(4), texts(case, 1)
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    prefix = patchselect.encode_prefix(case.model, images)
    expected = from_pixels(case, images, text, "all")
    for rows in (2, slice(1, 3), [3, 0], torch.tensor([0, 2])):
        index = [rows] if isinstance(rows, int) else rows
        found = from_prefix(case, images, prefix[rows], text, "all")
        torch.testing.assert_close(found, expected[index], rtol=1e-5, atol=1e-5)
    file = io.BytesIO()
    torch.save(prefix, file)
    file.seek(0)
    stored = torch.load(file, weights_only=True) if missing("weights_only") is None else loaded(file)
    twin = copy.deepcopy(case.model)
    with torch.no_grad(), patchselect.guide(twin, text, "all", prefix=stored):
        torch.testing.assert_close(case.image_side(twin, stored.images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "siglip2", "open_clip"])
def test_a_prefix_is_taken_of_what_score_pairs_takes(name):
    case = build(name)
    images = case.images(3)
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    pixels, options = split(images)
    whole = patchselect.encode_prefix(case.model, pixels, **options)
    named = {"pixel_values": pixels, **options}
    sources = [named, DataLoader([{key: value[i] for key, value in named.items()} for i in range(3)], batch_size=2)]
    sources += [] if name == "siglip2" else [list(pixels), [pixels[:2], pixels[2:]]]
    for source in sources:
        prefix = patchselect.encode_prefix(case.model, source)
        assert (len(prefix), prefix.shape, prefix.origin) == (3, whole.shape, whole.origin)
        torch.testing.assert_close(prefix.tokens, whole.tokens, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(prefix.normed, whole.normed, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="are a Prefix already"):
        patchselect.encode_prefix(case.model, whole)
    with pytest.raises(ValueError, match=r"one size, at least one of them; got \[\]"):
        patchselect.encode_prefix(case.model, [])
    with pytest.raises(TypeError, match="image processor first"):
        patchselect.encode_prefix(case.model, ["cat.jpg"])


@pytest.mark.parametrize("name", list(HOSTS))
def test_the_stand_in_without_its_prefix_gives_no_numbers(name):
    case = build(name)
    images = case.images(2)
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    pixels, options = split(images)
    prefix = patchselect.encode_prefix(case.model, pixels, **options)
    inputs = {**images, "pixel_values": prefix.images} if isinstance(images, dict) else prefix.images
    assert not from_pixels(case, inputs, texts(case, 2)).isfinite().any()


def test_the_whole_model_takes_a_prefix_in_place_of_its_pixels():
    case = build("clip")
    patchselect.apply(case.model, 0.5, layers=[1, 3], pairing="paired")
    images, tokens = case.images(2), ids(2)
    prefix = patchselect.encode_prefix(case.model, images)
    text = case.text_side(case.model, tokens).detach()
    with torch.no_grad():
        expected = case.pair(case.model, images, tokens)
        with patchselect.guide(case.model, text, prefix=prefix):
            torch.testing.assert_close(case.pair(case.model, prefix.images, tokens), expected, rtol=1e-5, atol=1e-5)


def test_a_prefix_that_no_longer_fits_is_refused():
    case = build("clip")
    images, text = case.images(2), texts(case, 2)
    model = case.model
    layers = case.tower(model).encoder.layers
    patchselect.apply(model, 0.5, layers=[1, 3])
    prefix = patchselect.encode_prefix(model, images)
    patchselect.apply(model, 0.5, layers=[2, 3])
    with pytest.raises(ValueError, match=r"layers \[1, 3\], this model selects in \[2, 3\]"):
        patchselect.guide(model, text, prefix=prefix)
    patchselect.apply(model, 0.7, layers=[1, 3])
    patchselect.guide(model, text, prefix=prefix)
    weight = layers[0].mlp.fc1.weight
    before = weight.detach().clone()
    for change in (lambda: weight.data.mul_(1.01), lambda: setattr(weight, "data", before + 1e-3)):
        change()
        with pytest.raises(ValueError, match="weights before the first selection"):
            patchselect.guide(model, text, prefix=prefix)
        weight.data = before.clone()
    layers[5].mlp.fc1.weight.data.mul_(2)
    torch.testing.assert_close(from_prefix(case, images, prefix, text), from_pixels(case, images, text))
    other = build("open_clip")
    patchselect.apply(other.model, 0.5, layers=[1, 3])
    with pytest.raises(ValueError, match="of another model"):
        patchselect.guide(other.model, texts(other, 2), prefix=prefix)
    stranger = build("clip", seed=5)
    patchselect.apply(stranger.model, 0.5, layers=[1, 3])
    with pytest.raises(ValueError, match="weights before the first selection"):
        patchselect.guide(stranger.model, text, prefix=prefix)
    guided = patchselect.guide(model, text, prefix=prefix[:1])
    with guided, pytest.raises(ValueError, match="holds 1 images of 17 tokens, the encoder was called with 2"):
        case.image_side(model, images)


def test_only_a_text_guided_model_has_a_prefix_and_remove_leaves_nothing_of_it():
    case = build("clip")
    classes = [type(part) for part in case.model.modules()]
    with pytest.raises(ValueError, match="not patched"):
        patchselect.encode_prefix(case.model, case.images(1))
    patchselect.apply(case.model, guidance="image")
    with pytest.raises(ValueError, match="guided by 'image'"):
        patchselect.encode_prefix(case.model, case.images(1))
    handle = patchselect.apply(case.model)
    patchselect.encode_prefix(case.model, case.images(1))
    handle.remove()
    assert [type(part) for part in case.model.modules()] == classes
    assert not any("patchselect" in key for part in case.model.modules() for key in vars(part))


def test_gradients_reach_the_text_and_the_suffix_through_checkpointing():
    needs("checkpointing kinds")
    case = build("clip")
    text = texts(case, 2).requires_grad_()
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    prefix = patchselect.encode_prefix(case.model, case.images(2))
    found = []
    for reentrant in (None, False):
        if reentrant is not None:
            switch_on(case.model, {"use_reentrant": reentrant})
        case.model.train()
        case.model.zero_grad()
        with patchselect.guide(case.model, text, prefix=prefix):
            output = case.image_side(case.model, prefix.images)
        weights = case.tower(case.model).encoder.layers[2].mlp.fc1.weight
        found.append(torch.autograd.grad(output.square().sum(), (text, weights)))
    for one, other in zip(*found):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other)


def test_rows_of_a_batch_are_rows_of_a_prefix():
    case = build("siglip2")
    images = case.images(3)
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    pixels, options = split(images)
    prefix = patchselect.encode_prefix(case.model, pixels, **options)
    expected = from_pixels(case, images, texts(case, 3))
    found = from_prefix(case, take(images, slice(1, 3)), prefix[1:], texts(case, 3)[1:])
    torch.testing.assert_close(found, expected[1:], rtol=1e-5, atol=1e-5)
