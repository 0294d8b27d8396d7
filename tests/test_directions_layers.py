"""What `values` reads the patches with is never stale, where layers get hooks, forwards or adapters meanwhile."""

from __future__ import annotations

import pytest
import torch
from kept_directions import WIDTH, counted, same
from since import needs
from torch import nn

import patchselect

made = pytest.fixture(counted)


def small_clip():
    """A tower of transformers, whose layers are modules of their own."""
    needs("projected tower")
    import transformers

    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2)
    config = transformers.CLIPVisionConfig(**small, image_size=32, patch_size=8, projection_dim=WIDTH)
    torch.manual_seed(0)
    return transformers.CLIPVisionModelWithProjection(config).eval()


def seen_by(model, image):
    with patchselect.handle_of(model).record() as trace, torch.no_grad():
        model(pixel_values=image)
    return [entry.relevance for entry in trace]


def hooked(layer, name):
    getattr(layer, name).register_forward_hook(lambda _, args, out: out * torch.linspace(-2, 2, out.shape[-1]))


def forward_of_its_own(layer, name):
    own = getattr(layer, name)
    own.forward = lambda x: torch.nn.functional.linear(x, own.weight.flip(0), own.bias)


def wrapped(layer, name):
    class Turned(nn.Linear):
        def forward(self, x):
            return super().forward(x).flip(-1)

    own = getattr(layer, name)
    turned = Turned(own.in_features, own.out_features)
    turned.load_state_dict(own.state_dict())
    setattr(layer, name, turned)


@pytest.mark.parametrize("name", ["v_proj", "out_proj"])
@pytest.mark.parametrize("change", [hooked, forward_of_its_own, wrapped], ids=lambda change: change.__name__)
def test_layers_that_change_inside_of_the_block(change, name, made):
    model = small_clip()
    patchselect.apply(model, 0.5)
    text, image = torch.randn(1, WIDTH), torch.randn(2, 3, 32, 32)
    layer = next(module for module in reversed(list(model.modules())) if hasattr(module, "v_proj"))
    with patchselect.guide(model, text):
        before = seen_by(model, image)
        assert same(before, seen_by(model, image)) and len(made) == 1, "or nothing is kept"
        change(layer, name)
        after = seen_by(model, image)
    assert not same(before, after), "or this test could not fail"
    with patchselect.guide(model, text):
        assert same(after, seen_by(model, image))


def test_lora_on_and_off(made):
    needs("peft")
    import peft

    lora = peft.LoraConfig(r=4, target_modules=["v_proj", "out_proj"], init_lora_weights=False)
    model = peft.get_peft_model(small_clip(), lora).eval()
    patchselect.apply(model, 0.5)
    text, image = torch.randn(1, WIDTH), torch.randn(2, 3, 32, 32)

    def seen():
        return seen_by(model, image)

    with patchselect.guide(model, text):
        on = seen()
        with model.disable_adapter():
            off = seen()
        again = seen()
        model.merge_adapter()
        merged = seen()
    assert same(on, again) and not same(on, off)
    for one, other in zip(on, merged):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
