"""The alignment recipe, on the small CLIP."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from processes import leave_group
from since import BENCHMARKS, needs

needs(*BENCHMARKS, module=True)

from benchmarks.accuracy import align as command
from benchmarks.accuracy.clip import host as small
from benchmarks.accuracy.clip import model as clip
from benchmarks.accuracy.yours import alignment as align
from benchmarks.accuracy.yours import resume
from benchmarks.models.host import OpenClipHost


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
        leave_group()


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
