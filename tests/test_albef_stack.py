"""One step of ALBEF's retrieval head in the stack of a training script: two processes, autocast, checkpointing."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.multiprocessing
from heads import build, floats, loss_of, rewound, skip_what_autocast_cannot_run
from processes import leave_group
from since import missing, needs, since, slow
from torch import Tensor, nn

needs("checkpoints without reentry", module=True)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

import patchselect

LAYERS = [1, 3]
HALF = 2.0**-8
"""The relative distance between neighbours in bfloat16."""
REAL_OR_DOUBLE = pytest.mark.parametrize("name", ["albef-retrieval", "real-albef-retrieval"])
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def autocast(enabled: bool) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def _step(rank: int, world: int, store: str, name: str, how: str, half: bool, results: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    head = build(name)
    model = head.model.train()
    patchselect.apply(model, 0.5, LAYERS)
    batch = head.batch(rank)
    if how == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world,))
        for tower in patchselect.handle_of(model).towers:
            for block in tower.blocks:
                fully_shard(block, mesh=mesh)
        scalars = {weight for weight in model.parameters() if weight.dim() == 0}  # ALBEF's temperature
        fully_shard(model, mesh=mesh, ignored_params=scalars)
        run = model
    else:
        run = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    torch.manual_seed(7)
    with autocast(half):
        loss = loss_of(run(*batch[0], **batch[1]))
    averages = how == "ddp" or missing("averages of FSDP2") is None
    (loss if averages else loss / world).backward()
    weight = patchselect.handle_of(model).towers[0].blocks[0].norm1.weight.grad
    weight = weight.full_tensor() if how == "fsdp" else weight
    torch.save((loss.detach(), weight), f"{results}/{rank}")
    leave_group()


@REAL_OR_DOUBLE
@pytest.mark.parametrize("how", ["ddp", pytest.param("fsdp", marks=since("FSDP2"))])
@pytest.mark.parametrize("half", [False, pytest.param(True, marks=slow)], ids=["float32", "autocast"])
def test_two_processes_lose_what_one_loses(name, how, half, tmp_path):
    """Each rank has the loss of its share alone, and the gradients are the mean of the two."""
    build(name)
    if half:
        skip_what_autocast_cannot_run(name)
    losses, gradients = [], []
    for rank in range(2):
        head = build(name)
        handle = patchselect.apply(head.model.train(), 0.5, LAYERS)
        with autocast(half):
            loss = loss_of(head.call(head.batch(rank)))
        loss.backward()
        losses.append(loss.detach())
        gradients.append(handle.towers[0].blocks[0].norm1.weight.grad)
    with tempfile.NamedTemporaryFile() as file:
        store = file.name
    torch.multiprocessing.spawn(_step, args=(2, store, name, how, half, str(tmp_path)), nprocs=2)
    for rank in range(2):
        loss, gradient = torch.load(tmp_path / str(rank))
        torch.testing.assert_close(loss, losses[rank])
        torch.testing.assert_close(gradient, torch.stack(gradients).mean(dim=0), rtol=1e-4, atol=1e-6)


def without_chance(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout off in training mode, and negatives that do not hang on the last digit of a similarity."""
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
    draw = torch.multinomial
    monkeypatch.setattr(torch, "multinomial", lambda weights, count: draw((weights > 0).float(), count))


def closest_call(trace) -> float:
    """How far the last kept patch lies before the first removed one, in standard deviations of their scores."""
    gaps = []
    for entry in trace:
        scores = entry.relevance.log().sort(dim=1, descending=True).values
        kept = entry.kept.shape[1]
        gaps.append(((scores[:, kept - 1] - scores[:, kept]) / scores.std(dim=1)).min())
    return float(torch.stack(gaps).min())


@REAL_OR_DOUBLE
def test_autocast_loses_what_float32_loses(name, monkeypatch):
    """Half precision moves a score by about `HALF` of its spread, so a choice that is eight times clearer stands.

    With the same patches kept, what is left is the rounding of the model itself, patched or not: one `HALF`.
    """
    skip_what_autocast_cannot_run(name)
    head = build(name)
    without_chance(head.model.train(), monkeypatch)
    rewind = rewound(head)
    handle = patchselect.apply(head.model, 0.5, LAYERS)
    for seed in range(100):
        batch = head.batch(seed)
        rewind()
        with torch.no_grad(), handle.record() as trace:
            expected = floats(head.call(batch))
        if closest_call(trace) > 8 * HALF:
            break
    rewind()
    with autocast(True), handle.record() as half:
        found = floats(head.call(batch))
    assert closest_call(trace) > 8 * HALF and len(half) == len(trace) == 4
    assert all(torch.equal(one.kept, two.kept) for one, two in zip(half, trace))
    torch.testing.assert_close([loss.float() for loss in found], expected, rtol=HALF, atol=0)
    assert not all(map(torch.equal, found, expected)), "nothing ran in half precision"
    loss_of(found).backward()
    assert all(weight.grad.isfinite().all() for weight in handle.towers[0].module.parameters())


