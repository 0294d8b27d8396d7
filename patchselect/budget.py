"""A compute budget in place of a keep rate: what a vision encoder costs, counted in tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from .adapter import Tower
from .functional import as_ratio, num_kept
from .prompts.host import Prompted
from .reduction import Merge, Reduction, reduction_of
from .reduction.groups import Grouped
from .relevance import Relevance, relevance_of
from .relevance.joint import projection_cost
from .weights import products_of
from .wiring.plan import Plan, check_layers, check_merge
from .wiring.state import wirings_in
from .wiring.towers import find_towers, unwrapped

STEPS = 10**6
"""Rates are told apart to a millionth, as `num_kept` does."""
SLACK = 1e-9
"""Of the budget, for rounding."""


@dataclass(frozen=True)
class Cost:
    """What one image costs in the vision encoder, in multiply-adds: the products with weights, and the attention."""

    tower: Tower
    attention: int
    """Weights of the attention branch of a block: each token meets each of them once."""
    mlp: int
    embedding: int
    """Weights of the patch embedding."""
    pooling: tuple[int, int]
    """Multiply-adds of an attentional pooler: once, and per token."""
    projection: int
    """Multiply-adds of the way of one token into the joint space."""
    relevance: Relevance
    reduction: Reduction
    guidance: str
    num_heads: int
    key_width: int
    """Of one head, by which patches are compared before they merge."""
    folded_keys: bool
    """Whether the mean key is one product with the mean of the heads' weights."""
    sizes: bool = False
    """Whether attention counts sizes, and so has the keys at hand, after the first merging."""
    prompt: Callable[[int], int] | None = field(default=None, repr=False)
    """Multiply-adds of a prompt that holds so many patches, in the language model that reads them."""
    scoring: dict[tuple[int, bool], tuple[int, int]] = field(default_factory=dict, repr=False)
    """What the relevance answered, per layer."""

    @classmethod
    def of(
        cls, tower: Tower, plan: Plan | None = None, side: int = 1, prompt: Callable[[int], int] | None = None
    ) -> Cost:
        """Take the cost of a tower apart; without a plan, for guidance by text in the adapter's default way.

        `side`: of the squares of patches that stay or go as one.
        """
        usual = reduction_of("mean") if side == 1 else Grouped(reduction_of("mean"), side)
        kind, block = tower.adapter, tower.blocks[0]
        weights = kind.projections(block)
        attention = sum(part.numel() for part in (weights.query, weights.key, weights.value, weights.output))
        whole = products_of(block)
        embedding = kind.patch_embedding(tower)
        if embedding is None:
            raise ValueError(
                f"the {kind.name} adapter does not say which layer of {type(tower.module).__name__} makes tokens of "
                "pixels, so its cost is not known (Adapter.patch_embedding)"
            )
        return cls(
            tower=tower,
            attention=attention,
            mlp=whole - attention,
            embedding=embedding.weight.numel(),  # type: ignore[union-attr, operator]
            pooling=kind.pooling_cost(tower),
            projection=projection_cost(tower),
            relevance=relevance_of(kind.relevance_for(tower)) if plan is None else plan.relevance,
            reduction=usual if plan is None else plan.reduction,
            guidance="text" if plan is None else plan.guidance,
            num_heads=weights.num_heads,
            key_width=weights.key.shape[0] // weights.num_heads,
            folded_keys=weights.key_norm is None,
            sizes=True if plan is None else plan.sizes or not plan.merge,
            prompt=prompt,
        )

    def of_encoder(
        self, patches: int, layers: Sequence[int] = (), rates: Sequence[tuple[int, int]] = (), merge: float = 0.0
    ) -> int:
        """Return the multiply-adds of one image of `patches` patches, with these selection layers and rates.

        `rates` are fractions, as `as_ratio` gives them; `merge` is the share of `apply`.
        """
        tower, by_layer, whole = self.tower, dict(zip(layers, rates)), patches
        merging = Merge(merge, rates[0], layers[0]) if merge else None
        merged = () if merging is None else merging.schedule(patches)
        at_hand = False
        total = patches * self.embedding
        for index in range(len(tower.blocks)):
            tokens = tower.num_prefix_tokens + patches
            total += tokens * self.attention + 2 * tokens * tower.adapter.span(tower, index, tokens) * tower.width
            if index in by_layer:
                kept = min(num_kept(whole if index == layers[0] else patches, by_layer[index]), patches)
                if kept < patches:
                    once, each = self._scoring(index, index == layers[0])
                    total += once + patches * each + self.reduction.cost(patches, kept, tower.width)
                    patches = kept + self.reduction.num_fused(patches, kept)
            if merging is not None and index < len(merged) and merged[index]:
                each = self.key_width if self.folded_keys else self.key_width * self.num_heads
                total += 0 if at_hand else (tower.num_prefix_tokens + patches) * each * tower.width
                total += merging.cost(patches, merged[index], tower.width, self.key_width)
                patches, at_hand = patches - merged[index], self.sizes
            total += (tower.num_prefix_tokens + patches) * self.mlp
        head = 0 if self.pooling[0] else self.projection
        total += 0 if self.prompt is None else self.prompt(patches)
        return total + head + self.pooling[0] + (tower.num_prefix_tokens + patches) * self.pooling[1]

    def _scoring(self, index: int, first: bool) -> tuple[int, int]:
        key = index, first
        if key not in self.scoring:
            self.scoring[key] = self.relevance.cost(self.tower, index, first, self.guidance)
        return self.scoring[key]


