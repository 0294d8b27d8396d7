"""Weights that accelerate offloads, dispatches or wraps after `apply` are those that are read."""

from __future__ import annotations

import pytest
from hosts import build
from tooling import WAYS, check_alike, look, tool

import patchselect


def _cpu_offload(model, folder):
    return tool("accelerate").cpu_offload(model, preload_module_classes=["MultiheadAttention"]) or model


def _disk_offload(model, folder):
    return tool("accelerate").disk_offload(model, folder, preload_module_classes=["MultiheadAttention"]) or model


def _dispatch(model, folder):
    names = [name for name, _ in (*model.named_children(), *model.named_parameters(recurse=False))]
    places = {name: ("disk", "cpu")[index % 2] for index, name in enumerate(names)}
    accelerate = tool("accelerate")
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, preload_module_classes=["MultiheadAttention"],
        force_hooks=True,
    )  # fmt: skip


def _prepare(model, folder):
    return tool("accelerate").Accelerator(cpu=True).prepare(model)


@pytest.mark.parametrize("name", ["clip", "siglip", "open_clip", "timm_class_token", "albef", "blip"])
@pytest.mark.parametrize("place", [_cpu_offload, _disk_offload, _dispatch, _prepare])
def test_offloaded_after_apply(place, name, tmp_path):
    for number, (guidance, relevance) in enumerate(WAYS):
        case = build(name)
        if guidance == "image" and relevance == "values" and "joint" not in case.relevances:
            continue
        patchselect.apply(case.model, 0.5, guidance=guidance, relevance=relevance)
        expected = look(case, case.model, guidance)
        model = place(case.model, str(tmp_path / str(number)))
        check_alike(look(case, model, guidance), expected)
