"""Dual encoders of Hugging Face transformers: CLIP, its relatives, SigLIP and SigLIP 2; releases 4.5x and 5.x.

Towers are found by their structure (`embeddings`, `encoder.layers` of pre-norm blocks, `post_layernorm`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from patchselect.adapter import (
    Adapter,
    Attended,
    TextCall,
    TextRun,
    Texts,
    Tower,
    Wrapper,
    bound,
    named,
    patch_grid,
    pooled,
)
from patchselect.weights import Projections, is_linear, matrix, rate
from patchselect.wiring.padding import knows_padding
from patchselect.wiring.text_calls import call_with_text, recall_text
from patchselect.wiring.wording import instead_of_whole, refuse_masks

from .switches import advice_of_transformers

BLOCK_PARTS = {"layer_norm1", "self_attn", "layer_norm2", "mlp"}
ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "out_proj")
TOWER_PARTS = {"embeddings", "pre_layrnorm", "pre_layernorm", "encoder", "post_layernorm", "head"}
WHOLE_MODEL_PARTS = {"vision_model", "text_model", "visual_projection", "text_projection", "classifier"}
DENSE_READERS = {"CLIPSeg": "its segmentation decoder", "OwlViT": "its box heads", "Owlv2": "its box heads"}
TEXT_ARGUMENTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def is_tower(module: Any) -> bool:
    layers = getattr(getattr(module, "encoder", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return False
    if not hasattr(module, "post_layernorm") or not hasattr(getattr(module, "embeddings", None), "patch_embedding"):
        return False
    return all(
        {name for name, _ in block.named_children()} == BLOCK_PARTS
        and all(is_linear(getattr(block.self_attn, part, None)) for part in ATTENTION_PARTS)
        for block in layers
    )


def takes_return_dict(encoder: nn.Module | None) -> dict[str, bool]:
    """Return the flag that makes a text encoder return named outputs, where it takes one."""
    parameters = {} if encoder is None else inspect.signature(encoder.forward).parameters
    named = "return_dict" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return {"return_dict": True} if named else {}


def calls_of(model: nn.Module, block: nn.Module) -> dict[str, Any]:
    """Return how a model, its blocks and its text encoder are called and what blocks return, release by release."""
    of_block = inspect.signature(getattr(type(block), "_patchselect_base", type(block)).forward).parameters
    return {
        "block_call": tuple(of_block)[1:],
        "call": tuple(inspect.signature(type(model).forward).parameters)[1:],
        "returns_tuple": "output_attentions" in of_block,
        "text_flags": takes_return_dict(getattr(model, "text_model", None)),
    }


class TransformersClip(Adapter):
    """`CLIPModel`, `CLIPVisionModel(WithProjection)`, `ChineseCLIPModel`, `AltCLIPModel`, `MetaClip2Model`, …"""

    name = "transformers-clip"
    pools = False
    """Whether an attention pools over the patches, in place of a class token."""
    default_relevance = "values"

    def towers(self, model: nn.Module) -> list[Tower]:
        core: Any = model
        while isinstance(getattr(core, "vision_model", None), nn.Module):
            core = core.vision_model
        if not is_tower(core):
            return self._refuse_readers(model)
        if self._is_siglip(core) != self.pools:
            return []
        name = type(model).__name__
        for prefix, reader in DENSE_READERS.items():
            if name.startswith(prefix) or type(core).__name__.startswith(prefix):
                raise TypeError(f"{name} cannot be patched: {reader} reads a dense grid of patches from its tower")
        strangers = {part for part, _ in model.named_children()} - WHOLE_MODEL_PARTS
        if core is not model and strangers:
            raise TypeError(
                f"{name} cannot be patched as a whole: its {', '.join(sorted(strangers))} may read a fixed number of "
                "patches. Patch the vision tower alone if its reader takes any number of tokens"
            )
        if getattr(core, "vision_rotary_embedding", None) is not None or hasattr(core, "rotary_pos_emb"):
            raise TypeError(f"{type(core).__name__} uses rotary positions per patch, which are not supported")
        readers = {part for part, _ in core.named_children()} - TOWER_PARTS
        if readers:
            reader = ", ".join(sorted(readers))
            raise TypeError(f"{type(core).__name__} cannot be patched: its {reader} may read a fixed number of patches")
        block = core.encoder.layers[0]
        takes = inspect.signature(type(block.self_attn).forward).parameters
        packed = [part for part in ("cu_seqlens", "position_embeddings") if part in takes]
        if packed or not hasattr(block.self_attn, "scale"):
            why = f"is called with {' and '.join(packed)} (images packed into one sequence, or rotary positions)"
            why = why if packed else "is not that of CLIP or SigLIP: it has no scale"
            raise TypeError(f"{type(core).__name__} cannot be patched: its {type(block.self_attn).__name__} {why}")
        has_class_token = hasattr(core.embeddings, "class_embedding")
        return [
            Tower(
                adapter=self,
                module=core,
                blocks=list(core.encoder.layers),
                num_prefix_tokens=int(has_class_token),
                has_class_token=has_class_token,
                width=block.self_attn.q_proj.in_features,
                head=model if is_linear(getattr(model, "visual_projection", None)) else None,
                final_norm=core.post_layernorm,
                parts=calls_of(model, block),
            )
        ]

    def _is_siglip(self, core: Any) -> bool:
        return not hasattr(core.embeddings, "class_embedding")

    def _refuse_readers(self, model: nn.Module) -> list[Tower]:
        for path, part in model.named_modules():
            if is_tower(part):
                raise TypeError(instead_of_whole(model, path))
        return []

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        text = getattr(model, "text_model", None)
        if text is None or not isinstance(getattr(model, "vision_model", None), nn.Module):
            return []
        return [(model, {"forward": call_with_text}), (text, {"forward": recall_text})]

    def attend(self, tower: Tower, block: Any, *args: Any, **kwargs: Any) -> Attended:
        given = bound(tower.parts["block_call"], args, kwargs)
        masks = {name: value for name, value in given.items() if name.endswith("attention_mask") and value is not None}
        if masks and block._patchselect.plan.selects and not (tower.padded and knows_padding(tower)):
            refuse_masks(tower, masks)
        hidden_states = given.pop("hidden_states")
        normed = block.layer_norm1(hidden_states)
        attended, weights = block.self_attn(hidden_states=normed, **given)[:2]
        shown = weights if tower.parts["returns_tuple"] and given.get("output_attentions") else None
        return Attended(hidden_states + attended, normed, shown)

    def finish(self, tower: Tower, block: Any, tokens: Tensor, rest: Any) -> Any:
        tokens = tokens + block.mlp(block.layer_norm2(tokens))
        if not tower.parts["returns_tuple"]:
            return tokens
        return (tokens,) if rest is None else (tokens, rest)

    def reads_patches(self, model: nn.Module, tower: Tower) -> str | None:
        if not tower.has_class_token:
            return "an attention pools over all patches"
        return "this model returns last_hidden_state for its user" if tower.head is None else None

    def as_output(self, tower: Tower, tokens: Tensor) -> Any:
        return (tokens,) if tower.parts["returns_tuple"] else tokens

    def instead_of_reentry(self, model: nn.Module, tower: Tower) -> str:
        return advice_of_transformers(model, tower.module) or super().instead_of_reentry(model, tower)

    def projections(self, block: Any) -> Projections:
        attention = block.self_attn
        return Projections.separate(
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.out_proj,
            num_heads=attention.num_heads,
            scale=attention.scale,
            norm=block.layer_norm1,
            dropout=rate(getattr(attention, "dropout", getattr(attention, "attention_dropout", None))),
        )

    def text_width(self, tower: Tower) -> int:
        return tower.width if tower.head is None else tower.head.visual_projection.out_features  # type: ignore

    def lift(self, tower: Tower, text: Tensor) -> Tensor:
        if tower.head is None:
            return text
        weight = matrix(tower.head.visual_projection)
        return text.to(weight.dtype) @ weight

    def project(self, tower: Tower, patches: Tensor) -> Tensor:
        normed = tower.final_norm(patches)  # type: ignore[misc]
        return normed if tower.head is None else tower.head.visual_projection(normed)  # type: ignore

    def text_of_call(
        self, model: Any, tower: Tower, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TextCall | None:
        given = bound(tower.parts["call"], args, kwargs)
        if given.get("input_ids") is None or given.get("pixel_values") is None:
            return None
        known = set(tower.parts["call"])
        shared = {
            k: v for k, v in given.items() if k not in known or k in ("output_attentions", "output_hidden_states")
        }
        run = {**{name: given.get(name) for name in TEXT_ARGUMENTS if name in known}, **shared}
        run.pop("return_dict", None)
        result = model.text_model(**run, **tower.parts["text_flags"])
        pooled = getattr(result, "pooler_output", None)
        features = result.last_hidden_state[:, 0] if pooled is None else pooled
        if isinstance(getattr(model, "text_projection", None), nn.Module):
            features = model.text_projection(features)
        return TextCall(features, (TextRun(model.text_model, "forward", (), run, result),), compares_all=True)

    def encode_images(self, model: Any, tower: Tower, images: Any, **kwargs: Any) -> Tensor:
        return pooled((model.get_image_features if hasattr(model, "get_image_features") else model)(images, **kwargs))

    def encode_texts(self, model: Any, tower: Tower, texts: Any) -> Texts:
        if not hasattr(model, "get_text_features"):
            return super().encode_texts(model, tower, texts)
        return Texts(pooled(model.get_text_features(**named(texts))))

    def grid(self, tower: Tower, pixel_values: Tensor, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return patch_grid(pixel_values, tower.module.get_submodule("embeddings.patch_embedding"))
