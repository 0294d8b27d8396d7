"""Whole towers that merge, then select, computed in float64 from the equations alone.

The reference loops over images, heads and patches, and reads nothing of the library; of the host it reads tensors of
the state dict, the tokens that come to the first block and, of a rotary one, the sines and cosines of each place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable

import torch
from hosts.calls import tokens_of
from torch import Tensor

import patchselect


def slow_merge(tokens, sizes, keys, count, prefix):
    """One image: tokens `(N, D)`, sizes and where each token went, as lists."""
    patches = range(len(tokens) - prefix)
    unit = [keys[prefix + i] / keys[prefix + i].norm().clamp(min=1e-12) for i in patches]
    pairs = []
    for even in patches[::2]:
        cosines = {odd: float(unit[even] @ unit[odd]) for odd in patches[1::2]}
        if cosines:
            best = max(cosines, key=lambda odd: (cosines[odd], -odd))
            pairs.append((-cosines[best], even, best))
    goes = {even: odd for _, even, odd in sorted(pairs)[:count]}
    stays = [i for i in patches if i not in goes]
    out, counts = list(tokens[:prefix]), list(sizes[:prefix])
    for i in stays:
        members = [i, *(even for even, odd in goes.items() if odd == i)]
        counts.append(sum(sizes[prefix + m] for m in members))
        out.append(sum(sizes[prefix + m] * tokens[prefix + m] for m in members) / counts[-1])
    into = [*range(prefix), *(prefix + stays.index(goes.get(i, i)) for i in patches)]
    return torch.stack(out), torch.stack(counts), into


@dataclass
class Names:
    """Where the weights of a host are, in its state dict; `{}` is the block."""

    blocks: str
    norms: tuple[str, str]
    heads: int
    out: str
    mlp: tuple[str, ...]
    """The layers of the MLP in order; of a gated one the gate, what it gates, and the last."""
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
    prefix: int = 1
    inner: tuple[str, str] | None = None
    """Norms before the last layer of attention and of the MLP."""
    rotary: Callable[[tuple, dict], tuple[Tensor, Tensor]] | None = None
    """Sines and cosines `(n, E)` of all places, of the arguments of a block."""
    half: bool = False
    pool: Callable[[dict[str, Tensor]], Tensor] | None = None
    """Output times value weights of the attention that pools behind the tower, `(width, width)`."""


def erf_gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


TIMM = Names(
    "blocks.{}.", ("norm1", "norm2"), 4, "attn.proj", ("mlp.fc1", "mlp.fc2"), erf_gelu, "attn.qkv.",
    scales=("ls1.gamma", "ls2.gamma"), eps=1e-6,
)  # fmt: skip


class Reference:
    """The blocks of one tower, one image at a time."""

    def __init__(self, state, names: Names, layers, rates, merge, sizes, relevance, tables=None) -> None:
        self.w, self.names, self.tables = state, names, tables
        self.layers, self.rates, self.merge, self.counts, self.relevance = layers, rates, merge, sizes, relevance

    def get(self, index: int, name: str) -> Tensor:
        return self.w[self.names.blocks.format(index) + name]

    def linear(self, x: Tensor, index: int, name: str) -> Tensor:
        return x @ self.get(index, f"{name}.weight").T + self.bias(index, name)

    def bias(self, index: int, name: str) -> Tensor | float:
        return self.w.get(self.names.blocks.format(index) + f"{name}.bias", 0.0)

    def norm(self, x: Tensor, index: int, which: int) -> Tensor:
        return self.named_norm(x, index, self.names.norms[which])

    def named_norm(self, x: Tensor, index: int, name: str) -> Tensor:
        return self.plain(x) * self.get(index, f"{name}.weight") + self.bias(index, name)

    def plain(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.pow(2).mean(-1, keepdim=True) + self.names.eps).sqrt()

    def parts(self, index: int) -> list[tuple[Tensor, Tensor]]:
        names = self.names
        if names.apart is not None:
            return [(self.get(index, f"{n}.weight"), self.bias(index, n)) for n in names.apart]
        weight, bias = self.get(index, f"{names.fused}weight"), self.get(index, f"{names.fused}bias")
        return list(zip(weight.chunk(3), bias.chunk(3)))

    def scaled(self, branch: Tensor, index: int, which: int) -> Tensor:
        return branch if self.names.scales is None else branch * self.get(index, self.names.scales[which])

    def __call__(self, x: Tensor, depth: int, text: Tensor) -> Tensor:
        """Return what the last block gives for the tokens `(P + n, D)` of one image."""
        prefix, first = self.names.prefix, self.layers[0]
        patches = len(x) - prefix
        self.places: list[int | None] = [None] * prefix + list(range(patches))
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
                x, sizes, into = slow_merge(x, sizes, mean, min(count, (len(x) - prefix) // 2), prefix)
                self.merge_places(into)
                reduced = reduced or count > 0
            elif index in self.layers:
                whole = patches if index == first else len(x) - prefix
                keep = math.ceil(self.rates[self.layers.index(index)] * whole - 1e-9)
                x, sizes = self.select(x, before, seen, sizes, keep, index, text, depth)
                reduced = True
            normed = self.norm(x, index, 1)
            hidden = self.names.activation(self.linear(normed, index, self.names.mlp[0]))
            if len(self.names.mlp) == 3:
                hidden = hidden * self.linear(normed, index, self.names.mlp[1])
            if self.names.inner is not None:
                hidden = self.named_norm(hidden, index, self.names.inner[1])
            x = x + self.scaled(self.linear(hidden, index, self.names.mlp[-1]), index, 1)
        return x

    def merge_places(self, into: list[int]) -> None:
        """A merged token stands where the odd patch stood that the others merged into."""
        prefix, before = self.names.prefix, self.places
        after: dict[int, int | None] = {}
        for patch, goes in enumerate(into[prefix:]):
            if goes not in after or patch % 2 == 1:
                after[goes] = before[prefix + patch]
        self.places = [None] * prefix + [after[token] for token in sorted(after)]

    def turned(self, x: Tensor) -> Tensor:
        """Queries or keys of one head `(N, E)`, turned by the places of their tokens; one without a place is not."""
        if self.tables is None:
            return x
        out, width = x.clone(), x.shape[1]
        for token, place in enumerate(self.places):
            for entry in range(width) if place is not None else ():
                if self.names.half:
                    sign, other = (-1, entry + width // 2) if entry < width // 2 else (1, entry - width // 2)
                else:
                    sign, other = (-1, entry + 1) if entry % 2 == 0 else (1, entry - 1)
                sine, cosine = (table[place, entry] for table in self.tables)
                out[token, entry] = x[token, entry] * cosine + sign * x[token, other] * sine
        return out

    def attention(self, x: Tensor, index: int, sizes: Tensor | None) -> Tensor:
        q, k, v = (x @ weight.T + bias for weight, bias in self.parts(index))
        out, width = torch.zeros_like(x), x.shape[1] // self.names.heads
        for head in range(self.names.heads):
            part = slice(head * width, (head + 1) * width)
            logits = self.turned(q[:, part]) @ self.turned(k[:, part]).T / math.sqrt(width)
            if sizes is not None:
                logits = logits + sizes.log()
            out[:, part] = logits.softmax(-1) @ v[:, part]
        if self.names.inner is not None:
            out = self.named_norm(out, index, self.names.inner[0])
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
        p = self.names.prefix
        fused = sum(a[i] * x[p + i] for i in rest) / sum(a[i] for i in rest)
        total = sum(sizes[p + i] for i in rest)
        tokens = torch.stack([*x[:p], *(x[p + i] for i in kept), fused])
        self.places = [*self.places[:p], *(self.places[p + i] for i in kept), None]
        return tokens, torch.stack([*sizes[:p], *(sizes[p + i] for i in kept), total])

    def lifted(self, text: Tensor) -> Tensor:
        if self.names.lift is None:
            return text
        projection = self.w[self.names.lift]
        return (projection.T if self.names.lift.endswith(".weight") else projection) @ text

    def by_keys(self, seen: Tensor, index: int, text: Tensor) -> Tensor:
        (query, query_bias), (key, key_bias), _ = self.parts(index)
        q, k = query @ self.norm(self.lifted(text), index, 0) + query_bias, seen @ key.T + key_bias
        width = len(q) // self.names.heads
        heads = [slice(h * width, (h + 1) * width) for h in range(self.names.heads)]
        keys = [self.turned(k[:, p])[self.names.prefix :] for p in heads]
        return torch.stack([(key @ q[p] / math.sqrt(width)).softmax(-1) for key, p in zip(keys, heads)]).mean(0)

    def by_values(self, x: Tensor, before: Tensor, index: int, text: Tensor, depth: int) -> Tensor:
        g = self.lifted(text) if self.names.pool is None else text @ self.names.pool(self.w)
        g = self.w[self.names.post] * g
        g = g - g.mean()
        scores = torch.zeros(len(x) - self.names.prefix, dtype=x.dtype)
        for later in range(index, depth):
            w = self.scaled(g, later, 0) @ self.get(later, f"{self.names.out}.weight") @ self.parts(later)[2][0]
            scores += self.norm((before if later == index else x)[self.names.prefix :], later, 0) @ w
        return ((scores - scores.mean()) / scores.std(unbiased=False)).softmax(-1)


def through_the_blocks(case, tower, images, text) -> tuple[Tensor, Tensor, tuple, dict]:
    """Return what comes to the first block and what the last one gives, and the arguments of the first."""
    came, went, given = [], [], []

    def first(module, args, kwargs={}):  # noqa: B006 (releases before 2.0 give none)
        came.append(tokens_of(tower, args[0]))
        given.append((args, kwargs))

    with_kwargs = {"with_kwargs": True} if tower.rotary else {}
    hooks = [
        tower.blocks[0].register_forward_pre_hook(first, **with_kwargs),
        tower.blocks[-1].register_forward_hook(lambda module, args, out: went.append(tokens_of(tower, out))),
    ]
    with torch.no_grad(), patchselect.guide(case.model, text):
        case.image_side(case.model, images)
    for hook in hooks:
        hook.remove()
    return came[0], went[0], *given[0]
