"""Merge, then select, with what stands around a model: compile, export, ONNX, checkpoints, prefixes, pairs, budgets."""

from __future__ import annotations

import io

import pytest
import torch
from checkpointing import needs_graph, switch_on, ways
from hosts import HOSTS, build, texts
from hosts.calls import Guided, encode
from since import loaded, missing, needs, since
from test_budget import counted, guided, real_clip
from test_merge import RATE, merging

import patchselect
from patchselect import functional as op
from patchselect.budget import Cost
from patchselect.functional import as_ratio
from patchselect.wiring.towers import find_towers

if missing("compile") is None:
    from torch._dynamo.utils import counters


def program_of(name: str, **options):
    case, _ = merging(name, 0.5, **options)
    case.model.requires_grad_(False)
    return case, Guided(case)


@since("fullgraph")
@pytest.mark.parametrize("name", ["clip", "open_clip", "timm_registers"])
def test_compile_without_graph_breaks_or_recompiles(name):
    case, program = program_of(name)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        text = texts(case, 3, seed=seed)
        torch.testing.assert_close(compiled(case.images(3), text), program(case.images(3), text))
    assert counters["stats"]["unique_graphs"] == 1, "a new text must not compile anything anew"


@since("export")
@pytest.mark.parametrize("name", ["clip", "open_clip", "timm_class_token"])
def test_export_with_a_dynamic_batch(name):
    case, program = program_of(name)
    batch = torch.export.Dim("batch", min=2, max=64)
    example = case.images(3), texts(case, 3)
    exported = torch.export.export(program, example, dynamic_shapes=({0: batch}, {0: batch}))
    other = torch.randn(7, *example[0].shape[1:]), texts(case, 7)
    torch.testing.assert_close(exported.module()(*other), program(*other))


