"""Hosts that select with a relevance, a reduction or an adapter from a file of the user's own: those of examples/."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hosts import build
from hosts.case import Case

import patchselect

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

from plain_vit import PlainViT, PlainViTAdapter
from quarters import Quarters
from trim import Trim

HOSTS = ("plain_vit", "clip", "open_clip", "openai_clip")
OBJECTS = {
    "trim": dict(relevance=Trim()),
    "trim-least": dict(relevance=Trim(-1)),
    "quarters": dict(fusion=Quarters()),
    "both": dict(relevance=Trim(-1), fusion=Quarters()),
}
both = pytest.mark.parametrize("name", HOSTS)
each = pytest.mark.parametrize("kind", OBJECTS)


def host(name: str) -> Case:
    if name != "plain_vit":
        return build(name)
    torch.manual_seed(0)
    model = PlainViT(patch=16).eval()
    images = lambda batch: torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(7))  # noqa: E731
    return Case(model, lambda m, x: m(x)[:, 0], 48, images, lambda m: m, 1, 16, (4, 4))


def patched(name: str, kind: str, rate: float = 0.25, **more):
    case = host(name)
    adapter = PlainViTAdapter() if name == "plain_vit" else None
    handle = patchselect.apply(case.model, rate, layers=[1, 3], adapter=adapter, **{**OBJECTS[kind], **more})
    return case, handle


def features(case: Case, text: torch.Tensor, batch: int = 3, **options):
    with patchselect.guide(case.model, text, **options):
        return case.image_side(case.model, case.images(batch))
