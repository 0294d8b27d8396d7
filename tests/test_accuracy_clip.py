"""The small CLIP, its study and the alignment recipe."""

import json
import re
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from since import BENCHMARKS, needs

needs(*BENCHMARKS, module=True)

import patchselect
from benchmarks.accuracy import CHECKPOINTS
from benchmarks.accuracy import align as command
from benchmarks.accuracy.clip import arms, questions, study, training
from benchmarks.accuracy.clip import host as small
from benchmarks.accuracy.clip import model as clip
from benchmarks.accuracy.yours import alignment as align
from benchmarks.accuracy.yours import resume
from benchmarks.common.tome import token_merging
from benchmarks.models.host import OpenClipHost

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
    assert recorded["accuracy"] > 5 / questions.CHOICES  # far above chance


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


# The questions.


def test_one_caption_fits(asked):
    for objects, captions in zip(asked.scenes.objects, asked.candidates):
        fits = [set(caption) <= set(objects) for caption in captions]
        assert fits == [True] + [False] * (questions.CHOICES - 1)
        assert len({frozenset(caption) for caption in captions}) == questions.CHOICES
        # Swapped, not added: a wrong caption names as many, all but one of them right.
        assert {len(set(caption) - set(objects)) for caption in captions[1:]} == {1}


def test_splits_do_not_share_scenes(asked):
    assert not set(asked.scenes.objects) & set(questions.make_questions(24, questions.TEST).scenes.objects)


def test_right_counts_no_ties():
    texts = F.normalize(torch.eye(questions.CHOICES), dim=-1).expand(3, -1, -1)
    image = torch.stack([texts[0, 0], texts[0, 5], torch.ones(questions.CHOICES)])
    assert questions.right(image, texts).tolist() == [True, False, False]
    each = image.unsqueeze(1).expand(-1, questions.CHOICES, -1)
    assert questions.right(each, texts).tolist() == [True, False, False]


def test_caption_is_read_where_it_ends(model):
    tokens = clip.tokenize([(0,), tuple(range(clip.MOST))])
    assert tokens.shape == (2, clip.CONTEXT) and tokens.argmax(1).tolist() == [3, clip.CONTEXT - 1]
    padded = tokens.clone()
    padded[0, 4:] = 2  # whatever comes behind the end does not count
    torch.testing.assert_close(model.encode_text(padded)[0], model.encode_text(tokens)[0])


# The study.


@pytest.mark.parametrize("rate", study.RATES)
def test_equal_tokens(model, rate):
    """What the table calls equal is what really passes through the MLPs."""
    seen = []
    hooks = [
        b.mlp.register_forward_hook(lambda m, i, o: seen.append(o.shape[1])) for b in model.visual.transformer.resblocks
    ]
    image, wanted = torch.randn(1, 3, clip.SIZE, clip.SIZE), arms.tokens_with(rate)
    try:
        patchselect.apply(model, rate, clip.LAYERS, "image")
        model.encode_image(image)
        patchselect.remove(model)
        assert sum(seen) == wanted
        seen.clear()
        with token_merging(model, arms.merged_like(wanted)):
            model.encode_image(image)
        assert sum(seen) == arms.spent(arms.Arm("", "tome"), rate)
        seen.clear()
        arms.encode_smaller(model, image, arms.grid_like(wanted))
        assert sum(seen) == arms.spent(arms.Arm("", "grid"), rate)
    finally:
        for hook in hooks:
            hook.remove()
        patchselect.remove(model)


def test_every_arm_is_the_model_itself_without_reduction(model, asked):
    images, texts = asked.images(slice(0, 3)), asked.texts(model)[:3]
    plain = questions.encode(model, images)
    for arm in arms.ARMS:
        if arm.guidance == "grid":
            features = arms.encode_smaller(model, images, (arms.GRID, arms.GRID))
        else:
            features = arms.answers(model, arm, 1.0, images, texts)
        wanted = plain if features.dim() == 2 else plain.unsqueeze(1).expand_as(features)
        torch.testing.assert_close(features, wanted, atol=1e-5, rtol=1e-4)


