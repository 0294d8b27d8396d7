"""A relevance or a reduction of the user's own that answers otherwise than it must is refused at `apply`."""

from __future__ import annotations

import pytest
import torch
from hosts import build, texts
from outside import PlainViTAdapter, Quarters, Trim, patched

import patchselect


def test_a_class_in_place_of_an_object_is_refused_with_what_to_write():
    case = build("openai_clip")
    with pytest.raises(TypeError, match=r"write Trim\(\), not Trim"):
        patchselect.apply(case.model, relevance=Trim)
    with pytest.raises(TypeError, match=r"write Quarters\(\), not Quarters"):
        patchselect.apply(case.model, fusion=Quarters)
    with pytest.raises(TypeError, match=r"write PlainViTAdapter\(\), not PlainViTAdapter"):
        patchselect.apply(case.model, adapter=PlainViTAdapter)
    with pytest.raises(TypeError, match="'plain-vit' does not know"):
        patchselect.apply(case.model, adapter=PlainViTAdapter())


def test_a_reduction_that_reads_places_wants_a_whole_tower():
    case, handle = patched("plain_vit", "quarters")
    with pytest.raises(ValueError, match="reads the place of each patch in the image"):
        with patchselect.guide(case.model, texts(case, 2)):
            case.model.blocks[1](torch.randn(2, 17, 48))
    with pytest.raises(ValueError, match="a layer alone does not know"):
        patchselect.PatchSelection(0.5, fusion=Quarters())
    handle.remove()


class Told(patchselect.Relevance):
    """Scores that a test says."""

    name = "told"

    def __init__(self, change, weights=False):
        self.change, self.scores_are_weights = change, weights

    def scores(self, seen, text):
        rows = seen.patches.shape[0]
        return self.change(torch.einsum("btd,bnd->btn", text.expand(rows, -1, -1), seen.projected(seen.patches)), seen)


BAD_SCORES = {
    "no tensor": (lambda s, seen: None, TypeError, "scores of told.* must return a tensor"),
    "no texts": (lambda s, seen: s[:, 0], ValueError, r"scores of told.* must return \(B, T, n\)"),
    "texts first": (lambda s, seen: s.transpose(0, 1), ValueError, "asked, got"),
    "one image": (lambda s, seen: s[:1], ValueError, "asked, got"),
    "all tokens": (lambda s, seen: torch.cat([s[..., :1], s], dim=-1), ValueError, "of the patches alone"),
    "not finite": (lambda s, seen: torch.cat([s[..., 1:], s[..., :1] - float("inf")], dim=-1), ValueError, "-inf"),
    "not a number": (lambda s, seen: s * float("nan"), ValueError, "must be finite"),
}


@pytest.mark.parametrize("kind", BAD_SCORES)
def test_a_relevance_that_answers_otherwise_is_refused_at_apply(kind):
    change, error, message = BAD_SCORES[kind]
    case = build("clip")
    with pytest.raises(error, match=message):
        patchselect.apply(case.model, 0.5, relevance=Told(change))
    assert not any("_patchselect" in vars(part) for part in case.model.modules())
    patchselect.apply(case.model, 0.5, relevance=Told(lambda s, seen: s))
    patchselect.apply(case.model, 0.5, relevance=Told(lambda s, seen: s.softmax(dim=-1), weights=True))
    for wrong in (lambda s, seen: 10 * s.softmax(dim=-1), lambda s, seen: -s.softmax(dim=-1)):
        with pytest.raises(ValueError, match="weights of told.* at least 0 and sum to 1"):
            patchselect.apply(case.model, 0.5, relevance=Told(wrong, weights=True))


class Bent(Quarters):
    """A good reduction whose answer a test bends."""

    name = "bent"

    def __init__(self, bend):
        self.bend = bend

    def reduce(self, tokens, relevance, num_keep, num_prefix_tokens, places=None):
        found = super().reduce(tokens, relevance, num_keep, num_prefix_tokens, places)
        return self.bend(found, num_prefix_tokens)


BENT = {
    "tuple": (lambda r, p: tuple(r), TypeError, "must return a Reduced, got tuple"),
    "longer": (lambda r, p: r._replace(tokens=torch.cat([r.tokens, r.tokens[:, :1]], 1)), ValueError, "num_fused"),
    "fewer kept": (lambda r, p: r._replace(kept=r.kept[:, 1:]), ValueError, "kept of|kept .*must return"),
    "no into": (lambda r, p: r._replace(into=None), TypeError, "into of bent.* must return a tensor"),
    "prefix counted": (lambda r, p: r._replace(kept=r.kept + 7), ValueError, "without prefix tokens"),
    "off by one": (lambda r, p: r._replace(kept=(r.kept + 1) % 8), ValueError, "says other places than kept"),
    "into beyond": (lambda r, p: r._replace(into=r.into + 50), ValueError, "places in the new sequence"),
    "order": (lambda r, p: r._replace(kept=r.kept.flip(1)), ValueError, "says other places than kept"),
}


@pytest.mark.parametrize("kind", BENT)
def test_a_reduction_that_answers_otherwise_is_refused_at_apply(kind):
    bend, error, message = BENT[kind]
    case = build("clip")
    with pytest.raises(error, match=message):
        patchselect.apply(case.model, 0.5, fusion=Bent(bend))
    assert not any("_patchselect" in vars(part) for part in case.model.modules())
    patchselect.apply(case.model, 0.5, fusion=Bent(lambda r, p: r))
