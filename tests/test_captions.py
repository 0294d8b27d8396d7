"""What is particular to heads that are called with strings: BLIP's and LAVIS'."""

from __future__ import annotations

import functools

import pytest
import torch
from doubles import blip
from doubles.albef import Vit
from doubles.text import pictures
from heads import CAPTIONS, build, pictures_in, texts_in
from torch import Tensor, nn

import patchselect

LAYERS = [1, 3]
scored = functools.partial(patchselect.score_pairs, progress=False)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize(
    ("name", "adapter"),
    [
        *(("blip-retrieval", "blip"), ("blip-captioning", "blip"), ("lavis-albef-retrieval", "lavis")),
        *(("lavis-blip-classification", "lavis"), ("albef-retrieval", "albef")),
    ],
)
def test_each_family_knows_its_own(name, adapter):
    wrapped = nn.ModuleDict({"head": build(name).model})
    handle = patchselect.apply(wrapped, 0.5, LAYERS)
    assert {tower.adapter.name for tower in handle.towers} == {adapter}


@torch.no_grad()
def pair_by_pair(head) -> Tensor:
    """The probabilities of a match in the head's own forward, which puts the pairs of its batch first."""
    batch = head.batch(0)
    images, texts = pictures_in(batch), texts_in(batch)
    given: list[Tensor] = []
    hook = head.model.score.register_forward_hook(lambda module, args, output: given.append(output))
    scores = torch.empty(len(images), len(texts))
    for i in range(len(images)):
        for j in range(len(texts)):
            pair = images[[i, i - 1]], [texts[j], texts[j - 1]]
            given.clear()
            head.model(dict(image=pair[0], text_input=pair[1])) if isinstance(batch[0][0], dict) else head.model(*pair)
            scores[i, j] = given[0][0].softmax(dim=-1)[1]
    hook.remove()
    return scores