def keep_rate_for_budget(
    model: nn.Module,
    budget: float,
    layers: Sequence[int] | None = None,
    image_size: int | tuple[int, int] | None = None,
    per_layer: bool = False,
    *,
    merge: float | None = None,
    words: int | None = None,
) -> float | tuple[float, ...]:
    """Return the largest keep rate with which the vision encoder costs at most `budget` of the unpatched one.

        rate = patchselect.keep_rate_for_budget(model, 0.6)
        rate = patchselect.keep_rate_for_budget(model, 1.0, image_size=384)    # 384 px at the price of 224

    Counted exactly in tokens: products with weights and attention in every block, patch embedding, pooling, relevance
    and fusing; no forward is run. Norms, activations and biases are left out, as FLOP counters do, and so is fitting
    positions to an image's grid, before the first block. A cost moves in steps of one patch, so it may stay under the
    budget by one step.

    Args:
        model: a supported model or tower, patched or not; of several towers the first counts.
        budget: share of the cost of the unpatched encoder at its own image size; above 0.
        layers: 0-based selection layers; `None` takes those of a patched model, else the default of `apply`.
        image_size: pixels, one number or `(height, width)`, of the images that will be encoded; `None` is the
            model's own size.
        per_layer: one rate per layer, early layers keep more: the i-th of `t` layers keeps `r ** (i / t)`, where `r`
            is the rate of the last one.
        merge: as in `apply`: the share of the removed patches that merges before the first selection layer; `None` is
            that of a patched model, else 0.
        words: of a language model that reads the patches in its prompt: how many other tokens a prompt with one image
            has; tower and prefill of the prompt are counted together. `None` counts the tower alone.

    Returns:
        A rate for `apply(keep_rate=…)`, or a tuple of rates.

    Raises:
        ValueError: no rate has this cost; the error tells the range that can be reached. An image size that is not
            positive.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < float("inf"):
        raise ValueError(f"budget must be a share of the unpatched cost, above 0; got {budget!r}")
    host = unwrapped(model)
    wiring = next(iter(wirings_in(host)), None)
    tower = find_towers(host)[0] if wiring is None else wiring.towers[0]
    plan = None if wiring is None else wiring.plan
    if tower.single_stream:
        raise ValueError(
            f"{type(tower.module).__name__} has no vision encoder of its own: image and text share one sequence, whose "
            "cost depends on the text"
        )
    own = plan is not None and layers is None and (merge is None or bool(merge) == bool(plan.merge))
    share_merged = (0.0 if plan is None else plan.merge) if merge is None else check_merge(merge)
    chosen = plan.layers if plan is not None and own else check_layers(layers, len(tower.blocks), share_merged)
    side, prompt = of_prompts(host if wiring is None else wiring.model, tower, words)
    cost = Cost.of(tower, plan, side, prompt)
    patches = own_patches(tower) if image_size is None else patches_at(tower, image_size)
    whole = cost.of_encoder(patches if tower.packed else own_patches(tower))  # packed: no size is its own

    def rates_at(step: int) -> tuple[float, ...]:
        return _rates(step, len(chosen), per_layer)

    def of_rates(rates: Sequence[float]) -> int:
        return cost.of_encoder(patches, chosen, [as_ratio(rate) for rate in rates], share_merged)

    def share(step: int) -> float:
        return of_rates(rates_at(step)) / whole

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
    rates = _shortest(step, rates_at, of_rates)
    return rates if per_layer else rates[0]


def of_prompts(model: nn.Module, tower: Tower, words: int | None) -> tuple[int, Callable[[int], int] | None]:
    """Return the side of the squares that a language model reads as one, and what a prompt costs by its patches.

    Raises:
        ValueError: `words` was given, and there is no prompt.
    """
    adapter = tower.adapter
    if not isinstance(adapter, Prompted):
        if words is not None:
            raise ValueError(f"words counts the prompt of a language model, and {type(model).__name__} has none")
        return 1, None
    core = adapter.core(model)
    side, extra = adapter.side(core), adapter.extra(core, {})
    if words is None:
        return side, None
    return side, lambda patches: adapter.prompt_cost(core, extra + patches // side**2, words)


def _rates(step: int, count: int, per_layer: bool) -> tuple[float, ...]:
    if not per_layer:
        return (step / STEPS,) * count
    return tuple(round((step / STEPS) ** ((i + 1) / count), 6) for i in range(count))


def _largest(fits: Callable[[int], bool], high: int) -> int:
    """Return the largest step from 1 to `high` that fits; costs rise with the step, and step 1 fits."""
    low = 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _shortest(
    step: int, rates_at: Callable[[int], tuple[float, ...]], cost: Callable[[tuple[float, ...]], int]
) -> tuple[float, ...]:
    """Return rates of the same cost with the fewest decimals."""
    exact = rates_at(step)
    for digits in (10**5, 10**4, 1000, 100, 10):
        rounded = rates_at(max(1, step // digits * digits))
        if cost(rounded) == cost(exact):
            return rounded
    return exact


def patches_at(tower: Tower, image_size: int | tuple[int, int]) -> int:
    """Return the number of patches of an image of this size, in pixels.

    Raises:
        ValueError: the size is not positive, or the size that the tower was built for is not known.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(height, width) < 1:
        raise ValueError(f"image_size must be positive, a number of pixels or (height, width); got {image_size!r}")
    embedding = tower.adapter.patch_embedding(tower)
    if isinstance(embedding, nn.Linear):
        side = round((embedding.in_features / 3) ** 0.5)
        return (height // side) * (width // side)
    grid = tower.adapter.grid(tower, torch.empty(1, 3, height, width, device="meta"))
    if grid is None:
        raise ValueError(
            f"{type(tower.module).__name__} alone knows how many patches it makes of an image: leave image_size out"
        )
    return grid[0] * grid[1]


def own_patches(tower: Tower) -> int:
    """Return the number of patches of an image of the size that the model was built for.

    Raises:
        ValueError: the size that the tower was built for is not known.
    """
    found = tower.adapter.own_patches(tower)
    if found is None:
        raise ValueError(
            f"the image size that {type(tower.module).__name__} was built for is not known: give "
            "keep_rate_for_budget(…, image_size=…)"
        )
    return found
