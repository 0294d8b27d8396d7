"""Whole towers of several hosts that merge, then select, against a float64 computation of the equations."""

from __future__ import annotations

import pytest
import torch
from hosts import build, texts
from since import needs
from torch import Tensor
from towers_by_hand import TIMM, Names, Reference, erf_gelu, through_the_blocks

import patchselect
from patchselect.wiring.towers import find_towers


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
OF_RELEASE = {"vit": "plain layers", "dinov2_registers": "plain layers"}
"""Hosts whose parts have these names in some releases alone."""
NAMES = {
    "clip": Names(
        "vision_model.encoder.layers.{}.", ("layer_norm1", "layer_norm2"), 4, "self_attn.out_proj",
        ("mlp.fc1", "mlp.fc2"), lambda x: x * torch.sigmoid(1.702 * x),
        apart=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), lift="visual_projection.weight",
        post="vision_model.post_layernorm.weight",
    ),
    "open_clip": Names(
        "visual.transformer.resblocks.{}.", ("ln_1", "ln_2"), 4, "attn.out_proj", ("mlp.c_fc", "mlp.c_proj"),
        erf_gelu, "attn.in_proj_", lift="visual.proj", post="visual.ln_post.weight",
    ),
    "albef": Names(
        "eyes.blocks.{}.", ("norm1", "norm2"), 4, "attn.proj", ("mlp.up", "mlp.down"), erf_gelu, "attn.qkv."
    ),
    "timm_class_token": TIMM,
    "vit": Names(
        "layers.{}.", ("layernorm_before", "layernorm_after"), 4, "attention.o_proj", ("mlp.fc1", "mlp.fc2"), erf_gelu,
        apart=("attention.q_proj", "attention.k_proj", "attention.v_proj"), post="layernorm.weight", eps=1e-12,
    ),
    "dinov2_registers": Names(
        "encoder.layer.{}.", ("norm1", "norm2"), 4, "attention.o_proj", GATED, silu,
        apart=("attention.q_proj", "attention.k_proj", "attention.v_proj"), post="layernorm.weight", eps=1e-6,
        scales=("layer_scale1.lambda1", "layer_scale2.lambda1"), prefix=4,
    ),
    "dinov3": Names(
        "model.layer.{}.", ("norm1", "norm2"), 4, "attention.o_proj", GATED, erf_gelu,
        apart=("attention.q_proj", "attention.k_proj", "attention.v_proj"), post="norm.weight",
        scales=("layer_scale1.lambda1", "layer_scale2.lambda1"), prefix=4,
        rotary=lambda args, kwargs: kwargs["position_embeddings"][::-1], half=True,
    ),
    "timm_eva02": Names(
        "blocks.{}.", ("norm1", "norm2"), 4, "attn.proj", ("mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"), silu,
        apart=("attn.q_proj", "attn.k_proj", "attn.v_proj"), scales=("gamma_1", "gamma_2"), eps=1e-6,
        inner=("attn.norm", "mlp.norm"), rotary=lambda args, kwargs: kwargs["rope"].chunk(2, dim=-1),
    ),
}  # fmt: skip
SETTINGS = [
    ((3,), (0.4,), 0.5, None),
    ((3,), (0.15,), 0.9, None),
    ((4,), (0.5,), 0.3, False),
    ((2, 4), (0.5, 0.6), 0.5, None),
    ((1, 3), (0.5, 0.5), 0.0, True),
    ((5,), (0.3,), 0.5, True),
]


@pytest.mark.parametrize(("layers", "rates", "merge", "sizes"), SETTINGS)
@pytest.mark.parametrize("name", list(NAMES))
def test_whole_towers(name, layers, rates, merge, sizes):
    if name in OF_RELEASE:
        needs(OF_RELEASE[name])
    case = build(name)
    case.model.double()
    names, tower = NAMES[name], find_towers(case.model)[0]
    state = {key: value.double() for key, value in case.model.state_dict().items()}
    if names.scales is not None and names.blocks.format(0) + names.scales[0] not in state:
        names = Names(**{**vars(names), "scales": None})  # timm before LayerScale
    images, text = case.images(2).double(), texts(case, 2).double()
    for relevance in ("keys", "values") if names.post else ("keys",):
        patchselect.apply(case.model, list(rates), list(layers), relevance=relevance, merge=merge, sizes=sizes)
        came, went, *given = through_the_blocks(case, tower, images, text)
        tables = None if names.rotary is None else names.rotary(*given)
        counts = merge > 0 if sizes is None else sizes
        reference = Reference(state, names, layers, rates, merge, counts, relevance, tables)
        expected = torch.stack([reference(x, len(tower.blocks), t) for x, t in zip(came, text)])
        assert went.shape == expected.shape
        assert ((went - expected).norm() / expected.norm()).item() < 1e-8
