"""Every supported host keeps every promise of the contract."""

from __future__ import annotations

import copy
import io
import itertools
import pickle

import pytest
import torch
from hosts import HOSTS, Case, build, ids, take, texts
from since import SLOW, loaded, since
from torch import Tensor

import patchselect
from patchselect.functional import num_kept

RATE = 0.5
NAMES = [*HOSTS, "llava", "vipllava", "paligemma"]
every_host = pytest.mark.parametrize("name", NAMES)
packed_too = pytest.mark.parametrize(
    "name", [*NAMES, *(["qwen2_vl", "qwen2_5_vl", "qwen3_vl"] if SLOW else ["qwen2_vl"])]
)
"""Hosts whose images stand one behind the other as well; test_multimodal_packed.py has what differs there."""


def encode(case: Case, images, text: Tensor | None = None, pairing: str = "paired", model=None) -> Tensor:
    model = case.model if model is None else model
    with torch.no_grad():
        if text is None:
            return case.image_side(model, images)
        with patchselect.guide(model, text, pairing=pairing):
            return case.image_side(model, images)


def tokens_of(tower, output) -> Tensor:
    """`(B, N, D)` from what a block returned."""
    tokens = output[0] if isinstance(output, tuple) else output
    return tokens if tower.batch_first else tokens.transpose(0, 1)


def lengths(case: Case, rate: float, fused: int = 1) -> list[int]:
    first = num_kept(case.patches, rate) + fused
    return [case.prefix + first, case.prefix + num_kept(first, rate) + fused]


@packed_too
def test_nothing_is_added_and_nothing_is_lost(name):
    case = build(name)
    model, images = case.model, case.images(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parts = {path: (part, type(part)) for path, part in model.named_modules()}
    parameters = [(key, id(value)) for key, value in model.named_parameters()]
    buffers = [(key, id(value)) for key, value in model.named_buffers()]
    reference = encode(case, images)
    handle = patchselect.apply(model, RATE)
    assert not torch.equal(encode(case, images, texts(case, 3)), reference)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [(key, id(value)) for key, value in model.named_parameters()] == parameters
    assert [(key, id(value)) for key, value in model.named_buffers()] == buffers
    assert dict(model.named_modules()) == {path: part for path, (part, _) in parts.items()}
    assert all(isinstance(part, parts[path][1]) for path, part in model.named_modules())
    assert all(type(part).__name__ == parts[path][1].__name__ for path, part in model.named_modules())
    model.load_state_dict(before)
    handle.remove()
    assert {path: (part, type(part)) for path, part in model.named_modules()} == parts
    assert not any("patchselect" in key for part in model.modules() for key in vars(part))
    assert torch.equal(encode(case, images), reference)


@every_host
def test_the_tokens_are_as_long_as_promised(name):
    case = build(name)
    seen: list[Tensor] = []
    tower = patchselect.wiring.towers.find_towers(case.model)[0]
    for block in tower.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(tokens_of(tower, out)))
    handle = patchselect.apply(case.model, RATE, layers=[1, 3])
    with handle.record() as trace:
        encode(case, case.images(2), texts(case, 2))
    short, shorter = lengths(case, RATE)
    whole = case.prefix + case.patches
    assert [tokens.shape[1] for tokens in seen] == [whole, short, short, shorter, shorter, shorter]
    assert [entry.num_tokens for entry in trace] == [short, shorter]
    assert [entry.layer for entry in trace] == [1, 3]


@every_host
def test_keep_rate_one_is_bit_equal(name):
    case = build(name)
    images = case.images(2)
    reference = encode(case, images)
    handle = patchselect.apply(case.model, 1.0)
    assert torch.equal(encode(case, images, texts(case, 2)), reference)
    with handle.record() as trace:
        assert torch.equal(encode(case, images, texts(case, 2)), reference)
    assert trace[0].kept.tolist() == [list(range(case.patches))] * 2


@packed_too
def test_apply_twice_replaces(name):
    case = build(name)
    images, text = case.images(2), texts(case, 2)
    first = patchselect.apply(case.model, RATE, layers=[0, 1, 2, 3])
    second = patchselect.apply(case.model, 0.7, layers=[2])
    with second.record() as trace:
        encode(case, images, text)
    assert [entry.layer for entry in trace] == [2]
    first.remove()
    patchselect.remove(case.model)
    assert torch.equal(encode(case, images), encode(build(name), images))


@packed_too
@pytest.mark.parametrize("guidance", ["text", "image"])
def test_each_row_is_its_own(name, guidance):
    case = build(name)
    images, text = case.images(4), texts(case, 4)
    patchselect.apply(case.model, RATE, guidance=guidance)

    def rows(order) -> Tensor:
        return encode(case, take(images, order), text[order] if guidance == "text" else None)

    whole, order = rows(torch.arange(4)), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(rows(order), whole[order], rtol=1e-4, atol=1e-5)
    for row in range(4):
        torch.testing.assert_close(rows(torch.tensor([row])), whole[row : row + 1], rtol=1e-4, atol=1e-5)


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


