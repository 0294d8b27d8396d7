"""DDP and FSDP2: two processes have the gradients of one, and weights in shards are read whole."""

from __future__ import annotations

import pytest
import torch
import torch.multiprocessing as mp
from hosts import build, ids, texts
from processes import leave_group
from since import missing, since, slow
from torch import nn

import patchselect


class Embeds(nn.Module):
    """A tensor, not an object around it: DDP of torch 1.13 reduces no gradient through the outputs of CLIP 4.8."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs).image_embeds


def _distributed(rank: int, world: int, path: str, kind: str, relevance: str, merge: float) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    reference, case = build("clip"), build("clip")
    for one in (reference.model, case.model):  # fully_shard takes no scalar parameters
        one.logit_scale = nn.Parameter(one.logit_scale.detach().view(1))
    images, tokens = case.images(4), ids(4)

    def loss(model, rows):
        embeds = model(input_ids=tokens[rows], pixel_values=images[rows])
        return embeds.square().sum(dim=1).mul(torch.arange(1.0, 5.0)[rows]).mean() + embeds.sum(dim=1).mean()

    patchselect.apply(reference.model, 0.5, relevance=relevance, merge=merge, pairing="paired")
    sum(loss(Embeds(reference.model), slice(2 * r, 2 * r + 2)) for r in range(world)).div(world).backward()
    mine = slice(2 * rank, 2 * rank + 2)
    patchselect.apply(case.model, 0.5, relevance=relevance, merge=merge, pairing="paired")
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(Embeds(case.model), find_unused_parameters=True)
    else:
        from torch.distributed.fsdp import fully_shard

        model = case.model
        mesh = dist.init_device_mesh("cpu", (world,))
        for block in (*model.vision_model.encoder.layers, *model.text_model.encoder.layers):
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    found = loss(model if kind == "ddp" else Embeds(model), mine)
    averages = kind == "ddp" or missing("averages of FSDP2") is None
    (found if averages else found / world).backward()
    expected = dict(reference.model.named_parameters())
    for name, parameter in case.model.named_parameters():
        gradient = parameter.grad
        if expected[name].grad is None:
            continue
        assert gradient is not None, name
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        torch.testing.assert_close(whole, expected[name].grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    patchselect.remove(case.model)
    assert not any(hasattr(type(part), "_patchselect_base") for part in case.model.modules())
    leave_group()


@pytest.mark.parametrize(
    ("relevance", "merge"), [("keys", 0.0), pytest.param("values", 0.0, marks=slow), ("values", 0.5)]
)
@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp2", marks=since("FSDP2"))])
def test_two_processes_have_the_gradients_of_one(tmp_path, kind, relevance, merge):
    build("clip")
    mp.spawn(_distributed, args=(2, str(tmp_path / "store"), kind, relevance, merge), nprocs=2)


def _sharded_pool(rank: int, path: str) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=1)
    case = build("open_clip_siglip")
    patchselect.apply(case.model, 0.5, relevance="values")
    text, found = torch.randn(2, case.text_width), []
    for shard in (False, True):
        if shard:
            mesh = dist.init_device_mesh("cpu", (1,))
            for part in (*case.tower(case.model).blocks, case.tower(case.model).attn_pool, case.model.visual):
                fully_shard(part, mesh=mesh)
        with torch.no_grad(), patchselect.guide(case.model, text):
            found.append(case.image_side(case.model, case.images(2)))
    torch.testing.assert_close(*found)
    leave_group()


@since("FSDP2")
def test_text_is_read_back_through_a_pool_in_shards(tmp_path):
    build("open_clip_siglip")
    mp.spawn(_sharded_pool, args=(str(tmp_path / "store"),), nprocs=1)


def _hooked_shards(rank: int, path: str) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=1)
    mesh = dist.init_device_mesh("cpu", (1,))
    for relevance, bends in (("values", False), ("values", True), ("keys", True)):
        found = []
        for shard in (False, True):
            case = build("clip")
            handle = patchselect.apply(case.model, 0.5, layers=[1, 3], relevance=relevance)
            tower, text = case.model.vision_model, texts(case, 2)
            for block in tower.encoder.layers:
                for layer in (block.self_attn.k_proj, block.self_attn.v_proj):
                    layer.register_forward_hook(lambda module, args, out: 1.5 * out + 1 if bends else None)  # noqa: B023
            if shard:
                for block in tower.encoder.layers:
                    fully_shard(block, mesh=mesh)
                fully_shard(tower, mesh=mesh)
            with torch.no_grad(), handle.record() as trace, patchselect.guide(case.model, text):
                if shard and bends and relevance == "values":
                    with pytest.raises(TypeError, match="changes what Linear returns, whose weights are in shards"):
                        tower(case.images(2))
                else:
                    tower(case.images(2))
                    found.append(trace[0].relevance)
        torch.testing.assert_close(found[0], found[-1])
    leave_group()


@slow
@since("FSDP2")
def test_hooks_on_sharded_layers_are_noticed(tmp_path):
    build("clip")
    mp.spawn(_hooked_shards, args=(str(tmp_path / "store"),), nprocs=1)
