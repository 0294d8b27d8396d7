"""torch.compile, export, ONNX, DDP, FSDP2, hidden states, packaging: the stack around a patched model."""

from __future__ import annotations

import contextlib
import itertools
import warnings

import pytest
import torch
import torch.multiprocessing as mp
from hosts import build, ids, texts
from processes import leave_group
from since import missing, since, slow
from torch import nn

import patchselect

if missing("compile") is None:
    from torch._dynamo.utils import counters

COMPILED = ["clip", "siglip", "open_clip", "timm_registers", "open_clip_siglip"]


class Guided(nn.Module):
    """A whole program: pixels and text features in, image features out."""

    def __init__(self, case):
        super().__init__()
        self.model, self.image_side = case.model, case.image_side

    def forward(self, images, text):
        with patchselect.guide(self.model, text):
            return self.image_side(self.model, images)


def ready(name, **options):
    case = build(name)
    case.model.requires_grad_(False)
    patchselect.apply(case.model, 0.5, **options)
    return case


@since("fullgraph")
@pytest.mark.parametrize(
    ("name", "relevance"),
    [("clip", "keys")]
    + [(name, "values") for name in COMPILED]
    + [pytest.param(name, "keys", marks=slow) for name in COMPILED[1:]],
)
def test_compile_without_graph_breaks_or_recompiles(name, relevance):
    case = ready(name, relevance=relevance)
    torch._dynamo.reset()
    counters.clear()
    program = Guided(case)
    inside = torch.compile(program, fullgraph=True, backend="aot_eager")
    outside = torch.compile(lambda images: case.image_side(case.model, images), fullgraph=True, backend="aot_eager")
    images = case.images(3)
    graphs = []
    for seed in range(3):
        text = torch.randn(3, case.text_width, generator=torch.Generator().manual_seed(seed))
        expected = program(images, text)
        torch.testing.assert_close(inside(images, text), expected)
        with patchselect.guide(case.model, text):
            torch.testing.assert_close(outside(images), expected)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [2, 2, 2], "a new text must not compile anything anew"


@since("fullgraph")
@pytest.mark.parametrize("name", ["clip", "open_clip"])
def test_compiled_paired_calls_take_their_text_from_the_call(name):
    case = ready(name, pairing="paired")
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(lambda images, tokens: case.pair(case.model, images, tokens), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    for seed in range(3):
        tokens = ids(3, seed)
        torch.testing.assert_close(compiled(case.images(3), tokens), case.pair(case.model, case.images(3), tokens))
    assert counters["stats"]["unique_graphs"] == 1


@since("compiled selection")
@pytest.mark.parametrize("relevance", ["keys", "values"])
@pytest.mark.parametrize("name", ["clip", "openai_clip"])
def test_plain_compile_takes_new_texts(name, relevance):
    """With graph breaks: on releases that trace no guided call whole, and on the newest."""
    case = ready(name, relevance=relevance)
    torch._dynamo.reset()
    compiled = torch.compile(lambda images: case.image_side(case.model, images), backend="aot_eager")
    images = case.images(3)
    for grad, seed in itertools.product((True, False), range(3)):
        text = torch.randn(3, case.text_width, generator=torch.Generator().manual_seed(seed))
        with torch.set_grad_enabled(grad), patchselect.guide(case.model, text):
            torch.testing.assert_close(compiled(images), case.image_side(case.model, images))


@since("compiled selection")
@pytest.mark.parametrize("name", ["clip_vision", "albef_tower"])
def test_applying_and_removing_reaches_a_model_that_was_compiled_from_it(name):
    case = build(name)
    torch._dynamo.reset()
    compiled = torch.compile(case.model, backend="aot_eager")
    images = case.images(2)
    with torch.no_grad():
        plain = case.image_side(compiled, images)
        handle = patchselect.apply(case.model, 0.5, guidance="image")
        selected = case.image_side(compiled, images)
        assert not torch.allclose(selected, plain)
        torch.testing.assert_close(selected, case.image_side(case.model, images))
        handle.remove()
        torch.testing.assert_close(case.image_side(compiled, images), plain)


@slow
def test_inductor_gives_the_same_numbers():
    case = ready("open_clip")
    torch._dynamo.reset()
    program, images, text = Guided(case), case.images(2), torch.randn(2, 24)
    torch.testing.assert_close(torch.compile(program)(images, text), program(images, text), rtol=1e-3, atol=1e-4)


@since("export")
@pytest.mark.parametrize("relevance", ["keys", "values"])
@pytest.mark.parametrize("name", ["clip", "open_clip", "timm_class_token"])
def test_export_with_a_dynamic_batch(name, relevance):
    case = ready(name, relevance=relevance)
    program, batch = Guided(case), torch.export.Dim("batch", min=2, max=64)
    example = case.images(3), torch.randn(3, case.text_width)
    exported = torch.export.export(program, example, dynamic_shapes=({0: batch}, {0: batch}))
    other = torch.randn(7, *example[0].shape[1:]), torch.randn(7, case.text_width)
    torch.testing.assert_close(exported.module()(*other), program(*other))


@since("ONNX", "onnxruntime", "onnxscript")
def test_onnx_with_a_dynamic_batch(tmp_path):
    import onnxruntime as runtime

    case = ready("clip")
    program, batch = Guided(case), torch.export.Dim("batch", min=2, max=64)
    example = case.images(3), torch.randn(3, 24)
    path = tmp_path / "guided.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            program, example, str(path), dynamo=True, input_names=["images", "text"], verbose=False,
            dynamic_shapes=({0: batch}, {0: batch}),
        )  # fmt: skip
    other = torch.randn(5, 3, 64, 64), torch.randn(5, 24)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": other[0].numpy(), "text": other[1].numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), program(*other), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("used_before", [True, False])
