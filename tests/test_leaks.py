"""No question of the benchmark is answered by its texts alone, and what looks for such a leak finds the old one."""

from __future__ import annotations

import pytest
import torch
from since import BENCHMARKS, needs

needs(*BENCHMARKS, module=True)
import numpy as np

pytest.importorskip("sklearn")
pytest.importorskip("emoji")

from benchmarks.accuracy.albef.evaluate import TEST_SEED
from benchmarks.accuracy.albef.evaluate import Questions as Matching
from benchmarks.accuracy.clip import model as clip
from benchmarks.accuracy.clip.arms import ARMS, SHARED, answers
from benchmarks.accuracy.clip.questions import TEST, VALIDATION, make_questions, right
from benchmarks.accuracy.leaks import places, study
from benchmarks.accuracy.world import text_alone
from benchmarks.accuracy.world.candidates import CHOICES, GRID, KINDS, LEAKY, grid
from benchmarks.accuracy.world.captions import concepts_of, unique_captions
from benchmarks.accuracy.world.text_alone import COUNTING, PAIR, TRAINED
from patchselect.metrics import retrieval_recall

HOW = (TRAINED, COUNTING)
COUNT = 1024


@pytest.fixture(scope="module")
def matching():
    """The questions and the pool that the tables of the mini-ALBEF are made of."""
    return Matching.make(320, 48, TEST_SEED)


def above(hits, chance: float) -> float:
    """How many standard errors of chance the hits are away from it."""
    return (float(torch.as_tensor(hits).double().mean()) - chance) / (chance * (1 - chance) / len(hits)) ** 0.5


# The wrong captions.


def test_every_word_of_a_place_is_in_as_many_captions():
    random = np.random.default_rng(0)
    for named in ((3,), (3, 5), (3, 5, 8, 9)):
        captions = grid(named, (3, 5, 8, 9, 1), random)
        assert captions[0] == named and len(set(map(frozenset, captions))) == CHOICES
        assert not {word for caption in captions for word in caption if word not in named} & {3, 5, 8, 9, 1}
        for place in zip(*captions):
            assert {place.count(word) for word in place} == {round(CHOICES ** (1 - 1 / len(named)))}
    with pytest.raises(ValueError, match="1, 2 or 4 objects each, not 3"):
        grid((1, 2, 3), (1, 2, 3), random)


# Texts alone.


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("split", [VALIDATION, TEST])
def test_clip_questions_are_not_answered_by_their_texts(split, how):
    candidates = make_questions(COUNT, split).candidates
    assert abs(above(text_alone.answered(candidates, how, GRID), 1 / CHOICES)) <= 2


@pytest.mark.parametrize("how", HOW)
def test_the_same_classifiers_answer_the_leaky_questions(how):
    """Or the tests here could not fail."""
    candidates = make_questions(COUNT, TEST, kind=LEAKY).candidates
    hits = text_alone.answered(candidates, how, LEAKY)
    assert hits.mean() > 0.45 and above(hits, 1 / CHOICES) > 20
    two = torch.tensor([len(captions[0]) == 2 for captions in candidates])
    assert hits[two].mean() > 0.95
    assert abs(above(hits[~two], 1 / CHOICES)) <= 2  # one object swapped is another object: nothing to count


def test_a_classifier_is_not_told_which_candidate_comes_first():
    (candidates,) = text_alone.asked(1, 3, GRID)
    order = np.random.default_rng(1).permutation(CHOICES)
    shuffled = [candidates[place] for place in order]
    np.testing.assert_allclose(text_alone.described(candidates)[order], text_alone.described(shuffled))


def test_matching_questions_are_not_answered_by_their_texts(matching):
    fitting, other = concepts_of(matching.fitting), concepts_of(matching.other)
    hits = np.concatenate([text_alone.fits(fitting) > 0, text_alone.fits(other) < 0])
    assert abs(above(hits, 0.5)) <= 2
    for how in HOW:
        assert abs(above(text_alone.answered(list(zip(fitting, other)), how, PAIR), 0.5)) <= 2


