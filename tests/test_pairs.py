"""N images against M texts: the numbers of pair by pair, from tensors and from loaders."""

from __future__ import annotations

import functools

import pytest
import torch
from hosts import HOSTS, Case, build, ids, take, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import patchselect

BARE = {
    "timm_class_token",
    "timm_registers",
    "timm_average",
    "timm_naflex",
    "timm_naflex_rotary",
    "albef_tower",
    "meter_tower",
    "lavis_clip_vit",
    "vit",
    "dinov2_registers",
    "dinov3",
    "timm_eva02",
}
FUSED = {"albef", "mplug", "meter", "blip"}  # scored by a fusion encoder that reads tokens, not features
UNREAD = {"mplug", "meter", "timm_eva02"}  # whose value-output path cannot be read backwards
SCORED = [name for name in HOSTS if name not in BARE | FUSED]
scored = functools.partial(patchselect.score_pairs, progress=False)


@torch.no_grad()
def pair_by_pair(case: Case, images, text: Tensor) -> Tensor:
    """The slow, obvious reference: one image, one text, one whole pass."""
    size = len(images["pixel_values"] if isinstance(images, dict) else images)
    scores = torch.empty(size, len(text))
    for i in range(size):
        for j in range(len(text)):
            with patchselect.guide(case.model, text[j : j + 1]):
                found = case.image_side(case.model, take(images, slice(i, i + 1)))
            scores[i, j] = torch.cosine_similarity(found, text[j : j + 1])
    return scores


@functools.lru_cache(maxsize=None)
def shared_case(name: str) -> Case:
    return build(name)


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(["clip", "siglip", "open_clip", "open_clip_normalised_keys"]),
    rate=st.floats(0.05, 1.0),
    layers=st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True).map(sorted),
    relevance=st.sampled_from(["keys", "features", "values", "joint"]),
    fusion=st.sampled_from(["mean", "sum", "none"]),
    images=st.integers(1, 2),
    count=st.integers(1, 3),
)
def test_all_pairs_are_the_pairs_one_by_one(name, rate, layers, relevance, fusion, images, count):
    case = shared_case(name)
    patchselect.apply(case.model, rate, layers, relevance=relevance, fusion=fusion)
    pixels, text = case.images(images), texts(case, count)
    with torch.no_grad():
        with patchselect.guide(case.model, text, "all"):
            found = case.image_side(case.model, pixels)
        pixels, text = pixels.repeat_interleave(count, dim=0), text.repeat(images, 1)
        for row in range(images * count):
            with patchselect.guide(case.model, text[row : row + 1]):
                alone = case.image_side(case.model, pixels[row : row + 1])
            torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in HOSTS if name not in UNREAD])
