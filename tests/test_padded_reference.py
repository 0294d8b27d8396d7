"""Padded batches of mixed sizes against an independent float64 computation, image by image, that never sees padding.

The reference is that of towers_by_hand.py: it reads tensors of the state dict, the tokens that come to the first
block (patches and their positions) and, of a rotary tower, the sines and cosines of each place.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hosts import Case, build, texts
from hosts.of_open_clip import naflex, patches_of
from test_padded import SHAPES, batch
from torch import Tensor
from towers_by_hand import TIMM, Names, Reference, erf_gelu, through_the_blocks

import patchselect
from patchselect.wiring.towers import find_towers


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


SIGLIP2 = Names(
    "vision_model.encoder.layers.{}.", ("layer_norm1", "layer_norm2"), 4, "self_attn.out_proj", ("mlp.fc1", "mlp.fc2"),
    tanh_gelu, apart=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), eps=1e-6, prefix=0,
    post="vision_model.post_layernorm.weight",
    pool=lambda w: w["vision_model.head.attention.out_proj.weight"]
    @ w["vision_model.head.attention.in_proj_weight"].chunk(3)[2],
)  # fmt: skip
NAFLEX = dataclasses.replace(
    TIMM, post="norm.weight", pool=lambda w: w["attn_pool.proj.weight"] @ w["attn_pool.kv.weight"].chunk(2)[1]
)
ROTARY = Names(
    "blocks.{}.", ("norm1", "norm2"), 4, "attn.proj", ("mlp.fc1", "mlp.fc2"), erf_gelu, "attn.qkv.", eps=1e-6,
    scales=("gamma_1", "gamma_2"), post="norm.weight", half=True,
    rotary=lambda args, kwargs: kwargs["rope"].chunk(2, dim=-1),
)  # fmt: skip
TOWERS = {"siglip2": SIGLIP2, "timm_naflex": NAFLEX, "rotary": ROTARY}


def made(name: str) -> Case:
    if name != "rotary":
        return build(name)
    torch.manual_seed(0)
    case = naflex(
        class_token=True, global_pool="token", rope_type="dinov3", rope_rotate_half=True, init_values=0.3,
        pos_embed_grid_size=(4, 4),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in case.model.eval().parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return case


@pytest.mark.parametrize(("layers", "rates"), [((1, 3), (0.5, 0.7)), ((2,), (0.4,)), ((0, 4, 5), (0.9, 0.6, 0.3))])
@pytest.mark.parametrize("name", list(TOWERS))
def test_whole_towers(name, layers, rates):
    case, names = made(name), TOWERS[name]
    case.model.double()
    tower, text = find_towers(case.model)[0], texts(case, len(SHAPES)).double()
    state = {key: value.double() for key, value in case.model.state_dict().items()}
    images = {key: value.double() if value.is_floating_point() else value for key, value in batch(case).items()}
    for relevance in ("keys", "values"):
        patchselect.apply(case.model, list(rates), list(layers), relevance=relevance)
        came, went, *given = through_the_blocks(case, tower, images, text)
        assert came.shape[1] > case.prefix + max(height * width for height, width in SHAPES), "there is padding"
        for row, (height, width) in enumerate(SHAPES):
            tables = None if names.rotary is None else tuple(table[row, 0] for table in names.rotary(*given))
            reference = Reference(state, names, layers, rates, 0.0, False, relevance, tables)
            expected = reference(came[row, : case.prefix + height * width], len(tower.blocks), text[row])
            found = went[row, : len(expected)]
            assert ((found - expected).norm() / expected.norm()).item() < 1e-8


def test_padding_and_positions_are_what_the_batch_says():
    """What comes to the first block of a padded batch is what comes to it of each image alone."""
    case = made("timm_naflex")
    case.model.double()
    patchselect.apply(case.model, 0.5, [1])
    tower, text = find_towers(case.model)[0], texts(case, len(SHAPES)).double()
    images = patches_of(SHAPES, 17)
    images["patches"] = images["patches"].double()
    together = through_the_blocks(case, tower, images, text)[0]
    for row, (height, width) in enumerate(SHAPES):
        alone = {key: value[row : row + 1, : height * width] for key, value in images.items()}
        own = through_the_blocks(case, tower, alone, text[row : row + 1])[0]
        torch.testing.assert_close(together[row, : own.shape[1]], own[0], rtol=1e-12, atol=1e-12)
