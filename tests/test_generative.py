"""transformers' BLIP and ViLT, for real, tiny, with random weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from checkpointing import Way, switch_on, ways
from since import needs

import patchselect
from patchselect import visualization
from patchselect.functional import num_kept

needs("transformers", module=True)
import transformers

LAYERS = [1, 3]
BLIP_TEXT = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=120,
    projection_dim=32, max_position_embeddings=32, bos_token_id=110, eos_token_id=2, sep_token_id=102, pad_token_id=0,
    initializer_range=0.2,
)  # fmt: skip
BLIP_VISION = dict(
    num_hidden_layers=6, num_attention_heads=4, intermediate_size=96, image_size=64, patch_size=16,
    initializer_range=0.2,
)  # fmt: skip
VILT = dict(
    hidden_size=64, num_hidden_layers=6, num_attention_heads=4, intermediate_size=96, vocab_size=120, image_size=64,
    patch_size=16, max_position_embeddings=32, initializer_range=0.2, num_images=2, modality_type_vocab_size=3,
)  # fmt: skip
BLIP = ("BlipModel", "BlipForImageTextRetrieval", "BlipForQuestionAnswering", "BlipForConditionalGeneration")
VILTS = (
    "ViltModel",
    "ViltForQuestionAnswering",
    "ViltForImageAndTextRetrieval",
    "ViltForImagesAndTextClassification",
    "ViltForMaskedLM",
    "ViltForTokenClassification",
)
every_model = pytest.mark.parametrize("name", [*BLIP, *VILTS])


def build(name: str, vision_width: int = 64):
    needs(name if name == "ViltForTokenClassification" else "ViLT" if name in VILTS else "BLIP")
    torch.manual_seed(0)
    if name in VILTS:
        return getattr(transformers, name)(transformers.ViltConfig(**VILT)).eval()
    text = {**BLIP_TEXT, "encoder_hidden_size": vision_width}
    vision = {**BLIP_VISION, "hidden_size": vision_width}
    config = transformers.BlipConfig(
        text_config=text, vision_config=vision, projection_dim=32, image_text_hidden_size=32
    )
    return getattr(transformers, name)(config).eval()


def inputs(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 100, (3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    given = dict(pixel_values=torch.randn(3, 3, 64, 64, generator=generator), input_ids=ids, attention_mask=mask)
    if name in VILTS:
        given["pixel_mask"] = torch.ones(3, 64, 64, dtype=torch.long)
    if name == "ViltForImagesAndTextClassification":
        given["pixel_values"] = torch.stack([given["pixel_values"], given["pixel_values"].flip(0)], dim=1)
        given["pixel_mask"] = given["pixel_mask"].unsqueeze(1).expand(-1, 2, -1, -1)
    if name == "BlipForQuestionAnswering":
        given["labels"] = ids[:, :4]
    return given


def selecting(model, rate, **options):
    """`BlipModel` compares all images with all texts: here text i belongs to image i."""
    if type(model).__name__ == "BlipModel":
        options["pairing"] = "paired"
    return patchselect.apply(model, rate, LAYERS, **options)


def call(model, given, **more):
    torch.manual_seed(5)  # ViLT shuffles its patches
    return [part for part in model(**{**given, **more}).to_tuple() if isinstance(part, torch.Tensor)]


def lengths(prefix: int) -> list[int]:
    first = num_kept(16, 0.5) + 1
    return [prefix + first, prefix + num_kept(first, 0.5) + 1]


@every_model
@pytest.mark.parametrize("training", [False, True])
def test_keeping_everything_changes_nothing(name, training):
    """In training too: the extra text runs of BLIP draw their dropout apart."""
    model, given = build(name).train(training), inputs(name)
    reference = call(model, given)
    handle = selecting(model, 1.0)
    assert all(map(torch.equal, call(model, given), reference))
    handle.remove()
    assert all(map(torch.equal, call(model, given), reference))


@every_model
@pytest.mark.parametrize("guidance", ["text", "image", "random"])
@pytest.mark.parametrize("relevance", ["keys", "features"])
def test_tokens_and_one_step(name, guidance, relevance):
    model, given = build(name).train(), inputs(name)
    keys = list(model.state_dict())
    handle = selecting(model, 0.5, guidance=guidance, relevance=relevance)
    assert list(model.state_dict()) == keys
    with handle.record() as trace:
        output = call(model, given)
    runs = 2 if name == "ViltForImagesAndTextClassification" else 1
    prefix = 8 if name in VILTS else 1
    assert [entry.num_tokens for entry in trace] == lengths(prefix) * runs
    assert [entry.num_prefix_tokens for entry in trace] == [prefix] * 2 * runs
    loss = sum(part.float().square().mean() for part in output)
    loss.backward()
    weight = handle.towers[0].adapter.projections(handle.towers[0].blocks[0]).output
    assert loss.isfinite() and weight.grad.abs().sum() > 0


@every_model
def test_a_text_guides_its_own_image_alone(name):
    model, given = build(name), inputs(name)
    handle = selecting(model, 0.5)
    with handle.record() as trace:
        call(model, given)
    other = given["input_ids"].clone()
    other[1, 1:4] = 7
    with handle.record() as moved:
        call(model, given, input_ids=other)
    for one, two in zip(trace, moved):
        assert (one.relevance != two.relevance).any(dim=1).tolist() == [False, True, False]


@every_model
def test_copies_and_pickles_select_on_their_own(name):
    model, given = build(name), inputs(name)
    handle = selecting(model, 0.5)
    expected = call(model, given)
    duplicate, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    handle.remove()
    for other in (duplicate, loaded):
        assert all(map(torch.equal, call(other, given), expected))


def trained(name: str, way: Way | None):
    model, given = build(name).train(), inputs(name)
    selecting(model, 0.5)
    if way is not None:
        switch_on(model, way.options)
    sum(part.float().square().mean() for part in call(model, given)).backward()
    return {key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None}


@every_model
def test_checkpointing_has_the_same_gradients(name):
    """ViLT's text is in its sequence, and gets its gradient always; BLIP's is one that reentry may lose."""
    expected = trained(name, None)
    dust = 1e-6 * max(float(gradient.abs().max()) for gradient in expected.values())
    for way in ways("clip"):
        if name in BLIP and not way.carries_text:
            with pytest.raises(RuntimeError, match=way.advice):
                trained(name, way)
            continue
        found = trained(name, way)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=dust)


@pytest.mark.parametrize("name", ["BlipForQuestionAnswering", "BlipForConditionalGeneration"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_is_guided_by_its_question_or_prompt(name, beams):
    model, given = build(name), inputs(name)
    handle = selecting(model, 0.5)
    given.pop("labels", None)
    given["input_ids"] = given["input_ids"].clone()
    with handle.record() as trace:
        first = model.generate(**given, max_new_tokens=3, num_beams=beams)
    assert [entry.num_tokens for entry in trace] == lengths(1)
    assert first.shape[0] == 3
    handle.remove()
    whole = model.generate(**given, max_new_tokens=3, num_beams=beams)
    selecting(model, 1.0)
    assert torch.equal(model.generate(**given, max_new_tokens=3, num_beams=beams), whole)


@pytest.mark.parametrize("case", ["labels", "no prompt"])
def test_captions_to_learn_and_no_prompt_guide_nothing(case):
    model, given = build("BlipForConditionalGeneration"), inputs("BlipForConditionalGeneration")
    selecting(model, 0.5)
    with pytest.raises(ValueError, match=r"got (labels|no prompt).*patchselect\.guide.*guidance=\"image\""):
        if case == "labels":
            model(**given, labels=given["input_ids"])
        else:
            model.generate(pixel_values=given["pixel_values"], max_new_tokens=2)
    with patchselect.guide(model, torch.randn(3, 64)):
        assert model(**given, labels=given["input_ids"]).loss.isfinite()
        assert model.generate(pixel_values=given["pixel_values"], max_new_tokens=2).shape[0] == 3


def test_a_prompt_is_read_to_its_last_word():
    """Words in the padding do not count, the last one in front of it does."""
    model, given = build("BlipForConditionalGeneration"), inputs("BlipForConditionalGeneration")
    handle = selecting(model, 0.5)
    found = []
    for position in (None, 4, 6):
        ids = given["input_ids"].clone()
        if position is not None:
            ids[1, position] = 50
        with handle.record() as trace:
            call(model, given, input_ids=ids)
        found.append(trace[0].relevance[1])
    assert not torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_contrastive_score_of_blip_runs_its_text_encoder_once():
    model, given = build("BlipForImageTextRetrieval"), inputs("BlipForImageTextRetrieval")
    selecting(model, 0.5, pairing="paired")
    runs = []
    model.text_encoder.encoder.register_forward_hook(lambda *args: runs.append(1))
    call(model, given, use_itm_head=False)
    assert len(runs) == 1
    call(model, given)
    assert len(runs) == 3


def test_a_wider_blip_tower_is_reached_through_the_joint_space():
    model, given = build("BlipForImageTextRetrieval", 96), inputs("BlipForImageTextRetrieval")
    handle = selecting(model, 0.5)
    with handle.record() as trace:
        call(model, given)
    assert len(trace) == 2
    with pytest.raises(ValueError, match="images of width 96 and has no joint space"):
        patchselect.apply(build("BlipForQuestionAnswering", 96))
    patchselect.apply(build("BlipForQuestionAnswering", 96), guidance="image")


def test_text_tokens_of_vilt_are_never_touched():
    """The prefix, text and image [CLS], is bit for bit what attention made of it, and the padding stays masked."""
    model, given = build("ViltModel"), inputs("ViltModel")
    handle = selecting(model, 0.5)
    seen = {}
    adapter = handle.towers[0].adapter
    block = handle.towers[0].blocks[1]
    block.layernorm_after.register_forward_pre_hook(lambda module, args: seen.update(after=args[0]))
    block.register_forward_pre_hook(
        lambda module, args: seen.update(before=adapter.attend(handle.towers[0], block, *args, text_length=7).tokens)
    )
    first = call(model, given)[0]
    assert torch.equal(seen["after"][:, :8], seen["before"][:, :8])
    other = given["input_ids"].clone()
    other[1, 5:] = 7
    second = call(model, given, input_ids=other)[0]
    assert torch.equal(first[1, :5], second[1, :5]) and not torch.equal(first[1, 5:7], second[1, 5:7])


def test_vilt_tells_the_places_of_its_shuffled_patches():
    model, given = build("ViltModel"), inputs("ViltModel")
    handle = selecting(model, 0.5)
    found, maps = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with handle.record() as trace:
            output = model(**given)
        assert trace[-1].grid == (4, 4)
        found.append([set(row.tolist()) for row in trace[-1].kept])
        board = patchselect.restore(output.last_hidden_state, trace)
        place = int((trace[-1].kept[0] >= 0).nonzero()[0])
        where = int(trace[-1].kept[0, place])
        assert torch.equal(board[0].flatten(0, 1)[where], output.last_hidden_state[0, 8 + place])
        maps.append(torch.stack([visualization.relevance_map(trace[0], row) for row in range(3)]))
    assert found[0] == found[1]
    torch.testing.assert_close(maps[0], maps[1])


def test_the_dual_encoder_of_blip_scores_pairs_by_its_cosine():
    model, given = build("BlipModel"), inputs("BlipModel")
    selecting(model, 0.5)
    texts = {name: given[name] for name in ("input_ids", "attention_mask")}
    expected = torch.empty(3, 3)
    with torch.no_grad():
        for i in range(3):
            for j in range(3):
                pair = {name: value[j : j + 1] for name, value in texts.items()}
                out = model(pixel_values=given["pixel_values"][i : i + 1], **pair)
                expected[i, j] = torch.cosine_similarity(out.image_embeds, out.text_embeds)
        features = model.get_text_features(**texts)
    found = patchselect.score_pairs(model, given["pixel_values"], texts, progress=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    features = getattr(features, "pooler_output", features)
    found = patchselect.score_pairs(model, given["pixel_values"], features, progress=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["BlipForConditionalGeneration", "BlipForQuestionAnswering"])
def test_heads_that_score_no_pairs_say_so(name):
    model, given = build(name), inputs(name)
    selecting(model, 0.5)
    for texts in (given["input_ids"], torch.randn(3, 64)):
        with pytest.raises(ValueError, match=f"{name} has no image-text matching head"):
            patchselect.score_pairs(model, given["pixel_values"], texts)


@pytest.mark.parametrize("name", ["BlipModel", "BlipForImageTextRetrieval"])
def test_padding_of_bare_ids_is_no_word(name):
    model, given = build(name), inputs(name)
    selecting(model, 0.5)
    texts = {name: given[name] for name in ("input_ids", "attention_mask")}
    texts["input_ids"][1, 5:] = model.config.text_config.pad_token_id
    expected = patchselect.score_pairs(model, given["pixel_values"], texts, progress=False)
    found = patchselect.score_pairs(model, given["pixel_values"], texts["input_ids"], progress=False)
    torch.testing.assert_close(found, expected)
    every = {**texts, "attention_mask": torch.ones_like(texts["input_ids"])}
    words = patchselect.score_pairs(model, given["pixel_values"], every, progress=False)
    assert (words - expected)[:, 1].abs().min() > 1e-4


@pytest.mark.parametrize("name", ["ViltModel", "ViltForImagesAndTextClassification", "BlipForConditionalGeneration"])
def test_a_call_of_the_whole_model_can_be_drawn(name, tmp_path):
    needs("matplotlib")
    model, given = build(name), inputs(name)
    handle = selecting(model, 0.5)
    with torch.no_grad(), handle.record() as trace:
        call(model, given)
    photos = given["pixel_values"].reshape(-1, 3, 64, 64)[:3]
    figure = visualization.draw_selection(photos, trace[:2], ["one", "two", "three"], path=tmp_path / "kept.png")
    assert len(figure.get_axes()) == 3 * 4 and (tmp_path / "kept.png").stat().st_size > 10_000


def test_padded_images_of_vilt_are_refused():
    model, given = build("ViltModel"), inputs("ViltModel")
    selecting(model, 0.5)
    given["pixel_mask"][0, :, 40:] = 0
    with pytest.raises(ValueError, match="batch images of one size"):
        model(**given)


def test_vilt_takes_no_text_from_outside():
    model = build("ViltForQuestionAnswering")
    selecting(model, 0.5)
    for attempt in (
        lambda: patchselect.guide(model, torch.zeros(3, 64)),
        lambda: patchselect.encode_prefix(model, torch.zeros(3, 3, 64, 64)),
        lambda: patchselect.apply(model, relevance="values"),
        lambda: patchselect.apply(model, relevance="joint"),
        lambda: patchselect.score_pairs(model, torch.zeros(3, 3, 64, 64), torch.ones(3, 7, dtype=torch.long)),
        lambda: patchselect.keep_rate_for_budget(model, 0.7),
    ):
        with pytest.raises(ValueError, match="same sequence|(share|as) one sequence"):
            attempt()


def test_a_block_of_vilt_alone_is_an_error():
    model = build("ViltModel")
    selecting(model, 0.5)
    with pytest.raises(ValueError, match="call the model as a whole"):
        model.encoder.layer[1](torch.randn(1, 20, 64))


@pytest.mark.parametrize("name", BLIP[1:])
def test_every_image_with_every_text_is_refused_where_a_row_reads_its_own_text(name):
    model, given = build(name), inputs(name)
    selecting(model, 0.5)
    calls = [lambda: model(**given)]
    if name != "BlipForImageTextRetrieval":
        prompt = {key: given[key] for key in ("pixel_values", "input_ids", "attention_mask")}
        calls += [lambda: model.generate(**prompt, max_new_tokens=2)]
    with torch.no_grad(), patchselect.guide(model, torch.randn(2, 64), pairing="all"):
        for attempt in calls:
            with pytest.raises(ValueError, match=r'pairing="all" gives a row per image and text.*repeat_interleave'):
                attempt()
        assert model.vision_model(given["pixel_values"]).last_hidden_state.shape[0] == 6
    repeated = {key: value.repeat_interleave(2, dim=0) for key, value in given.items()}
    with torch.no_grad(), patchselect.guide(model, torch.randn(2, 64).repeat(3, 1)):
        call(model, repeated)
