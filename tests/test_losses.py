"""Losses of alignment and matching against slow, obvious float64 references; gradients and refusals of all losses."""

from __future__ import annotations

import math

import pytest
import torch
from hosts import build
from hypothesis import given, settings
from hypothesis import strategies as st
from paired_features import cosine, features, pairs
from torch import Tensor

import patchselect
from patchselect import losses


@settings(max_examples=30, deadline=None)
@given(pairs, st.floats(-0.5, 0.5))
def test_cosine_alignment_is_torchs_loss_on_drawn_pairs(shape, margin):
    image, text = features(shape, 2)
    size, seed = len(image), shape[2]
    found = losses.cosine_alignment_loss(image, text, margin, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    embedding_loss = torch.nn.CosineEmbeddingLoss(margin=margin)
    total = theirs = 0.0
    for one, other in ((image, text), (text, image)):
        partner = (torch.arange(size) + torch.randint(1, size, (size,), generator=generator)) % size
        assert not (partner == torch.arange(size)).any()
        label = torch.cat([torch.ones(size), -torch.ones(size)])
        theirs += float(embedding_loss(torch.cat([one, one]), torch.cat([other, other[partner]]), label))
        matching = sum(1 - cosine(one[i], other[i]) for i in range(size))
        mismatched = sum(max(0.0, cosine(one[i], other[partner[i]]) - margin) for i in range(size))
        total += (matching + mismatched) / (2 * size)
    assert float(found) == pytest.approx(total / 2, rel=1e-9, abs=1e-12)
    if torch.cat([image, text]).norm(dim=-1).min() > 1e-3:  # torch adds 1e-12 to squared lengths
        assert float(found) == pytest.approx(theirs / 2, rel=1e-4, abs=1e-4)


def test_selection_alignment_trains_what_selects():
    case = build("clip")
    handle = patchselect.apply(case.model, 0.5, layers=[1, 3], relevance="keys")
    text = torch.randn(3, case.text_width)
    with handle.record() as trace, patchselect.guide(case.model, text):
        case.image_side(case.model, case.images(3))
    head = patchselect.wiring.towers.find_towers(case.model)[0]

    def project(pooled: Tensor) -> Tensor:
        return head.adapter.project(head, pooled)

    loss = losses.selection_alignment_loss(trace[0].pooled, text, 0.1, project=project)
    expected = losses.itc_loss(project(trace[0].pooled), text, 0.1)
    assert torch.equal(loss, expected)
    loss.backward()
    assert head.blocks[1].self_attn.q_proj.weight.grad.abs().sum() > 0
    torch.testing.assert_close(
        losses.selection_alignment_loss(trace[0].pooled.detach(), torch.randn(3, 48)).isfinite(), torch.tensor(True)
    )


@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_those_of_the_values(seed):
    """Numerical derivatives in float64; the weights of SRCL are constants where the teacher alone makes them."""
    image, text, taught_image, taught_text = features((4, 5, seed))
    more = [torch.cat(both) for both in ((image, taught_image), (text, taught_text))]
    project = torch.nn.Linear(5, 5, bias=False).double()
    temperature = torch.tensor(0.3, dtype=torch.float64)

    def check(loss, *inputs: Tensor) -> None:
        assert torch.autograd.gradcheck(loss, [x.detach().clone().requires_grad_() for x in inputs])

    check(losses.itc_loss, image, text, temperature)
    check(lambda v, t, a, b: losses.itc_loss(v, t, 0.3, image_candidates=a, text_candidates=b), image, text, *more)
    taught = dict(teacher_image_features=taught_image, teacher_text_features=taught_text, alpha=1.0, delta=2.0)
    check(lambda v, t, one: losses.srcl_loss(v, t, one, **taught), image, text, temperature)
    queues = dict(teacher_image_candidates=more[0].flip(1), teacher_text_candidates=more[1].flip(1))
    check(
        lambda v, t, a, b: losses.srcl_loss(v, t, 0.3, **taught, **queues, image_candidates=a, text_candidates=b),
        image, text, *more,
    )  # fmt: skip
    check(lambda v, t: losses.cosine_alignment_loss(v, t, -0.2, torch.Generator().manual_seed(seed)), image, text)
    check(
        lambda v, t, weight: losses.selection_alignment_loss(v, t, 0.3, lambda x: x @ weight.T),
        image, text, project.weight,
    )  # fmt: skip
    check(losses.itm_loss, image[:, :2], torch.cat([text, taught_text])[:, :2])


def test_hard_negatives_are_drawn_by_likeness_and_never_match():
    image, text, *_ = features((6, 4, 3))
    groups = torch.tensor([0, 1, 2, 3, 3, 5])
    generator, count = torch.Generator().manual_seed(0), 4000
    drawn = [losses.hard_negatives(image, text, 0.5, groups, generator) for _ in range(count)]
    for way, (one, other) in enumerate(((text, image), (image, text))):
        found = torch.stack([draw[way] for draw in drawn])
        for i in range(6):
            scores = [0.0 if groups[i] == groups[j] else math.exp(cosine(one[i], other[j]) / 0.5) for j in range(6)]
            shares = found[:, i].bincount(minlength=6) / count
            for share, score in zip(shares.tolist(), scores):
                chance = score / sum(scores)
                assert abs(share - chance) <= 5 * math.sqrt(chance * (1 - chance) / count)
    images, texts = losses.hard_negatives(image[:2], text[:2])  # the only other one
    assert images.tolist() == [1, 0] and texts.tolist() == [1, 0]


def test_matching_is_cross_entropy_over_all_pairs():
    fitting, other = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.5, -1.0], [2.0, 2.0]])
    expected = (math.log(1 + math.exp(-2.0)) + math.log(1 + math.exp(-1.5)) + math.log(2)) / 3
    assert float(losses.itm_loss(fitting, other)) == pytest.approx(expected, rel=1e-6)
    assert losses.itm_loss(fitting.half(), other.half()).dtype == torch.float32


def test_alpha_falls_from_one_to_zero():
    assert [losses.progressive_alpha(step, 4) for step in range(6)] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


def test_half_precision_and_wrong_arguments():
    image, text = (x.half() for x in features((3, 5, 0), 2))
    assert losses.itc_loss(image, text).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = losses.itc_loss(image.float(), text.float())
    assert torch.equal(exact, losses.itc_loss(image.float(), text.float()))
    for call, message in (
        (lambda: losses.itc_loss(image, text[:2]), "row i of both a pair"),
        (lambda: losses.itc_loss(image, text, 0.0), "temperature must be above 0"),
        (lambda: losses.srcl_loss(image, text, alpha=0.5), "give teacher_image_features"),
        (lambda: losses.srcl_loss(image, text, alpha=1.5), r"alpha must be in \[0, 1\]"),
        (lambda: losses.itc_loss(image, text, text_candidates=text[:2]), "M of at least 3"),
        (lambda: losses.srcl_loss(image, text, 1, image, text, 0.5, text_candidates=image.repeat(2, 1)), "same pairs"),
        (lambda: losses.cosine_alignment_loss(image[:1], text[:1]), "at least 2 pairs"),
        (lambda: losses.hard_negatives(image, text, groups=torch.zeros(3)), "no negative"),
        (lambda: losses.hard_negatives(image[:1], text[:1]), "no negative"),
        (lambda: losses.hard_negatives(image, text, groups=torch.zeros(2)), r"groups must be \(3,\)"),
        (lambda: losses.itm_loss(image, text), r"\(pairs, 2\)"),
        (lambda: losses.progressive_alpha(-1, 4), "step must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
