"""Every supported host trains, and computes in half precision, under autocast and with texts of another dtype."""

from __future__ import annotations

import itertools

import pytest
import torch
from hosts import build, of_dtype, texts
from hosts.calls import encode
from promised import RATE, packed_too
from since import since

import patchselect


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
    images = of_dtype(case.images(2), model)
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
    images = of_dtype(images, torch.bfloat16)
    assert encode(case, images, text.bfloat16()).isfinite().all()
    assert encode(case, images, text).isfinite().all(), "float32 text guides a bfloat16 model"
