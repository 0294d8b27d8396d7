"""`apply` asks whether blocks that run on a shorter sequence depend on where a token stands, or on other rows."""

from __future__ import annotations

import contextlib

import pytest
import torch
from doubles.albef import Block, Vit
from hosts import HOSTS, build
from refusals import refused
from torch import nn

import patchselect

ROWS = 4
"""Windows an image."""


class Placed(nn.Module):
    """An MLP with a vector for each place, cut to the sequence that comes."""

    def __init__(self, inner, spread):
        super().__init__()
        self.inner, self.table = inner, nn.Parameter(spread * torch.randn(17, 32))

    def forward(self, x):
        return self.inner(x) + self.table[: x.shape[1]]


class Convolved(nn.Module):
    """An MLP with a convolution over the sequence."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.conv = inner, nn.Conv1d(32, 32, 3, padding=1, groups=32)

    def forward(self, x):
        return self.inner(x) + self.conv(x.transpose(1, 2)).transpose(1, 2)


class Windowed(Block):
    """Rows are windows: this block attends over all windows of an image (RF-DETR)."""

    def forward(self, x, register_hook=False):
        whole = x.reshape(x.shape[0] // ROWS, -1, x.shape[2])
        x = x + self.attn(self.norm1(whole)).reshape(x.shape)
        return x + self.mlp(self.norm2(x))


class OfTheBatch(Block):
    """Tokens are centred over the batch."""

    def forward(self, x, register_hook=False):
        return super().forward(x - x.mean(dim=0, keepdim=True))


def changed(kind, indices, **options):
    torch.manual_seed(0)
    model = Vit().eval()
    for index in indices:
        block = model.blocks[index]
        if issubclass(kind, Block):
            block.__class__ = kind
        else:
            block.mlp = kind(block.mlp, **options)
    return model.eval()


ELSEWHERE = "makes something else of a patch where it stands elsewhere in the sequence"
KINDS = [
    (Placed, {"spread": 1.0}, ELSEWHERE),
    (Placed, {"spread": 0.0}, ELSEWHERE),  # a table that starts with zeros says nothing until it is trained
    (Convolved, {}, ELSEWHERE),
    (Windowed, {}, "could not be asked|on the same tokens in another order"),
    (OfTheBatch, {}, "beside another one in the batch"),
]


@pytest.mark.parametrize(("kind", "options", "said"), KINDS)
def test_a_block_after_the_selection(kind, options, said):
    refused(changed(kind, [4], **options), f"block 4 of Vit cannot follow a selection.*{said}", layers=[1, 3])
    refused(changed(kind, [2], **options), f"block 2 of Vit cannot follow a selection.*{said}", layers=[1, 3])
    patchselect.apply(changed(kind, [0, 2], **options), 0.5, layers=[3], guidance="image")
    patchselect.apply(changed(kind, [4], **options), 1.0, layers=[1], guidance="image")
    refused(changed(kind, [1], **options), "block 1 of Vit", layers=[3], merge=0.5)


@pytest.mark.parametrize(("kind", "options", "said"), KINDS[:3])
def test_a_block_that_selects(kind, options, said):
    """Its halves are its forward, since both are called as they are; what they compute is another question."""
    refused(changed(kind, [1], **options), f"block 1 of Vit cannot follow a selection.*{said}", layers=[1])


def test_places_of_rotary_towers_go_with_their_patches(monkeypatch):
    tried = 0
    for name in HOSTS:
        with contextlib.suppress(pytest.skip.Exception):
            case = build(name)
            tower = patchselect.wiring.towers.find_towers(case.model)[0]
            if not tower.rotary:
                continue
            tried += 1
            with monkeypatch.context() as patch:
                stays = lambda self, tower, block, places, *args, **kwargs: (args, kwargs)  # noqa: E731
                patch.setattr(type(tower.adapter), "at_places", stays)
                with pytest.raises(TypeError, match=ELSEWHERE):
                    patchselect.apply(case.model, 0.5)
    if not tried:
        pytest.skip("no host of this environment has rotary positions")