@pytest.mark.parametrize("pairing", ["shared", "all", "own texts"])
def test_more_texts_than_patches_choose_what_they_choose_in_a_larger_batch(name, pairing):
    """There the patches go through the weights, in place of the texts."""
    case = build(name)
    handle = patchselect.apply(case.model, 0.5, layers=[1, 3], relevance="values")
    images = case.images(4)
    text = texts(case, case.patches + 4)
    found = []
    for rows in (slice(0, 1), slice(0, 4)):
        own = text.expand(rows.stop, *text.shape) if pairing == "own texts" else text
        how = "shared" if pairing == "own texts" else pairing
        with torch.no_grad(), handle.record() as trace, patchselect.guide(case.model, own, how):
            found.append((case.image_side(case.model, take(images, rows)), trace))
    (alone, one), (batch, many) = found
    rows = len(alone)
    for first, second in zip(one, many):
        assert torch.equal(first.kept, second.kept[:rows])
        torch.testing.assert_close(first.relevance, second.relevance[:rows], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(alone, batch[:rows], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SCORED)
def test_scores_on_every_host(name):
    case = build(name)
    images, text = case.images(3), texts(case, 4)
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    torch.testing.assert_close(scored(case.model, images, text), pair_by_pair(case, images, text), rtol=0, atol=1e-4)


def test_a_bare_timm_tower_is_scored_in_its_own_width():
    case = build("timm_average")
    case.model.reset_classifier(0)
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    images, text = case.images(2), texts(case, 3)
    torch.testing.assert_close(scored(case.model, images, text), pair_by_pair(case, images, text), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="has no text encoder that is known here"):
        scored(case.model, images, ids(3))


@pytest.mark.parametrize("name", [name for name in SCORED if not name.startswith("clip_vision")])
def test_raw_texts_go_through_the_text_encoder_of_the_host(name):
    case = build(name)
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    images, tokens = case.images(2), ids(5)
    with torch.no_grad():
        features = case.text_side(case.model, tokens)
    expected = pair_by_pair(case, images, features)
    torch.testing.assert_close(scored(case.model, images, tokens), expected, rtol=0, atol=1e-4)
    loader = [tokens[:2], (tokens[2:], "captions")]
    torch.testing.assert_close(scored(case.model, images, loader), expected, rtol=0, atol=1e-4)


def test_images_and_texts_may_come_from_loaders():
    case = build("clip")
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    images, text = case.images(7), texts(case, 5)
    expected = scored(case.model, images, text)
    loader = DataLoader(TensorDataset(images, torch.arange(7)), batch_size=3)
    named = ({"pixel_values": images[i : i + 2], "labels": torch.zeros(2)} for i in range(0, 7, 2))
    prefix = patchselect.encode_prefix(case.model, images)
    mask = torch.ones(5, 7, dtype=torch.long)
    for source in (loader, named, [images[:4], images[4:]], prefix, {"pixel_values": images}):
        torch.testing.assert_close(scored(case.model, source, text), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scored(case.model, images, DataLoader(text, batch_size=2)), expected)
    tokens = {"input_ids": ids(5), "attention_mask": mask}
    torch.testing.assert_close(scored(case.model, images, tokens), scored(case.model, images, ids(5)))
    with pytest.raises(ValueError, match="RandomSampler"):
        scored(case.model, DataLoader(TensorDataset(images), batch_size=3, shuffle=True), text)


def test_images_may_come_one_by_one():
    case = build("clip")
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    images, text = case.images(3), texts(case, 4)
    expected = scored(case.model, images, text)
    for source in (list(images), tuple(images), zip(images, range(3))):
        torch.testing.assert_close(scored(case.model, source, text), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scored(case.model, images[0], text), expected[:1], rtol=1e-5, atol=1e-5)
    candidates = torch.tensor([[1], [0], [3]])
    found = scored(case.model, list(images), text, candidates=candidates)
    torch.testing.assert_close(found, expected.gather(1, candidates), rtol=1e-5, atol=1e-5)
    for wrong, message in (
        ((images, torch.arange(3)), r"one of these is \(3,\)\. Of a pair \(images, labels\), give the images alone"),
        ([images[0], images[1, :, :32]], r"of one size, got \[\(3, 32, 64\), \(3, 64, 64\)\]"),
        ({"pixel_values": images[None]}, r"one of these is \(1, 3, 3, 64, 64\)"),
        ({"pixel_values": ["cat.jpg"]}, "one of these is list"),
    ):
        with pytest.raises(ValueError, match=message):
            scored(case.model, wrong, text)
    flat = build("siglip2")
    patchselect.apply(flat.model, 0.5, layers=[1, 3])
    with pytest.raises(ValueError, match=r"\(N, patches, values\).*one of these is \(3, 64, 64, 3\)"):
        scored(flat.model, torch.rand(3, 64, 64, 3), texts(flat, 2))


def test_candidates_are_columns_of_the_whole_matrix():
    case = build("siglip")
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    images, text = case.images(5), texts(case, 6)
    candidates = torch.tensor([[0, 3], [5, 5], [1, 0], [2, 4], [3, 3]])
    expected = scored(case.model, images, text).gather(1, candidates)
    for limit in (2**30, 400_000):
        found = scored(case.model, images, text, candidates=candidates, memory_limit=limit)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="indices of the 6 texts"):
        scored(case.model, images, text, candidates=candidates + 2)
    with pytest.raises(ValueError, match=r"must be \(5, K\)"):
        scored(case.model, images, text, candidates=candidates[:3])


def test_a_guidance_without_text_encodes_each_image_once():
    case = build("clip")
    images, text = case.images(3), texts(case, 4)
    patchselect.apply(case.model, 0.5, layers=[1, 3], guidance="image")
    with torch.no_grad():
        features = case.image_side(case.model, images)
    expected = torch.cosine_similarity(features.unsqueeze(1), text, dim=-1)
    torch.testing.assert_close(scored(case.model, images, text), expected)


def test_dropout_is_off_for_the_call_alone():
    case = build("open_clip")
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    images, text = case.images(2), texts(case, 2)
    expected = scored(case.model, images, text)
    case.model.visual.patch_dropout = torch.nn.Dropout(0.5)
    case.model.train()
    case.model.visual.ln_post.eval()
    torch.testing.assert_close(scored(case.model, images, text), expected)
    assert case.model.visual.transformer.training and not case.model.visual.ln_post.training


def test_what_cannot_be_scored_is_said():
    case = build("clip")
    with pytest.raises(ValueError, match="not patched"):
        scored(case.model, case.images(1), texts(case, 1))
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    with pytest.raises(TypeError, match="tokenizer first"):
        scored(case.model, case.images(1), ["a cat"])
    with pytest.raises(TypeError, match="image processor first"):
        scored(case.model, ["cat.jpg"], texts(case, 1))
    with pytest.raises(ValueError, match=r"\(texts, 24\)"):
        scored(case.model, case.images(1), torch.randn(2, 23))
    with pytest.raises(ValueError, match="got no text"):
        scored(case.model, case.images(1), [])
