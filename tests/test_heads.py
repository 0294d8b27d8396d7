"""Every head that fuses image and text keeps every promise: doubles in CI, the real ALBEF and mPLUG where they are."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from heads import (
    HEADS,
    build,
    changed,
    floats,
    ids_in,
    loss_of,
    pictures_in,
    rewound,
    skip_what_autocast_cannot_run,
    texts_in,
)
from since import loaded as load_file

import patchselect
from patchselect.functional import num_kept

LAYERS = [1, 3]
every_head = pytest.mark.parametrize("name", list(HEADS))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


def lengths(patches: int, rate: float) -> list[int]:
    first = num_kept(patches, rate) + 1
    return [1 + first, 1 + num_kept(first, rate) + 1]


def equal(first, second) -> bool:
    first, second = floats(first), floats(second)
    return bool(first) and len(first) == len(second) and all(map(torch.equal, first, second))


@every_head
def test_one_step_of_training(name):
    head = build(name)
    model = head.model.train()
    rewind = rewound(head)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kinds = {path: (part, type(part)) for path, part in model.named_modules()}
    reference = head.call()
    rewind()
    handle = patchselect.apply(model, 0.5, LAYERS)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with handle.record() as trace:
        output = head.call()
    assert [entry.num_tokens for entry in trace] == lengths(head.patches, 0.5) * len(handle.towers)
    loss = loss_of(output)
    assert loss.isfinite() and not equal(output, reference)
    loss.backward()
    online = handle.towers[0].module
    first = handle.towers[0].adapter.projections(handle.towers[0].blocks[0]).output
    assert first.grad is not None and first.grad.isfinite().all() and first.grad.abs().sum() > 0
    assert all(weight.grad is None for tower in handle.towers[1:] for weight in tower.module.parameters())
    assert any(weight.grad is not None for weight in online.parameters())
    handle.remove()
    rewind()
    assert {path: (part, type(part)) for path, part in model.named_modules()} == kinds
    assert not any("patchselect" in key for part in model.modules() for key in vars(part))
    assert equal(head.call(), reference)


@every_head
def test_a_text_guides_its_own_image_alone(name):
    head = build(name)
    handle = patchselect.apply(head.model.eval(), 0.5, LAYERS)
    rewind = rewound(head)
    batch = head.batch(0)
    texts = head.images if head.captions else len(ids_in(texts_in(batch)))
    other_features = head.text_features()
    other_features[1] = torch.randn(other_features.shape[1], generator=torch.Generator().manual_seed(9))
    with torch.no_grad(), handle.record() as trace:
        head.call(batch)
    rewind()
    with torch.no_grad(), handle.record() as other:
        head.call(batch if head.captions else changed(batch, 1), text=other_features)
    assert len(trace) == len(other) >= 2
    for number, (one, two) in enumerate(zip(trace, other)):
        moved = (one.relevance != two.relevance).any(dim=1)
        expected = torch.arange(head.images) % texts == 1
        assert moved[expected].all(), number
        assert not moved[~expected].any(), number


@every_head
@pytest.mark.parametrize("training", [False, True])
def test_keeping_everything_changes_nothing(name, training):
    head = build(name)
    if training and not head.same_stream:
        pytest.skip("dropout is drawn in another order here: the text runs before the image")
    head.model.train(training)
    rewind = rewound(head)
    reference = head.call()
    rewind()
    patchselect.apply(head.model, 1.0, LAYERS)
    assert equal(head.call(), reference)


@every_head
def test_no_layer_of_a_text_encoder_runs_twice(name):
    """But where it reads the image from its first layer on, so that the run that guides is one more."""
    head = build(name)
    rewind = rewound(head)
    layers = [part for path, part in head.model.named_modules() if path.rpartition(".")[0].endswith("encoder.layer")]
    calls: list[int] = []
    for layer in layers:  # what is inside of it runs when it computes; it may be answered from memory as a whole
        layer.attention.register_forward_hook(lambda module, args, output: calls.append(id(module)))
    head.call()
    before = sorted(calls)
    calls.clear()
    rewind()
    patchselect.apply(head.model, 0.5, LAYERS)
    head.call()
    assert len(calls) == len(before) + head.extra_text_layers
    assert head.captions or before
    assert head.extra_text_layers or sorted(calls) == before


@every_head
def test_copies_and_pickles_select_on_their_own(name):
    head = build(name)
    handle = patchselect.apply(head.model.eval(), 0.5, LAYERS)
    rewind = rewound(head)
    with torch.no_grad(), head.active():
        expected = head.call()
        rewind()
        duplicate = copy.deepcopy(head.model)
        stored = io.BytesIO()
        torch.save(head.model, stored)
        stored.seek(0)
        loaded = load_file(stored)
        handle.remove()
        assert equal(head.call(model=duplicate), expected)
        assert equal(head.call(model=loaded), expected)


@every_head
def test_autocast(name):
    head = build(name)
    skip_what_autocast_cannot_run(name)
    handle = patchselect.apply(head.model.train(), 0.5, LAYERS)
    with torch.autocast("cpu", dtype=torch.bfloat16), handle.record() as trace:
        loss = loss_of(head.call())
    assert loss.isfinite()
    assert [entry.num_tokens for entry in trace[:2]] == lengths(head.patches, 0.5)
    loss.backward()


@every_head
def test_its_tower_serves_every_text_prefixes_maps_and_budgets(name):
    head = build(name)
    model = head.model.eval()
    handle = patchselect.apply(model, 0.5, LAYERS)
    tower = handle.towers[0]
    images = pictures_in(head.batch(0)).flatten(0, -4)
    text = head.text_features()[:2]

    def encode(given):
        return tower.adapter.encode_images(model, tower, given)

    with torch.no_grad():
        with handle.record() as trace, patchselect.guide(model, text, "all"):
            every = encode(images)
        for row in range(2):
            with patchselect.guide(model, text[row : row + 1].expand(len(images), -1)):
                torch.testing.assert_close(every[row::2], encode(images), rtol=1e-4, atol=1e-5)
        prefix = patchselect.encode_prefix(model, images)
        with patchselect.guide(model, text, "all", prefix=prefix):
            torch.testing.assert_close(encode(prefix.images), every, rtol=1e-4, atol=1e-5)
    board = patchselect.restore(every, trace).flatten(1, 2)
    kept = trace[-1].kept[1]
    at = int((kept >= 0).nonzero()[0])
    assert torch.equal(board[1, kept[at]], every[1, 1 + at])
    assert 0.3 < patchselect.keep_rate_for_budget(model, 0.8) < 1.0