def test_shared_selection_is_one_and_own_selections_differ(model, asked):
    images, texts = asked.images(slice(0, 2)), asked.texts(model)[:2]
    shared = arms.answers(model, arms.ARMS[1], 0.3, images, texts)
    own = arms.answers(model, arms.ARMS[3], 0.3, images, texts)
    assert shared.shape == (2, clip.WIDTH) and own.shape == (2, questions.CHOICES, clip.WIDTH)
    assert not torch.allclose(own[:, 0], own[:, 1])
    alone = arms.answers(model, arms.ARMS[1], 0.3, images[1:], texts[1:])
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
    assert [bar["met"] for bar in study.bars(list(records.values()))] == [True]


def test_command_line(tmp_path, capsys):
    wanted = [arms.SHARED, "random"]
    arguments = f"--seeds 0 --count 64 --keep-rate 0.3 --threads 1 --output {tmp_path}".split()
    report = study.main(study.parse([*arguments, "--arms", *wanted]))
    found = {record["arm"]: record["accuracy"] for record in report["results"]}
    assert set(found) == {arms.NONE, *wanted}
    assert found[arms.NONE] > 5 / questions.CHOICES
    assert found[arms.SHARED] > found["random"] + 0.1
    assert f"| {arms.SHARED}" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"clip-test.json", "clip-test.md", "clip-test.png"}


# The alignment.


def small_copy(seed=0):
    torch.manual_seed(seed)
    return OpenClipHost(clip.build(), "random", "open_clip", clip.SIZE, "", True, None, None)


@pytest.mark.parametrize("pairing, alignment", [("shared", 0.0), ("paired", 1.0)])
def test_resumed_run_ends_with_the_same_weights(tmp_path, pairing, alignment):
    plan = align.Plan("keys", (0.5, 0.3), clip.LAYERS, pairing, alignment, steps=6, batch=4, rate=1e-3)
    data, whole, first, rest = small.scene_pairs(10, 0), small_copy(), small_copy(), small_copy(1)
    start = {name: value.clone() for name, value in whole.model.state_dict().items()}
    losses = align.align(whole, data, plan, progress=False)
    before = align.align(first, data, plan, tmp_path, stop=2, progress=False)
    torch.rand(3)  # whatever else draws
    after = align.align(rest, data, plan, tmp_path, progress=False)
    assert before + after == losses and len(before) == 2
    state = rest.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())
    assert any(not torch.equal(value, state[name]) for name, value in start.items())
    assert not any("_patchselect" in vars(module) for module in rest.model.modules())


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    plan, data = align.Plan("keys", (0.5,), clip.LAYERS, steps=2, batch=4), small.scene_pairs(10, 0)
    align.align(small_copy(), data, plan, tmp_path, stop=1, progress=False)
    others = {
        "plan": (small_copy(), data, replace(plan, rate=1e-5)),
        "model": (replace(small_copy(), name="other"), data, plan),
        "weights": (replace(small_copy(), weights="weights: other"), data, plan),
        "data": (small_copy(), replace(data, name="other"), plan),
        "pairs": (small_copy(), replace(data, size=9), plan),
    }
    for what, (host, given, planned) in others.items():
        before = {name: value.clone() for name, value in host.model.state_dict().items()}
        with pytest.raises(ValueError, match=f"last.pt is of another run: {what} .* there, .* here. Give another"):
            align.align(host, given, planned, tmp_path, progress=False)
        assert all(torch.equal(value, before[name]) for name, value in host.model.state_dict().items())
    with pytest.raises(ValueError, match="processes 1 there, 2 here"):
        resume.resume(tmp_path, {"processes": "2"}, {})
    assert len(align.align(small_copy(1), data, plan, tmp_path, progress=False)) == 1


