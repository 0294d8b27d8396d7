"""Rotary towers: the places of patches follow them through every block, whatever shortened the sequence."""

from __future__ import annotations

import math

import pytest
import torch
from hosts import build, texts
from hosts.calls import Guided, encode
from hosts.of_open_clip import eva
from since import needs, since

import patchselect
from patchselect.adapters.rotary import at, turning
from patchselect.reduction import reduction_of
from patchselect.wiring.towers import find_towers

ROTARY = ("dinov3", "timm_eva02", "open_clip_perception", "perception")
rotary = pytest.mark.parametrize("name", ROTARY)


class Shuffled(patchselect.Reduction):
    """The weighted mean, with what stays in another order; `honest` says whether it tells."""

    name = "shuffled"

    def __init__(self, honest: bool) -> None:
        self.honest = honest

    def num_fused(self, num_patches, num_keep):
        return reduction_of("mean").num_fused(num_patches, num_keep)

    def reduce(self, tokens, relevance, num_keep, num_prefix_tokens, places=None):
        found = reduction_of("mean").reduce(tokens, relevance, num_keep, num_prefix_tokens)
        order = torch.randperm(num_keep, generator=torch.Generator().manual_seed(1))
        first, last = num_prefix_tokens, num_prefix_tokens + num_keep
        whole = torch.cat([torch.arange(first), first + order, torch.arange(last, found.tokens.shape[1])])
        if not self.honest:
            return found._replace(tokens=found.tokens[:, whole])
        into = torch.where(found.into < 0, found.into, whole.argsort()[found.into])
        return patchselect.reduction.Reduced(found.tokens[:, whole], found.kept[:, order], into)


@torch.no_grad()
@rotary
@pytest.mark.parametrize("merge", [0.0, 0.5])
def test_kept_patches_in_another_order_with_their_places_give_the_same_output(name, merge):
    case = build(name)
    images, text, found = case.images(2), texts(case, 2), []
    for fusion in ("mean", Shuffled(True), Shuffled(False)):
        patchselect.apply(case.model, 0.6, [2] if merge else [1, 3], fusion=fusion, relevance="keys", merge=merge)
        found.append(encode(case, images, text))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert (found[2] - found[0]).abs().max() > 20 * (found[1] - found[0]).abs().max(), "places matter in this tower"


def test_rows_of_a_table_for_what_is_left():
    table, nowhere = torch.randn(2, 3, 5, 4), torch.tensor([7.0, 8.0, 9.0, 10.0])
    places = torch.tensor([[4, -1, 0], [1, 1, 3], [-1, 2, 2], [0, 3, 4]])
    for given in (table[0, 0], table[0], table[:, :1], table):
        found = at(given, places, nowhere)
        for row, head, token in ((0, 0, 0), (0, 0, 1), (1, 0, 2), (2, 0, 0), (3, 0, 1)):
            image, place = row // 2, places[row, token]
            own = given if given.dim() == 2 else given[head] if given.dim() == 3 else given[image, head]
            assert torch.equal(found[row, head, token], nowhere if place < 0 else own[place])


@pytest.mark.parametrize("half", [False, True])
def test_turning_is_the_rotation_of_pairs(half):
    heads, angles = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.tensor([[0.3, 1.1], [0.7, 2.0]])
    pairs = ((0, 2), (1, 3)) if half else ((0, 1), (2, 3))
    wide = torch.cat([angles, angles], dim=1) if half else angles.repeat_interleave(2, dim=1)
    found = turning(wide.sin().double(), wide.cos().double(), half)(heads)
    assert torch.equal(found[:, :3], heads[:, :3]), "tokens without a place are not turned"
    for patch in range(2):
        for which, (first, second) in enumerate(pairs):
            angle = float(angles[patch, which])
            x, y = heads[:, 3 + patch, :, first], heads[:, 3 + patch, :, second]
            torch.testing.assert_close(found[:, 3 + patch, :, first], x * math.cos(angle) - y * math.sin(angle))
            torch.testing.assert_close(found[:, 3 + patch, :, second], y * math.cos(angle) + x * math.sin(angle))


