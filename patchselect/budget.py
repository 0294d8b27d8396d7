"""A compute budget in place of a keep rate: what a vision encoder costs, counted in tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .adapter import Tower
from .checks import check_layers
from .compat import FlopCounterMode
from .functional import as_ratio, num_kept
from .hosts import find_towers, unwrapped
from .patching import Handle, handles_in

STEPS = 10**6
"""Rates are told apart to a millionth, as `num_kept` does."""
SLACK = 1e-9
"""Of the budget, for rounding."""


@dataclass(frozen=True)
class Cost:
    """What one image costs in the vision encoder, in multiply-adds: the products with weights, and the attention."""

    depth: int
    width: int
    prefix: int
    attention: int
    """Weights of the attention branch of a block: each token meets each of them once."""
    mlp: int
    embedding: int
    """Weights of the patch embedding."""
    pooling: tuple[int, int]
    """Multiply-adds of an attentional pooler: once, and per token."""
    relevance: str
    keys: int
    """Multiply-adds per patch of `relevance="keys"`."""
    lift: int
    """Multiply-adds of the way of one text to the width of the tower; for `"joint"`, of its product with one patch."""
    projection: int
    """Multiply-adds of the way of one token into the joint space."""
    fused: bool

    @classmethod
    def of(cls, tower: Tower, handle: Handle | None = None) -> Cost:
        block = tower.blocks[0]
        weights = tower.adapter.projections(block)
        attention = sum(part.numel() for part in (weights.query, weights.key, weights.value, weights.output))
        whole = sum(part.numel() for part in block.parameters() if part.dim() == 2)
        relevance = handle.relevance if handle is not None else tower.adapter.default_relevance
        guided = handle is None or handle.guidance == "text"
        if handle is not None and handle.guidance == "random":
            relevance = "none"
        return cls(
            depth=len(tower.blocks),
            width=tower.width,
            prefix=tower.num_prefix_tokens,
            attention=attention,
            mlp=whole - attention,
            embedding=_embedding(tower).weight.numel(),
            pooling=_pooling(tower),
            relevance=relevance,
            keys=weights.num_heads * tower.width if weights.key_norm is None else tower.width**2,
            lift=_lift(tower, relevance) if guided and not tower.single_stream else 0,
            projection=_projection(tower),
            fused=handle is None or handle.fusion != "none",
        )

    def of_encoder(self, patches: int, layers: Sequence[int] = (), rates: Sequence[tuple[int, int]] = ()) -> int:
        """Multiply-adds of one image of `patches` patches, with these selection layers and rates (as `as_ratio`)."""
        by_layer = dict(zip(layers, rates))
        total = patches * self.embedding
        for index in range(self.depth):
            tokens = self.prefix + patches
            total += tokens * self.attention + 2 * tokens * tokens * self.width
            if index in by_layer:
                kept = num_kept(patches, by_layer[index])
                if kept < patches:
                    total += self._scoring(index, patches, index == layers[0]) + patches * self.fused * self.width
                    patches = kept + self.fused
            total += (self.prefix + patches) * self.mlp
        head = 0 if self.pooling[0] else self.projection
        return total + head + self.pooling[0] + (self.prefix + patches) * self.pooling[1]

    def _scoring(self, index: int, patches: int, first: bool) -> int:
        """Multiply-adds of one layer's relevance for one text."""
        square = self.width**2
        once, each = {
            "keys": (2 * square + self.lift, self.keys),
            "features": (square + self.lift, self.width),
            "values": ((2 * square * (self.depth - index) + self.lift) * first, 3 * self.width),
            "joint": (0, self.projection + self.lift),
            "none": (0, 0),
        }[self.relevance]
        return once + patches * each


