"""Weights that are made of others, by pruning or by a norm of theirs, are read as they are at this moment."""

from __future__ import annotations

import pytest
import torch
from hosts import build, texts
from since import needs
from tooling import check_alike, look, vision_linears
from torch import nn
from torch.nn.utils import parametrizations, prune

import patchselect


def _pruned(layer):
    prune.l1_unstructured(layer, "weight", 0.3)


def _hook_weight_norm(layer):
    nn.utils.weight_norm(layer)


def _hook_spectral_norm(layer):
    nn.utils.spectral_norm(layer)


def _parametrized(layer):
    parametrizations.weight_norm(layer)


PARTS = {_pruned: "weight_orig", _hook_weight_norm: "weight_g", _hook_spectral_norm: "weight_orig",
         _parametrized: "parametrizations.weight.original0"}  # fmt: skip


@pytest.mark.parametrize("name", ["clip", "timm_class_token", "albef", "blip"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("change", PARTS)
def test_weights_that_are_made_of_others_are_those_of_this_moment(change, order, name):
    if change is _parametrized:
        needs("parametrized weight norm")
    case = build(name)
    if order == "after":
        patchselect.apply(case.model, 0.5, relevance="values")
    layers = [layer for *_, layer in vision_linears(case.model)]
    for layer in layers:
        change(layer)
    if order == "before":
        patchselect.apply(case.model, 0.5, relevance="values")
    look(case, case.model)
    with torch.no_grad():
        for number, layer in enumerate(layers):  # an optimiser's step, before any of them has run again
            dict(layer.named_parameters())[PARTS[change]].mul_(1 + 0.1 * number)
    found = look(case, case.model)
    check_alike(found, look(case, case.model))

    for _ in range(2):  # each step has a graph of its own
        with patchselect.guide(case.model, texts(case, 2)):
            case.image_side(case.model.train(), case.images(2)).sum().backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in case.model.parameters())