@dataclass
class Step:
    """One step of training: losses, gradients, and what each selecting block of the trained tower kept, run by run."""

    losses: list[Tensor]
    gradients: dict[str, Tensor]
    kept: list[list[Tensor]]


def step(name: str, checkpointing: CheckpointImpl | None, detached: bool = False) -> Step:
    """With `checkpointing`, every block of both towers and every layer of BERT run again in the backward pass.

    ALBEF's ViT has no switch for it, so its blocks are wrapped, as a training script would.
    """
    head = build(name)
    model = head.model.train()
    handle = patchselect.apply(model, 0.5, LAYERS)
    kept: list[list[Tensor]] = [[] for _ in LAYERS]
    for runs, layer in zip(kept, LAYERS):
        norm = handle.towers[0].blocks[layer].norm2  # reads what the selection leaves
        norm.register_forward_pre_hook(lambda module, args, runs=runs: runs.append(args[0].detach().clone()))
    text, weights = head.text_features(), dict(model.named_parameters())
    if checkpointing is not None:
        handle.towers[0].reader.text_encoder.config.gradient_checkpointing = True
        for tower in handle.towers:
            for index, block in enumerate(tower.blocks):
                tower.module.blocks[index] = checkpoint_wrapper(block, checkpoint_impl=checkpointing)
    with patchselect.guide(model, text) if detached else nullcontext():
        output = head.call()
    loss_of(output).backward()
    gradients = {key: weight.grad for key, weight in weights.items() if weight.grad is not None}
    return Step(floats(output), gradients, kept)


@REAL_OR_DOUBLE
@pytest.mark.parametrize("kind", ["not reentrant", "reentrant, detached text"])
def test_checkpointing_changes_no_loss_and_no_gradient(name, kind):
    reentrant = kind.startswith("reentrant")
    whole = step(name, None, detached=reentrant)
    again = step(name, CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT, detached=reentrant)
    assert all(map(torch.equal, again.losses, whole.losses))
    assert again.gradients.keys() == whole.gradients.keys()
    dust = 1e-6 * max(float(gradient.abs().max()) for gradient in whole.gradients.values())
    for key, expected in whole.gradients.items():
        torch.testing.assert_close(again.gradients[key], expected, rtol=1e-4, atol=dust)
    for once, (first, second) in zip(whole.kept, again.kept):
        assert torch.equal(first, once[0]) and torch.equal(second, first), "the recomputation kept other patches"


@REAL_OR_DOUBLE
def test_reentrant_checkpointing_without_a_detached_text_is_an_error(name):
    with pytest.raises(RuntimeError, match=r"use_reentrant=False\), or give guide\(\) detached text features"):
        step(name, CheckpointImpl.REENTRANT)


class Wrapped(nn.Module):
    """Some wrapper that is not torch's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.inner = block

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def blocks_of(tower) -> nn.ModuleList:
    return tower.module.transformer.resblocks if hasattr(tower.module, "transformer") else tower.module.blocks


@pytest.mark.parametrize("again", [False, True], ids=["wrapped first", "applied again"])
@pytest.mark.parametrize("name", ["albef-retrieval", "albef-pairs", "mplug-retrieval-base"])
def test_blocks_in_a_checkpoint_wrapper_are_found_inside_of_it(name, again):
    """Not those of the momentum twin alone, which nobody wraps."""
    plain, head = build(name), build(name)
    towers = head.towers()
    patchselect.apply(plain.model.eval(), 0.5, LAYERS)
    if again:
        patchselect.apply(head.model.eval(), 0.7, LAYERS)
    for index, block in enumerate(towers[0].blocks):
        blocks_of(towers[0])[index] = checkpoint_wrapper(block, CheckpointImpl.NO_REENTRANT)
    handle = patchselect.apply(head.model.eval(), 0.5, LAYERS)
    assert [tower.module for tower in handle.towers] == [tower.module for tower in towers]
    assert list(map(type, blocks_of(towers[0]))) == [type(checkpoint_wrapper(nn.Identity()))] * 6
    assert all(map(torch.equal, floats(head.call()), floats(plain.call())))
    handle.remove()
    assert not any("_patchselect" in vars(part) for part in head.model.modules())


@pytest.mark.parametrize("name", ["albef-retrieval", "albef-pairs", "mplug-retrieval-base"])
def test_blocks_in_another_wrapper_are_refused_by_its_name(name):
    head = build(name)
    towers = head.towers()
    for index, block in enumerate(towers[0].blocks):
        blocks_of(towers[0])[index] = Wrapped(block)
    classes = [type(part) for part in head.model.modules()]
    with pytest.raises(ValueError, match=r"wrapped in .*test_albef_stack\.Wrapped, .*apply first and wrap after it"):
        patchselect.apply(head.model, 0.5, LAYERS)
    assert [type(part) for part in head.model.modules()] == classes