@pytest.mark.parametrize("name", ["blip-retrieval", "blip-matching", "lavis-albef-retrieval"])
def test_the_score_of_a_pair_is_that_of_the_models_own_forward(name):
    """Whatever the ids begin with: the head puts [ENC] before a pair, or leaves [CLS] there."""
    head = build(name)
    model = head.model.eval()
    patchselect.apply(model, 0.5, LAYERS)
    images, captions = pictures_in(head.batch(0)), texts_in(head.batch(0))
    expected = pair_by_pair(head)
    assert expected.std() > 1e-4
    tokens = model.tokenizer(captions, padding=True, truncation=True, max_length=blip.LONGEST, return_tensors="pt")
    torch.testing.assert_close(scored(model, images, tokens), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(scored(model, images, dict(tokens), memory_limit=1e6), expected, rtol=0, atol=1e-5)
    if name == "blip-retrieval":
        tokens.input_ids[:, 0] = model.tokenizer.enc_token_id
        torch.testing.assert_close(scored(model, images, tokens), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="give score_pairs token ids"):
        scored(model, images, torch.randn(3, 32))
    with pytest.raises(TypeError, match="run the host's own tokenizer first"):
        scored(model, images, captions)


@pytest.mark.parametrize(
    ("name", "why"), [("blip-answering", "has no image-text"), ("blip-captioning", "runs no text")]
)
def test_heads_that_score_no_pairs_say_so(name, why):
    model = build(name).model.eval()
    if name == "blip-answering":
        model.score = nn.Linear(32, 3)
    patchselect.apply(model, 0.5, LAYERS)
    with pytest.raises(ValueError, match=why):
        scored(model, pictures(2), torch.ones(2, 4, dtype=torch.long))


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_caption_to_learn_guides_nothing(call):
    """The message advises what helps there, and not the call that was made."""
    model = build("blip-captioning").model
    patchselect.apply(model, 0.5, LAYERS)
    arguments = (pictures(3), list(CAPTIONS)) if call == "forward" else (pictures(3),)
    with pytest.raises(
        ValueError, match=rf"Captioning\.{call} reads no text before the image.*guidance=\"image\""
    ) as told:
        getattr(model, call)(*arguments)
    assert "together" not in str(told.value)
    with patchselect.guide(model, torch.randn(3, 32)):
        getattr(model, call)(*arguments)
    patchselect.apply(model, 0.5, LAYERS, guidance="image")
    getattr(model, call)(*arguments)


def test_answers_guide_nothing():
    model = build("blip-answering").model.eval()
    handle = patchselect.apply(model, 0.5, LAYERS)
    found = []
    for answers in (["a dog", "two", "no"], ["a cat", "nine", "yes"]):
        with handle.record() as trace:
            model(pictures(3), list(CAPTIONS), answers)
        found.append(trace[0].relevance)
    assert torch.equal(*found)


def test_words_that_the_head_cuts_off_guide_nothing():
    """Its own code says how long a text may be."""
    model = build("blip-retrieval").model.eval()
    handle = patchselect.apply(model, 0.5, LAYERS)
    found = []
    for end in ("seven eight nine", "seven horse boat", "tree eight nine"):
        with handle.record() as trace:
            model(pictures(1), [f"one two three four five six {end}"])
        found.append(trace[0].relevance)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


class Unreadable(blip.Matching):
    """Its tokenizer gets an argument that no reader of its source can know."""

    def forward(self, picture: Tensor, caption: list[str]) -> Tensor:
        states = self.eyes(picture)
        text = self.tokenizer(caption, padding=["longest"][0], return_tensors="pt")
        read = self.words(text.input_ids, attention_mask=text.attention_mask, return_dict=True, **blip._seen(states))
        return self.score(read.last_hidden_state[:, 0])


def test_a_head_whose_source_says_less_is_guided_all_the_same():
    model = Unreadable().eval()
    reference = model(pictures(3), list(CAPTIONS))
    handle = patchselect.apply(model, 1.0, LAYERS)
    with handle.record() as trace:
        assert torch.equal(model(pictures(3), list(CAPTIONS)), reference)
    assert len({tuple(row.tolist()) for row in trace[0].relevance}) == 3


def test_one_string_for_one_image():
    for name, arguments in (
        ("blip-matching", (pictures(1), [CAPTIONS[0]])),
        ("lavis-albef-retrieval", (dict(image=pictures(1), text_input=[CAPTIONS[0]]),)),
    ):
        model = build(name).model.eval()
        handle = patchselect.apply(model, 0.5, LAYERS)
        with handle.record() as trace:
            model(*arguments)
        assert len(trace) >= 2
    with pytest.raises(ValueError, match="1 texts for 3 images"):
        build_patched("blip-matching")(pictures(3), [CAPTIONS[0]])


def build_patched(name: str) -> nn.Module:
    model = build(name).model.eval()
    patchselect.apply(model, 0.5, LAYERS)
    return model


@pytest.mark.parametrize("name", ["lavis-albef-classification", "lavis-blip-classification"])
def test_features_of_an_image_alone_read_no_text_that_lies_beside_it(name):
    """They are compared with every text, so the caption that happens to come along must not choose their patches."""
    model = build_patched(name)
    given = dict(image=pictures(3), text_input=list(CAPTIONS))
    handle = patchselect.handle_of(model)
    with handle.record() as trace:
        assert model.extract_features(given).shape[0] == 3
    assert len(trace) == 2 and trace[0].grid == (4, 4)
    with pytest.raises(ValueError, match=r"no text guides this call of NamedVit.*patchselect\.guide"):
        model.extract_features(given, mode="image")
    with patchselect.guide(model, torch.randn(3, 32)):
        assert model.extract_features(given, mode="image").shape == (3, 7, 32)


def test_two_widths_without_a_joint_space_need_an_image_to_guide():
    model = blip.Captioning()
    model.eyes = Vit(width=48)
    with pytest.raises(ValueError, match="Captioning reads text of width .* and images of width 48"):
        patchselect.apply(model, 0.5, LAYERS)
    patchselect.apply(model, 0.5, LAYERS, guidance="image")


def test_extra_runs_draw_their_dropout_apart():
    """The random numbers of the host stay its own, whether or not it makes the run itself."""
    for match_head in ("itm", "itc"):
        model = build("blip-matching").model.train()
        torch.manual_seed(1)
        reference = model(pictures(3), list(CAPTIONS), match_head)
        patchselect.apply(model, 1.0, LAYERS, pairing="paired")
        torch.manual_seed(1)
        assert torch.equal(model(pictures(3), list(CAPTIONS), match_head), reference)
