"""A relevance, a reduction and a host from a file of the user's own do all that built-in ones do."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hosts import build, texts
from hosts.case import Case
from since import since
from torch import nn

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


@each
@both
def test_it_selects_records_restores_and_draws(name, kind):
    pytest.importorskip("matplotlib")
    case, handle = patched(name, kind)
    fused = 4 if kind in ("quarters", "both") else 1
    with torch.no_grad(), handle.record() as trace:
        features(case, texts(case, 3))
    assert [entry.num_tokens for entry in trace] == [1 + 4 + fused, 1 + 2 + fused]
    for entry in trace:
        assert entry.relevance.sum(dim=1).allclose(torch.ones(3))
        tokens = torch.arange(entry.num_tokens - 1.0).view(1, -1, 1).expand(3, -1, 2)
        board = patchselect.restore(tokens, entry, fill="fused")
        assert torch.equal(board[..., 0].flatten(1), entry.holders.to(board))
    assert patchselect.visualization.draw_selection(torch.rand(3, 3, 64, 64), trace, ["a", "b", "c"]) is not None


@each
@both
def test_the_most_relevant_patches_are_those_that_its_scores_name(name, kind):
    case, handle = patched(name, kind)
    with torch.no_grad(), handle.record() as trace:
        features(case, texts(case, 3))
    expected = trace[0].relevance.topk(4, dim=1).indices.sort(dim=1).values
    assert torch.equal(trace[0].kept, expected)


def test_the_sign_turns_the_choice_round():
    kept = []
    for kind in ("trim", "trim-least"):
        case, handle = patched("clip", kind, 0.5)
        with torch.no_grad(), handle.record() as trace:
            features(case, texts(case, 3))
        kept.append({(row, place) for row, places in enumerate(trace[0].kept.tolist()) for place in places})
    assert not kept[0] & kept[1] and len(kept[0] | kept[1]) == 3 * 16


def test_four_tokens_are_the_means_of_their_quarters():
    tokens = torch.randn(2, 1 + 16, 5, dtype=torch.float64)
    relevance = torch.rand(2, 16, dtype=torch.float64)
    places = patchselect.reduction.Places(torch.arange(16).expand(2, -1), (4, 4))
    found = Quarters().reduce(tokens, relevance, 3, 1, places)
    for row in range(2):
        kept = set(found.kept[row].tolist())
        for quarter, (top, left) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
            inside = [4 * y + x for y in (top, top + 1) for x in (left, left + 1) if 4 * y + x not in kept]
            weights = relevance[row, inside]
            mean = (weights[:, None] * tokens[row, [1 + i for i in inside]]).sum(0) / weights.sum()
            torch.testing.assert_close(found.tokens[row, 1 + 3 + quarter], mean)
            assert all(int(found.into[row, 1 + i]) == 1 + 3 + quarter for i in inside)


@each
@both
def test_rows_belong_to_their_text_alone(name, kind):
    case, _ = patched(name, kind)
    text = texts(case, 3)
    with torch.no_grad():
        whole = features(case, text)
        every = features(case, text, pairing="all").view(3, 3, -1)
        shared = features(case, text[:1], pairing="shared")
        alone = features(case, text[:1].expand(3, -1))
    torch.testing.assert_close(every[range(3), range(3)], whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shared, alone, rtol=1e-4, atol=1e-5)


@each
@both
def test_nothing_is_added_and_nothing_is_lost(name, kind):
    case = host(name)
    images, keys = case.images(2), list(case.model.state_dict())
    with torch.no_grad():
        plain = case.image_side(case.model, images)
        adapter = PlainViTAdapter() if name == "plain_vit" else None
        patchselect.apply(case.model, 1.0, adapter=adapter, **OBJECTS[kind])
        assert torch.equal(features(case, texts(case, 2), 2), plain)
        assert list(case.model.state_dict()) == keys
        patchselect.remove(case.model)
        assert torch.equal(case.image_side(case.model, images), plain)


@each
@both
def test_a_budget_is_kept_and_counts_what_the_object_costs(name, kind):
    case, handle = patched(name, kind)
    rate = patchselect.keep_rate_for_budget(case.model, 0.7)
    cost = patchselect.budget.Cost.of(handle.towers[0], handle.plan)
    fraction = patchselect.functional.as_ratio(rate)
    assert 0 < rate < 1
    assert cost.of_encoder(16, (1, 3), [fraction] * 2) <= 0.7 * cost.of_encoder(16)
    once, each_patch = handle.plan.relevance.cost(handle.towers[0], 1, True, "text")
    projection = patchselect.relevance.joint.projection_cost(handle.towers[0])
    assert (once, each_patch) == (0, projection + case.text_width) or "trim" not in handle.relevance


@since("checkpoints without reentry")
@each
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(kind, reentrant):
    from torch.utils.checkpoint import checkpoint

    found = []
    for checkpointed in (False, True):
        case, _ = patched("plain_vit", kind)
        if checkpointed:
            for block in case.model.blocks:
                block.forward = _checkpointed(checkpoint, block.forward, reentrant)
        images = case.images(2).requires_grad_()
        with patchselect.guide(case.model, texts(case, 2)):
            out = case.image_side(case.model, images)
        out.square().sum().backward()
        found.append([parameter.grad for parameter in case.model.parameters()])
    for plain, again in zip(*found):
        torch.testing.assert_close(plain, again)


def _checkpointed(checkpoint, forward, reentrant):
    return lambda x: checkpoint(forward, x, use_reentrant=reentrant)


@each
@both
def test_copies_and_files_carry_the_object(name, kind, tmp_path):
    case, _ = patched(name, kind)
    text = texts(case, 2)
    with torch.no_grad():
        expected = features(case, text, 2)
        for other in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
            with patchselect.guide(other, text):
                assert torch.equal(case.image_side(other, case.images(2)), expected)


class Guided(nn.Module):
    """A whole program: pixels and text features in, image features out."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model, self.image_side = case.model, case.image_side

    def forward(self, images, text):
        with patchselect.guide(self.model, text):
            return self.image_side(self.model, images)