@packed_too
def test_copies_and_pickles_are_models_of_their_own(name):
    case = build(name)
    images, text = case.images(2), texts(case, 2)
    patchselect.apply(case.model, RATE)
    expected = encode(case, images, text)
    buffer = io.BytesIO()
    try:
        torch.save(case.model, buffer)
        saved = loaded(io.BytesIO(buffer.getvalue()))
    except (pickle.PicklingError, AttributeError):
        unpatched = build(name)
        encode(unpatched, images)  # transformers hangs hooks on models that were asked for hidden states
        with pytest.raises((pickle.PicklingError, AttributeError)):
            pickle.dumps(unpatched.model)
        saved = None
    for twin in (copy.deepcopy(case.model), saved):
        if twin is None:
            continue
        assert torch.equal(encode(case, images, text, model=twin), expected)
        with torch.no_grad():
            next(iter(twin.parameters())).add_(1.0)
            for parameter in patchselect.wiring.towers.find_towers(twin)[0].blocks[1].parameters():
                parameter.mul_(1.5)
        assert torch.equal(encode(case, images, text), expected)
        assert not torch.equal(encode(case, images, text, model=twin), expected)
        patchselect.remove(twin)
        assert torch.equal(encode(case, images, text), expected)


@every_host
def test_records_name_the_original_patches_and_restore_puts_them_back(name):
    case = build(name)
    images, text = case.images(2), texts(case, 2)
    handle = patchselect.apply(case.model, RATE, layers=[1, 3])
    last: list[Tensor] = []
    tower = handle.towers[0]
    hook = tower.blocks[3].register_forward_hook(lambda module, args, out: last.append(tokens_of(tower, out)))
    with handle.record() as trace:
        encode(case, images, text)
    hook.remove()
    assert [entry.grid for entry in trace] == [case.grid] * 2
    first, second = (set(row.tolist()) for row in (trace[0].kept[0], trace[1].kept[0]))
    assert first <= set(range(case.patches)) and second <= first | {-1}
    tokens = last[-1]
    dense = patchselect.restore(tokens, trace, fill=float("nan"))
    assert dense.shape == (2, *case.grid, tokens.shape[-1])
    flat = dense.flatten(1, 2)
    for row in range(2):
        survivors = [int(place) for place in trace[1].kept[row]]
        for position, place in enumerate(survivors):
            if place >= 0:
                assert torch.equal(flat[row, place], tokens[row, case.prefix + position])
        gone = set(range(case.patches)) - set(survivors)
        assert all(flat[row, place].isnan().all() for place in gone)


@packed_too
def test_training_reaches_the_tower_and_the_text(name):
    case = build(name)
    case.model.train()
    patchselect.apply(case.model, RATE)
    text = texts(case, 2).requires_grad_()
    with patchselect.guide(case.model, text):
        case.image_side(case.model, case.images(2)).square().sum().backward()
    assert text.grad is not None and text.grad.abs().sum() > 0
    first = next(iter(patchselect.wiring.towers.find_towers(case.model)[0].blocks[0].parameters()))
    assert first.grad is not None and first.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=since("half on CPU"))], ids=str)
@packed_too
def test_autocast_in_every_way_of_selecting(name, dtype):
    case = build(name)
    images, text = case.images(2), texts(case, 2)
    for guidance, relevance in itertools.product(("text", "image"), case.relevances):
        if guidance == "image" and relevance == "values" and "joint" not in case.relevances:
            continue
        patchselect.apply(case.model, RATE, relevance=relevance, guidance=guidance)
        for given in (text, text.to(dtype)):
            with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
                out = encode(case, images, given) if guidance == "text" else case.image_side(case.model, images)
            assert out.isfinite().all(), (guidance, relevance)


@pytest.mark.parametrize(("model", "text"), [(torch.float64, torch.float32), (torch.float32, torch.float64)], ids=str)
@packed_too
def test_a_text_of_another_dtype_than_the_model(name, model, text):
    case = build(name)
    case.model.to(model)
    images = case.images(2)
    if isinstance(images, dict):
        images = {**images, "pixel_values": images["pixel_values"].to(model)}
    else:
        images = images.to(model)
    for relevance in case.relevances:
        patchselect.apply(case.model, RATE, relevance=relevance)
        assert encode(case, images, texts(case, 2).to(text)).isfinite().all(), relevance


@packed_too
def test_half_precision_and_autocast(name):
    case = build(name)
    images, text = case.images(2), texts(case, 2)
    patchselect.apply(case.model, RATE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encode(case, images, text).isfinite().all()
    case.model.to(torch.bfloat16)
    if isinstance(images, dict):
        images = {**images, "pixel_values": images["pixel_values"].bfloat16()}
    else:
        images = images.bfloat16()
    assert encode(case, images, text.bfloat16()).isfinite().all()
    assert encode(case, images, text).isfinite().all(), "float32 text guides a bfloat16 model"
