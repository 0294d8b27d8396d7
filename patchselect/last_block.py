"""The last block of a tower whose user reads the pooled token alone: outputs that nobody reads are not computed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .pairs.prefix import pass_block
from .weights import gathered
from .wiring.blocks import Original
from .wiring.guard import check_halves
from .wiring.merging import run_counting, run_placed
from .wiring.places import follows
from .wiring.sizes import counted_for
from .wiring.state import STATE, Layer, wiring_of
from .wiring.swapping import unswap


def skip_unread_outputs(model: nn.Module) -> None:
    """Let the last vision block compute the prefix tokens ([CLS], registers) alone, exactly.

    For towers of which only the pooled [CLS] is read. All patches are still attended to: the one query folds through
    the keys and the mean through the values, so neither is computed per patch. Saves almost a whole block: one
    twelfth of an unpatched ViT-B, less after selection, where the last block is short already. The tower then
    returns the prefix tokens alone. In training mode, blocks run as always.

    Call it after `patchselect.apply` (with `keep_rate=1.0` where no selection is wanted); `remove` undoes it, and
    applying again drops it.

    Args:
        model: a patched model.

    Raises:
        ValueError: the model is not patched; its patch tokens are read, or may be; its last block selects.
    """
    wiring = wiring_of(model)
    for tower in wiring.towers:
        reason = tower.adapter.reads_patches(wiring.model, tower)
        if reason is not None:
            raise ValueError(f"the outputs of the last block of {type(tower.module).__name__} are read: {reason}")
        last = len(tower.blocks) - 1
        if last in wiring.plan.layers:
            raise ValueError(f"block {last} selects patches, so its outputs are not free to skip: drop it from layers")
        check_halves(tower, last)
        weights = tower.adapter.projections(tower.blocks[last])
        if weights.key_norm is not None or weights.nonlinear_values is not None or tower.rotary:
            raise ValueError(
                f"block {last} of {type(tower.module).__name__} normalises its queries and keys, turns them by their "
                "places, or is not linear in its values, so one query cannot be folded through them"
            )
    for tower in wiring.towers:
        last = len(tower.blocks) - 1
        block = tower.blocks[last]
        if STATE in vars(block):
            unswap(block)
        wiring.patch(block, {"forward": run_pooled}, Layer(wiring, tower, last, False, (1, 1)))


def run_pooled(block: nn.Module, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """Run the last block on its prefix tokens alone."""
    layer: Layer = block._patchselect  # type: ignore[assignment]
    hidden = args[0] if args else next(iter(kwargs.values()))
    masks = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, Tensor) and value is not hidden]
    if block.training or kwargs.get("output_attentions") or masks or not isinstance(hidden, Tensor):
        placed = run_placed if follows(layer.plan, layer.tower, layer.index) else pass_block
        usual = run_counting if layer.plan.counts(layer.index) else placed
        return usual(block, name, original, *args, **kwargs)
    return pass_block(block, name, lambda *_, **__: _pooled(layer, block, hidden), *args, **kwargs)


def _pooled(layer: Layer, block: nn.Module, hidden: Tensor) -> Any:
    """Return prefix tokens `(B, P, D)` after the block, in the host's own layout and form.

    `out = sum_h W_o,h W_v,h (a_h . x) + c` with `a_h = softmax(q_h W_k,h . x)` and `x = LN(hidden)`. The constant c
    holds the biases of value and output; the host's own attention of a single token of zeros tells it.
    """
    tower, sizes = layer.tower, counted_for(layer, hidden).sizes if layer.plan.sizes else None
    weights = tower.adapter.projections(block)
    tokens = hidden if tower.batch_first else hidden.transpose(0, 1)
    normed, read = weights.norm(tokens), tokens[:, : tower.num_prefix_tokens]
    dtype = weights.query.dtype
    scale = torch.ones((), dtype=dtype, device=tokens.device)
    scale = scale if weights.output_scale is None else gathered(weights.output_scale)
    nothing = tokens.new_zeros(1, 1, tokens.shape[-1])
    alone = tower.adapter.attend(tower, block, nothing)
    value, output = weights.value, weights.output
    constant = alone.tokens - scale * F.linear(F.linear(alone.normed.to(dtype), value), output)

    heads = weights.num_heads
    query = F.linear(normed[:, : read.shape[1]].to(dtype), weights.query, weights.query_bias)
    query = query.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, H, P, E)
    key = weights.key.unflatten(0, (heads, -1))  # (H, E, D)
    scores = torch.einsum("bhpd,bnd->bhpn", query @ key, normed.to(dtype)) * weights.scale
    scores = scores if sizes is None else scores + sizes.log().to(dtype)[:, None, None]
    mean = torch.einsum("bhpn,bnd->bhpd", scores.float().softmax(dim=-1).to(dtype), normed.to(dtype))
    mixed = mean @ value.unflatten(0, (heads, -1)).transpose(-1, -2)  # (B, H, P, E)
    branch = F.linear(mixed.transpose(1, 2).flatten(2), output)
    after = read + scale * branch + constant
    return tower.adapter.finish(tower, block, after if tower.batch_first else after.transpose(0, 1), alone.rest)
