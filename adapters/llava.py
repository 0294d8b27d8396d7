"""Language models of Hugging Face transformers that read each token of a CLIP or SigLIP tower through a projector.

LLaVA, VipLLaVA and PaliGemma: one placeholder of the prompt per token, and nothing between tower and words that asks
where in the image a token stands. Others, which do, are refused with the reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from patchselect.adapter import Tower, Wrapper
from patchselect.calls import bound
from patchselect.prompts.calls import call_prompted, generate_prompted
from patchselect.prompts.encoded import features_in_call
from patchselect.prompts.host import Prompted
from patchselect.prompts.layers import call_tower_evenly, check_read, evening
from patchselect.weights import is_linear
from patchselect.wiring.twins import bare_twin

from .readers import check_release, core_of, names_of, refuse_others
from .siglip import TransformersSiglip
from .transformers import TransformersClip

READS_LAYERS = ("LlavaModel", "VipLlavaModel")
"""Read the hidden states of the layers that `vision_feature_layer` names."""
READS_LAST = ("PaliGemmaModel",)
"""Read what the tower returns."""


def call_features(module: Any, name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
    """Encode images: what is read of the tower must come after its selections, and be of one length."""
    encoded = features_in_call(module, args, kwargs)
    if encoded is not None:
        return encoded
    wiring = module._patchselect
    given = bound(tuple(inspect.signature(original).parameters), args, kwargs)
    host, tower = wiring.towers[0].adapter, wiring.towers[0]
    asked = host.layers_read(module, given)
    if asked is None or not wiring.plan.selects:
        return original(*args, **kwargs)
    host.extra(module, given)
    check_read(wiring.plan.layers, len(tower.blocks), asked)
    with evening(not isinstance(asked, int)):
        return original(*args, **kwargs)


def check_projector(model: nn.Module, projector: nn.Module) -> None:
    """Raise a TypeError unless a projector maps each token by itself."""
    first: Any = next((part for part in projector.modules() if is_linear(part)), None)
    weight = None if first is None else first.weight
    if weight is None or weight.is_meta or not weight.is_floating_point() or hasattr(weight, "full_tensor"):
        return
    if (weight.dtype, weight.device.type) == (torch.float16, "cpu"):
        return
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 5, first.in_features, generator=generator).to(weight)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        try:
            twin = bare_twin(projector)
            whole, part = twin(tokens), twin(tokens[:, 3:])
            alike = whole.shape[:2] == (1, 5) and torch.allclose(whole[:, 3:], part, rtol=0.02, atol=0.02)
        except (RuntimeError, ValueError, AssertionError):
            alike = False
    if not alike:
        raise TypeError(
            f"{type(model).__name__} cannot be patched: its {type(projector).__name__} reads tokens by their neighbours"
        )


class Llava(Prompted):
    """What the models of this family share, whichever tower they have."""

    reads: tuple[str, ...] = READS_LAYERS + READS_LAST
    call_tower: Wrapper = staticmethod(call_tower_evenly)
    call_features: Wrapper = staticmethod(call_features)
    image_arguments: tuple[str, ...] = ("pixel_values", "vision_feature_layer", "vision_feature_layers",
                       "vision_feature_select_strategy", "image_sizes")  # fmt: skip

    def core(self, model: nn.Module) -> Any:
        return core_of(model)

    def towers(self, model: nn.Module) -> list[Tower]:
        core = core_of(model)
        if not set(names_of(core)) & set(self.reads):
            refuse_others(model)
            return []
        found = super().towers(self.tower_of(core))
        if not found:
            return []
        check_release(model, core)
        if self.takes_flat_patches(found[0]):
            raise TypeError(
                f"{type(model).__name__} cannot be patched: its tower takes patches that are cut out already"
            )
        check_projector(model, self.projector_of(core))
        return found

    def tower_of(self, core: Any) -> nn.Module:
        return core.vision_tower

    def projector_of(self, core: Any) -> nn.Module:
        return core.multi_modal_projector

    def takes_flat_patches(self, tower: Tower) -> bool:
        return is_linear(tower.module.embeddings.patch_embedding)  # type: ignore[union-attr]

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        core = core_of(model)
        found: list[tuple[nn.Module, Mapping[str, Wrapper]]] = [
            (core, {"forward": call_prompted, "get_image_features": self.call_features}),
            (self.tower_of(core), {"forward": self.call_tower}),
        ]
        if core is not model:
            outer: dict[str, Wrapper] = {"forward": call_prompted}
            if hasattr(model, "generate"):
                outer["generate"] = generate_prompted
            found.append((model, outer))
        return found

    def check(self, model: nn.Module, tower: Tower, layers: tuple[int, ...]) -> None:
        core = core_of(model)
        asked = self.layers_read(core, {})
        self.extra(core, {})
        if asked is not None:
            check_read(layers, len(tower.blocks), asked)

    def layers_read(self, core: Any, given: Mapping[str, Any]) -> Any:
        """Return the hidden states that a call reads, as indices; `None` where it reads what the tower returns."""
        if not set(names_of(core)) & set(READS_LAYERS):
            return None
        names = ("vision_feature_layer", "vision_feature_layers")
        asked = next((given[name] for name in names if given.get(name) is not None), None)
        return (
            asked
            if asked is not None
            else next(getattr(core.config, name) for name in names if hasattr(core.config, name))
        )

    def first_position(self, core: Any) -> int:
        return int("PaliGemmaModel" in names_of(core))

    def extra(self, core: Any, given: Mapping[str, Any]) -> int:
        has_class_token = hasattr(self._embeddings(core), "class_embedding")
        if not set(names_of(core)) & set(READS_LAYERS):
            return int(has_class_token)
        name = "vision_feature_select_strategy"
        strategy = given.get(name) or getattr(core.config, name, "default")
        if strategy == "default" and not has_class_token:
            raise ValueError(
                f'{name}="default" cuts off the first token of the tower as if it were a [CLS], and this one has none: '
                f'use {name}="full"'
            )
        return int(has_class_token and strategy == "full")

    def _embeddings(self, core: Any) -> Any:
        tower: Any = self.tower_of(core)
        return (tower.vision_model if hasattr(tower, "vision_model") else tower).embeddings

    def sizes(self, tower: Tower, core: Any, given: Mapping[str, Any]) -> list[int]:
        if given.get("image_sizes") is not None:
            raise ValueError("image_sizes is for towers that take images of several sizes: leave it out")
        pixels: Tensor = given["pixel_values"]
        if pixels.dim() != 4:
            raise ValueError(f"pixel_values must be (images, channels, height, width), got {tuple(pixels.shape)}")
        grid: Any = self.grid(tower, pixels)
        return [grid[0] * grid[1] + self.extra(core, given)] * len(pixels)


class LlavaClip(Llava, TransformersClip):
    """With a CLIP tower."""

    name = "transformers-llava-clip"


class LlavaSiglip(Llava, TransformersSiglip):
    """With a SigLIP tower."""

    name = "transformers-llava-siglip"
