"""What `values` reads the patches with is computed once in a `guide` block, and anew where weights or text change."""

from __future__ import annotations

import pytest
import torch
from kept_directions import FIRST, WIDTH, block_of, clip_that_selects, counted, fresh, one_text, relevances, same
from stand_ins import images
from torch import nn

import patchselect

model = pytest.fixture(clip_that_selects)
text = pytest.fixture(one_text)
made = pytest.fixture(counted)


@pytest.mark.parametrize("pairing, texts", [("paired", 1), ("shared", 1), ("shared", 3), ("all", 3)])
@pytest.mark.parametrize("inference", [False, True])
def test_once_per_block(model, made, pairing, texts, inference):
    text = torch.randn(texts, WIDTH)
    wanted = fresh(model, text, images(2), pairing), fresh(model, text, images(4)[2:], pairing)
    made.clear()
    with patchselect.guide(model, text, pairing), torch.inference_mode(inference):
        found = relevances(model, images(2)), relevances(model, images(4)[2:])
        assert made == [FIRST]
    assert all(map(same, found, wanted))
    with patchselect.guide(model, text, pairing):
        relevances(model, images(2))
    assert made == [FIRST] * 2


def test_all_images_after_those_of_another_mode(model, text, made):
    with patchselect.guide(model, text):
        with torch.inference_mode():
            model.encode_image(images(2))
        found = relevances(model, images(2))
        with torch.autocast("cpu", torch.bfloat16):
            model.encode_image(images(2).bfloat16().float())
        image = images(2).requires_grad_()
        model.encode_image(image).sum().backward()
    assert same(found, fresh(model, text, images(2)))
    assert image.grad.abs().sum() > 0
    assert made[:1] == [FIRST] and len(made) > 2, "with gradients it is computed anew"


def add_in_place(model):
    with torch.no_grad():
        block_of(model).attn.out_proj.weight[3, 5] += 9


def add_in_inference_mode(model):
    with torch.inference_mode():
        block_of(model).attn.in_proj_weight[-1, 0] += 9


def scale_past_autograd(model):
    block_of(model).attn.in_proj_weight.data.mul_(-2)


def zero_a_row_past_autograd(model):
    block_of(model).attn.out_proj.weight.data[:, 7] = 5


def write_by_numpy(model):
    weight = block_of(model).attn.out_proj.weight.detach().numpy()
    weight *= -3


def other_memory(model):
    weight = block_of(model).attn.out_proj.weight
    weight.data = weight.data.flip(0).clone()


def other_parameter(model):
    attention = block_of(model).attn
    attention.in_proj_weight = nn.Parameter(attention.in_proj_weight.detach().flip(0))


def other_layer(model):
    attention = block_of(model).attn
    attention.out_proj = nn.modules.linear.NonDynamicallyQuantizableLinear(*attention.out_proj.weight.shape)


def load_weights(model):
    state = {
        name: value.flip(0) if name.endswith("out_proj.weight") else value for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)


def step_of_an_optimiser(model):
    weight = block_of(model).attn.out_proj.weight
    weight.grad = torch.randn_like(weight)
    torch.optim.SGD([weight], lr=1.0).step()


def scale_a_norm(model):
    with torch.no_grad():
        block_of(model).ln_1.weight[3] *= 20


def weights_in_double(model):
    model.double()


CHANGES = [
    add_in_place, add_in_inference_mode, scale_past_autograd, zero_a_row_past_autograd, write_by_numpy, other_memory,
    other_parameter, other_layer, load_weights, step_of_an_optimiser, scale_a_norm, weights_in_double,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_weights_that_change_inside_of_the_block(model, text, change):
    image = images(2)
    with patchselect.guide(model, text):
        before = relevances(model, image)
        change(model)
        image = image.to(next(model.parameters()).dtype)
        after = relevances(model, image)
    assert not same(before, after), "or this test could not fail"
    assert same(after, fresh(model, text, image))


def test_weights_behind_the_joint_space(model, text):
    with patchselect.guide(model, text):
        before = relevances(model, images(2))
        model.visual.proj.data.mul_(torch.linspace(-1, 1, WIDTH))
        after = relevances(model, images(2))
    assert not same(before, after)
    assert same(after, fresh(model, text, images(2)))


def test_a_text_that_changes_inside_of_the_block(model, text):
    with patchselect.guide(model, text):
        before = relevances(model, images(2))
        text.detach().numpy()[:] = text.flip(1).numpy().copy()
        after = relevances(model, images(2))
    assert not same(before, after)
    assert same(after, fresh(model, text, images(2)))


def test_weights_that_are_made_anew_for_each_call_are_not_kept(model, text, made):
    """A product of parameters may get the memory of the last one, and count its versions from 0."""
    torch.nn.utils.prune.random_unstructured(block_of(model).attn.out_proj, "weight", 0.5)
    with patchselect.guide(model, text):
        first = relevances(model, images(2))
        again = relevances(model, images(2))
        block_of(model).attn.out_proj.weight_orig.data.neg_()
        changed = relevances(model, images(2))
    assert len(made) == 3
    assert same(first, again) and not same(first, changed)
    assert same(changed, fresh(model, text, images(2)))
