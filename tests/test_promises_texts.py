"""On every supported host each row is guided by its own text and by nothing of another row, in every pairing."""

from __future__ import annotations

import pytest
import torch
from hosts import build, ids, take, texts
from hosts.calls import check_rows_are_their_own, encode
from promised import RATE, every_host, packed_too

import patchselect


@packed_too
@pytest.mark.parametrize("guidance", ["text", "image"])
def test_each_row_is_its_own(name, guidance):
    case = build(name)
    patchselect.apply(case.model, RATE, guidance=guidance)
    check_rows_are_their_own(case, guidance)


@packed_too
def test_a_text_changes_its_row_and_no_other(name):
    case = build(name)
    images, text = case.images(4), texts(case, 4)
    for relevance in case.relevances:
        handle = patchselect.apply(case.model, RATE, relevance=relevance)
        other = text.clone()
        other[1] = texts(case, 1, seed=9)
        traces = []
        for given in (text, other):
            with handle.record() as trace:
                encode(case, images, given)
            traces.append(trace[0].relevance)
        changed = (traces[0] - traces[1]).abs().amax(dim=1) > 1e-7
        assert changed.tolist() == [False, True, False, False], relevance


@packed_too
def test_relevance_is_a_distribution_that_does_not_depend_on_the_scale_of_the_text(name):
    case = build(name)
    images, text = case.images(3), texts(case, 3)
    for relevance in case.relevances:
        handle = patchselect.apply(case.model, RATE, relevance=relevance)
        kept = []
        for scale in (1.0, 7.0):
            with handle.record() as trace:
                encode(case, images, text * scale)
            kept.append([entry.kept for entry in trace])
            for entry in trace:
                assert (entry.relevance >= 0).all()
                torch.testing.assert_close(entry.relevance.sum(dim=1), torch.ones(3))
        assert all(torch.equal(a, b) for a, b in zip(*kept)), relevance


@every_host
def test_a_call_brings_its_own_text(name):
    case = build(name)
    if case.pair is None:
        pytest.skip("a bare tower has no text side")
    images, tokens = case.images(3), ids(3)
    runs = []
    patchselect.apply(case.model, RATE, pairing="paired")
    embedding = next(part for part in case.model.modules() if isinstance(part, torch.nn.Embedding)
                     and part.num_embeddings == 99)  # fmt: skip
    embedding.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        paired = case.pair(case.model, images, tokens)
        assert len(runs) == 1, "the text encoder ran twice for one call"
        text = case.text_side(case.model, tokens)
        with patchselect.guide(case.model, text):
            explicit = case.pair(case.model, images, tokens)
    torch.testing.assert_close(paired, explicit, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="text i guides image i"), torch.no_grad():
        case.pair(case.model, images, ids(2))
    with pytest.raises(ValueError, match="no text guides this call"):
        encode(case, images)


@every_host
def test_pairings(name):
    case = build(name)
    images, text = case.images(2), texts(case, 3)
    for relevance in case.relevances:
        patchselect.apply(case.model, RATE, relevance=relevance)
        every = encode(case, images, text, "all")
        assert every.shape[0] == 6
        for image in range(2):
            for row in range(3):
                alone = encode(case, take(images, slice(image, image + 1)), text[row : row + 1])
                torch.testing.assert_close(every[3 * image + row], alone[0], rtol=1e-3, atol=1e-4)
        one = encode(case, images, text[:1], "shared")
        torch.testing.assert_close(one, encode(case, images, text[:1].repeat(2, 1)), rtol=1e-4, atol=1e-5)
        shuffled = encode(case, images, text[[2, 0, 1]], "shared")
        torch.testing.assert_close(encode(case, images, text, "shared"), shuffled, rtol=1e-4, atol=1e-5)
        own = torch.stack([text[:2], text[1:]])  # (images, texts, width): each image is shared by texts of its own
        each = encode(case, images, own, "shared")
        for image in range(2):
            alone = encode(case, take(images, slice(image, image + 1)), own[image], "shared")
            torch.testing.assert_close(each[image], alone[0], rtol=1e-3, atol=1e-4)
        with pytest.raises(ValueError, match=r"\(images, texts, width\) = \(3, 2, .*, but 2 images came"):
            encode(case, images, own[[0, 1, 0]], "shared")
