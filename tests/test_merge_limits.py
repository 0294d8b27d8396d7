"""Where merging ends: what cannot merge or count sizes is refused in words, and a rate of one merges nothing."""

from __future__ import annotations

import functools

import pytest
import torch
from hosts import build, texts
from hosts.calls import encode
from test_merge import RATE

import patchselect
from patchselect.wiring.towers import find_towers


def test_what_cannot_merge_is_refused():
    case = build("clip")
    for merge in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"merge must be in \[0, 1\)"):
            patchselect.apply(case.model, merge=merge)
    with pytest.raises(TypeError, match="merge must be a number"):
        patchselect.apply(case.model, merge="half")
    with pytest.raises(TypeError, match="sizes must be True, False or None"):
        patchselect.apply(case.model, sizes=1)
    with pytest.raises(ValueError, match="there is none before layers="):
        patchselect.apply(case.model, layers=[0], merge=0.5)
    patchselect.apply(case.model, RATE, [3], merge=0.5)
    with pytest.raises(ValueError, match="call CLIPVision.*, not its blocks"), patchselect.guide(
        case.model, texts(case, 2)
    ):
        find_towers(case.model)[0].blocks[1](torch.randn(2, 17, 48), None)


def test_a_host_whose_attention_cannot_count_is_refused_by_name():
    case = build("albef_tower")
    attention = case.model.blocks[4].attn
    plain = type(attention)
    attention.__class__ = type("Twice", (plain,), {"forward": lambda self, x, **kw: 2 * plain.forward(self, x, **kw)})
    with pytest.raises(ValueError, match=r"block 4 of Vit cannot count .* computes it otherwise than the block does"):
        patchselect.apply(case.model, RATE, [3], merge=0.5)
    handle = patchselect.apply(case.model, RATE, [3], merge=0.5, sizes=False)
    encode(case, case.images(2), texts(case, 2))
    handle.remove()


@pytest.mark.parametrize("name", ["clip", "siglip", "open_clip", "timm_class_token", "albef_tower", "openai_clip"])
@pytest.mark.parametrize("index", [1, 3, 5])
def test_hooks_on_an_attention_that_is_not_called_are_refused(name, index):
    """A hook that is never called would be a silent no-op, whatever it does; one elsewhere in the block is called."""
    case = build(name)
    block = find_towers(case.model)[0].blocks[index]
    attention = block.attn if hasattr(block, "attn") else block.self_attn
    seen = []
    hook = attention.register_forward_hook(lambda module, args, out: seen.append(1))
    with pytest.raises(ValueError, match=rf"cannot count sizes: the .*attn of block {index} has hooks.*sizes=False"):
        patchselect.apply(case.model, RATE, [3], merge=0.5)
    hook.remove()
    patchselect.apply(case.model, RATE, [3], merge=0.5)
    block.mlp.register_forward_hook(lambda module, args, out: seen.append(1))
    encode(case, case.images(2), texts(case, 2))
    assert seen == [1]
    hook = attention.register_forward_hook(lambda module, args, out: None)
    with pytest.raises(ValueError, match=rf"changed after.*attn of block {index} has hooks"):
        encode(case, case.images(2), texts(case, 2))
    hook.remove()
    attention.forward = attention.forward
    encode(case, case.images(2), texts(case, 2))  # that of its class
    attention.forward = functools.partial(type(attention).forward, attention)
    with pytest.raises(ValueError, match=rf"changed after.*attn of block {index} has hooks or a forward of its own"):
        encode(case, case.images(2), texts(case, 2))
    patchselect.apply(case.model, RATE, [3], merge=0.5, sizes=False)
    encode(case, case.images(2), texts(case, 2))


def test_an_exchanged_attention_is_refused_where_it_would_not_be_called():
    case = build("albef_tower")
    patchselect.apply(case.model, RATE, [3], merge=0.5)
    attention = case.model.blocks[5].attn
    plain = type(attention)
    attention.__class__ = type("Twice", (plain,), {"forward": lambda self, x, **kw: 2 * plain.forward(self, x, **kw)})
    with pytest.raises(ValueError, match=r"changed after.*the attn of block 5 is another one \(Twice\)"):
        encode(case, case.images(2), texts(case, 2))


@pytest.mark.parametrize("rates", [1.0, (1.0, 1.0), (1.0, 0.5)])
def test_nothing_merges_where_nothing_is_removed_first_and_it_is_recorded_so(rates):
    """As `keep_rate=1.0` without `merge`; a record of it was refused as one of a block alone."""
    case = build("clip")
    layers = [3] if rates == 1.0 else [2, 4]
    handle = patchselect.apply(case.model, rates, layers, merge=0.5)
    with handle.record() as trace:
        encode(case, case.images(2), texts(case, 2))
    last = 17 if rates != (1.0, 0.5) else 1 + 8 + 1
    assert [entry.num_tokens for entry in trace] == [17, last][: len(layers)]
    assert trace[0].kept.tolist() == [list(range(16))] * 2