def test_hidden_states_have_their_true_lengths(name, used_before):
    case = build(name)
    tower, images, prefix = case.tower(case.model), case.images(2), case.prefix
    if used_before and tower(images, output_hidden_states=True).hidden_states is None:
        pytest.skip("this release of transformers reports hidden states of the whole model alone")
    patchselect.apply(case.model, 0.5, layers=[1, 3], guidance="image")
    states = tower(images, output_hidden_states=True).hidden_states
    if states is None:
        pytest.skip("this release of transformers reports hidden states of the whole model alone")
    lengths = [state.shape[1] for state in states]
    assert lengths == [prefix + n for n in (16, 16, 9, 9, 6, 6, 6)]


def test_attention_maps_have_their_true_sizes():
    case = build("clip_vision")
    config = case.model.config
    config._attn_implementation = "eager"
    model = type(case.model)(config).eval()
    patchselect.apply(model, 0.5, layers=[1, 3], guidance="image")
    maps = model(case.images(2), output_attentions=True).attentions
    assert [tuple(m.shape[-2:]) for m in maps] == [(n, n) for n in (17, 17, 10, 10, 7, 7)]


@since("other sizes of CLIP")
def test_images_of_other_sizes():
    case = build("clip")
    handle = patchselect.apply(case.model, 0.5, guidance="image")
    images = torch.randn(2, 3, 96, 48)
    with handle.record() as trace:
        case.model.get_image_features(pixel_values=images, interpolate_pos_encoding=True)
    assert trace[0].grid == (6, 3) and trace[0].num_tokens == 1 + 9 + 1


@since("fused attention", "fused CLIP")
def test_no_attention_kernel_is_replaced_and_no_square_map_is_built():
    case = ready("clip")
    text, seen = torch.randn(2, 24), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            outs = out if isinstance(out, (tuple, list)) else (out,)
            seen.append((str(function), [tuple(o.shape) for o in outs if isinstance(o, torch.Tensor)]))
            return out

    with Watch(), patchselect.guide(case.model, text):
        case.image_side(case.model, case.images(2))
    fused = [name for name, _ in seen if "scaled_dot_product" in name]
    assert len(fused) == 6, "one fused attention a block"
    squares = [(name, shape) for name, shapes in seen for shape in shapes if len(shape) > 2 and shape[-2:] == (16, 16)]
    assert not squares and not [s for _, shapes in seen for s in shapes if s[-2:] == (17, 17)]


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


@pytest.mark.parametrize("guidance", ["text", "image"])
def test_the_meta_device_gives_the_shapes(guidance):
    case = build("open_clip")
    case.model.to("meta")
    patchselect.apply(case.model, 0.5, guidance=guidance)
    images, text = case.images(2).to("meta"), torch.randn(2, 24, device="meta")
    with patchselect.guide(case.model, text) if guidance == "text" else contextlib.nullcontext():
        assert case.image_side(case.model, images).shape == (2, 24)


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
