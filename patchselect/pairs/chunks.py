"""How many images and texts fit in memory together."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..adapter import Texts
from ..functional import num_kept
from ..wiring.state import Wiring
from .batches import Batch
from .prefix import Prefix

MARGIN = 1.25
"""For what the counting of activations leaves out: workspaces of kernels, relevance, indices."""


class Chunks(NamedTuple):
    """How many images and texts are in memory together."""

    images: int
    """Images whose prefix is held together."""
    texts: int
    """Texts that guide each of them in one pass."""


def plan_chunks(wiring: Wiring, batch: Batch, texts: Texts, columns: int, limit: float) -> Chunks:
    """Return the largest chunks of this batch and of `columns` texts whose activations stay under `limit` bytes.

    Counted in numbers per token: a block holds its input, its normed input, and either the MLP's hidden layer before
    and after its activation, or queries, keys, values, the attention maps of an eager host and the branch's output.
    """
    plan, tower = wiring.plan, wiring.towers[0]
    block, heads = tower.blocks[0], tower.adapter.projections(tower.blocks[0]).num_heads
    width, size = tower.width, next(tower.module.parameters()).element_size()
    hidden = max(weight.shape[0] for weight in block.parameters() if weight.dim() == 2)

    def bytes_of_block(tokens: int) -> float:
        return MARGIN * size * tokens * max(3 * width + 2 * hidden, 7 * width + 2 * heads * tokens)

    if isinstance(batch.images, Prefix):
        within, pixels = batch.images.within, 0
        tokens = batch.images.tokens.shape[1] if within is None else tower.num_prefix_tokens + within.shape[1]
    else:
        grid = tower.adapter.grid(tower, batch.images[:1], **_one(batch.options))
        if grid is None:
            raise ValueError(
                f"{type(tower.module).__name__} alone knows how many patches it makes of an image, so chunks cannot be "
                "planned: encode a prefix (patchselect.encode_prefix) and give that as images"
            )
        tokens, pixels = tower.num_prefix_tokens + grid[0] * grid[1], 2 * size * batch.images[0].numel()
    patches = tokens - tower.num_prefix_tokens
    kept = num_kept(patches, plan.keep_rates[0])
    after = tower.num_prefix_tokens + kept + plan.reduction.num_fused(patches, kept)
    states = sum(2 * state[0].numel() * state.element_size() for state in texts.states.values())
    pair = bytes_of_block(after) + (bytes_of_block(after) / 4 + 16 * states if states else 0)
    merged = sum(plan.merging.schedule(patches)) if plan.merge and plan.selects else 0
    image = MARGIN * (size * 4 * (tokens - merged) * width + pixels)
    alone = bytes_of_block(tokens) + pixels
    if plan.guidance != "text":
        pair = states * 16 + (size * after * width if states else 16 * width)
        image = alone
    least = max(image + pair, alone)
    if least > limit:
        raise ValueError(
            f"memory_limit is {limit / 2**20:.1f} MiB, but one image with one text takes {least / 2**20:.1f} MiB at "
            f"{tokens} tokens: allow more, or use smaller images"
        )
    columns = max(columns, 1)
    images = int(min(len(batch), limit // alone, max(limit // (image + columns * pair), limit // (8 * (image + pair)))))
    images = max(1, min(images, 64))
    return Chunks(images, max(1, min(columns, int((limit - images * image) // (images * pair)))))


def texts_at_once(batch: Any, limit: float) -> int:
    """Return how many rows of token ids a text encoder may take together: 64 KiB a token, for a width of 1024."""
    ids: Tensor = batch["input_ids"] if isinstance(batch, dict) or hasattr(batch, "keys") else batch
    return max(1, int(limit // (ids.shape[-1] * 2**16)))


def _one(options: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:1] for name, value in options.items()}