@pytest.mark.parametrize(
    "options",
    [
        dict(rope_type="mixed"),
        dict(rope_type="dinov3", rope_rotate_half=True, num_reg_tokens=4, init_values=0.3),
        dict(rope_type="cat", dynamic_img_size=True, ref_feat_shape=4),
        dict(use_rot_pos_emb=False),
        dict(attn_type="rope", qk_norm=True),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@torch.no_grad()
def test_every_kind_of_eva_keeps_the_contract(options):
    needs("kinds of rotary towers")
    torch.manual_seed(0)
    case = eva(**options)
    model, images, text = case.model.eval(), case.images(3), torch.randn(3, 48)
    plain = model(images)
    patchselect.apply(model, 1.0, guidance="image")
    assert torch.equal(model(images), plain)
    for merge in (0.0, 0.5):
        handle = patchselect.apply(model, 0.5, [2] if merge else [1, 3], merge=merge)
        with handle.record() as trace:
            guided = encode(case, images, text)
        assert trace[0].num_tokens == case.prefix + 9 and guided.isfinite().all()
        order = torch.tensor([2, 0, 1])
        torch.testing.assert_close(encode(case, images[order], text[order]), guided[order], rtol=1e-4, atol=1e-5)


def test_patch_dropout_and_places():
    """Positions of patches that a host has dropped are gone before the first block: each row has its own table."""
    needs("kinds of rotary towers")
    case = eva(patch_drop_rate=0.4)
    patchselect.apply(case.model.train(), 0.5, [1, 3])
    with patchselect.guide(case.model, torch.randn(2, 48)):
        case.model(case.images(2)).sum().backward()
    assert case.model.blocks[-1].attn.qkv.weight.grad.isfinite().all()


@rotary
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_blocks_find_the_places_of_their_first_run(name, reentrant):
    from torch.utils.checkpoint import checkpoint

    gradients = []
    for checkpointed in (False, True):
        case = build(name)
        tower = find_towers(case.model)[0]
        patchselect.apply(case.model, 0.5, [1, 3], relevance="keys")
        if checkpointed:
            for block in tower.blocks:
                forward = block.forward

                def again(x, *args, forward=forward, **kwargs):
                    return checkpoint(lambda x: forward(x, *args, **kwargs), x, use_reentrant=reentrant)

                block.forward = again
        for _ in range(2):  # two calls before one backward pass
            with patchselect.guide(case.model, texts(case, 2)):
                case.image_side(case.model, case.images(2)).square().sum().backward()
        gradients.append({path: p.grad for path, p in case.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for path, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][path], gradient, rtol=1e-3, atol=1e-5)


@rotary
def test_blocks_alone_do_not_know_the_places(name):
    case = build(name)
    tower = find_towers(case.model)[0]
    patchselect.apply(case.model, 0.5, [1], guidance="image")
    tokens = torch.randn(2, case.prefix + case.patches, tower.width)
    args, kwargs = tower.adapter.sample_call(tower, tower.blocks[2], tokens)
    with pytest.raises(ValueError, match="call .* not its blocks"):
        tower.blocks[2](*args, **kwargs)


@since("fullgraph")
@rotary
def test_compile_without_graph_breaks_or_recompiles(name):
    from torch._dynamo.utils import counters

    case = build(name)
    case.model.requires_grad_(False)
    patchselect.apply(case.model, 0.5, [1, 3], relevance="keys")
    program = Guided(case)
    program(case.images(3), texts(case, 3))  # PE keeps the angles of the grid of its last call
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        text = texts(case, 3, seed=seed)
        torch.testing.assert_close(compiled(case.images(3), text), program(case.images(3), text), rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_the_text_is_not_turned_and_the_keys_are():
    """What the class token looks at in its own attention is what `guidance="image"` ranks by."""
    needs("kinds of rotary towers")
    torch.manual_seed(0)
    case = eva()
    block = case.model.eval().blocks[1]
    block.attn.fused_attn = False
    maps = []
    block.attn.attn_drop.register_forward_hook(lambda module, args, out: maps.append(out))
    handle = patchselect.apply(case.model, 0.5, [1], guidance="image", relevance="keys")
    maps.clear()
    with torch.no_grad(), handle.record() as trace:
        case.model(case.images(2))
    of_class_token = maps[0][:, :, 0, 1:]
    expected = (of_class_token / of_class_token.sum(dim=-1, keepdim=True)).mean(dim=1)
    torch.testing.assert_close(trace[0].relevance, expected)
