"""Losses and the retrieval metric against slow, obvious float64 references."""

from __future__ import annotations

import math

import pytest
import torch
from hosts import build
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import leave_group
from torch import Tensor

import patchselect
from patchselect import losses
from patchselect.metrics import retrieval_recall

pairs = st.tuples(st.integers(2, 7), st.integers(1, 9), st.integers(0, 10_000))


def features(shape: tuple[int, int, int], count: int = 4) -> list[Tensor]:
    size, width, seed = shape
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, width, generator=generator, dtype=torch.float64) * 3 for _ in range(count)]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


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
