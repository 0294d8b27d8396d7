"""LAVIS: its ALBEF, BLIP and CLIP models, which are called with a dictionary `samples`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from patchselect.adapter import Attended, TextCall, Tower, Wrapper
from patchselect.wiring.text_calls import call_with_text, recall_text
from patchselect.wiring.wording import refuse_masks

from .albef import Albef
from .blip_salesforce import is_text
from .captions import Alike, vits_and_head
from .openai_clip import ClipReader, OpenAiClip, is_tower

IMAGES = {"image", "image0"}


class Lavis(Albef):
    """ALBEF's and BLIP's heads, with ALBEF's ViT: `samples["text_input"]` guides."""

    name = "lavis"

    def towers(self, model: nn.Module) -> list[Tower]:
        found = vits_and_head(model, takes_samples, text_of_samples)
        return self.vit_towers(*found) if found else []


def takes_samples(calls: Mapping[str, tuple[str, ...]], halves: bool) -> bool:
    """Tell a head of LAVIS: its calls begin with a dictionary."""
    return any(names[:1] == ("samples",) for names in calls.values())


def text_of_samples(given: dict[str, Any], names: tuple[str, ...]) -> Any:
    """Return the text of the samples of a call."""
    return text_in(given.get("samples"))


class LavisClipReader(ClipReader):
    """LAVIS' `CLIP`, which is called with strings in a dictionary."""

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        return [(model, {"forward": call_with_text, "extract_features": call_with_text, "encode_text": recall_text})]

    def text_of_call(
        self, model: Any, tower: Tower, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TextCall | None:
        text = text_in(args[0] if args else kwargs.get("samples"))
        if text is None:
            return None
        ids = model.tokenizer(text).to(model.token_embedding.weight.device)
        result = model.encode_text(ids)
        return TextCall(result, (Alike(model, "encode_text", (ids,), {}, result),), compares_all=True)


class LavisClip(OpenAiClip):
    """Its copy of OpenAI's CLIP, whose blocks stand in a list and take a mask."""

    name = "lavis-clip"

    def towers(self, model: nn.Module) -> list[Tower]:
        visual: Any = getattr(model, "visual", None)
        takes = tuple(inspect.signature(type(model).forward).parameters)[1:2]
        if takes != ("samples",) or not is_tower(visual, nn.ModuleList):
            return []
        return [self.sequence_first_tower(visual, LavisClipReader())]

    def attend(self, tower: Tower, block: Any, x: Tensor, attn_mask: Tensor | None = None) -> Attended:  # type: ignore[override]
        refuse_masks(tower, {"attn_mask": attn_mask})
        return super().attend(tower, block, x)


def text_in(samples: Any) -> Any:
    """Return the text of `samples` that come with an image."""
    if not isinstance(samples, Mapping) or not IMAGES & set(samples):
        return None
    text = samples.get("text_input")
    return text if is_text(text) else None
