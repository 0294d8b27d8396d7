"""Quantised layers are read as what they stand for, and a budget counts them in whatever form they are kept."""

from __future__ import annotations

import pytest
import torch
from hosts import build
from tooling import WAYS, look, tool, tuned, vision_linears
from torch import Tensor, nn

import patchselect


def _bnb(kind: str):
    def make(model):
        bnb = tool("bitsandbytes")
        for parent, name, layer in vision_linears(model):
            size = layer.in_features, layer.out_features, layer.bias is not None
            if kind == "8 bit":
                made = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False)
                made.weight = bnb.nn.Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
            else:
                made = bnb.nn.Linear4bit(*size, quant_type="nf4", compute_dtype=torch.float32)
                made.weight = bnb.nn.Params4bit(
                    layer.weight.data.clone(), requires_grad=False, quant_type="nf4", module=made
                )
            made.bias = None if layer.bias is None else nn.Parameter(layer.bias.data.clone())
            setattr(parent, name, made.to("cpu").eval())

    return make


def _torchao(kind: str):
    def make(model):
        quantization = tool("torchao.quantization")
        inside = {id(layer) for *_, layer in vision_linears(model)}
        quantization.quantize_(model, getattr(quantization, kind)(), filter_fn=lambda layer, path: id(layer) in inside)

    return make


def _dynamic(model):
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


QUANTISED = {
    "bitsandbytes 8 bit": _bnb("8 bit"),
    "bitsandbytes 4 bit": _bnb("4 bit"),
    "torchao int8 weight-only": _torchao("Int8WeightOnlyConfig"),
    "torchao float8 weight-only": _torchao("Float8WeightOnlyConfig"),
    "quantize_dynamic": _dynamic,
}


def dequantised(layer: nn.Module) -> Tensor:
    """What each library says that its weight stands for."""
    kind = type(layer).__name__
    if kind == "Linear8bitLt":
        weight, state = layer.weight, layer.state
        codes, scale = (weight.CB, weight.SCB) if getattr(weight, "SCB", None) is not None else (state.CB, state.SCB)
        return codes.float() * scale.float()[:, None] / 127
    if kind == "Linear4bit":
        return tool("bitsandbytes").functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    weight = layer.weight() if callable(layer.weight) else layer.weight
    return weight.dequantize()


@pytest.mark.parametrize("name", ["clip", "open_clip", "timm_class_token", "albef", "blip"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_layers_are_read_as_what_they_stand_for(kind, order, name):
    for guidance, relevance in WAYS:
        case = build(name)
        if guidance == "image" and relevance == "values" and "joint" not in case.relevances:
            continue
        places = [(parent, child_name) for parent, child_name, _ in vision_linears(case.model)]
        if order == "before":
            QUANTISED[kind](case.model)
        patchselect.apply(case.model, 0.5, guidance=guidance, relevance=relevance, layers=[0])
        if order == "after":
            QUANTISED[kind](case.model)
        found, _ = look(case, case.model, guidance)
        for parent, child_name in places:
            layer = getattr(parent, child_name)
            weight = dequantised(layer)
            plain = nn.Linear(weight.shape[1], weight.shape[0])
            bias = layer.bias() if callable(layer.bias) else layer.bias
            with torch.no_grad():
                plain.weight.copy_(weight)
                plain.bias.copy_(torch.zeros(()) if bias is None else bias)
            torch.testing.assert_close(patchselect.weights.matrix(layer), weight, rtol=2e-3, atol=2e-4)
            setattr(parent, child_name, plain.eval())
        expected, _ = look(case, case.model, guidance)
        torch.testing.assert_close(found, expected, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("kind", [*QUANTISED, "LoRA"])
def test_a_budget_counts_layers_in_whatever_form_they_are_kept(kind):
    case = build("clip")
    expected = patchselect.keep_rate_for_budget(case.model, 0.7)
    model = tuned(case.model, "LoRA") if kind == "LoRA" else case.model
    if kind in QUANTISED:
        QUANTISED[kind](model)
    # Reading a matrix from its layer is counted too, once an image; the towers here are so narrow that it shows.
    assert abs(patchselect.keep_rate_for_budget(model, 0.7) - expected) < 0.05
