"""Scores of image-text matching heads are what the model's own code gives, pair by pair."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import hosts
import pytest
import torch
from doubles.text import Output
from heads import build
from hosts import ids
from since import needs
from torch import Tensor, nn

import patchselect

LAYERS = [1, 3]
every_head = pytest.mark.parametrize(
    "name",
    [
        *("albef-retrieval", "albef-two-widths", "mplug-retrieval-base", "mplug-retrieval-large"),
        *("real-albef-retrieval", "real-albef-pretrain", "real-mplug-retrieval-base", "real-mplug-retrieval-large"),
    ],
)
scored = functools.partial(patchselect.score_pairs, progress=False)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def some(text, rows: list[int]) -> Output:
    return Output(input_ids=text.input_ids[rows], attention_mask=text.attention_mask[rows])


@torch.no_grad()
def pair_by_pair(head) -> Tensor:
    """The probabilities of a match in the head's own forward, which puts the pairs of its batch first."""
    (images, text), options = head.batch(0)
    options = {name: value[:2] if isinstance(value, Tensor) else value for name, value in options.items()}
    matching = next(part for part in head.model.children() if isinstance(part, nn.Linear) and part.out_features == 2)
    given: list[Tensor] = []
    hook = matching.register_forward_hook(lambda module, args, output: given.append(output))
    scores = torch.empty(len(images), len(text.input_ids))
    for i in range(scores.shape[0]):
        for j in range(scores.shape[1]):
            given.clear()
            torch.manual_seed(0)
            head.model(images[[i, i - 1]], some(text, [j, j - 1]), **options)  # the second draws the negatives
            scores[i, j] = given[0][0].softmax(dim=-1)[1]
    hook.remove()
    return scores


@every_head
def test_the_score_of_a_pair_is_that_of_the_models_own_forward(name):
    head = build(name)
    model = head.model.eval()
    patchselect.apply(model, 0.5, LAYERS)
    images, text = head.batch(0)[0]
    expected = pair_by_pair(head)
    assert expected.std() > 1e-4
    torch.testing.assert_close(scored(model, images, text), expected, rtol=0, atol=1e-5)
    few = scored(model, images, text, memory_limit=1e6 * (1 + 3 * name.startswith("real")))
    torch.testing.assert_close(few, expected, rtol=0, atol=1e-5)
    candidates = expected.topk(2, dim=1).indices
    found = scored(model, images, text, candidates=candidates)
    torch.testing.assert_close(found, expected.gather(1, candidates), rtol=0, atol=1e-5)
    prefix = patchselect.encode_prefix(model, images)
    torch.testing.assert_close(scored(model, prefix, text), expected, rtol=0, atol=1e-5)


@every_head
def test_features_are_no_text_that_a_matching_head_can_read(name):
    head = build(name)
    patchselect.apply(head.model.eval(), 0.5, LAYERS)
    with pytest.raises(ValueError, match="give score_pairs token ids"):
        scored(head.model, head.batch(0)[0][0], head.text_features())


@pytest.mark.parametrize("name", ["albef-retrieval", "mplug-retrieval-base"])
def test_padding_of_bare_ids_is_no_word_where_the_config_names_it(name):
    head = build(name)
    model = head.model.eval()
    images, text = head.batch(0)[0]
    text.input_ids[text.attention_mask == 0] = 0
    assert (text.attention_mask == 0).any()
    patchselect.apply(model, 0.5, LAYERS)
    expected, all_words = scored(model, images, text), scored(model, images, text.input_ids)
    assert not torch.allclose(all_words, expected, atol=1e-4)
    model.words.config = SimpleNamespace(pad_token_id=0, gradient_checkpointing=False)
    torch.testing.assert_close(scored(model, images, text.input_ids), expected)


def test_heads_that_score_no_pairs_say_so():
    head = build("mplug-captioning-base")
    patchselect.apply(head.model.eval(), 0.5, LAYERS)
    for texts in (ids(3), torch.randn(3, 32)):
        with pytest.raises(ValueError, match="Captioning runs no text encoder, so its pairs have no score"):
            scored(head.model, head.batch(0)[0][0], texts)


def test_a_matching_head_scores_pairs_by_its_fusion_encoder():
    needs("BLIP")
    import transformers

    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
    config = transformers.BlipConfig(
        text_config=dict(sizes, vocab_size=99, encoder_hidden_size=48, projection_dim=24, bos_token_id=97),
        vision_config=dict(sizes, image_size=64, patch_size=16),
    )
    torch.manual_seed(0)
    model = transformers.BlipForImageTextRetrieval(config).eval()
    images, tokens = torch.randn(3, 3, 64, 64), ids(4)
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    handle = patchselect.apply(model, 0.5, layers=[1, 2])
    expected = torch.empty(3, 4)
    with torch.no_grad():
        for i in range(3):
            for j in range(4):
                pair = dict(pixel_values=images[i : i + 1], input_ids=tokens[j : j + 1], attention_mask=mask[j : j + 1])
                expected[i, j] = model(**pair).itm_score.softmax(dim=-1)[0, 1]
    texts_of = {"input_ids": tokens, "attention_mask": mask}
    torch.testing.assert_close(scored(model, images, texts_of), expected, rtol=0, atol=1e-5)
    short = [{"input_ids": tokens[1:2, :5]}, {"input_ids": tokens[:1]}]
    torch.testing.assert_close(scored(model, images, short), expected[:, [1, 0]], rtol=0, atol=1e-5)
    torch.testing.assert_close(scored(model, images, texts_of, memory_limit=1e6), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="give score_pairs token ids"):
        scored(model, images, torch.randn(2, 48))
    handle.remove()
    patchselect.apply(model, 0.5, layers=[1, 2], guidance="image")
    with torch.no_grad():
        pair = dict(pixel_values=images, input_ids=tokens[:3], attention_mask=mask[:3])
        expected = model(**pair).itm_score.softmax(dim=-1)[:, 1]
    torch.testing.assert_close(scored(model, images, texts_of).diagonal(), expected, rtol=0, atol=1e-5)


def test_a_matching_head_of_the_albef_family_scores_pairs_by_its_fusion_half():
    case = hosts.build("albef")
    model, images, tokens = case.model, case.images(2), ids(3)
    patchselect.apply(model, 0.5)
    expected = torch.empty(2, 3)
    with torch.no_grad():
        read = dict(attention_mask=torch.ones_like(tokens), return_dict=True)
        states = model.words(tokens, **read, mode="text").last_hidden_state
        for i in range(2):
            for j in range(3):
                with patchselect.guide(model, states[j : j + 1, 0]):
                    rows = model.eyes(images[i : i + 1])
                fused = model.words(
                    encoder_embeds=states[j : j + 1],
                    attention_mask=torch.ones_like(tokens[:1]),
                    encoder_hidden_states=rows,
                    encoder_attention_mask=torch.ones(rows.shape[:2], dtype=torch.long),
                    return_dict=True,
                    mode="fusion",
                ).last_hidden_state
                expected[i, j] = model.score(fused[:, 0]).softmax(dim=-1)[0, 1]
    torch.testing.assert_close(scored(model, images, {"input_ids": tokens}), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="give score_pairs token ids"):
        scored(model, images, torch.randn(3, 32))