@since("fullgraph")
@pytest.mark.parametrize("kind", ["both"])
@pytest.mark.parametrize("name", ["plain_vit", "open_clip"])
def test_compile_without_graph_breaks_or_recompiles(name, kind):
    from torch._dynamo.utils import counters

    case, _ = patched(name, kind)
    case.model.requires_grad_(False)
    torch._dynamo.reset()
    counters.clear()
    program = Guided(case)
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        text = texts(case, 3, seed=seed)
        torch.testing.assert_close(compiled(case.images(3), text), program(case.images(3), text))
    assert counters["stats"]["unique_graphs"] == 1


@since("export")
@pytest.mark.parametrize("kind", ["both"])
@pytest.mark.parametrize("name", ["plain_vit", "open_clip"])
def test_export_with_a_dynamic_batch(name, kind):
    case, _ = patched(name, kind)
    case.model.requires_grad_(False)
    program, batch = Guided(case), torch.export.Dim("batch", min=2, max=64)
    example = case.images(3), texts(case, 3)
    exported = torch.export.export(program, example, dynamic_shapes=({0: batch}, {0: batch}))
    other = torch.randn(7, 3, 64, 64), texts(case, 7)
    torch.testing.assert_close(exported.module()(*other), program(*other))


@since("ONNX")
@pytest.mark.parametrize("kind", ["both"])
def test_onnx(tmp_path, kind):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    case, _ = patched("plain_vit", kind)
    case.model.requires_grad_(False)
    program, batch = Guided(case), torch.export.Dim("batch", min=2, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            program, (case.images(3), texts(case, 3)), str(tmp_path / "it.onnx"), dynamo=True, verbose=False,
            input_names=["images", "text"], dynamic_shapes=({0: batch}, {0: batch}),
        )  # fmt: skip
    other = torch.randn(5, 3, 64, 64), texts(case, 5)
    session = runtime.InferenceSession(str(tmp_path / "it.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": other[0].numpy(), "text": other[1].numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), program(*other), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", OBJECTS)
def test_pairs_are_scored(kind):
    case, _ = patched("clip", kind)
    images, text = case.images(3), texts(case, 4)
    found = patchselect.score_pairs(case.model, images, text)
    with torch.no_grad():
        rows = features(case, text, pairing="all").view(3, 4, -1)
    expected = torch.nn.functional.cosine_similarity(rows, text.expand(3, -1, -1), dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


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
