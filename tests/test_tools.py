"""Adapters, quantised layers, pruned ones and offloaded ones: the relevance is that of what the layers compute with."""

from __future__ import annotations

import contextlib
import copy
import importlib

import pytest
import torch
from hosts import Case, build, texts
from since import needs
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import patchselect

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj", "visual_projection"]
WAYS = [("text", "values"), ("text", "keys"), ("image", "values"), ("image", "keys")]


def tool(name: str):
    needs(name.split(".")[0])
    return importlib.import_module(name)


def shaken(model: nn.Module) -> nn.Module:
    """Return a model whose trainable weights, those of an adapter, do something."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return model.eval()


def look(case: Case, model: nn.Module, guidance: str = "text") -> tuple[Tensor, Tensor]:
    """What selection layers weigh, and what comes out."""
    text = patchselect.guide(model, texts(case, 2)) if guidance == "text" else contextlib.nullcontext()
    with torch.no_grad(), patchselect.handle_of(model).record() as trace, text:
        found = case.image_side(model, case.images(2))
    return torch.cat([entry.relevance for entry in trace], dim=1), found


def vision_linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers of the vision side that are called as such, which those of torch's own attention are not."""
    return [
        (parent, name, child)
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and "text" not in path + name
    ]


def check_alike(found, expected, plain=None) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-3, atol=1e-4)
    if plain is not None:
        assert (plain[0] - expected[0]).abs().max() > 1e-3, "the tool changes nothing here, so nothing was shown"


# peft

METHODS = {
    "LoRA": ("LoraConfig", dict(r=4, lora_dropout=0.5)),
    "DoRA": ("LoraConfig", dict(r=4, use_dora=True)),
    "IA3": ("IA3Config", dict(feedforward_modules=["out_proj"])),
    "VeRA": ("VeraConfig", dict(r=4, target_modules=PROJECTIONS[:4])),
    "AdaLoRA": ("AdaLoraConfig", dict(init_r=4, target_r=4, total_step=10, tinit=1, tfinal=1)),
    "LoHa": ("LoHaConfig", dict(r=4)),
    "LoKr": ("LoKrConfig", dict(r=4)),
    "OFT": ("OFTConfig", dict(r=0, oft_block_size=4)),
    "HRA": ("HRAConfig", dict(r=4)),
}


PACKED = r"(visual|visual_encoder|eyes|trunk)?\.?(trunk\.)?blocks\.\d+\.attn\.(qkv|proj)"
OWN_TARGETS = {
    "open_clip_siglip": PACKED,
    "timm_class_token": PACKED,
    "timm_average": PACKED,
    "albef": PACKED + "|vision_proj|text_proj|see|read",
}
"""What adapters are put on in hosts whose attention has one layer for queries, keys and values."""


def tuned(model: nn.Module, method: str, targets: str | None = None) -> nn.Module:
    """The model under an adapter that does something."""
    peft = tool("peft")
    kind, settings = METHODS[method]
    if targets is not None:
        settings = {key: value for key, value in settings.items() if not key.endswith("_modules")}
        settings = {**settings, "target_modules": targets}
        if method == "IA3":
            settings["feedforward_modules"] = r".*attn\.proj"
    return shaken(peft.get_peft_model(model, getattr(peft, kind)(**{"target_modules": PROJECTIONS, **settings})))


@pytest.mark.parametrize("relevance", ["values", "keys"])
@pytest.mark.parametrize("method", METHODS)
def test_adapters_count_as_if_merged_whether_they_come_before_apply_or_after(method, relevance):
    reference = build("clip")
    patchselect.apply(reference.model, 0.5, relevance=relevance)
    plain = look(reference, reference.model)
    patchselect.remove(reference.model)
    merged = tuned(reference.model, method).merge_and_unload()
    patchselect.apply(merged, 0.5, relevance=relevance)
    expected = look(reference, merged)

    case = build("clip")
    before = tuned(case.model, method)
    handle = patchselect.apply(before, 0.5, relevance=relevance)
    assert handle.model is case.model
    check_alike(look(case, before), expected, plain if relevance == "values" else None)
    with before.disable_adapter():
        check_alike(look(case, before), plain)

    case = build("clip")
    patchselect.apply(case.model, 0.5, relevance=relevance)
    after = tuned(case.model, method)
    check_alike(look(case, after), expected)


@pytest.mark.parametrize("name", OWN_TARGETS)
@pytest.mark.parametrize("method", METHODS)
def test_adapters_on_packed_projections_count_as_if_merged(method, name):
    """In both orders, for both relevances; the head of ALBEF is called with image and text as its own code does."""
    for relevance in ("values", "keys"):
        reference, targets = build(name), OWN_TARGETS[name]
        patchselect.apply(reference.model, 0.5, relevance=relevance, layers=[1, 3])
        plain = look(reference, reference.model)
        patchselect.remove(reference.model)
        merged = tuned(reference.model, method, targets).merge_and_unload()
        patchselect.apply(merged, 0.5, relevance=relevance, layers=[1, 3])
        expected = look(reference, merged)
        for order in ("before", "after"):
            case = build(name)
            if order == "after":
                patchselect.apply(case.model, 0.5, relevance=relevance, layers=[1, 3])
            model = tuned(case.model, method, targets)
            if order == "before":
                patchselect.apply(model, 0.5, relevance=relevance, layers=[1, 3])
            check_alike(look(case, case.model), expected, plain)
            with model.disable_adapter():
                check_alike(look(case, case.model), plain)
            unloaded = model.unload()
            check_alike(look(case, unloaded), plain)


