"""Contrastive losses (ITC, SRCL) against slow, obvious float64 references, with candidates and over processes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paired_features import cosine, features, pairs
from processes import leave_group
from torch import Tensor

from patchselect import losses


def contrastive(anchors: Tensor, others: Tensor, temperature: float, weight=lambda i, j: 1.0) -> float:
    """`-1/N sum_i log( f_ii / (f_ii + sum_j w_ij f_ij) )`, written down as it stands."""
    size, total = len(anchors), 0.0
    for i in range(size):
        own = math.exp(cosine(anchors[i], others[i]) / temperature)
        rest = sum(weight(i, j) * math.exp(cosine(anchors[i], others[j]) / temperature) for j in range(size) if j != i)
        total -= math.log(own / (own + rest))
    return total / size


@settings(max_examples=30, deadline=None)
@given(pairs, st.floats(0.05, 2.0))
def test_itc_is_info_nce_in_both_directions(shape, temperature):
    image, text = features(shape, 2)
    expected = (contrastive(image, text, temperature) + contrastive(text, image, temperature)) / 2
    assert float(losses.itc_loss(image, text, temperature)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(pairs, st.floats(0.05, 2.0), st.floats(0, 1), st.floats(0, 3))
def test_srcl_weighs_negatives_by_their_likeness(shape, temperature, alpha, delta):
    image, text, taught_image, taught_text = features(shape)
    size = len(image)

    def direction(one, other, taught_one, taught_other) -> float:
        likeness = [
            [
                alpha * math.exp(cosine(taught_one[i], taught_other[j]))
                + (1 - alpha) * math.exp(cosine(one[i], other[j]))
                for j in range(size)
            ]
            for i in range(size)
        ]

        def weight(i: int, j: int) -> float:
            mean = sum(likeness[i][k] ** -delta for k in range(size) if k != i) / (size - 1)
            return likeness[i][j] ** -delta / mean

        return contrastive(one, other, temperature, weight)

    expected = (
        direction(image, text, taught_image, taught_text) + direction(text, image, taught_text, taught_image)
    ) / 2
    found = losses.srcl_loss(image, text, temperature, taught_image, taught_text, alpha, delta)
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    plain = losses.srcl_loss(image, text, temperature, delta=0.0)
    assert float(plain) == pytest.approx(float(losses.itc_loss(image, text, temperature)), rel=1e-9, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(pairs, st.integers(0, 4), st.floats(0, 1), st.floats(0, 3))
def test_candidates_stand_in_for_the_features_of_the_batch(shape, more, alpha, delta):
    """Momentum features and a queue: rows behind the batch are negatives of all."""
    image, text, taught_image, taught_text = features(shape)
    size, width, seed = shape
    image_rows, text_rows, taught_image_rows, taught_text_rows = features((size + more, width, seed + 1))

    def direction(one, rows, taught_one, taught_rows) -> float:
        total = 0.0
        for i in range(size):
            scores = [math.exp(cosine(one[i], row) / 0.3) for row in rows]
            likeness = [
                alpha * math.exp(cosine(taught_one[i], taught)) + (1 - alpha) * math.exp(cosine(one[i], row))
                for row, taught in zip(rows, taught_rows)
            ]
            weights = [value**-delta for value in likeness]
            mean = (sum(weights) - weights[i]) / (len(rows) - 1)
            rest = sum(weights[j] / mean * scores[j] for j in range(len(rows)) if j != i)
            total -= math.log(scores[i] / (scores[i] + rest))
        return total / size

    given = dict(image_candidates=image_rows, text_candidates=text_rows)
    expected = (
        direction(image, text_rows, taught_image, taught_text_rows)
        + direction(text, image_rows, taught_text, taught_image_rows)
    ) / 2
    found = losses.srcl_loss(
        image, text, 0.3, taught_image, taught_text, alpha, delta, **given,
        teacher_image_candidates=taught_image_rows, teacher_text_candidates=taught_text_rows,
    )  # fmt: skip
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    plain = losses.srcl_loss(image, text, 0.3, delta=0.0, **given)
    assert float(losses.itc_loss(image, text, 0.3, **given)) == pytest.approx(float(plain), rel=1e-9, abs=1e-12)


def test_weights_of_negatives_have_the_mean_one_and_fall_with_the_likeness():
    similarity = torch.tensor([[3.0, 1.0, 2.0, 0.5], [1.0, 9.0, 4.0, 2.0]], dtype=torch.float64)
    weights = losses.negative_weights(similarity, delta=2.0)
    assert weights.diagonal().tolist() == [0.0, 0.0]
    torch.testing.assert_close(weights.sum(dim=1) / 3, torch.ones(2, dtype=torch.float64))
    assert weights[0, 3] > weights[0, 1] > weights[0, 2] > 0
    assert losses.negative_weights(similarity, delta=0.0)[0].tolist() == [0.0, 1.0, 1.0, 1.0]


def _one_of_two(rank: int, store: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    image, text = (x.chunk(2)[rank].requires_grad_() for x in features((6, 5, 3), 2))
    loss = losses.srcl_loss(
        image, text, 0.2, image_candidates=losses.gather_features(image), text_candidates=losses.gather_features(text)
    )
    loss.backward()
    torch.save((loss.detach(), image.grad / 2, text.grad / 2), f"{folder}/{rank}.pt")  # DDP takes the mean over both
    leave_group()


def test_gathered_over_two_processes_it_is_the_loss_of_one(tmp_path):
    image, text = (x.requires_grad_() for x in features((6, 5, 3), 2))
    assert losses.gather_features(image) is image
    loss = losses.srcl_loss(image, text, 0.2)
    loss.backward()
    torch.multiprocessing.spawn(_one_of_two, args=(str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close((parts[0][0] + parts[1][0]) / 2, loss.detach())
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), image.grad)
    torch.testing.assert_close(torch.cat([part[2] for part in parts]), text.grad)


def test_the_weights_of_srcl_carry_no_gradient():
    image, text = (x.requires_grad_() for x in features((4, 6, 1), 2))
    (found,) = torch.autograd.grad(losses.srcl_loss(image, text, 0.5), image)
    normed = [torch.nn.functional.normalize(x, dim=-1) for x in (image, text)]
    cosines = normed[0] @ normed[1].T
    weights = (-cosines.detach()).exp() * (1 - torch.eye(4, dtype=torch.float64))

    def direction(cosines, weights):
        weights = weights / weights.sum(dim=1, keepdim=True) * 3 + torch.eye(4, dtype=torch.float64)
        scores = (cosines / 0.5).exp()
        return -(scores.diagonal() / (weights * scores).sum(dim=1)).log().mean()

    (expected,) = torch.autograd.grad((direction(cosines, weights) + direction(cosines.T, weights.T)) / 2, image)
    torch.testing.assert_close(found, expected)
