"""Scores of image-text matching heads are what the model's own code gives, pair by pair."""

from __future__ import annotations

import pytest
import torch
from doubles.text import Output
from heads import build
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
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def scored(model: nn.Module, images, texts, **options) -> Tensor:
    return patchselect.score_pairs(model, images, texts, progress=False, **options)


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