def test_the_dropout_of_an_adapter_does_not_hide_its_matrix():
    peft = tool("peft")
    model = peft.get_peft_model(build("clip").model, peft.LoraConfig(r=4, lora_dropout=0.5, target_modules=PROJECTIONS))
    layer = model.base_model.model.visual_projection
    nn.init.normal_(layer.lora_B["default"].weight)
    model.eval()
    expected = patchselect.weights.matrix(layer)
    model.train()
    state = torch.get_rng_state()
    torch.testing.assert_close(patchselect.weights.matrix(layer), expected)
    assert layer.training and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["albef", "blip"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_the_projections_of_a_head_are_read_with_their_adapters(name, order):
    peft = tool("peft")
    case, reference = build(name), build(name)

    def adapted(model):
        found = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["text_proj", "vision_proj"]), model)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for path, weight in found.named_parameters():
                if "lora_" in path:
                    weight.copy_(torch.randn(weight.shape, generator=generator))
        return found.eval()

    patchselect.apply(reference.model, 0.5, relevance="values")
    plain = look(reference, reference.model)
    adapted(reference.model)
    for parent in list(reference.model.modules()):
        for child_name, child in list(parent.named_children()):
            if hasattr(child, "base_layer"):
                child.merge()
                setattr(parent, child_name, child.base_layer)
    expected = look(reference, reference.model)

    if order == "before":
        adapted(case.model)
    patchselect.apply(case.model, 0.5, relevance="values")
    if order == "after":
        adapted(case.model)
    check_alike(look(case, case.model), expected, plain)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_tuned_norm_whose_scale_is_hidden_is_refused_by_name(order):
    peft, case = tool("peft"), build("clip")

    def tune():
        peft.get_peft_model(case.model, peft.LNTuningConfig(target_modules=["post_layernorm", "layer_norm1"]))

    if order == "after":
        patchselect.apply(case.model, 0.5, relevance="values")
    tune()
    with pytest.raises((TypeError, ValueError), match="LNTuningLayer"):
        if order == "before":
            patchselect.apply(case.model, 0.5, relevance="values")
        look(case, case.model)


def test_a_prefix_made_with_an_adapter_is_refused_without_it():
    case = build("clip")
    patchselect.apply(case.model, 0.5)
    model = tuned(case.model, "LoRA")
    prefix = patchselect.encode_prefix(model, case.images(2))

    def use():
        with torch.no_grad(), patchselect.guide(model, texts(case, 2), prefix=prefix):
            return case.image_side(model, prefix.images)

    use()
    with model.disable_adapter(), pytest.raises(ValueError, match="an adapter was switched on or off"):
        use()
    use()


# accelerate


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


# Weights that are made of others


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


# Quantised


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


# Hooks


@pytest.mark.parametrize("name", ["clip", "siglip", "timm_class_token", "albef", "blip"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_hooks_that_change_what_a_layer_returns_count_as_merged(order, name):
    for guidance, relevance in WAYS:
        reference, case = build(name), build(name)
        if guidance == "image" and relevance == "values" and "joint" not in case.relevances:
            continue
        plain = build(name)
        patchselect.apply(plain.model, 0.5, guidance=guidance, relevance=relevance)
        generator = torch.Generator().manual_seed(3)
        scales = {}
        with torch.no_grad():
            for parent, child, layer in vision_linears(reference.model):
                scale = 1 + torch.rand(layer.out_features, generator=generator)
                scales[child, id(parent)] = scale
                layer.weight.mul_(scale[:, None])
                if layer.bias is not None:
                    layer.bias.mul_(scale).add_(1)
                else:
                    layer.bias = nn.Parameter(torch.ones(layer.out_features))
        patchselect.apply(reference.model, 0.5, guidance=guidance, relevance=relevance)
        expected = look(reference, reference.model, guidance)
        if order == "after":
            patchselect.apply(case.model, 0.5, guidance=guidance, relevance=relevance)
        for scale, (*_, layer) in zip(scales.values(), vision_linears(case.model)):
            layer.register_forward_hook(lambda module, args, out, scale=scale: out * scale + 1)
        if order == "before":
            patchselect.apply(case.model, 0.5, guidance=guidance, relevance=relevance)
        check_alike(look(case, case.model, guidance), expected, look(plain, plain.model, guidance))


def test_hooks_that_look_on_change_nothing_and_see_one_token_more():
    case, seen = build("clip"), []
    patchselect.apply(case.model, 0.5, relevance="values")
    expected = look(case, case.model)
    for *_, layer in vision_linears(case.model):
        layer.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape[:-1])))
    found = look(case, case.model)
    assert all(torch.equal(left, right) for left, right in zip(found, expected))
    assert (1, 1) in seen and all(shape[0] == 2 for shape in seen if shape != (1, 1)), "no unit vectors"


def test_hooks_that_bend_a_layer_are_refused_by_name():
    case = build("clip")
    patchselect.apply(case.model, 0.5, layers=[2], relevance="keys")
    layer = patchselect.handle_of(case.model).towers[0].blocks[2].self_attn.q_proj
    hook = layer.register_forward_hook(lambda module, args, out: out.relu())
    with pytest.raises(TypeError, match="Linear does not show the matrix.*its hooks make it something else"):
        look(case, case.model)
    hook.remove()
    patchselect.apply(case.model, 0.5, relevance="values")
    case.model.vision_model.post_layernorm.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.raises(TypeError, match="a forward hook changes what LayerNorm returns"):
        look(case, case.model)


class Odd(nn.Linear):
    def forward(self, x):
        raise RuntimeError("rows of another kind")


def test_a_layer_that_cannot_be_asked_is_refused_by_name():
    case = build("clip")
    case.model.visual_projection = Odd(48, 24)
    with pytest.raises(TypeError, match="Odd does not show the matrix that it applies.*rows of another kind.*merge"):
        patchselect.apply(case.model, 0.5, relevance="values")
    assert copy.deepcopy(case.model) is not None
