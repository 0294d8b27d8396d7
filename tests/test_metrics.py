"""The retrieval metric against a slow, obvious reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from patchselect.metrics import retrieval_recall


def slow_recall(similarity: list[list[float]], owner: list[int], k: int) -> tuple[float, float]:
    images, texts = len(similarity), len(owner)
    asked = [i for i in range(images) if i in owner]
    hits = 0
    for i in asked:
        ranked = sorted(range(texts), key=lambda j: -similarity[i][j])
        hits += any(owner[j] == i for j in ranked[:k])
    other = 0
    for j in range(texts):
        ranked = sorted(range(images), key=lambda i: -similarity[i][j])
        other += owner[j] in ranked[:k]
    return 100 * hits / len(asked), 100 * other / texts


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_recall_counts_any_caption_of_an_image(data):
    images, texts = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 12))
    owner = data.draw(st.lists(st.integers(0, images - 1), min_size=texts, max_size=texts))
    line = st.lists(st.integers(0, 5).map(float), min_size=texts, max_size=texts)
    similarity = data.draw(st.lists(line, min_size=images, max_size=images))
    found = retrieval_recall(torch.tensor(similarity), owner, ks=(1, 2, 5))
    for k in (1, 2, 5):
        expected = slow_recall(similarity, owner, k)
        assert (found["image_to_text"][k], found["text_to_image"][k]) == pytest.approx(expected)


def test_recall_refuses_what_cannot_be_ranked():
    good = torch.rand(2, 3)
    assert retrieval_recall(good, torch.tensor([0, 1, 1])).keys() == {"image_to_text", "text_to_image"}
    for similarity, owner, ks, message in (
        (good, [0, 1], (1,), r"owner \(texts,\)"),
        (good, [0, 1, 2], (1,), "0 to 1"),
        (good, [0, 1, 1], (0,), "ks must be"),
        (good * float("nan"), [0, 1, 1], (1,), "NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            retrieval_recall(similarity, owner, ks)
