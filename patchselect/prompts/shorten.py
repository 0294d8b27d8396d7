"""Encode the images of a call under their texts, and cut the call to the placeholders that are left."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ContextManager, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor

from ..wiring.guidance import current, scope
from ..wiring.journey import Journey, followed
from ..wiring.state import Wiring
from .columns import Cut, offsets_of, rows_of_images, shortened
from .host import Prompted

FILLS = {"attention_mask": 0, "labels": -100, "token_type_ids": 0, "mm_token_type_ids": 0, "inputs_embeds": 0}
"""Arguments as long as the prompt, and what padding is in them."""
OTHERS = ("input_ids", "position_ids")


class Short(NamedTuple):
    """A call whose images are encoded, and whose prompt is as long as they are now."""

    given: dict[str, Any]
    """Its arguments, without the pixels."""
    encoded: Any
    """What the host returns of its images."""
    tokens: Sequence[Tensor]
    """The tokens `(m_i, D)` of each image."""
    columns: Tensor
    """`(B, L)`, bool: which columns of the prompt stayed."""
    removed: int
    """By how many columns the batch is shorter now."""
    padded: bool
    """Whether rows were padded again."""
    ahead: Tensor | None
    """`(B, 1)`: by how much positions go before the number of tokens; `None`: they are columns of the whole prompt."""


def shorten_call(wiring: Wiring, given: Mapping[str, Any], positions: Tensor | None = None) -> Short:
    """Encode the images of a call with pixels, and cut whatever is as long as its prompt.

    Args:
        wiring: the selection.
        given: the arguments of the call by their names.
        positions: `(…, B, L)`: those of the whole prompt; `None` where the call has its own or the host counts.

    Raises:
        ValueError: rows with another number of placeholders than their images need, texts that do not fit the
            prompts, an argument that cannot be cut.
    """
    tower = wiring.towers[0]
    host: Prompted = tower.adapter  # type: ignore[assignment]
    core = host.core(wiring.model)
    placeholders = host.placeholders(core, given)
    rows, length = placeholders.shape
    check_cut(given, rows, length)
    sizes = host.sizes(tower, core, given)
    counts = placeholders.sum(dim=1).tolist()
    row = torch.tensor(rows_of_images(counts, sizes))
    with texts_of_prompts(wiring, row, rows), followed(wiring) as journeys:
        encoded, tokens = host.encode(core, given)
    if len(tokens) != len(sizes):
        raise ValueError(
            f"{len(tokens)} image features came of {len(sizes)} images: every image is encoded with the text of its "
            'prompt alone, so leave out pairing="all"'
        )
    offsets = places(host, core, given, sizes, tokens, journeys)
    found = dict(given)
    base = given.get("position_ids") if given.get("position_ids") is not None else positions
    if base is None:
        base = host.positions(core, given, rows, length, placeholders.device)
    base = base.to(placeholders.device)
    base = base.expand(*base.shape[:-2], rows, length) if base.dim() > 1 else base.expand(rows, length)
    stay = shortened(placeholders, sizes, offsets, base, wiring.plan.positions == "renumbered")
    mask = given.get("attention_mask")
    cut = Cut.of(stay.columns, mask)
    # Without a mask, transformers takes jumps between positions for the borders of packed sequences.
    found["attention_mask"] = torch.ones(rows, length, dtype=torch.long, device=base.device) if mask is None else mask
    for name, fill in FILLS.items():
        if found.get(name) is not None:
            found[name] = cut(found[name], fill)
    if found.get("input_ids") is not None:
        found["input_ids"] = cut(found["input_ids"], padding_of(core))
    found["position_ids"] = cut.last(stay.positions)
    for name in host.image_arguments:
        found.pop(name, None)
    ahead = host.settle(core, found)
    return Short(found, encoded, tokens, stay.columns, length - cut.source.shape[1], cut.filled is not None, ahead)


def padding_of(core: Any) -> int:
    """Return a token that stands for no image; the mask hides it."""
    config = core.config
    for name in ("pad_token_id", "bos_token_id"):
        found = getattr(config.get_text_config(), name, None)
        if isinstance(found, int) and found >= 0 and found != config.image_token_id:
            return found
    return 0 if config.image_token_id != 0 else 1


def places(
    host: Prompted, core: Any, given: Mapping[str, Any], sizes: Sequence[int], tokens: Sequence[Tensor],
    journeys: Sequence[Journey],
) -> list[Tensor]:  # fmt: skip
    """Return which placeholders of its image `(m_i,)` the tokens that each image has now stand for.

    Raises:
        ValueError: the tokens are not those that the selection left.
    """
    extra = host.extra(core, given)
    rows = host.left(core, journeys)
    if not rows and len(sizes):
        raise ValueError(
            "the tower did not tell which patches it has left: it is compiled: compile the language model alone, not "
            "the tower or what calls it; or it was not called: call the model with pixel_values"
        )
    if len(rows) != len(sizes) or any(extra + len(row) != len(each) for row, each in zip(rows, tokens)):
        raise ValueError(
            f"the images have {[len(each) for each in tokens]} tokens, and the selection left "
            f"{[extra + len(row) for row in rows]}: the features of an earlier call, or a change of the tower, stand "
            "between them; call the model with pixel_values"
        )
    too_many = next((index for index, each in enumerate(tokens) if len(each) > sizes[index]), None)
    if too_many is not None:
        raise ValueError(
            f"the selection leaves {len(tokens[too_many])} tokens of image {too_many}, which has {sizes[too_many]} "
            "placeholders: use a smaller keep_rate"
        )
    return [offsets_of(row[None], size, extra)[0] for row, size in zip(rows, sizes)]


def check_cut(given: Mapping[str, Any], rows: int, length: int) -> None:
    """Raise a ValueError if an argument of a call is as long as its prompt and not known, or of another shape."""
    for name, value in given.items():
        known = name in FILLS or name in OTHERS
        if name == "logits_to_keep" and isinstance(value, Tensor):
            raise ValueError("logits_to_keep as a tensor names columns of the whole prompt, give it as a number")
        if known and value is not None and name != "position_ids":
            if (
                not isinstance(value, Tensor)
                or value.shape[:2] != (rows, length)
                or value.dim() > 2 + (name == "inputs_embeds")
            ):
                found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"{name} must be (rows, columns) = ({rows}, {length}) as the prompt is, so that it can be cut with "
                    f"it; got {found}"
                )
        elif not known and isinstance(value, Tensor) and value.dim() > 1 and value.shape[:2] == (rows, length):
            raise ValueError(
                f"{name} is as long as the prompt, ({rows}, {length}), and it is not known how to shorten it with the "
                "images: leave it out"
            )


def texts_of_prompts(wiring: Wiring, row: Tensor, rows: int) -> ContextManager[Any]:
    """Let the text of each prompt guide all images `(I,)` of its `row`; a text per image is fine where they differ.

    Raises:
        ValueError: there is neither a text per prompt nor one per image.
    """
    guidance = current(wiring)
    if wiring.plan.guidance != "text" or guidance is None or guidance.pairing != "paired" or guidance.repeat:
        return nullcontext()
    texts = len(guidance.text)
    if texts == 1 or (texts == len(row) and texts != rows):
        return nullcontext()
    if texts != rows:
        raise ValueError(
            f"{texts} texts for {rows} prompts with {len(row)} images: give guide() one text per prompt, which guides "
            "all of its images, one per image, or one for all"
        )
    return scope(wiring, guidance.text[row.to(guidance.text.device)], "paired")
