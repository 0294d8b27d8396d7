"""The op against a slow, obvious float64 reference, over random shapes, rates, prefixes and ties."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import patchselect
from patchselect import functional as op

shapes = st.fixed_dictionaries(
    dict(
        batch=st.integers(1, 4),
        patches=st.integers(1, 30),
        prefix=st.integers(0, 5),
        width=st.sampled_from([4, 8, 12]),
        rate=st.floats(0.01, 1.0),
        fusion=st.sampled_from(["mean", "sum", "none"]),
        ties=st.booleans(),
        seed=st.integers(0, 10**6),
    )
)


def draw(case):
    generator = torch.Generator().manual_seed(case["seed"])
    size = (case["batch"], case["prefix"] + case["patches"], case["width"])
    tokens = torch.randn(size, generator=generator, dtype=torch.float64)
    scores = torch.randn(case["batch"], case["patches"], generator=generator, dtype=torch.float64)
    if case["ties"]:
        scores = scores.round()
    return tokens, scores.softmax(dim=-1)


def slow_select(tokens, relevance, keep, prefix, fusion):
    rows, kept_rows = [], []
    for row, weights in zip(tokens, relevance):
        ranked = sorted(range(len(weights)), key=lambda i: (-float(weights[i]), i))
        kept, rest = sorted(ranked[:keep]), sorted(ranked[keep:])
        out = [row[i] for i in range(prefix)] + [row[prefix + i] for i in kept]
        if rest and fusion != "none":
            total = sum(float(weights[i]) for i in rest)
            scale = 1.0 if fusion == "sum" else total
            out.append(sum(float(weights[i]) / scale * row[prefix + i] for i in rest))
        rows.append(torch.stack(out))
        kept_rows.append(kept)
    return torch.stack(rows), torch.tensor(kept_rows)


@settings(max_examples=150, deadline=None)
@given(shapes)
def test_keep_and_fuse(case):
    tokens, relevance = draw(case)
    keep = op.num_kept(case["patches"], case["rate"])
    out, kept = op.keep_and_fuse(tokens, relevance, keep, case["prefix"], case["fusion"])
    expected, expected_kept = slow_select(tokens, relevance, keep, case["prefix"], case["fusion"])
    assert torch.equal(kept, expected_kept)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert out.shape[1] == op.num_tokens_after(case["patches"], case["rate"], case["prefix"], case["fusion"])


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_kept_and_fused_weights_account_for_every_patch(case):
    """With one-hot tokens the output shows how much of each patch is in each token."""
    _, relevance = draw(case)
    patches = case["patches"]
    tokens = torch.eye(patches, dtype=torch.float64).expand(case["batch"], -1, -1)
    keep = op.num_kept(patches, case["rate"])
    out, kept = op.keep_and_fuse(tokens, relevance, keep, 0, "sum")
    share = out.sum(dim=1)
    expected = relevance.scatter(1, kept, 1.0)
    torch.testing.assert_close(share, expected)
    if keep < patches:
        mean, _ = op.keep_and_fuse(tokens, relevance, keep, 0, "mean")
        torch.testing.assert_close(mean[:, -1].sum(dim=-1), torch.ones(case["batch"], dtype=torch.float64))


@settings(max_examples=60, deadline=None)
@given(shapes, st.randoms(use_true_random=False))
def test_permuting_the_patches_permutes_the_choice(case, random):
    tokens, relevance = draw({**case, "ties": False})
    order = list(range(case["patches"]))
    random.shuffle(order)
    prefix, keep = case["prefix"], op.num_kept(case["patches"], case["rate"])
    moved = torch.cat([tokens[:, :prefix], tokens[:, prefix:][:, order]], dim=1)
    out, kept = op.keep_and_fuse(tokens, relevance, keep, prefix, case["fusion"])
    out_moved, kept_moved = op.keep_and_fuse(moved, relevance[:, order], keep, prefix, case["fusion"])
    back = torch.tensor(order)[kept_moved]
    assert torch.equal(back.sort(dim=1).values, kept)
    torch.testing.assert_close(out_moved[:, :prefix], out[:, :prefix])
    torch.testing.assert_close(out_moved[:, prefix + keep :], out[:, prefix + keep :])


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 1024), st.fractions(Fraction(1, 1000), 1, max_denominator=1000))
def test_num_kept_reads_the_rate_that_was_meant(patches, rate):
    assert op.num_kept(patches, float(rate)) == max(1, math.ceil(rate * patches))


def test_num_kept_of_float_dust():
    assert op.num_kept(30, 0.1) == 3
    assert op.num_kept(196, 0.7) == 138
    assert op.num_kept(6, 5 / 6) == 5
    assert op.num_kept(10, 0.1 + 0.2) == 3
    assert op.num_kept(5, 1e-9) == 1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 4), st.integers(2, 9))
def test_folded_key_relevance_is_attention(seed, batch, texts, patches):
    """`softmax(q k / sqrt(e))` per head with real keys and their bias, then the mean over the heads."""
    generator = torch.Generator().manual_seed(seed)
    width, heads = 12, 3
    query, x = (torch.randn(batch, n, width, generator=generator, dtype=torch.float64) for n in (texts, patches))
    weight = torch.randn(width, width, generator=generator, dtype=torch.float64)
    bias = torch.randn(width, generator=generator, dtype=torch.float64)
    keys = x @ weight.T + bias
    expected = torch.zeros(batch, texts, patches, dtype=torch.float64)
    for head in range(heads):
        part = slice(4 * head, 4 * head + 4)
        expected += (query[..., part] @ keys[..., part].transpose(-2, -1) / 2.0).softmax(dim=-1) / heads
    torch.testing.assert_close(op.key_relevance(query, x, weight, heads), expected)
    real = op.real_key_relevance(query.unflatten(-1, (heads, 4)), keys.unflatten(-1, (heads, 4)), 0.5)
    torch.testing.assert_close(real, expected)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_normalised_scores_are_those_of_a_layer_norm(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 7, 16, generator=generator, dtype=torch.float64) * 3 + 1
    v = torch.randn(2, 3, 16, generator=generator, dtype=torch.float64)
    expected = v @ torch.nn.functional.layer_norm(x, (16,), eps=1e-5).transpose(-2, -1)
    torch.testing.assert_close(op.normalised_scores(v, x, 1e-5), expected)


def test_normalised_scores_of_nearly_constant_patches_are_finite():
    x = torch.full((1, 64, 512), 300.0) + torch.randn(1, 64, 512, generator=torch.Generator().manual_seed(0)) * 1e-4
    assert op.normalised_scores(torch.randn(1, 1, 512), x, 1e-6).isfinite().all()


@pytest.mark.parametrize("fusion", ["mean", "sum", "none"])
@pytest.mark.parametrize("unknown", [slice(None), 2], ids=["all", "one"])
def test_a_relevance_that_is_not_a_number_shows_in_its_row_alone(fusion, unknown):
    tokens, relevance = torch.randn(2, 7, 4), torch.rand(2, 6).softmax(dim=-1)
    expected, _ = op.keep_and_fuse(tokens, relevance, 3, 1, fusion)
    relevance[1, unknown] = float("nan")
    out, _ = op.keep_and_fuse(tokens, relevance, 3, 1, fusion)
    assert torch.equal(out[0], expected[0]) and out[1].isnan().any()


def test_standardise():
    scores = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]], dtype=torch.float64)
    out = op.standardise(scores)
    torch.testing.assert_close(out[0], (scores[0] - 3.0) / math.sqrt(14 / 3))
    assert torch.equal(out[1], torch.zeros(3, dtype=torch.float64))
    same = torch.full((1, 5), 0.1).requires_grad_()
    op.standardise(same).softmax(dim=-1)[0, 0].backward()
    assert same.grad is not None and same.grad.isfinite().all()


def test_shared_texts_take_the_patch_that_one_of_them_needs():
    attention = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]])
    torch.testing.assert_close(op.combine_attention(attention), torch.tensor([[0.7, 0.2, 0.8]]) / 1.7)
    scores = torch.tensor([[[9.0, 0.0, 0.0], [0.0, 0.0, 9.0]]])
    weights = op.combine_scores(scores)
    assert weights[0, 0] == weights[0, 2] > weights[0, 1]


def test_fusing_patches_without_any_weight_is_their_mean():
    tokens = torch.arange(8.0).view(1, 4, 2)
    out, _ = op.keep_and_fuse(tokens, torch.tensor([[1.0, 0.0, 0.0, 0.0]]), 1, 0, "mean")
    torch.testing.assert_close(out[0, 1], tokens[0, 1:].mean(dim=0))


def test_top_k_passes_no_gradient_but_the_fused_weights_do():
    tokens = torch.randn(1, 5, 4)
    relevance = torch.rand(1, 5).requires_grad_()
    out, _ = op.keep_and_fuse(tokens, relevance, 2, 0, "none")
    assert not out.requires_grad
    out, kept = op.keep_and_fuse(tokens, relevance, 2, 0, "sum")
    out.sum().backward()
    assert relevance.grad is not None
    assert (relevance.grad.gather(1, kept) == 0).all() and (relevance.grad != 0).sum() == 3


def test_the_module_is_the_op():
    layer = patchselect.PatchSelection(0.5, "mean", num_prefix_tokens=1)
    assert not list(layer.parameters()) and not list(layer.buffers()) and not layer.state_dict()
    tokens, relevance = torch.randn(2, 9, 4), torch.rand(2, 8)
    out, kept = layer(tokens, relevance)
    expected, expected_kept = op.keep_and_fuse(tokens, relevance, 4, 1, "mean")
    assert torch.equal(out, expected) and torch.equal(kept, expected_kept)
    whole, every = patchselect.PatchSelection(1.0)(tokens, relevance)
    assert whole is tokens and every.tolist() == [list(range(8))] * 2
    with pytest.raises(ValueError, match=r"need \(2, 8\), got \(2, 9\)"):
        layer(tokens, torch.rand(2, 9))
    with pytest.raises(ValueError, match=r"tokens must be \(B, .*got \(9,\)"):
        layer(tokens[0, :, 0], relevance)
    with pytest.raises(ValueError, match="weights of 0 or more, got -1"):
        layer(tokens, relevance - relevance.amin() - 1)
    for wrong in (dict(keep_rate=0), dict(fusion="max"), dict(num_prefix_tokens=-1)):
        with pytest.raises(ValueError):
            patchselect.PatchSelection(**wrong)
