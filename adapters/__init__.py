"""The families of hosts that `patchselect.apply` knows. A new family is one new file and one line here."""

from __future__ import annotations

from patchselect.adapter import Adapter

from .albef import Albef
from .blip import TransformersBlip
from .blip_salesforce import SalesforceBlip
from .dinov3 import TransformersDinov3
from .eva import OpenClipEva, TimmEva
from .lavis import Lavis, LavisClip
from .llava import LlavaClip, LlavaSiglip
from .meter import Meter
from .mplug import Mplug
from .naflex import OpenClipNaflex, OpenClipNaflexEva, TimmNaflex, TimmNaflexEva
from .open_clip import OpenClip, OpenClipTimm
from .openai_clip import OpenAiClip
from .perception import PerceptionEncoder
from .plain import TransformersPlain
from .qwen2_5_vl import Qwen2Point5Vl
from .qwen2_vl import Qwen2Vl
from .qwen3_vl import Qwen3Vl
from .shuffled import Idefics3, InternVl
from .siglip import TransformersSiglip
from .timm import TimmViT
from .transformers import TransformersClip
from .vilt import TransformersVilt
from .vit_mae import TransformersMae

ADAPTERS: tuple[Adapter, ...] = (
    LlavaClip(),
    LlavaSiglip(),
    Idefics3(),
    InternVl(),
    Qwen2Vl(),
    Qwen2Point5Vl(),
    Qwen3Vl(),
    TransformersClip(),
    TransformersSiglip(),
    LavisClip(),
    PerceptionEncoder(),
    OpenClip(),
    OpenClipNaflex(),
    OpenClipNaflexEva(),
    TimmNaflex(),
    TimmNaflexEva(),
    OpenClipTimm(),
    OpenClipEva(),
    TimmViT(),
    TimmEva(),
    Lavis(),
    SalesforceBlip(),
    Albef(),
    Meter(),
    Mplug(),
    OpenAiClip(),
    TransformersBlip(),
    TransformersVilt(),
    TransformersPlain(),
    TransformersMae(),
    TransformersDinov3(),
)