def test_retrieval_needs_the_pictures(matching):
    """Scores of texts alone are the same for every picture of the pool: one of them is answered right."""
    captions = concepts_of(matching.pool_captions)
    scores = torch.from_numpy(text_alone.fits(captions)).expand(len(captions), -1)
    recall = retrieval_recall(scores, torch.arange(len(captions)), ks=(1, 10))
    for way in recall.values():
        assert way[1] == pytest.approx(100 / len(captions)) and way[10] == pytest.approx(1000 / len(captions))
    objects = text_alone.objects_drawn(600, 5)
    rows, texts = unique_captions(objects, 24, 0)
    assert all(
        (set(text) <= set(objects[row])) == (i == j) for i, text in enumerate(texts) for j, row in enumerate(rows)
    )


def test_the_order_of_the_candidates_does_not_matter():
    """The right one lies in front; nothing that selects for all of them together may know."""
    model, questions = clip.load(0), make_questions(16, VALIDATION)
    images, texts = questions.images(), questions.texts(model)
    arm = next(arm for arm in ARMS if arm.name == SHARED)
    order = torch.from_numpy(np.random.default_rng(0).permutation(CHOICES))
    features = [answers(model, arm, 0.3, images, some) for some in (texts, texts[:, order])]
    torch.testing.assert_close(features[0], features[1])
    assert torch.equal(*(right(one, texts) for one in features))


# Kept places.


def test_maps_are_what_was_kept():
    model, questions = clip.load(0), make_questions(3, VALIDATION)
    images, texts = questions.images(), questions.texts(model)
    shared = places.of_clip(model, "values", 0.3, images, texts, "shared")
    assert shared.shape == (3, CHOICES, 2, 64)
    assert (shared == shared[:, :1]).all() and (shared.sum(-1)[:, :, 0] == 20).all()
    assert not (shared[:, :, 1] & ~shared[:, :, 0]).any()  # the second chooses among what the first kept
    own = places.of_clip(model, "values", 0.3, images, texts, "all")
    assert (own != own[:, :1]).any() and (own.sum(-1)[:, :, 0] == 20).all()


def test_clumps_are_counted():
    kept = np.zeros((4, 4), dtype=bool)
    kept[:2, :2] = kept[3, 3] = True
    beside, across, pieces, *largest, _, _ = places.clumps(kept)
    assert (beside, across, pieces, largest) == (4, 2, 2, [4, 1, 0])
    assert places.clumps(np.zeros((4, 4), dtype=bool)) == [0.0] * 8


def test_a_label_written_into_the_places_is_found():
    """Or the figures of the study could not be above chance."""
    random = torch.Generator().manual_seed(0)
    kept = torch.rand(200, 4, 2, 64, generator=random) < 0.3
    kept[:, 0, :, :9] |= torch.rand(200, 2, 9, generator=random) < 0.6
    features, wanted = places.told_beside(kept), np.tile(np.arange(4) == 0, 100)
    train, test = features[:100].reshape(400, -1), features[100:].reshape(400, -1)
    for classifier in places.classifiers().values():
        scores = classifier.fit(train, wanted).predict_proba(test)[:, 1].reshape(100, 4)
        assert above(torch.from_numpy(scores.argmax(1) == 0), 0.25) > 5


def test_command_line(any_size, tmp_path, capsys):
    small = "--seeds 0 --keep-rate 0.3 --count 64 --queries 32 --scenes 24 --train 16 --asked 16 --threads 1"
    report = study.main(study.parse([*small.split(), "--output", str(tmp_path)]))
    assert {record["questions"] for record in report["words"]} >= {f"CLIP, 1 of {CHOICES}, {kind}" for kind in KINDS}
    assert len(report["matching"]) == 8 and len(report["candidates"]) == 8
    assert "values, shared, 0, trees" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"leaks.json", "leaks.md"}