def keep_rate_for_budget(
    model: nn.Module,
    budget: float,
    layers: Sequence[int] | None = None,
    image_size: int | tuple[int, int] | None = None,
    per_layer: bool = False,
) -> float | tuple[float, ...]:
    """The largest keep rate with which the vision encoder costs at most `budget` of the unpatched one.

        rate = patchselect.keep_rate_for_budget(model, 0.6)
        rate = patchselect.keep_rate_for_budget(model, 1.0, image_size=384)    # 384 px at the price of 224

    Counted exactly in tokens: products with weights and attention in every block, patch embedding, pooling, relevance
    and fusing; no forward is run. Norms, activations and biases are left out, as FLOP counters do. A cost moves in
    steps of one patch, so it may stay under the budget by one step.

    Args:
        model: a supported model or tower, patched or not; of several towers the first counts.
        budget: share of the cost of the unpatched encoder at its own image size; above 0.
        layers: 0-based selection layers; `None` takes those of a patched model, else the default of `apply`.
        image_size: pixels, one number or `(height, width)`, of the images that will be encoded; `None` is the
            model's own size.
        per_layer: one rate per layer, early layers keep more: the i-th of `t` layers keeps `r ** (i / t)`, where `r`
            is the rate of the last one.

    Returns:
        A rate for `apply(keep_rate=…)`, or a tuple of rates.

    Raises:
        ValueError: no rate has this cost; the error tells the range that can be reached. An image size that is not
            positive.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < float("inf"):
        raise ValueError(f"budget must be a share of the unpatched cost, above 0; got {budget!r}")
    host = unwrapped(model)
    handle = next(iter(handles_in(host)), None)
    tower = find_towers(host)[0] if handle is None else handle.towers[0]
    if tower.single_stream:
        raise ValueError(
            f"{type(tower.module).__name__} has no vision encoder of its own: image and text share one sequence, whose "
            "cost depends on the text"
        )
    chosen = handle.layers if handle is not None and layers is None else check_layers(layers, len(tower.blocks))
    cost = Cost.of(tower, handle)
    whole = cost.of_encoder(own_patches(tower))
    patches = own_patches(tower) if image_size is None else patches_at(tower, image_size)

    def rates_at(step: int) -> tuple[float, ...]:
        return _rates(step, len(chosen), per_layer)

    def share(step: int) -> float:
        return cost.of_encoder(patches, chosen, [as_ratio(rate) for rate in rates_at(step)]) / whole

    lowest, highest = share(1), share(STEPS)
    if not lowest <= budget * (1 + SLACK) or budget > highest * (1 + SLACK):
        raise ValueError(
            f"budget must be in [{lowest:.3f}, {highest:.3f}] of the unpatched cost for {patches} patches and "
            f"selection in layers {list(chosen)} (keep next to nothing, keep all); got {budget}. "
            + (
                "Select in earlier layers or use smaller images"
                if budget < lowest
                else "That is more than these images can cost: use larger ones, or no selection"
            )
        )
    if (
        budget * (1 + SLACK) >= highest
    ):  # one patch less than all, and a fused token, is as long and costs a little more
        return (1.0,) * len(chosen) if per_layer else 1.0
    step = _largest(lambda step: share(step) <= budget * (1 + SLACK), STEPS)
    rates = _shortest(step, rates_at, lambda rates: cost.of_encoder(patches, chosen, [as_ratio(r) for r in rates]))
    return rates if per_layer else rates[0]


def _rates(step: int, count: int, per_layer: bool) -> tuple[float, ...]:
    if not per_layer:
        return (step / STEPS,) * count
    return tuple(round((step / STEPS) ** ((i + 1) / count), 6) for i in range(count))


def _largest(fits: Callable[[int], bool], high: int) -> int:
    """The largest step from 1 to `high` that fits; costs rise with the step, and step 1 fits."""
    low = 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _shortest(
    step: int, rates_at: Callable[[int], tuple[float, ...]], cost: Callable[[tuple[float, ...]], int]
) -> tuple[float, ...]:
    """The same cost with the fewest decimals."""
    exact = rates_at(step)
    for digits in (10**5, 10**4, 1000, 100, 10):
        rounded = rates_at(max(1, step // digits * digits))
        if cost(rounded) == cost(exact):
            return rounded
    return exact


def patches_at(tower: Tower, image_size: int | tuple[int, int]) -> int:
    """Patches of an image of this size, in pixels."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ValueError(f"image_size must be positive, a number of pixels or (height, width); got {image_size!r}")
    embedding = _embedding(tower)
    if isinstance(embedding, nn.Linear):
        side = round((embedding.in_features / 3) ** 0.5)
        return (height // side) * (width // side)
    grid = tower.adapter.grid(tower, torch.empty(1, 3, height, width, device="meta"))
    if grid is None:
        raise ValueError(f"{type(tower.module).__name__} does not tell its patches from an image size: leave it out")
    return grid[0] * grid[1]


def own_patches(tower: Tower) -> int:
    """Patches of an image of the size that the model was built for: its position embedding has one entry each."""
    embed = getattr(tower.module, "patch_embed", None)
    if getattr(embed, "num_patches", None):
        return int(embed.num_patches)  # type: ignore[union-attr, arg-type]
    for name, tensor in tower.module.named_parameters():
        if "pos" in name and "embed" in name and tensor.dim() > 1:
            entries = tensor.shape[-2]
            side = round(entries**0.5)
            # SigLIP 2 and other towers without prefix tokens have one entry per patch, the others one per token.
            return (
                entries if side * side == entries and not tower.num_prefix_tokens else entries - tower.num_prefix_tokens
            )
    raise ValueError(f"{type(tower.module).__name__} does not tell its image size: give image_size")


def _lift(tower: Tower, relevance: str) -> int:
    if relevance == "none":
        return 0
    width = tower.adapter.text_width(tower)
    if relevance == "joint":
        return width
    way = tower.adapter.read_back if relevance == "values" else tower.adapter.lift
    weight = next(tower.blocks[0].parameters())
    return _counted(lambda: way(tower, torch.zeros(1, width, device=weight.device, dtype=weight.dtype)))


def _projection(tower: Tower) -> int:
    weight = next(tower.blocks[0].parameters())
    token = torch.zeros(1, 1, tower.width, device=weight.device, dtype=weight.dtype)
    try:
        return _counted(lambda: tower.adapter.project(tower, token))
    except ValueError:  # there is no joint space
        return 0


def _counted(run: Callable[[], object]) -> int:
    """Multiply-adds of something small that each adapter does in its own way."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def _embedding(tower: Tower) -> nn.Conv2d | nn.Linear:
    """The layer that makes tokens of patches: the first convolution, or a linear layer for flat patches."""
    inside = {id(part) for block in tower.blocks for part in block.modules()}
    outside = [part for part in tower.module.modules() if id(part) not in inside]
    found = next((part for part in outside if isinstance(part, nn.Conv2d)), None)
    if found is None:
        found = next((p for p in outside if isinstance(p, nn.Linear) and p.out_features == tower.width), None)  # type: ignore[assignment]
    if found is None:
        raise ValueError(f"{type(tower.module).__name__} has no patch embedding that is known here")
    return found


def _pooling(tower: Tower) -> tuple[int, int]:
    """An attentional pooler of the tower: what its queries, output and MLP cost, and its keys and values per token."""
    home = tower.module
    pool = next((p for name in ("attn_pool", "head") if isinstance(p := getattr(home, name, None), nn.Module)), None)
    weights: dict[str, Tensor] = {} if pool is None else {n: p for n, p in pool.named_parameters() if p.dim() == 2}
    kv = [p for n, p in weights.items() if n.split(".")[-2:] in (["kv", "weight"],) or "kv.weight" in n]
    packed = [p for n, p in weights.items() if n.endswith("in_proj_weight")]
    split = [p for n, p in weights.items() if n.endswith(("k_proj_weight", "v_proj_weight"))]
    queries = getattr(pool, "query", None)
    count = queries.shape[0] if isinstance(queries, nn.Parameter) and queries.dim() == 2 else 1
    per_token = sum(p.numel() for p in kv) + sum(2 * p.numel() // 3 for p in packed) + sum(p.numel() for p in split)
    if not per_token:
        return 0, 0
    rest = sum(p.numel() for n, p in weights.items() if n != "query" and "probe" not in n) - per_token
    width = (kv or packed or split)[0].shape[-1]
    return count * rest, per_token + 2 * count * width
