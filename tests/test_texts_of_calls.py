"""Which text guides which image is said, never guessed: several images per text, calls that compare all with all."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from doubles import albef
from doubles.text import pictures, sentences
from hosts import HOSTS, build, ids, take, texts
from since import needs

import patchselect

DUAL = [
    "clip", "chinese_clip", "alt_clip", "metaclip2", "siglip", "siglip2", "open_clip", "open_clip_custom_average",
    "open_clip_pooler", "coca", "open_clip_siglip", "openai_clip", "blip",
]  # fmt: skip
"""Hosts with a call that compares every image with every text (BLIP: `use_itm_head=False`)."""
every_dual = pytest.mark.parametrize("name", DUAL)


def test_every_dual_encoder_of_the_table_is_tried():
    assert set(DUAL) | {"open_clip_normalised_keys"} == {
        "clip", "chinese_clip", "alt_clip", "metaclip2", "siglip", "siglip2", "open_clip", "open_clip_custom_average",
        "open_clip_pooler", "open_clip_normalised_keys", "coca", "open_clip_siglip", "openai_clip", "blip",
    } <= set(HOSTS)  # fmt: skip


# Several images per text.


@pytest.fixture
def case():
    found = build("clip")
    patchselect.apply(found.model, 0.5)
    return found


def guided(case, images, text, **how):
    with torch.no_grad(), patchselect.guide(case.model, text, **how):
        return case.image_side(case.model, images)


@pytest.mark.parametrize("relevance", ["keys", "features", "values", "joint"])
@pytest.mark.parametrize("name", ["clip", "openai_clip", "timm_registers"])
def test_images_of_a_text_in_a_row_and_in_tiles(name, relevance):
    case = build(name)
    if relevance not in case.relevances:
        pytest.skip(f"{name} has no joint space")
    patchselect.apply(case.model, 0.5, relevance=relevance)
    images, text = case.images(4), texts(case, 2)
    each = guided(case, images, text, repeat="each")
    torch.testing.assert_close(each, guided(case, images, text[[0, 0, 1, 1]]), rtol=1e-4, atol=1e-5)
    tile = guided(case, images, text, repeat="tile")
    torch.testing.assert_close(tile, guided(case, images, text[[0, 1, 0, 1]]), rtol=1e-4, atol=1e-5)
    assert (each - tile).abs().max() > 1e-4, "the order makes no difference here"


def test_several_images_per_text_without_an_order_are_an_error(case):
    with pytest.raises(ValueError, match=r'2 texts for 4 images.*repeat="each".*repeat="tile".*pairing="shared"'):
        guided(case, case.images(4), texts(case, 2))
    one = guided(case, case.images(4), texts(case, 1))
    torch.testing.assert_close(one, guided(case, case.images(4), texts(case, 1), pairing="shared"))
    for repeat in ("each", "tile"):
        with pytest.raises(ValueError, match="3 texts for 4 images"):
            guided(case, case.images(4), texts(case, 3), repeat=repeat)
        for pairing in ("shared", "all"):
            with pytest.raises(ValueError, match=f"repeat='{repeat}' says which.*pairing='{pairing}'"):
                patchselect.guide(case.model, texts(case, 2), pairing, repeat=repeat)
    with pytest.raises(ValueError, match="repeat must be one of 'each', 'tile'; got 'tiles'"):
        patchselect.guide(case.model, texts(case, 2), repeat="tiles")


def test_frames_of_a_prefix_and_of_checkpointed_blocks_keep_their_order(case):
    needs("checkpoints of CLIP")
    images, text = case.images(4), texts(case, 2)
    expected = guided(case, images, text, repeat="each")
    prefix = patchselect.encode_prefix(case.model, images)
    found = guided(case, prefix.images, text, repeat="each", prefix=prefix)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = []
    for checkpointing in (False, True):
        model = case.model.train()
        getattr(model, f"gradient_checkpointing_{'enable' if checkpointing else 'disable'}")()
        model.zero_grad(set_to_none=True)
        with patchselect.guide(model, text, repeat="each"):
            case.image_side(model, images).square().sum().backward()
        gradients.append(case.tower(model).encoder.layers[0].mlp.fc1.weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_the_head_of_image_pairs_says_its_own_order():
    """NLVR2 gets `torch.cat([image0, image1])`: images i and i + B have text i."""
    model = albef.Pairs(twins=False).eval()
    handle = patchselect.apply(model, 0.5, [1, 3])
    said, images, labels = sentences(3), pictures(6), torch.tensor([0, 1, 1])
    with torch.no_grad():
        read = dict(return_dict=True, mode="text")
        features = model.words(said.input_ids, said.attention_mask, **read).last_hidden_state[:, 0]
        with handle.record() as own:
            model(images, said, labels)
        with handle.record() as tiles, patchselect.guide(model, features, repeat="tile"):
            model(images, said, labels)
        with pytest.raises(ValueError, match="3 texts for 6 images"), patchselect.guide(model, features):
            model(images, said, labels)
    torch.testing.assert_close(own[0].relevance, tiles[0].relevance)


# Calls that compare every image with every text.


@every_dual
def test_a_call_that_compares_all_with_all_asks_which_text_guides(name):
    case = build(name)
    patchselect.apply(case.model, 0.5)
    for count in (2, 3):  # as many texts as images, or more
        with pytest.raises(ValueError, match=r'pairing="paired"\).*pairing="shared"\).*score_pairs'), torch.no_grad():
            case.pair(case.model, case.images(2), ids(count))


@every_dual
def test_shared_texts_of_a_call_are_one_selection_per_image(name):
    """Whatever the batch: as many images as texts, or not."""
    if name == "coca":
        pytest.skip("its captioning decoder reads text i with image i, so it takes as many of each")
    case = build(name)
    patchselect.apply(case.model, 0.5, pairing="shared")
    images, tokens = case.images(3), ids(3)
    with torch.no_grad():
        found = case.pair(case.model, images, tokens)
        alone = torch.cat([case.pair(case.model, take(images, slice(i, i + 1)), tokens) for i in range(3)])
        with patchselect.guide(case.model, case.text_side(case.model, tokens), pairing="shared"):
            explicit = case.pair(case.model, images, tokens)
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found, explicit, rtol=1e-4, atol=1e-4)
        patchselect.apply(case.model, 0.5, pairing="paired")
        assert (case.pair(case.model, images, tokens) - found).abs().max() > 1e-5


@every_dual
def test_one_text_needs_no_word(name):
    case = build(name)
    images, tokens = case.images(2), ids(1)
    found = []
    for pairing in (None, "shared"):
        patchselect.apply(case.model, 0.5, pairing=pairing)
        with torch.no_grad():
            found.append(case.pair(case.model, take(images, slice(0, 1)), tokens))
    assert torch.equal(*found)


def test_pairings_that_no_call_can_have_are_refused():
    case = build("clip")
    with pytest.raises(ValueError, match=r'pairing="all" gives one row.*score_pairs'):
        patchselect.apply(case.model, 0.5, pairing="all")
    with pytest.raises(ValueError, match="pairing must be one of 'paired', 'shared'; got 'both'"):
        patchselect.apply(case.model, 0.5, pairing="both")
    tower = build("timm_class_token").model
    with pytest.raises(ValueError, match=r"has none that is known here.*patchselect\.guide\("):
        patchselect.apply(tower, 0.5, pairing="shared")
    assert not hasattr(case.model, "_patchselect") and not hasattr(tower, "_patchselect")


def test_a_matching_head_pairs_by_its_own_call():
    model = albef.Retrieval().eval()
    patchselect.apply(model, 0.5, [1, 3], pairing="shared")
    with pytest.raises(ValueError, match='Retrieval.forward pairs text i with image i, so pairing="shared"'):
        model(pictures(3), sentences(3))
    with torch.no_grad():
        patchselect.apply(model, 0.5, [1, 3], pairing="paired")
        said = model(pictures(3), sentences(3))
        patchselect.apply(model, 0.5, [1, 3])
        assert all(map(torch.equal, model(pictures(3), sentences(3)), said))


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_zero_shot_pipeline_gives_what_the_page_says(batch, count, tmp_path):
    """docs/pairs.md: one selection per image for all labels, whatever the batch size; an error until that is said."""
    needs("image processors", "pillow")
    transformers, model = pytest.importorskip("transformers"), build("clip").model
    from PIL import Image

    labels = ["cat", "dog", "boat"][:count]
    vocabulary = {"<|startoftext|>": 97, "<|endoftext|>": 98, "!": 1, "cat</w>": 5, "dog</w>": 6, "boat</w>": 7}
    tokenizer = _tokenizer(transformers, vocabulary)
    size = {"height": 64, "width": 64}
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=size)
    photos = [Image.fromarray(torch.randint(256, (64, 64, 3), generator=torch.Generator().manual_seed(seed))
                              .to(torch.uint8).numpy()) for seed in range(4)]  # fmt: skip
    pipeline = transformers.pipeline(
        "zero-shot-image-classification", model=model, tokenizer=tokenizer, image_processor=processor, device="cpu"
    )

    def ask():
        return pipeline(photos, candidate_labels=labels, hypothesis_template="{}", batch_size=batch)

    patchselect.apply(model, 0.5)
    if count > 1:
        with pytest.raises(ValueError, match=r'CLIPModel\.forward compares every image with every text.*"shared"'):
            ask()
    patchselect.apply(model, 0.5, pairing="shared")
    answers = ask()
    tokens = tokenizer(labels, return_tensors="pt", padding=True)
    pixels = processor(photos, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        classes = model.get_text_features(**tokens)
        classes = getattr(classes, "pooler_output", classes)
        with patchselect.guide(model, classes, pairing="shared"):
            images = model.get_image_features(pixels)
            images = getattr(images, "pooler_output", images)
        logits = model.logit_scale.exp() * F.normalize(images, dim=-1) @ F.normalize(classes, dim=-1).T
    for answer, expected in zip(answers, logits.softmax(dim=-1)):
        found = {entry["label"]: entry["score"] for entry in answer}
        torch.testing.assert_close(torch.tensor([found[label] for label in labels]), expected, rtol=1e-4, atol=1e-5)


def _tokenizer(transformers, vocabulary):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word.replace("</w>", ""): number for word, number in vocabulary.items()}
    made = Tokenizer(models.WordLevel(words, unk_token="!"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<|startoftext|>", 97), ("<|endoftext|>", 98)]
    made.post_processor = processors.TemplateProcessing("<|startoftext|> $A <|endoftext|>", special_tokens=ends)
    names = ["input_ids", "attention_mask"]  # as CLIP's own tokenizer gives; the plain one adds more until 5.0
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="!", unk_token="!", model_input_names=names
    )
