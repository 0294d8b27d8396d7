"""ViLT of Hugging Face transformers: text and image share one sequence, `[text tokens, image [CLS], patches]`.

The text [CLS] in it guides; the text tokens and the image [CLS] are prefix tokens and never touched. All images of a
batch must be of one size, so that no patch is padding; texts may be padded as usual.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, NoReturn

from torch import Tensor, nn

from patchselect.adapter import Adapter, Attended, Tower, Wrapper, bound
from patchselect.calls import refuse_extras
from patchselect.weights import Projections, rate
from patchselect.wiring.journey import call_tower, note_grid

from .switches import advice_of_transformers

BLOCK_PARTS = {"attention", "intermediate", "output", "layernorm_before", "layernorm_after"}
CALL = ("input_ids", "attention_mask", "token_type_ids", "pixel_values", "pixel_mask", "inputs_embeds")

_text_length: ContextVar[int | None] = ContextVar("patchselect_vilt_text_length", default=None)


def is_tower(module: Any) -> bool:
    layers = getattr(getattr(module, "encoder", None), "layer", None)
    embeddings = getattr(module, "embeddings", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0 or not hasattr(embeddings, "visual_embed"):
        return False
    return all({name for name, _ in block.named_children()} == BLOCK_PARTS for block in layers)


def call_model(module: nn.Module, name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
    """Note the length of the text in `ViltModel.forward`: it says where the patches begin."""
    given = bound(CALL, args, kwargs)
    text = given.get("input_ids")
    text = given.get("inputs_embeds") if text is None else text
    mask = given.get("pixel_mask")
    if mask is not None and not bool(mask.all()):
        raise ValueError(
            f"{type(module).__name__} got padded images (pixel_mask has zeros), which selection does not support: "
            "batch images of one size, so that no patch is padding"
        )
    token = _text_length.set(None if text is None else text.shape[1])
    try:
        return call_tower(module, name, original, *args, **kwargs)
    finally:
        _text_length.reset(token)


def note_patches(embeddings: Any, name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
    """Note which patch is which: ViLT shuffles them, and drops some beyond `max_image_length`."""
    result = original(*args, **kwargs)
    places, (height, width) = result[2]
    order = places[..., 0] * int(width) + places[..., 1]
    note_grid(embeddings._patchselect.towers[0], (int(height), int(width)), order)
    return result


def fit_mask(
    attention: nn.Module, name: str, original: Any, hidden_states: Tensor, attention_mask: Tensor | None = None,
    *args: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Cut the mask `(B, 1, 1 | N, N)` to the sequence: its columns of image tokens are all alike, none is padding."""
    if attention_mask is not None:
        length = hidden_states.shape[1]
        attention_mask = attention_mask[..., :length, :length]
    return original(hidden_states, attention_mask, *args, **kwargs)


class TransformersVilt(Adapter):
    """`ViltModel` and its heads: question answering, retrieval, NLVR2, masked language modelling, token classes."""

    name = "transformers-vilt"
    default_relevance = "keys"

    def towers(self, model: nn.Module) -> list[Tower]:
        core: Any = model if is_tower(model) else getattr(model, "vilt", None)
        if not is_tower(core):
            return []
        return [
            Tower(
                adapter=self,
                module=core,
                blocks=list(core.encoder.layer),
                num_prefix_tokens=0,
                has_class_token=True,
                width=core.layernorm.normalized_shape[0],
                single_stream=True,
                final_norm=core.layernorm,
            )
        ]

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        core: Any = towers[0].module
        attentions = [(block.attention, {"forward": fit_mask}) for block in core.encoder.layer]
        return [(core, {"forward": call_model}), (core.embeddings, {"visual_embed": note_patches}), *attentions]

    def carry(self, tower: Tower) -> dict[str, Any]:
        length = _text_length.get()
        if length is None:
            raise ValueError("a block of ViLT alone does not know where the text ends: call the model as a whole")
        return {"text_length": length}

    def attend(
        self, tower: Tower, block: Any, hidden_states: Tensor, *args: Any, text_length: int = 0, **kwargs: Any
    ) -> Attended:
        normed = block.layernorm_before(hidden_states)
        attended, *rest = block.attention(normed, *args, **kwargs)
        return Attended(attended + hidden_states, normed, tuple(rest), text_length + 1)

    def attend_sized(
        self, tower: Tower, block: Any, sizes: Tensor, hidden_states: Tensor, attention_mask: Tensor | None = None,
        *args: Any, text_length: int = 0, **kwargs: Any,
    ) -> Attended:  # fmt: skip
        """Count sizes beside the mask of the text, which counts as before."""
        refuse_extras(args, kwargs)
        length = hidden_states.shape[1]
        mask = None if attention_mask is None else attention_mask[..., :length, :length]
        attended = self.with_sizes(tower, block, sizes, hidden_states, mask)
        return attended._replace(rest=(), num_prefix_tokens=text_length + 1)

    def finish(self, tower: Tower, block: Any, tokens: Tensor, rest: Any) -> Any:
        return (block.output(block.intermediate(block.layernorm_after(tokens)), tokens), *rest)

    def instead_of_reentry(self, model: nn.Module, tower: Tower) -> str:
        return advice_of_transformers(model, tower.module) or super().instead_of_reentry(model, tower)

    def projections(self, block: Any) -> Projections:
        attention = block.attention.attention
        return Projections.separate(
            attention.query,
            attention.key,
            attention.value,
            block.attention.output.dense,
            num_heads=attention.num_attention_heads,
            scale=attention.attention_head_size**-0.5,
            norm=block.layernorm_before,
            out=lambda heads: block.attention.output(heads, None),
            dropout=rate(attention.dropout),
        )

    def grid(self, tower: Tower, *args: Any, **kwargs: Any) -> None:
        return None  # the embeddings alone know, and note it

    def text_width(self, tower: Tower) -> NoReturn:
        raise ValueError(
            f"{type(tower.module).__name__} reads its text in the same sequence as its image, so guide() has nothing "
            'to add, and there is no joint space for relevance "values" or "joint": call the model with input_ids and '
            'pixel_values, and use relevance="keys" or "features"'
        )
