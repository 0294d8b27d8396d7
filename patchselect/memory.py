"""How many images and texts fit in memory together."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .batches import Batch
from .functional import num_kept
from .patching import Handle
from .prefix import Prefix
from .scoring import Texts

MARGIN = 1.25
"""For what the counting of activations leaves out: workspaces of kernels, relevance, indices."""


class Plan(NamedTuple):
    images: int
    """Images whose prefix is held together."""
    texts: int
    """Texts that guide each of them in one pass."""


def plan_chunks(handle: Handle, batch: Batch, texts: Texts, columns: int, limit: float) -> Plan:
    """The largest chunks of this batch and of `columns` texts whose activations stay under `limit` bytes.

    Counted in numbers per token: a block holds its input, its normed input, and either the MLP's hidden layer before
    and after its activation, or queries, keys, values, the attention maps of an eager host and the branch's output.
    """
    tower = handle.towers[0]
    block, heads = tower.blocks[0], tower.adapter.projections(tower.blocks[0]).num_heads
    width, size = tower.width, next(tower.module.parameters()).element_size()
    hidden = max(weight.shape[0] for weight in block.parameters() if weight.dim() == 2)

    def bytes_of_block(tokens: int) -> float:
        return MARGIN * size * tokens * max(3 * width + 2 * hidden, 7 * width + 2 * heads * tokens)

    if isinstance(batch.images, Prefix):
        tokens, pixels = batch.images.tokens.shape[1], 0
    else:
        grid = tower.adapter.grid(tower, batch.images[:1], **_one(batch.options))
        if grid is None:
            raise ValueError(f"{type(tower.module).__name__} does not tell its patches from its images")
        tokens, pixels = tower.num_prefix_tokens + grid[0] * grid[1], 2 * size * batch.images[0].numel()
    patches = tokens - tower.num_prefix_tokens
    kept = num_kept(patches, handle.keep_rates[0])
    after = tower.num_prefix_tokens + kept + int(kept < patches)
    states = sum(2 * state[0].numel() * state.element_size() for state in texts.states.values())
    pair = bytes_of_block(after) + (bytes_of_block(after) / 4 + 16 * states if states else 0)
    image = MARGIN * (size * 4 * tokens * width + pixels)
    alone = bytes_of_block(tokens) + pixels
    if handle.guidance != "text":
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
    return Plan(images, max(1, min(columns, int((limit - images * image) // (images * pair)))))


def texts_at_once(batch: Any, limit: float) -> int:
    """Rows of token ids that a text encoder may take together: 64 KiB a token is what one of width 1024 needs."""
    ids: Tensor = batch["input_ids"] if isinstance(batch, dict) or hasattr(batch, "keys") else batch
    return max(1, int(limit // (ids.shape[-1] * 2**16)))


def _one(options: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:1] for name, value in options.items()}
