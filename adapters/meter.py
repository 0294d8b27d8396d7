"""METER (zdou0830/METER): its CLIP vision tower, alone or in `METERTransformerSS`, which fuses two streams behind it.

The tower is OpenAI CLIP's without the last block and the projection; its blocks are called with a mask, which is None.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchselect.adapter import Adapter, Attended, Reader, TextCall, TextRun, Texts, Tower, Wrapper, bound
from patchselect.weights import matrix
from patchselect.wiring.text_calls import call_with_text, recall_text
from patchselect.wiring.wording import instead_of_whole, refuse_masks

from .captions import Alike
from .matching import ids_and_mask, matching_probability, seen_whole, states_of
from .openai_clip import OpenAiClip, is_tower

CALL = ("batch", "mask_text", "mask_image", "image_token_type_idx", "img")
HEAD_PARTS = {
    "vit_model", "text_transformer", "token_type_embeddings", "cross_modal_text_transform",
    "cross_modal_image_transform", "cross_modal_text_layers", "cross_modal_image_layers",
    "cross_modal_text_pooler", "cross_modal_image_pooler",
}  # fmt: skip


def takes_mask(block: nn.Module) -> bool:
    """Tell METER's block, whose attention must be given a mask of keys, from OpenAI's."""
    return "x_mask" in inspect.signature(type(block).forward).parameters


def head_around(model: nn.Module) -> nn.Module | None:
    """Return the `METERTransformerSS` in a model, whoever wraps it."""
    parts = (part for part in model.modules() if {name for name, _ in part.named_children()} >= HEAD_PARTS)
    return next((part for part in parts if hasattr(part, "infer")), None)


@dataclass(eq=False)
class MeterHead(Reader):
    """`METERTransformerSS`, which runs RoBERTa, or BERT, layer by layer before it runs the tower.

    The first token of a text guides, as `cross_modal_text_transform` gives it to the fusion layers. What its layers
    have computed for that is remembered, so that none of them runs twice.
    """

    module: Any

    def text_width(self, tower: Tower) -> int:
        return self.module.cross_modal_image_transform.out_features  # type: ignore[no-any-return]

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        encoder = self.module.text_transformer
        repeated = [encoder.embeddings, *encoder.encoder.layer]
        return [(self.module, {"infer": call_with_text}), *((part, {"forward": recall_text}) for part in repeated)]

    def fuses(self, model: nn.Module, tower: Tower, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return True

    def text_of_call(
        self, model: nn.Module, tower: Tower, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TextCall | None:
        given = bound(CALL, args, kwargs)
        ids = given["batch"].get("text_ids_mlm" if given.get("mask_text") else "text_ids")
        if ids is None:
            return None
        states, runs = self._read(ids, given["batch"]["text_masks"])
        return TextCall(self.module.cross_modal_text_transform(states[:, 0]), runs)

    def _read(self, ids: Tensor, masks: Tensor) -> tuple[Tensor, tuple[TextRun, ...]]:
        """Return the states `(B, L, D)` of texts, and every run that gave them."""
        encoder = self.module.text_transformer
        states = encoder.embeddings(input_ids=ids)
        runs = [TextRun(encoder.embeddings, "forward", (), {"input_ids": ids}, states)]
        mask = self._mask(masks)
        for layer in encoder.encoder.layer:
            result = layer(states, mask)
            runs.append(Alike(layer, "forward", (states, mask), {}, result))  # the mask of the head's own is made anew
            states = result[0]
        return states, tuple(runs)

    def _mask(self, seen: Tensor) -> Tensor:
        """Return what BERT adds to its attention, from ones `(B, L)` for what may be read."""
        mask: Tensor = self.module.text_transformer.get_extended_attention_mask(seen, seen.shape, seen.device)
        return mask

    # Pairs.

    def encode_texts(self, model: Any, tower: Tower, texts: Any) -> Texts:
        ids, mask = ids_and_mask(texts, self.module.text_transformer)
        states = self.module.cross_modal_text_transform(self._read(ids, mask)[0])
        return Texts(states[:, 0], {"tokens": states, "mask": mask})

    def score(self, model: Any, tower: Tower, rows: Tensor, texts: Texts) -> Tensor:
        """Score by `rank_output`, where the head was made to rank, else by the probability of a match."""
        head = self.module
        rank: Any = getattr(head, "rank_output", None)
        match: Any = getattr(head, "itm_score", None)
        if rank is None and match is None:
            raise ValueError(
                f"{type(head).__name__} has neither rank_output nor itm_score, so its pairs have no score: build it "
                "with loss_names of irtr or itm above 0"
            )
        fused = self._fused(rows, *states_of(head, texts))
        return matching_probability(match(fused)) if rank is None else rank(fused)[:, 0]

    def _fused(self, rows: Tensor, words: Tensor, seen: Tensor) -> Tensor:
        """Return what the heads read of image tokens and words: both streams, each through its pooler."""
        head, kinds = self.module, self.module.token_type_embeddings.weight
        mask, image_mask = self._mask(seen), self._mask(seen_whole(rows))
        words, rows = words + kinds[0], head.cross_modal_image_transform(rows) + kinds[1]
        for of_words, of_rows in zip(head.cross_modal_text_layers, head.cross_modal_image_layers):
            words, rows = of_words(words, rows, mask, image_mask)[0], of_rows(rows, words, image_mask, mask)[0]
        return torch.cat([head.cross_modal_text_pooler(words), head.cross_modal_image_pooler(rows)], dim=-1)


class Meter(OpenAiClip):
    """`METERTransformerSS` with a tower of CLIP, whoever wraps it; its `vit_model`, and `vit_model.visual` alone.

    A text of the whole model goes back through `cross_modal_image_transform`, transposed; a tower alone takes vectors
    of its width.
    """

    name = "meter"
    default_relevance = "keys"

    def towers(self, model: nn.Module) -> list[Tower]:
        found = [(path, part) for path, part in model.named_modules() if is_tower(part)]
        found = [(path, part) for path, part in found if takes_mask(part.transformer.resblocks[0])]  # type: ignore
        if not found:
            return []
        head = head_around(model)
        if len(found) == 1 and head is not None:
            return [self.sequence_first_tower(found[0][1], MeterHead(head))]
        if len(found) == 1 and found[0][0] in ("", "visual"):
            return [self.sequence_first_tower(found[0][1], Reader())]
        raise TypeError(instead_of_whole(model, found[0][0]))

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        return list(towers[0].reader.methods(model, towers))

    def attend(self, tower: Tower, block: Any, x: Tensor, x_mask: Tensor | None = None) -> Attended:  # type: ignore[override]
        refuse_masks(tower, {"x_mask": x_mask})
        normed = block.ln_1(x)
        return Attended(x + block.attention(normed, None), normed)

    def encode_images(self, model: Any, tower: Tower, images: Any, **kwargs: Any) -> Tensor:
        return tower.module(images, **{"x_mask": None, **kwargs})  # type: ignore[no-any-return]

    def lift(self, tower: Tower, text: Tensor) -> Tensor:
        if not isinstance(tower.reader, MeterHead):
            return text
        weight = matrix(tower.reader.module.cross_modal_image_transform)  # as it is now, with what came around
        return text.to(weight.dtype) @ weight

    def read_back(self, tower: Tower, text: Tensor) -> Tensor:
        if isinstance(tower.reader, MeterHead):
            raise ValueError('relevance="values" is not offered for the whole of METER: use "keys" or "features"')
        return super().read_back(tower, text)

    def project(self, tower: Tower, patches: Tensor) -> Tensor:
        whole = isinstance(tower.reader, MeterHead)  # which compares no image with a text: its layers fuse them
        return Adapter.project(self, tower, patches) if whole else super().project(tower, patches)
