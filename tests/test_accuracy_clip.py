"""The small CLIP and its study."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from since import BENCHMARKS, needs

needs(*BENCHMARKS, module=True)

from benchmarks.accuracy import CHECKPOINTS
from benchmarks.accuracy.clip import arms, questions, report, study, training
from benchmarks.accuracy.clip import model as clip
from benchmarks.accuracy.world.candidates import CHOICES, LEAKY
from benchmarks.common.cost import count_flops
from benchmarks.common.tome import token_merging

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def model():
    """Random weights, except that positions and patches differ: enough for everything but accuracy."""
    torch.manual_seed(0)
    return clip.build().eval()


@pytest.fixture(scope="module")
def asked():
    return questions.make_questions(24, questions.VALIDATION)


# The committed checkpoints.


@pytest.mark.parametrize("seed", SEEDS)
def test_checkpoint_reproduces_its_score(seed):
    about = json.loads((CHECKPOINTS / f"clip-{seed}.json").read_text())
    recorded = about["validation"]
    scores = questions.score(clip.load(seed), recorded["questions"])
    assert abs(scores["accuracy"] - recorded["accuracy"]) <= recorded["standard_error"]
    assert abs(scores["image_to_text_r1"] - recorded["image_to_text_r1"]) <= 1.0
    assert f"--seed {seed}" in about["command"] and re.fullmatch("[0-9a-f]{12,40}", about["commit"])
    assert recorded["accuracy"] > 5 / CHOICES  # far above chance


def test_checkpoints_are_small():
    assert sum((CHECKPOINTS / f"clip-{seed}.pt").stat().st_size for seed in SEEDS) <= 2_000_000


def test_missing_checkpoint_says_how_to_make_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="--train --seed 7"):
        clip.load(7, tmp_path)


def test_training_lowers_the_loss_and_is_saved(tmp_path):
    stages = (training.Stage(1.0, 40, training.Layout(size=clip.SIZE, objects=(1, 1), glyph=(40, 70)), 1),)
    plan = training.Training(seed=3, steps=20, batch=16)
    trained = training.train(plan, stages)
    assert plan.losses[-1] < plan.losses[0]
    clip.save(trained, tmp_path / "clip-3.pt", {})
    image = torch.randn(2, 3, clip.SIZE, clip.SIZE)
    again = clip.load(3, tmp_path)
    torch.testing.assert_close(again.encode_image(image), trained.encode_image(image), atol=2e-2, rtol=2e-2)


def test_a_model_of_another_size_is_asked_of_its_own_images(tmp_path, capsys):
    for seed, size in ((5, 80), (6, clip.SIZE)):
        torch.manual_seed(seed)
        clip.save(clip.build(size), tmp_path / f"clip-{seed}.pt", {})
    assert clip.size_of(clip.load(5, tmp_path)) == 80
    given = ["--checkpoints", str(tmp_path), "--output", str(tmp_path), "--count", "4", "--keep-rate", "0.5"]
    given += ["--arms", "ToMe", "smaller", "merge-then-select, shared by all nouns"]
    found = study.main(study.parse(["--seeds", "5", *given]))["results"]
    assert len(found) == 5 and all(0 <= record["accuracy"] <= 1 for record in found)
    with pytest.raises(SystemExit, match="several image sizes"):
        study.main(study.parse(["--seeds", "5", "6", *given]))
    with pytest.raises(SystemExit):
        study.parse(["--train", "--size", "84"])
    assert "takes a multiple of 8" in capsys.readouterr().err


def test_what_only_training_reads_is_not_ignored():
    with pytest.raises(SystemExit, match="--size, --steps can only be said of a model to --train"):
        study.main(study.parse(["--size", "80", "--steps", "5"]))


# The questions.


def test_one_caption_fits(asked):
    for objects, captions in zip(asked.scenes.objects, asked.candidates):
        fits = [set(caption) <= set(objects) for caption in captions]
        assert fits == [True] + [False] * (CHOICES - 1)
        assert len({frozenset(caption) for caption in captions}) == CHOICES
        assert {len(caption) for caption in captions} == {len(captions[0])}


def test_leaky_questions_are_there_for_comparison(asked):
    """Swapped, not added: a wrong caption names as many, all but one of them right."""
    leaky = questions.make_questions(24, questions.VALIDATION, kind=LEAKY)
    assert leaky.scenes.objects == asked.scenes.objects
    for objects, captions in zip(leaky.scenes.objects, leaky.candidates):
        assert set(captions[0]) <= set(objects)
        assert {len(set(caption) - set(objects)) for caption in captions[1:]} == {1}


def test_splits_do_not_share_scenes(asked):
    assert not set(asked.scenes.objects) & set(questions.make_questions(24, questions.TEST).scenes.objects)


def test_right_counts_no_ties():
    texts = F.normalize(torch.eye(CHOICES), dim=-1).expand(3, -1, -1)
    image = torch.stack([texts[0, 0], texts[0, 5], torch.ones(CHOICES)])
    assert questions.right(image, texts).tolist() == [True, False, False]
    each = image.unsqueeze(1).expand(-1, CHOICES, -1)
    assert questions.right(each, texts).tolist() == [True, False, False]


def test_caption_is_read_where_it_ends(model):
    tokens = clip.tokenize([(0,), tuple(range(clip.MOST))])
    assert tokens.shape == (2, clip.CONTEXT) and tokens.argmax(1).tolist() == [3, clip.CONTEXT - 1]
    padded = tokens.clone()
    padded[0, 4:] = 2  # whatever comes behind the end does not count
    torch.testing.assert_close(model.encode_text(padded)[0], model.encode_text(tokens)[0])


# The study.


@pytest.mark.parametrize("rate", study.RATES)
@pytest.mark.parametrize("guidance", ["image", "tome", "tome front", "grid", "merged", "once"])
@pytest.mark.parametrize("size", [clip.SIZE, 80])
def test_equal_flops(size, guidance, rate):
    """The tokens that FLOPs are counted from are those that really pass, and what is called equal is, nearly."""
    merge = {"merged": 0.5, "once": 0.0}.get(guidance)
    model, grid = clip.build(size).eval(), size // clip.PATCH
    seen, arm = [], arms.Arm("", guidance) if merge is None else arms.Arm("", "image", merge=merge)

    def watch(module, tokens, out):
        seen.append(tokens[0].shape[1])

    blocks = model.visual.transformer.resblocks
    hooks = [part.register_forward_hook(watch) for block in blocks for part in (block.ln_1, block.ln_2)]
    image = torch.randn(1, 3, size, size)
    try:
        arms.answers(model, arm, rate, image, torch.zeros(1, 16, clip.WIDTH))
    finally:
        for hook in hooks:
            hook.remove()
    assert list(zip(seen[::2], seen[1::2])) == arms.lengths(arm, rate, grid)
    # Whole patches; the even merging cannot merge enough at the lowest rate.
    target = arms.tower(grid).share(arms.tower(grid).selected(rate))
    assert arms.flops(arm, rate, grid) == pytest.approx(target, rel={"grid": 0.08, "tome": 0.04}.get(guidance, 0.01))


def test_flops_are_those_that_are_counted(model, flops):
    """Stem, projection and norms apart: what a second image costs that is all blocks."""
    image = torch.randn(1, 3, clip.SIZE, clip.SIZE)
    whole = count_flops(lambda: model.encode_image(image))
    with token_merging(model, 40, first=2):
        merged = count_flops(lambda: model.encode_image(image))
    blocks = 2 * clip.WIDTH * arms.tower().products([(65, 65)] * clip.DEPTH)
    saved = (1 - arms.tower().share(arms.tower().merged(40, 2))) * blocks
    assert whole - merged == pytest.approx(saved, rel=0.02)  # matching itself costs a little


def test_every_arm_is_the_model_itself_without_reduction(model, asked):
    images, texts = asked.images(slice(0, 3)), asked.texts(model)[:3]
    plain = questions.encode(model, images)
    for arm in arms.ARMS:
        if arm.guidance == "words":
            continue  # sees no image
        if arm.guidance == "grid":
            features = arms.encode_smaller(model, images, (arms.GRID, arms.GRID))
        else:
            features = arms.answers(model, arm, 1.0, images, texts)
        wanted = plain if features.dim() == 2 else plain.unsqueeze(1).expand_as(features)
        torch.testing.assert_close(features, wanted, atol=1e-5, rtol=1e-4)


def test_shared_selection_is_one_and_own_selections_differ(model, asked):
    images, texts = asked.images(slice(0, 2)), asked.texts(model)[:2]
    together, each = (next(arm for arm in arms.ARMS if arm.name == n) for n in (arms.SHARED, "values, per caption"))
    shared = arms.answers(model, together, 0.3, images, texts)
    own = arms.answers(model, each, 0.3, images, texts)
    assert shared.shape == (2, clip.WIDTH) and own.shape == (2, CHOICES, clip.WIDTH)
    assert not torch.allclose(own[:, 0], own[:, 1])
    alone = arms.answers(model, together, 0.3, images[1:], texts[1:])
    torch.testing.assert_close(alone[0], shared[1])


def test_summary_pairs_the_questions():
    base = torch.tensor([1.0, 1.0, 0.0, 0.0])
    found = {
        ("no selection", 1.0): base,
        (arms.SHARED, 0.3): base,
        ("random", 0.3): torch.tensor([0.0, 1.0, 0.0, 0.0]),
    }
    records = {r["arm"]: r for r in study.summarise([found, found], arms.ARMS)}
    assert records["random"]["against_none"] == pytest.approx((-0.25, 0.25))
    assert records[arms.SHARED]["against_none"] == (0.0, 0.0)
    assert records["random"]["by_model"] == [0.25, 0.25]
    assert records["random"]["shared_values_ahead"] == pytest.approx((0.25, 0.25))
    named = torch.tensor([1, 1, 2, 2])
    (record, *_) = study.summarise([found], arms.ARMS, named)
    assert {n: value for n, (value, _) in record["by_objects"].items()} == {1: 1.0, 2: 0.0}


def test_command_line(tmp_path, capsys):
    wanted = [arms.SHARED, "random", "text alone, counting words"]
    arguments = f"--seeds 0 --count 64 --keep-rate 0.3 --threads 1 --output {tmp_path}".split()
    report = study.main(study.parse([*arguments, "--arms", *wanted]))
    found = {record["arm"]: record["accuracy"] for record in report["results"]}
    assert set(found) == {arms.NONE, *wanted}
    assert found[arms.NONE] > 5 / CHOICES
    assert found[arms.SHARED] > found["random"] + 0.1
    assert f"| {arms.SHARED}" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"clip-test.json", "clip-test.md", "clip-test.png"}


def test_leaky_questions_carry_their_warning(tmp_path, capsys):
    arguments = f"--seeds 0 --count 32 --keep-rate 0.3 --threads 1 --questions leaky --output {tmp_path}".split()
    study.main(study.parse([*arguments, "--arms", arms.SHARED, "ToMe-front"]))
    told = capsys.readouterr().out
    assert report.WARNING in told and f"{arms.SHARED}, minus" not in told
    assert (tmp_path / "clip-test-leaky.json").is_file()


def test_a_run_that_was_broken_off_goes_on(tmp_path, monkeypatch):
    """What was answered is not asked again; answers of other questions are not taken over."""
    arguments = f"--seeds 0 --count 16 --keep-rate 0.3 --threads 1 --output {tmp_path} --arms random values".split()
    asked, real = [], study.answers

    def some(model, arm, *args):
        asked.append(arm.name)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(model, arm, *args)

    monkeypatch.setattr(study, "answers", some)
    with pytest.raises(KeyboardInterrupt):
        study.main(study.parse(arguments))
    report = study.main(study.parse(arguments))
    assert len(asked) == len(set(asked)) + 1 and asked[2] == asked[3]
    assert not list(tmp_path.glob("*.partial"))
    monkeypatch.setattr(study, "answers", real)
    again = study.main(study.parse(arguments))
    assert again["results"] == report["results"]
    first = {"asked": [1], "weights": []}
    study.Partial(tmp_path / "one", first).save()
    assert study.Partial(tmp_path / "one", {**first, "asked": [2]}).found == {}