@since("ONNX", "onnxruntime", "onnxscript")
def test_onnx_with_a_dynamic_batch(tmp_path):
    import onnxruntime as runtime

    case, program = program_of("clip")
    batch, path = torch.export.Dim("batch", min=2, max=64), str(tmp_path / "guided.onnx")
    example = case.images(3), texts(case, 3)
    exported = torch.onnx.export(
        program, example, dynamic_shapes=({0: batch}, {0: batch}), dynamo=True, opset_version=18, verbose=False
    )
    exported.save(path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    other = torch.randn(5, *example[0].shape[1:]), texts(case, 5)
    names = [given.name for given in session.get_inputs()]
    found = session.run(None, {name: value.numpy() for name, value in zip(names, other)})[0]
    torch.testing.assert_close(torch.from_numpy(found), program(*other), rtol=1e-3, atol=1e-4)


def gradients(case, text, options=None) -> dict[str, torch.Tensor]:
    """Gradients of one training step, checkpointed with `options`."""
    case.model.train()
    if options is not None:
        switch_on(case.model, options)
    patchselect.apply(case.model, RATE, [3], merge=0.5)
    with patchselect.guide(case.model, text):
        case.image_side(case.model, case.images(2)).square().sum().backward()
    found = {name: p.grad for name, p in case.model.named_parameters() if p.grad is not None}
    return {**found, "text": text.grad}


@pytest.mark.parametrize("name", ["clip", "siglip", "open_clip", "timm_class_token"])
def test_checkpointed_blocks_find_the_sizes_of_their_first_run(name):
    needs_graph(name)
    for way in ways(name):
        wanted = way.carries_text
        expected = gradients(build(name), texts(build(name), 2).requires_grad_(wanted))
        found = gradients(build(name), texts(build(name), 2).requires_grad_(wanted), way.options)
        assert set(found) == set(expected)
        for key, gradient in found.items():
            torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_mplug_checkpoints_its_blocks_itself():
    found = []
    for checkpointed in (False, True):
        case, _ = merging("mplug")
        text = texts(case, 2).requires_grad_()
        with patchselect.guide(case.model, text):
            case.model.eyes.visual(case.images(2), True, use_checkpoint=checkpointed)[:, 0].square().sum().backward()
        found.append((text.grad, *(p.grad for p in find_towers(case.model)[0].blocks[0].parameters())))
    for plain, again in zip(*found):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", list(HOSTS))
def test_a_prefix_holds_what_has_merged(name):
    case, handle = merging(name, [RATE, 0.7], layers=[3, 4])
    images, text = case.images(3), texts(case, 2)
    expected = encode(case, images, text, "all")
    given = images if isinstance(images, dict) else {"pixel_values": images}
    prefix = patchselect.encode_prefix(case.model, given if name == "siglip2" else images)
    assert prefix.tokens.shape[1] == case.prefix + case.patches - sum(op.merge_schedule(case.patches, RATE, 0.5, 3))
    buffer = io.BytesIO()
    torch.save(prefix, buffer)
    prefix = loaded(io.BytesIO(buffer.getvalue()))
    stand_in = {**images, "pixel_values": prefix.images} if isinstance(images, dict) else prefix.images
    runs = []
    hook = find_towers(case.model)[0].blocks[0].mlp if hasattr(find_towers(case.model)[0].blocks[0], "mlp") else None
    # Of the three images; what tells whether a prefix still fits are a few tokens in one row.
    count = lambda _, given, out: runs.append(1) if 3 in given[0].shape[:2] else None  # noqa: E731
    hook = None if hook is None else hook.register_forward_hook(count)
    with torch.no_grad(), handle.record() as seen, patchselect.guide(case.model, text, "all", prefix):
        found = case.image_side(case.model, stand_in)
    assert not runs, "blocks before the selection do not run again"
    if hook is not None:
        hook.remove()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with handle.record() as trace:
        encode(case, images, text, "all")
    for one, other in zip(seen, trace):
        assert torch.equal(one.kept, other.kept) and torch.equal(one.holders, other.holders)
        assert torch.equal(one.members, other.members)
    patchselect.apply(case.model, [0.3, 0.7], [3, 4], merge=0.5)
    with pytest.raises(ValueError, match="how many patches merge before the first selection"):
        patchselect.guide(case.model, text, prefix=prefix)


@pytest.mark.parametrize("name", ["clip", "siglip", "open_clip", "albef"])
def test_pairs_are_scored_as_one_by_one(name):
    case, _ = merging(name)
    images, text = case.images(3), texts(case, 4)
    if name == "albef":  # its heads score token ids
        rows = encode(case, images, text, "all")
        assert torch.equal(rows, encode(case, images, text, "all"))
        return
    scores = patchselect.score_pairs(case.model, images, text, progress=False)
    for row in range(4):
        found = encode(case, images, text[row : row + 1].repeat(3, 1))
        alone = torch.nn.functional.cosine_similarity(found, text[row : row + 1])
        torch.testing.assert_close(scores[:, row], alone, rtol=1e-3, atol=1e-4)


@since("counting")
@pytest.mark.parametrize("name", list(HOSTS))
def test_the_arithmetic_is_what_a_counter_counts(name):
    case, handle = merging(name)
    case.model.requires_grad_(False)
    expected = counted(lambda: guided(case, case.images(1)))
    found = Cost.of(handle.towers[0], handle.plan).of_encoder(case.patches, [3], [as_ratio(RATE)], 0.5)
    assert found == pytest.approx(expected, rel=0.01)


@since("counting")
@pytest.mark.parametrize(
    ("budget", "after"), [(0.769, 135), (0.632, 99), (0.516, 68)], ids=["two thirds", "a half", "a third"]
)
def test_a_budget_is_met_with_as_many_tokens_as_the_equations_say(budget, after):
    model = real_clip()
    patchselect.remove(model)
    rate = patchselect.keep_rate_for_budget(model, budget, merge=0.5)
    assert op.num_kept(196, rate) + 1 == after
    tower = find_towers(model)[0]
    handle = patchselect.apply(model, rate, merge=0.5)
    assert handle.layers == (4,)
    assert patchselect.keep_rate_for_budget(model, budget) == rate, "a patched model answers for itself"
    cost = Cost.of(tower, handle.plan)
    spent = cost.of_encoder(196, [4], [as_ratio(rate)], 0.5)
    assert spent <= budget * cost.of_encoder(196)
    patchselect.remove(model)


@pytest.mark.parametrize("name", ["clip", "open_clip"])
def test_outputs_that_nobody_reads_are_skipped_with_sizes_too(name):
    case, _ = merging(name)
    images, text = case.images(2), texts(case, 2)
    expected = encode(case, images, text)
    patchselect.skip_unread_outputs(case.model)
    torch.testing.assert_close(encode(case, images, text), expected, rtol=1e-4, atol=1e-5)


def test_the_meta_device_gives_the_shapes():
    needs("function transforms")  # torch 1.10 has no convolution on meta
    case = build("clip")
    case.model.to("meta")
    patchselect.apply(case.model, RATE, [3], merge=0.5)
    with patchselect.guide(case.model, torch.empty(2, 24, device="meta")):
        assert case.image_side(case.model, torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 24)


@pytest.mark.parametrize("guidance", ["text", "image"])
def test_vilt_merges_behind_the_text_and_its_mask(guidance):
    needs("ViLT")
    import transformers

    torch.manual_seed(0)
    sizes = dict(hidden_size=48, num_hidden_layers=6, num_attention_heads=4, intermediate_size=64)
    config = transformers.ViltConfig(**sizes, image_size=64, patch_size=16, vocab_size=99, max_image_length=-1)
    model = transformers.ViltModel(config).eval()
    ids, mask = torch.randint(3, 99, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    other = ids.clone()
    other[1, 5:] = 98
    pixels, found = torch.randn(2, 3, 64, 64), []
    handle = patchselect.apply(model, RATE, [3], guidance, merge=0.5)
    for given in (ids, other):
        torch.manual_seed(1)  # ViLT shuffles its patches
        with torch.no_grad(), handle.record() as trace:
            tokens = model(input_ids=given, attention_mask=mask, pixel_values=pixels).last_hidden_state
        found.append(tokens[1, :5])
        assert tokens.shape[1] == trace[0].num_tokens == 7 + 1 + op.num_kept(16, RATE) + 1
        assert (trace[0].holders >= 0).all() and max(trace[0].members[0].bincount()) > 1
    torch.testing.assert_close(found[0], found[1])
