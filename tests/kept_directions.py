"""What tests of kept directions share: a CLIP that selects, a text, a count of what is computed, relevances."""

from __future__ import annotations

import torch
from stand_ins import open_clip

import patchselect
from patchselect.relevance import directions

WIDTH, FIRST = 24, 4


def clip_that_selects():
    found = open_clip()
    patchselect.apply(found, 0.5)
    return found


def one_text():
    return torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1))


def counted(monkeypatch):
    """Count how often a text is pulled back."""
    calls = []
    original = directions._pulled_back

    def pulled_back(*args):
        calls.append(args[1])
        return original(*args)

    monkeypatch.setattr(directions, "_pulled_back", pulled_back)
    return calls


def relevances(model, image):
    """The relevance of each selection layer."""
    with patchselect.handle_of(model).record() as trace, torch.no_grad():
        model.encode_image(image)
    return [entry.relevance for entry in trace]


def fresh(model, text, image, pairing="paired"):
    with patchselect.guide(model, text.clone(), pairing):
        return relevances(model, image)


def same(found, wanted):
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def block_of(model):
    return model.visual.transformer.resblocks[FIRST + 2]
