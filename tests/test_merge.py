"""Merge, then select: the op against a slow float64 reference, and the promises of the contract on every host."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pytest
import torch
from hosts import HOSTS, build, of_dtype, take, texts
from hosts.calls import check_rows_are_their_own, encode, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from since import loaded, needs, since
from towers_by_hand import slow_merge

import patchselect
from patchselect import functional as op
from patchselect.visualization.drawing import kept_map, relevance_map
from patchselect.weights import mean_key
from patchselect.wiring.towers import find_towers

RATE = 0.4
every_host = pytest.mark.parametrize("name", list(HOSTS))
shapes = st.fixed_dictionaries(
    dict(
        batch=st.integers(1, 3),
        patches=st.integers(1, 24),
        prefix=st.integers(0, 4),
        share=st.floats(0, 1),
        ties=st.booleans(),
        seed=st.integers(0, 10**6),
    )
)


def merging(name: str, rate: float = RATE, **options):
    """A host that merges in blocks 0 to 2, selects in block 3, and counts sizes."""
    case = build(name)
    handle = patchselect.apply(case.model, rate, options.pop("layers", [3]), merge=0.5, **options)
    return case, handle


@settings(max_examples=150, deadline=None)
@given(shapes)
def test_merging_is_bipartite_matching(case):
    generator = torch.Generator().manual_seed(case["seed"])
    length, prefix = case["prefix"] + case["patches"], case["prefix"]
    tokens = torch.randn(case["batch"], length, 5, generator=generator, dtype=torch.float64)
    keys = torch.randn(case["batch"], length, 3, generator=generator, dtype=torch.float64)
    if case["ties"]:  # few directions, each of them exact in floating point
        keys = torch.eye(3, dtype=torch.float64)[torch.randint(3, (case["batch"], length), generator=generator)]
    sizes = torch.randint(1, 6, (case["batch"], length), generator=generator).double()
    count = int(case["share"] * (case["patches"] // 2))
    found = op.merge_similar(tokens, sizes, keys, count, prefix)
    for row in range(case["batch"]):
        out, counts, into = slow_merge(tokens[row], sizes[row], keys[row], count, prefix)
        torch.testing.assert_close(found[0][row], out, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found[1][row], counts)
        assert found[2][row].tolist() == into
    assert torch.equal(found[1].sum(dim=1), sizes.sum(dim=1))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 600), st.floats(0.01, 1.0), st.floats(0.0, 0.999), st.integers(1, 12))
def test_the_schedule_is_spread_evenly_and_never_more_than_half(patches, rate, share, blocks):
    counts = op.merge_schedule(patches, rate, share, blocks)
    after = op.num_kept(patches, rate) + 1
    numerator, denominator = op.as_ratio(share)
    exact = numerator * max(0, patches - after) / denominator
    left = patches
    for index, count in enumerate(counts):
        total = round(exact)
        even = math.floor((index + 1) * total / blocks) - math.floor(index * total / blocks)
        assert count == min(even, left // 2)
        left -= count
    assert left >= min(patches, after - 1), "merging alone never goes below what the selection keeps"


def test_a_count_out_of_range_is_refused():
    tokens, sizes = torch.randn(2, 8, 4), torch.ones(2, 8)
    for count in (-1, 4):
        with pytest.raises(ValueError, match=r"num_merge must be in \[0, 3\], half of the 7 patches"):
            op.merge_similar(tokens, sizes, tokens, count)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.sampled_from([None, 0.7, "tensor"]), st.booleans(), st.integers(0, 10**6))
def test_a_key_of_size_s_counts_as_s_equal_keys(length, scale, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 2, 3, length, 6, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 5, (1, length), generator=generator)
    times = sizes[0]
    scale = torch.rand(3, 1, 1, generator=generator, dtype=torch.float64) if scale == "tensor" else scale
    mask = torch.randn(2, 1, 1, length, generator=generator, dtype=torch.float64) if masked else None
    found = op.sized_attention(query, key, value, sizes.expand(2, -1).double(), scale, mask=mask)
    logits = query @ key.repeat_interleave(times, dim=2).transpose(-1, -2) * (6**-0.5 if scale is None else scale)
    logits = logits if mask is None else logits + mask.repeat_interleave(times, dim=3)
    torch.testing.assert_close(found, logits.softmax(dim=-1) @ value.repeat_interleave(times, dim=2))


@every_host
def test_sizes_of_one_are_the_attention_of_the_host(name):
    case = build(name)
    tower = find_towers(case.model)[0]
    length = case.prefix + case.patches
    hidden = torch.randn(2, length, tower.width, generator=torch.Generator().manual_seed(0))
    hidden = hidden if tower.batch_first else hidden.transpose(0, 1)
    for block in tower.blocks:
        with torch.no_grad():
            args, kwargs = tower.adapter.sample_call(tower, block, hidden)
            own = tower.adapter.attend(tower, block, *args, **kwargs)
            found = tower.adapter.attend_sized(tower, block, torch.ones(2, length), *args, **kwargs)
            normed = own.normed if tower.batch_first else own.normed.transpose(0, 1)
            keys = mean_key(tower.adapter.projections(block), normed)
        torch.testing.assert_close(found.tokens, own.tokens, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.normed, own.normed)
        torch.testing.assert_close(found.keys, keys, rtol=1e-4, atol=1e-5)


@every_host
def test_nothing_is_added_and_nothing_is_lost(name):
    case = build(name)
    images, before = case.images(3), {key: value.clone() for key, value in case.model.state_dict().items()}
    types = {path: type(part) for path, part in case.model.named_modules()}
    reference = encode(case, images)
    handle = patchselect.apply(case.model, RATE, [3], merge=0.5)
    assert not torch.equal(encode(case, images, texts(case, 3)), reference)
    after = case.model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    handle.remove()
    assert {path: type(part) for path, part in case.model.named_modules()} == types
    assert not any("patchselect" in key for part in case.model.modules() for key in vars(part))
    assert torch.equal(encode(case, images), reference)
    handle = patchselect.apply(case.model, 1.0, merge=0.5)
    assert torch.equal(encode(case, images, texts(case, 3)), reference), "keep_rate=1.0 is bit-equal"


@every_host
@pytest.mark.parametrize("merge", [0.0, 0.5])
def test_the_tokens_after_the_selection_do_not_depend_on_merging(name, merge):
    case = build(name)
    seen: list[int] = []
    tower = find_towers(case.model)[0]
    for block in tower.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(tokens_of(tower, out).shape[1]))
    handle = patchselect.apply(case.model, RATE, [3], merge=merge, sizes=True)
    with handle.record() as trace:
        encode(case, case.images(2), texts(case, 2))
    counts = op.merge_schedule(case.patches, RATE, merge, 3)
    left = [case.prefix + case.patches - sum(counts[: i + 1]) for i in range(3)]
    after = case.prefix + op.num_kept(case.patches, RATE) + 1
    assert seen == [*left, after, after, after]
    assert [(entry.layer, entry.num_tokens) for entry in trace] == [(3, after)]
    assert merge == 0 or sum(counts) > 0


@every_host
@pytest.mark.parametrize("guidance", ["text", "image"])
def test_each_row_is_its_own(name, guidance):
    case, _ = merging(name, guidance=guidance)
    check_rows_are_their_own(case, guidance)


@every_host
def test_pairings_share_what_has_merged(name):
    case, _ = merging(name)
    images, text, runs = case.images(2), texts(case, 3), []
    hook = find_towers(case.model)[0].blocks[2].register_forward_hook(lambda *_: runs.append(1))
    every = encode(case, images, text, "all")
    assert len(runs) == 1, "merging reads no text, so it runs once for all of them"
    hook.remove()
    for image in range(2):
        for row in range(3):
            alone = encode(case, take(images, slice(image, image + 1)), text[row : row + 1])
            torch.testing.assert_close(every[3 * image + row], alone[0], rtol=1e-3, atol=1e-4)
    one = encode(case, images, text[:1], "shared")
    torch.testing.assert_close(one, encode(case, images, text[:1].repeat(2, 1)), rtol=1e-4, atol=1e-5)


@every_host
def test_copies_and_pickles_are_models_of_their_own(name):
    case, _ = merging(name)
    images, text = case.images(2), texts(case, 2)
    expected = encode(case, images, text)
    twins, buffer = [copy.deepcopy(case.model)], io.BytesIO()
    try:
        torch.save(case.model, buffer)
        twins.append(loaded(io.BytesIO(buffer.getvalue())))
    except (pickle.PicklingError, AttributeError):
        with pytest.raises((pickle.PicklingError, AttributeError)):
            pickle.dumps(build(name).model)
    for twin in twins:
        assert torch.equal(encode(case, images, text, model=twin), expected)
        patchselect.remove(twin)
        assert torch.equal(encode(case, images, text), expected)


@every_host
def test_records_know_which_patches_a_token_stands_for(name):
    case, handle = merging(name, [RATE, 0.7], layers=[3, 4])
    tower, last = handle.towers[0], []
    hook = tower.blocks[4].register_forward_hook(lambda module, args, out: last.append(tokens_of(tower, out)))
    with handle.record() as trace:
        encode(case, case.images(2), texts(case, 2))
    hook.remove()
    counts = sum(op.merge_schedule(case.patches, RATE, 0.5, 3))
    assert trace[0].relevance.shape == (2, case.patches - counts)
    for entry in trace:
        assert (entry.holders >= 0).all() and entry.grid == case.grid
        for row in range(2):
            held = entry.holders[row].tolist()
            for position, place in enumerate(entry.kept[row].tolist()):
                assert place < 0 or held[place] == position, "kept names one of the patches of its token"
            board = kept_map(entry, row).flatten()
            kept = [entry.kept[row][token] if token < entry.kept.shape[1] else -1 for token in held]
            assert board.tolist() == [place >= 0 for place in kept], "a merged token paints all of its patches"
    assert max(trace[0].members[0].bincount()) > 1, "patches have merged"
    torch.testing.assert_close(
        relevance_map(trace[0]).flatten(), trace[0].relevance[0].gather(0, trace[0].members[0]), check_stride=False
    )
    tokens = last[-1]
    dense = patchselect.restore(tokens, trace, fill="fused").flatten(1, 2)
    for row in range(2):
        for place, token in enumerate(trace[1].holders[row].tolist()):
            assert torch.equal(dense[row, place], tokens[row, case.prefix + token])


@every_host
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_training_reaches_the_tower_and_the_text(name, dtype):
    if dtype is not None and name == "mplug":
        needs("autocast over checkpoints")
    case, _ = merging(name)
    case.model.train()
    text = texts(case, 2).requires_grad_()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        with patchselect.guide(case.model, text):
            case.image_side(case.model, case.images(2)).float().square().sum().backward()
    assert text.grad is not None and text.grad.abs().sum() > 0
    for block in find_towers(case.model)[0].blocks:
        first = next(iter(block.parameters()))
        assert first.grad is not None and first.grad.isfinite().all() and first.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=since("half on CPU"))], ids=str)
@every_host
def test_half_precision(name, dtype):
    case, _ = merging(name)
    case.model.to(dtype)
    images = of_dtype(case.images(2), dtype)
    assert encode(case, images, texts(case, 2).to(dtype)).isfinite().all()
