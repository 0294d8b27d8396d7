"""What tests of tools share: a look at what a model selects, and a model under an adapter of peft."""

from __future__ import annotations

import contextlib
import importlib

import torch
from hosts import Case, texts
from since import needs
from torch import Tensor, nn

import patchselect

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "out_proj", "visual_projection"]
WAYS = [("text", "values"), ("text", "keys"), ("image", "values"), ("image", "keys")]
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
