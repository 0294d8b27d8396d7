"""What else a patched tower returns has its true sizes, and no attention kernel is replaced for it."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hosts import build
from hosts.calls import ready
from since import since

import patchselect


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


@pytest.mark.parametrize("guidance", ["text", "image"])
def test_the_meta_device_gives_the_shapes(guidance):
    case = build("open_clip")
    case.model.to("meta")
    patchselect.apply(case.model, 0.5, guidance=guidance)
    images, text = case.images(2).to("meta"), torch.randn(2, 24, device="meta")
    with patchselect.guide(case.model, text) if guidance == "text" else contextlib.nullcontext():
        assert case.image_side(case.model, images).shape == (2, 24)
