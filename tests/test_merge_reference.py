"""Whole towers of four hosts that merge, then select, against an independent float64 computation of the equations.

The reference loops over images, heads and patches, and reads nothing of the library; of the host it reads tensors of
the state dict, and the tokens that come to the first block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable

import pytest
import torch
from hosts import build, texts
from test_merge import slow_merge
from test_promises import tokens_of
from torch import Tensor

import patchselect
from patchselect.wiring.towers import find_towers


@dataclass
class Names:
    """Where the weights of a host are, in its state dict; `{}` is the block."""

    blocks: str
    norms: tuple[str, str]
    heads: int
    out: str
    mlp: tuple[str, str]
    activation: Callable[[Tensor], Tensor]
    fused: str | None = None
    """Weight and bias of queries, keys and values in one."""
    apart: tuple[str, str, str] | None = None
    scales: tuple[str, str] | None = None
    """LayerScale of both branches."""
    lift: str | None = None
    """The visual projection, `(joint, width)` if it ends in `.weight`, else `(width, joint)`."""
    post: str | None = None
    eps: float = 1e-5


def erf_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


TIMM = Names(
    "blocks.{}.", ("norm1", "norm2"), 4, "attn.proj", ("mlp.fc1", "mlp.fc2"), erf_gelu, "attn.qkv.",
    scales=("ls1.gamma", "ls2.gamma"), eps=1e-6,
)  # fmt: skip
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
}  # fmt: skip


class Reference:
    """The blocks of one tower, one image at a time."""

    def __init__(self, state, names: Names, layers, rates, merge, sizes, relevance) -> None:
        self.w, self.names = state, names
        self.layers, self.rates, self.merge, self.counts, self.relevance = layers, rates, merge, sizes, relevance

    def get(self, index: int, name: str) -> Tensor:
        return self.w[self.names.blocks.format(index) + name]

    def linear(self, x: Tensor, index: int, name: str) -> Tensor:
        return x @ self.get(index, f"{name}.weight").T + self.get(index, f"{name}.bias")

    def norm(self, x: Tensor, index: int, which: int) -> Tensor:
        return self.plain(x) * self.get(index, f"{self.names.norms[which]}.weight") + self.get(
            index, f"{self.names.norms[which]}.bias"
        )

    def plain(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + self.names.eps).sqrt()

    def parts(self, index: int) -> list[tuple[Tensor, Tensor]]:
        names = self.names
        if names.apart is not None:
            return [(self.get(index, f"{n}.weight"), self.get(index, f"{n}.bias")) for n in names.apart]
        weight, bias = self.get(index, f"{names.fused}weight"), self.get(index, f"{names.fused}bias")
        return list(zip(weight.chunk(3), bias.chunk(3)))

    def scaled(self, branch: Tensor, index: int, which: int) -> Tensor:
        return branch if self.names.scales is None else branch * self.get(index, self.names.scales[which])

    def __call__(self, x: Tensor, depth: int, text: Tensor) -> Tensor:
        """Return what the last block gives for the tokens `(1 + n, D)` of one image."""
        patches, first = len(x) - 1, self.layers[0]
        after = math.ceil(self.rates[0] * patches - 1e-9) + 1
        removed = round(self.merge * (patches - after))
        sizes, reduced = torch.ones(len(x), dtype=x.dtype), False
        for index in range(depth):
            before, seen = x, self.norm(x, index, 0)
            keys = seen @ self.parts(index)[1][0].T + self.parts(index)[1][1]
            x = x + self.scaled(self.attention(seen, index, sizes if reduced and self.counts else None), index, 0)
            if index < first:
                count = math.floor((index + 1) * removed / first) - math.floor(index * removed / first)
                mean = torch.stack(list(keys.chunk(self.names.heads, dim=1))).mean(0)
                x, sizes, _ = slow_merge(x, sizes, mean, min(count, (len(x) - 1) // 2), 1)
                reduced = reduced or count > 0
            elif index in self.layers:
                whole = patches if index == first else len(x) - 1
                keep = math.ceil(self.rates[self.layers.index(index)] * whole - 1e-9)
                x, sizes = self.select(x, before, seen, sizes, keep, index, text, depth)
                reduced = True
            hidden = self.linear(self.norm(x, index, 1), index, self.names.mlp[0])
            x = x + self.scaled(self.linear(self.names.activation(hidden), index, self.names.mlp[1]), index, 1)
        return x

    def attention(self, x: Tensor, index: int, sizes: Tensor | None) -> Tensor:
        q, k, v = (x @ weight.T + bias for weight, bias in self.parts(index))
        out, width = torch.zeros_like(x), x.shape[1] // self.names.heads
        for head in range(self.names.heads):
            part = slice(head * width, (head + 1) * width)
            logits = q[:, part] @ k[:, part].T / math.sqrt(width)
            if sizes is not None:
                logits = logits + sizes.log()
            out[:, part] = logits.softmax(-1) @ v[:, part]
        return self.linear(out, index, self.names.out)

    def select(self, x, before, seen, sizes, keep, index, text, depth):
        a = (
            self.by_keys(seen, index, text)
            if self.relevance == "keys"
            else self.by_values(x, before, index, text, depth)
        )
        ranked = sorted(range(len(a)), key=lambda i: -float(a[i]))
        kept, rest = sorted(ranked[:keep]), ranked[keep:]
        if not rest:
            return x, sizes
        fused = sum(a[i] * x[1 + i] for i in rest) / sum(a[i] for i in rest)
        total = sum(sizes[1 + i] for i in rest)
        tokens = torch.stack([x[0], *(x[1 + i] for i in kept), fused])
        return tokens, torch.stack([sizes[0], *(sizes[1 + i] for i in kept), total])

    def lifted(self, text: Tensor) -> Tensor:
        if self.names.lift is None:
            return text
        projection = self.w[self.names.lift]
        return (projection.T if self.names.lift.endswith(".weight") else projection) @ text

    def by_keys(self, seen: Tensor, index: int, text: Tensor) -> Tensor:
        (query, query_bias), (key, key_bias), _ = self.parts(index)
        q, k = query @ self.norm(self.lifted(text), index, 0) + query_bias, seen[1:] @ key.T + key_bias
        width = len(q) // self.names.heads
        heads = [slice(h * width, (h + 1) * width) for h in range(self.names.heads)]
        return torch.stack([(k[:, p] @ q[p] / math.sqrt(width)).softmax(-1) for p in heads]).mean(0)

    def by_values(self, x: Tensor, before: Tensor, index: int, text: Tensor, depth: int) -> Tensor:
        g = self.w[self.names.post] * self.lifted(text)
        g = g - g.mean()
        scores = torch.zeros(len(x) - 1, dtype=x.dtype)
        for later in range(index, depth):
            w = g @ self.get(later, f"{self.names.out}.weight") @ self.parts(later)[2][0]
            scores += self.norm((before if later == index else x)[1:], later, 0) @ w
        return ((scores - scores.mean()) / scores.std(unbiased=False)).softmax(-1)


SETTINGS = [
    ((3,), (0.4,), 0.5, None),
    ((3,), (0.15,), 0.9, None),
    ((4,), (0.5,), 0.3, False),
    ((2, 4), (0.5, 0.6), 0.5, None),
    ((1, 3), (0.5, 0.5), 0.0, True),
    ((5,), (0.3,), 0.5, True),
]


def through_the_blocks(case, tower, images, text) -> tuple[Tensor, Tensor]:
    """Return what comes to the first block and what the last one gives, in a guided call."""
    came, went = [], []
    hooks = [
        tower.blocks[0].register_forward_pre_hook(lambda module, args: came.append(tokens_of(tower, args[0]))),
        tower.blocks[-1].register_forward_hook(lambda module, args, out: went.append(tokens_of(tower, out))),
    ]
    with torch.no_grad(), patchselect.guide(case.model, text):
        case.image_side(case.model, images)
    for hook in hooks:
        hook.remove()
    return came[0], went[0]


@pytest.mark.parametrize(("layers", "rates", "merge", "sizes"), SETTINGS)
@pytest.mark.parametrize("name", list(NAMES))
def test_whole_towers(name, layers, rates, merge, sizes):
    case = build(name)
    case.model.double()
    names, tower = NAMES[name], find_towers(case.model)[0]
    state = {key: value.double() for key, value in case.model.state_dict().items()}
    if names.scales is not None and names.blocks.format(0) + names.scales[0] not in state:
        names = Names(**{**vars(names), "scales": None})  # timm before LayerScale
    images, text = case.images(2).double(), texts(case, 2).double()
    for relevance in ("keys", "values") if names.post else ("keys",):
        patchselect.apply(case.model, list(rates), list(layers), relevance=relevance, merge=merge, sizes=sizes)
        came, went = through_the_blocks(case, tower, images, text)
        reference = Reference(state, names, layers, rates, merge, merge > 0 if sizes is None else sizes, relevance)
        expected = torch.stack([reference(x, len(tower.blocks), t) for x, t in zip(came, text)])
        assert went.shape == expected.shape
        assert ((went - expected).norm() / expected.norm()).item() < 1e-8
