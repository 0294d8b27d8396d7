"""`Contrast`, `Peek`, `Influence` and `Protect`: against what their equations say, and on hosts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hosts import build, texts

import patchselect
from patchselect.reduction import Alike, Protect
from patchselect.relevance import Contrast, Influence, Peek, Values

HOSTS = ("open_clip", "clip", "openai_clip")
OBJECTS = {
    "contrast": dict(relevance=Contrast(torch.randn(5, 24, generator=torch.Generator().manual_seed(1)))),
    "peek": dict(relevance=Peek()),
    "influence": dict(relevance=Influence(), fusion=Protect()),
    "influence of a peek": dict(relevance=Influence(Peek()), fusion=Protect(1.0)),
}
both = pytest.mark.parametrize("name", HOSTS)
each = pytest.mark.parametrize("kind", OBJECTS)


class Kept(patchselect.Relevance):
    """Another relevance, which keeps what it was shown and what it answered."""

    name = "kept"

    def __init__(self, of: patchselect.Relevance) -> None:
        self.of, self.found = of, []

    def scores(self, seen, text):
        self.found.append((seen, text, self.of.scores(seen, text)))
        return self.found[-1][2]

    def check(self, tower, layers, guidance):
        self.of.check(tower, layers, guidance)


def settings(kind: str, width: int) -> dict:
    if kind == "contrast":  # texts are as wide as the host's joint space
        return dict(relevance=Contrast(torch.randn(5, width, generator=torch.Generator().manual_seed(1))))
    return OBJECTS[kind]


def scored(name: str, relevance: patchselect.Relevance, merge: float):
    """What a relevance was shown and answered in float64, on three images with two texts each."""
    case = build(name)
    model = case.model.double()
    kept = Kept(relevance)
    patchselect.apply(model, 0.4, layers=[2], relevance=kept, merge=merge)
    text = texts(case, 2).double()
    with torch.no_grad(), patchselect.guide(model, text, pairing="shared"):
        case.image_side(model, case.images(3).double())
    return kept.found[-1]  # before it, `apply` has asked once


def z(scores):
    return (scores - scores.mean(-1, keepdim=True)) / scores.std(-1, keepdim=True, unbiased=False)


def per_head(tower, index, goal):
    """`W_O^lh W_V^lh` of each head, applied to `g` by plain loops: `(T, H, D)`."""
    weights = tower.adapter.projections(tower.blocks[index])
    width = weights.value.shape[0] // weights.num_heads
    heads = [slice(h * width, (h + 1) * width) for h in range(weights.num_heads)]
    return torch.stack([goal @ weights.output[:, h] @ weights.value[h] for h in heads], dim=1)


@both
def test_contrast_is_its_equation(name):
    case = build(name)
    background = torch.randn(4, texts(case, 1).shape[-1], generator=torch.Generator().manual_seed(2))
    seen, text, found = scored(name, Contrast(background, share=0.5), 0.0)
    tower = seen.tower
    asked = F.normalize(text[0], dim=-1) - 0.5 * F.normalize(background.double(), dim=-1).mean(0)
    goal = tower.adapter.read_back(tower, asked)
    expected = torch.zeros(len(seen.patches), len(asked), seen.patches.shape[1], dtype=torch.float64)
    for index in range(seen.index, len(tower.blocks)):
        norm = tower.adapter.projections(tower.blocks[index]).norm
        plain = F.layer_norm(seen.patches, seen.patches.shape[-1:], eps=norm.eps)
        for head in per_head(tower, index, goal).unbind(1):
            direction = head * norm.weight
            loud = direction.norm(dim=-1, keepdim=True) ** 0.5
            if index == seen.index:
                expected += torch.einsum("btn->btn", torch.einsum("bnd,td->btn", seen.normed, loud * head))
            else:
                expected += torch.einsum("bnd,td->btn", plain, loud * direction)
    torch.testing.assert_close(z(found), z(expected), rtol=1e-9, atol=1e-9)
    weights = Contrast().combine(found)
    shares = (2 * z(found)).log_softmax(-1).amax(1)
    torch.testing.assert_close(weights, z(shares).softmax(-1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("merge", [0.0, 0.5])
@both
def test_peek_is_its_equation(name, merge):
    seen, text, found = scored(name, Peek(share=0.5), merge)
    tower, adapter = seen.tower, seen.tower.adapter
    goal = adapter.read_back(tower, text[0])
    with torch.no_grad():
        values = Values().scores(seen, text)
        sizes = torch.ones(seen.all_tokens.shape[:2], dtype=torch.float64) if seen.sizes is None else seen.sizes
        assert bool(merge) == bool((sizes > 1).any())
        change = torch.zeros_like(found)
        tokens = seen.all_tokens
        cls = finished(tower, seen.index, tokens[:, :1])
        for index in range(seen.index + 1, len(tower.blocks)):
            block = tower.blocks[index]
            weights = adapter.projections(block)
            normed = torch.cat([weights.norm(cls), weights.norm(tokens[:, 1:])], dim=1)
            # All keys and values by the host's own layers, one head after the other.
            query, key, value = (x.unflatten(-1, (weights.num_heads, -1)) for x in weights.qkv(normed))
            directions, reads = per_head(tower, index, goal), []
            for head in range(weights.num_heads):
                logits = query[:, :1, head] @ key[:, :, head].transpose(1, 2) * weights.scale
                a = (logits.squeeze(1) + sizes.log()).softmax(-1)
                reads.append(torch.einsum("bn,bne->be", a, value[:, :, head]))
                u = torch.einsum("bnd,td->btn", normed[:, 1:], directions[:, head])
                a = a[:, None, 1:]
                change += a * (u - (a * u).sum(-1, keepdim=True) / a.sum(-1, keepdim=True))
            cls = finished(tower, index, cls + weights.out(torch.cat(reads, dim=-1).unsqueeze(1)))
    torch.testing.assert_close(found, z(values) + 0.5 * z(change), rtol=1e-8, atol=1e-8)


def finished(tower, index, tokens):
    given = tokens if tower.batch_first else tokens.transpose(0, 1)
    found = tower.adapter.finish(tower, tower.blocks[index], given, None)
    found = found if isinstance(found, torch.Tensor) else found[0]
    return found if tower.batch_first else found.transpose(0, 1)


def test_peek_in_the_last_block_has_nowhere_to_look():
    case = build("open_clip")
    last = len(case.tower(case.model).transformer.resblocks) - 1
    kept = Kept(Peek())
    patchselect.apply(case.model, 0.5, layers=[last], relevance=kept)
    with torch.no_grad(), patchselect.guide(case.model, texts(case, 3)):
        case.image_side(case.model, case.images(3))
    seen, text, found = kept.found[0]
    torch.testing.assert_close(found, z(Values().scores(seen, text)), rtol=1e-4, atol=1e-4)


def test_peek_refuses_what_has_no_class_token():
    case = build("siglip")
    with pytest.raises(ValueError, match=r'which \w+ does not have: use relevance="values"'):
        patchselect.apply(case.model, relevance=Peek())


def test_influence_counts_what_speaks_against_a_text():
    scores = torch.tensor([[[3.0, -4.0, 0.5, 0.0, 0.5]]])

    class Given(Values):
        def scores(self, seen, text):
            return scores

    found = Influence(Given())
    assert found.combine(found.scores(None, None)).argsort(descending=True)[0, :2].tolist() == [1, 0]
    with pytest.raises(ValueError, match="keys are weights: use values or joint"):
        Influence(patchselect.relevance.Keys())


@pytest.mark.parametrize("background", [torch.zeros(3), torch.zeros(0, 3)])
def test_contrast_wants_prompts(background):
    with pytest.raises(ValueError, match=r"\(prompts, width\); got \("):
        Contrast(background)


@pytest.mark.parametrize("copies", [0, 2])
def test_protect_keeps_and_merges_by_size(copies):
    torch.manual_seed(0)
    prefix, patches, keep = 2, 23, 6
    tokens, keys = torch.randn(3, prefix + patches, 5).double(), torch.randn(3, prefix + patches, 4).double()
    sizes = torch.randint(1, 4, (3, prefix + patches)).double()
    sizes[:, :prefix] = 1
    relevance = torch.rand(3, copies, patches).double() if copies else torch.rand(3, patches).double()
    reduction = Protect(1 / 3)
    found = reduction.reduce(tokens, relevance, keep, prefix, None, Alike(keys, sizes))
    fused = reduction.num_fused(patches, keep)
    assert fused == 2 and found.tokens.shape == (3 * max(1, copies), prefix + keep + fused, 5)
    assert sum(reduction.rounds(patches, keep)) == patches - keep - fused
    flat = relevance.flatten(0, 1) if copies else relevance
    assert torch.equal(found.kept, flat.topk(keep, dim=1).indices.sort(dim=1).values)
    repeated = [part.repeat_interleave(max(1, copies), dim=0) for part in (tokens, sizes)]
    after = reduction.sizes(repeated[1], found)
    assert torch.equal(after.sum(1), repeated[1].sum(1))
    for row in range(len(found.tokens)):
        for place in range(found.tokens.shape[1]):
            inside = found.into[row] == place
            weights = repeated[1][row, inside]
            mean = (weights[:, None] * repeated[0][row, inside]).sum(0) / weights.sum()
            torch.testing.assert_close(found.tokens[row, place], mean)
            assert place >= prefix + keep or int(inside.sum()) == 1


def test_protect_merges_what_is_alike_and_shows_a_nan():
    keys = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1], [1, 0], [0, 1]]])
    alike = Alike(keys, torch.ones(1, 6))
    relevance = torch.tensor([[9.0, 8, 1, 1, 1, 1]])
    found = Protect(1.5).reduce(torch.arange(6.0).view(1, 6, 1), relevance, 2, 0, None, alike)
    assert found.kept.tolist() == [[0, 1]] and found.into.tolist() == [[0, 1, 2, 2, 3, 4]]
    assert found.tokens[0, 2:].flatten().tolist() == [2.5, 4.0, 5.0]
    unknown = torch.tensor([[9.0, 8, 1, float("nan"), 1, 1]])
    assert Protect().reduce(torch.zeros(1, 6, 1), unknown, 2, 0, None, alike).tokens.isnan().any()
    with pytest.raises(ValueError, match="alike=Alike"):
        Protect().reduce(torch.zeros(1, 6, 1), torch.rand(1, 6), 2, 0)


@each
@both
def test_they_keep_the_promises(name, kind):
    case = build(name)
    given = settings(kind, texts(case, 1).shape[-1])
    handle = patchselect.apply(case.model, 0.4, merge=0.5, **given)
    text, images = texts(case, 3), case.images(3)

    def features(text, model=case.model, **options):
        with patchselect.guide(model, text, **options):
            return case.image_side(model, images)

    with torch.no_grad():
        with handle.record() as trace:
            whole = features(text)
        assert trace[0].relevance.sum(1).allclose(torch.ones(3))
        assert int(trace[0].holders.max()) == trace[0].num_tokens - 2 and int(trace[0].holders.min()) == 0
        every = features(text, pairing="all").view(3, 3, -1)
        torch.testing.assert_close(every[range(3), range(3)], whole, rtol=1e-4, atol=1e-5)
        alone = features(text[:1], pairing="shared")
        torch.testing.assert_close(alone, features(text[:1].expand(3, -1)), rtol=1e-4, atol=1e-5)
        prefix = patchselect.encode_prefix(case.model, images)
        torch.testing.assert_close(features(text, prefix=prefix), whole, rtol=1e-4, atol=1e-5)
        for twin in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
            torch.testing.assert_close(features(text, twin), whole, rtol=1e-4, atol=1e-5)
    text = text.requires_grad_()
    features(text).square().sum().backward()
    if kind.startswith("influence"):  # sizes weigh what merges, so nothing passes a gradient to the relevance
        assert text.grad is None
    else:
        assert text.grad.isfinite().all() and text.grad.abs().sum() > 0