def test_half_precision_is_trained_in_float32():
    host, wanted, data = small_copy(), small_copy(), small.scene_pairs(10, 0)
    plan = align.Plan("keys", (0.5,), clip.LAYERS, steps=2, batch=4)
    wanted.model.half().float()
    host.model.half()
    assert align.align(host, data, plan, progress=False) == align.align(wanted, data, plan, progress=False)
    assert {value.dtype for value in host.model.parameters()} == {torch.float32}


def test_a_loss_that_is_not_finite_stops(tmp_path):
    host, data = small_copy(), small.scene_pairs(10, 0)
    plan = align.Plan("keys", (0.5,), clip.LAYERS, steps=4, batch=4)
    align.align(host, data, plan, tmp_path, stop=1, progress=False)
    before = (tmp_path / "last.pt").read_bytes()
    broken = replace(data, read=lambda place, epoch: (data[place, epoch][0] * float("nan"), data[place, epoch][1]))
    with pytest.raises(FloatingPointError, match="step 2: loss nan"):
        align.align(host, broken, plan, tmp_path, progress=False)
    assert (tmp_path / "last.pt").read_bytes() == before
    assert all(value.isfinite().all() for value in host.model.state_dict().values())
    assert not any("_patchselect" in vars(module) for module in host.model.modules())


PAIRINGS = {"shared": ("shared", 0.0), "paired": ("paired", 0.0), "paired, aligned": ("paired", 1.0)}


def one_step(rank: int, world: int, folder: str) -> None:
    """One step of the small CLIP per pairing, of plain descent: what the weights change by is the gradient."""
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    found, data = {}, small.scene_pairs(32, 0)
    for name, (pairing, alignment) in PAIRINGS.items():
        host = small.small_host(0)
        plan = align.Plan("values", (0.3,), clip.LAYERS, pairing, alignment, steps=1, batch=16 // world, rate=25.0)
        plain = mock.patch.object(torch.optim, "AdamW", lambda weights, rate, **_: torch.optim.SGD(weights, rate, 0.9))
        with plain, mock.patch.object(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(())):
            (loss,) = align.align(host, data, plan, progress=False)
        found[name] = loss, host.model.state_dict()
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    """What one process made of 16 pairs, and each of two of 8 of them."""
    folder = tmp_path_factory.mktemp("processes")
    one_step(0, 1, str(folder))
    torch.multiprocessing.spawn(one_step, args=(2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{name}.pt") for name in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("name", PAIRINGS)
def test_two_processes_are_one_with_the_whole_batch(stepped, name):
    (loss, weights), *parts = (found[name] for found in stepped)
    assert sum(part[0] for part in parts) / 2 == pytest.approx(loss, abs=1e-5)
    start = clip.load(0).state_dict()
    for key, value in weights.items():
        for _, found in parts:
            torch.testing.assert_close(found[key] - start[key], value - start[key], atol=2e-6, rtol=1e-3)
    assert all(not torch.equal(weights[key], start[key]) for key in ("text_projection", "visual.proj"))


def test_processes_share_the_batch_out():
    plan = align.Plan(steps=5, batch=4)
    whole = list(align.Batches(30, align.Plan(steps=5, batch=8), 0))
    parts = [list(align.Batches(30, plan, 0, rank, 2)) for rank in range(2)]
    assert [a + b for a, b in zip(*parts)] == whole
    assert list(align.Batches(30, plan, 3, 1, 2)) == parts[1][3:]
    with pytest.raises(ValueError, match="lower --batch"):
        align.Batches(7, plan, 0, 0, 2)


def test_alignment_refuses_what_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="pairing='paired'"):
        align.Plan(alignment=1.0).check()
    with pytest.raises(ValueError, match="--data is for other models"):
        command.main(command.parse(["--model", "ViT-B-16", "--output", str(tmp_path), "--threads", "1"]))
