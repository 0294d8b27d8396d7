"""Which blocks `apply` compares and in which dtype, on which device; nothing of the model is touched by it."""

from __future__ import annotations

import pytest
import torch
from doubles.albef import Vit
from doubles.lookalikes import ScaledByParameters, ShowsAttention, tower_of
from hosts import HOSTS, build, vision_transformer
from refusals import refused
from since import needs
from torch import nn

import patchselect
from patchselect.wiring import guard


@pytest.mark.parametrize("layers", [[0, 2], [3]])
def test_only_blocks_that_select_are_asked(layers):
    model = Vit().eval()
    model.blocks[1] = ScaledByParameters(32, model.blocks[1].attn.num_heads).eval()
    patchselect.apply(model, 0.5, layers=layers, guidance="image")
    refused(model, "block 1 of Vit cannot select.*Leave this block out of layers", layers=[1, 3])


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("options", [{}, {"sizes": False}])
def test_blocks_that_merge_are_asked_too(index, options):
    model = Vit().eval()
    model.blocks[index] = ScaledByParameters(32, model.blocks[index].attn.num_heads).eval()
    patchselect.apply(model, 0.5, layers=[3], guidance="image")
    refused(model, f"block {index} of Vit .*gives other numbers.*without merge", layers=[3], merge=0.5, **options)


def test_blocks_that_are_alike_are_compared_once(monkeypatch):
    asked, check = [], guard.check_halves
    monkeypatch.setattr(
        guard, "check_halves", lambda tower, index, *rest: asked.append(index) or check(tower, index, *rest)
    )

    def asked_of(model):
        asked.clear()
        patchselect.apply(model, 0.5, layers=[3], guidance="image", merge=0.5, sizes=False)
        return asked

    assert asked_of(Vit().eval()) == [0]
    for index, change in {
        1: lambda block: setattr(block.mlp, "shift", 1.0),
        2: lambda block: setattr(block.attn, "__class__", type("Attention", (type(block.attn),), {})),
        3: lambda block: setattr(block.norm1, "eps", 1e-3),
    }.items():
        model = Vit().eval()
        change(model.blocks[index])
        assert asked_of(model) == [0, index]
    model = Vit().eval()
    for index, block in enumerate(model.blocks):
        block.drop_path = nn.Dropout(0.1 + 0.01 * index)
    assert asked_of(model) == [0]


class Counted(nn.Module):
    """A hook of a user: an object that counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, module, inputs, output):
        self.calls += 1


@pytest.mark.parametrize("name", HOSTS)
def test_nothing_is_touched(name):
    case = build(name)
    case.model.train()
    counted = Counted()
    for module in list(case.model.modules()):
        module.register_forward_hook(counted.forward)
    blocks = [case.model.get_submodule(path) for path, _ in case.model.named_modules()]
    before = torch.get_rng_state(), {key: value.clone() for key, value in case.model.state_dict().items()}
    flags, attributes = [block.training for block in blocks], [set(vars(block)) for block in blocks]
    grad = torch.is_grad_enabled()
    patchselect.apply(case.model, 0.5)
    patchselect.apply(case.model, 0.5)
    patchselect.remove(case.model)
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.is_grad_enabled() is grad
    assert [block.training for block in blocks] == flags and [set(vars(block)) for block in blocks] == attributes
    state = case.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before[1].items())
    assert counted.calls == 0 and all(weight.grad is None for weight in case.model.parameters())


def test_dropout_and_stochastic_depth_are_off_for_the_comparison_alone():
    needs("average pooling")
    sizes = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=4, num_classes=0)
    model = vision_transformer()(**sizes, drop_rate=0.5, drop_path_rate=0.5).train()
    patchselect.apply(model, 0.5, guidance="image")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["clip", "open_clip", "openai_clip", "albef"])
def test_it_compares_in_the_dtype_of_the_block(name, dtype):
    if dtype is torch.float16:
        needs("half products on CPU")
    case = build(name)
    case.model.to(dtype)
    patchselect.apply(case.model, 0.5)


def test_weights_in_half_precision_beside_norms_in_full():
    """As OpenAI's `convert_weights` leaves them: tokens are in half precision, norms cast and cast back."""

    class Wide(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.float()).to(x.dtype)

    case = build("openai_clip")
    for block in case.model.visual.transformer.resblocks:
        block.bfloat16()
        for name in ("ln_1", "ln_2"):
            norm = Wide(block.attn.embed_dim)
            norm.load_state_dict(getattr(block, name).float().state_dict())
            setattr(block, name, norm)
    patchselect.apply(case.model, 0.5)


def test_on_the_meta_device_shapes_are_compared():
    needs("operators on meta")
    patchselect.apply(build("clip").model.to("meta"), 0.5)
    refused(tower_of(ShowsAttention).to("meta"), "ran where they raised")
    patchselect.apply(tower_of(ScaledByParameters).to("meta"), 0.5, guidance="image")


def test_weights_that_are_elsewhere_are_not_read():
    """ZeRO-3 leaves empty parameters behind until a layer runs, accelerate those of the meta device and a hook."""
    model = Vit().eval()
    for weight in model.blocks[1].mlp.parameters():
        weight.data = torch.empty(0)
    patchselect.apply(model, 0.5, guidance="image", layers=[1])


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_hooks_that_make_weights_run_in_the_copy(kind):
    model = Vit().eval()
    for block in model.blocks:
        getattr(nn.utils, kind)(block.mlp.up)
        block.mlp.up.weight = torch.empty(0)  # what the hook makes anew
    patchselect.apply(model, 0.5, guidance="image")
