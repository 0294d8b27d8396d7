"""BLIP of Hugging Face transformers: retrieval, question answering, captioning, `BlipModel`, and the tower alone.

The text is encoded first, without the image. Only `BlipModel` and `BlipForImageTextRetrieval(use_itm_head=False)` make
that very call themselves, and get it from memory. Every other head reads the image in all layers of its text model,
so there the run is one more: 12 layers over the text alone, about 5 GFLOPs at 30 tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from patchselect.adapter import (
    Adapter,
    Attended,
    Reader,
    TextCall,
    TextRun,
    Texts,
    Tower,
    Wrapper,
    bound,
    patch_grid,
    pooled,
)
from patchselect.compat import fork_rng, is_compiling
from patchselect.weights import Projections, is_linear, matrix, rate, thirds, through_norm
from patchselect.wiring.text_calls import call_with_text, recall_text
from patchselect.wiring.wording import refuse_masks

from .matching import fused_from_ids, ids_and_mask, matching_layer, matching_probability, states_of
from .switches import advice_of_transformers

BLOCK_PARTS = {"layer_norm1", "self_attn", "layer_norm2", "mlp"}
TEXT_PARTS = ("text_encoder", "text_model", "text_decoder")
PROJECTIONS = (("text_proj", "vision_proj"), ("text_projection", "visual_projection"))
HEAD_PARTS = {"vision_model", "itm_head", *TEXT_PARTS, *PROJECTIONS[0], *PROJECTIONS[1]}
METHODS = ("forward", "generate", "get_multimodal_features")


def is_tower(module: Any) -> bool:
    """Tell whether this is a ViT with a fused `qkv`, an output layer `projection` and a class embedding."""
    layers = getattr(getattr(module, "encoder", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0 or not hasattr(module, "post_layernorm"):
        return False
    if not hasattr(getattr(module, "embeddings", None), "class_embedding"):
        return False
    return all(
        {name for name, _ in block.named_children()} == BLOCK_PARTS
        and is_linear(getattr(block.self_attn, "qkv", None))
        and is_linear(getattr(block.self_attn, "projection", None))
        for block in layers
    )


def joint_space_of(model: nn.Module) -> tuple[nn.Linear, nn.Linear] | None:
    """Return the projections of text and image into one space, if the head has them."""
    for names in PROJECTIONS:
        found = [getattr(model, name, None) for name in names]
        if all(map(is_linear, found)):
            return found[0], found[1]  # type: ignore[return-value]
    return None


@dataclass(eq=False)
class BlipHead(Reader):
    """A model of BLIP around its tower. `BlipModel` is a dual encoder; others read the image beside the text."""

    text: Any
    """Who reads the text: an encoder or, in captioning, a decoder."""
    calls: Mapping[str, tuple[str, ...]]
    """The parameters of each method that takes an image."""

    def methods(self, model: Any, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        calls: Mapping[str, Wrapper] = dict.fromkeys(self.calls, call_with_text)
        if self.text is getattr(model, "text_decoder", None):
            return [(model, calls)]
        return [(model, calls), (self.text, {"forward": recall_text})]

    def text_width(self, tower: Tower) -> int:
        joint = joint_space_of(tower.head) if hasattr(tower.head, "text_model") else None  # type: ignore[arg-type]
        return self.text.config.hidden_size if joint is None else joint[0].out_features

    def text_of_call(
        self, model: Any, tower: Tower, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TextCall | None:
        given = bound(self.calls[method], args, kwargs)
        if given.get("pixel_values") is None:
            return None
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        if self.text is getattr(model, "text_decoder", None):
            return self._prompt(model, ids, mask, given.get("labels"))
        if ids is None:
            return None
        encoder = self.text
        run = {"input_ids": torch.as_tensor(ids), "attention_mask": mask}
        joint = hasattr(model, "text_model")
        if joint:
            run["position_ids"] = given.get("position_ids")
        elif given.get("use_itm_head", True):
            with own_random_stream(encoder):
                return TextCall(encoder(**run, return_dict=True).last_hidden_state[:, 0], ())
        result = encoder(**run, return_dict=True)
        features = model.text_projection(result.pooler_output) if joint else result.last_hidden_state[:, 0]
        run_of_host = TextRun(encoder, "forward", (), run, result)
        return TextCall(features, (run_of_host,), compares_all=method != "get_multimodal_features")

    def fuses(self, model: Any, tower: Tower, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if method == "forward" and hasattr(model, "text_model"):
            return False
        return bool(bound(self.calls[method], args, kwargs).get("use_itm_head", True))

    def _prompt(self, model: Any, ids: Any, mask: Tensor | None, labels: Tensor | None) -> TextCall:
        if ids is None or labels is not None:
            why = "got labels (its input_ids are the caption to learn)" if labels is not None else "got no prompt"
            raise ValueError(
                f"{type(model).__name__} {why}, so no text guides this call: give the features of a prompt with `with "
                'patchselect.guide(model, text_features):`, or choose patchselect.apply(model, guidance="image")'
            )
        ids = torch.as_tensor(ids)
        decoder = model.text_decoder.bert
        with own_random_stream(decoder):
            states = decoder(
                input_ids=ids, attention_mask=mask, is_decoder=True, use_cache=False, return_dict=True
            ).last_hidden_state
        last = torch.full_like(ids[:, 0], ids.shape[1] - 1) if mask is None else mask.long().cumsum(1).argmax(1)
        return TextCall(states[torch.arange(len(ids), device=states.device), last], ())

    # Pairs.

    def encode_images(self, model: Any, tower: Tower, images: Any, **kwargs: Any) -> Tensor:
        if _is_dual(tower):
            return pooled(model.get_image_features(images, **kwargs))
        return super().encode_images(model, tower, images, **kwargs)

    def encode_texts(self, model: Any, tower: Tower, texts: Any) -> Texts:
        if _is_dual(tower):
            ids, mask = ids_and_mask(texts, model.text_model)
            return Texts(pooled(model.get_text_features(input_ids=ids, attention_mask=mask)))
        matching_layer(model)
        encoder = model.text_encoder
        ids, mask = ids_and_mask(texts, encoder)
        states = encoder(input_ids=ids, attention_mask=mask, return_dict=True).last_hidden_state
        return Texts(states[:, 0], {"tokens": ids, "mask": mask})

    def score(self, model: Any, tower: Tower, rows: Tensor, texts: Texts) -> Tensor:
        """Score with the matching layer: the text encoder reads the image in every layer, so it starts from the ids."""
        if _is_dual(tower):
            return super().score(model, tower, rows, texts)
        matching = matching_layer(model)
        fused = fused_from_ids(model.text_encoder, rows, *states_of(model, texts))
        return matching_probability(matching(fused[:, 0]))


def _is_dual(tower: Tower) -> bool:
    return hasattr(tower.head, "get_text_features") and hasattr(tower.head, "get_image_features")


class TransformersBlip(Adapter):
    """`BlipForImageTextRetrieval`, `BlipForQuestionAnswering`, `BlipForConditionalGeneration`, `BlipModel`.

    Text features are the [CLS] of the text encoder, run without an image. Captioning has no text encoder: a prompt is
    read by its decoder, and its last token, the only one that has seen all of it, is the feature. The labels of a
    captioning step guide nothing.
    """

    name = "transformers-blip"
    default_relevance = "keys"

    def towers(self, model: nn.Module) -> list[Tower]:
        core: Any = model if is_tower(model) else getattr(model, "vision_model", None)
        if not is_tower(core):
            return []
        strangers = {name for name, _ in model.named_children()} - HEAD_PARTS
        text = next((part for name in TEXT_PARTS if (part := getattr(model, name, None)) is not None), None)
        if core is not model and (strangers or text is None):
            raise TypeError(
                f"{type(model).__name__} cannot be patched as a whole: its {', '.join(sorted(strangers))} may read a "
                "fixed number of patches. Apply to its vision_model alone if its reader takes any number"
            )
        block: Any = core.encoder.layers[0]
        block_call = inspect.signature(getattr(type(block), "_patchselect_base", type(block)).forward).parameters
        calls = {
            method: tuple(inspect.signature(getattr(type(model), method)).parameters)[1:]
            for method in METHODS
            if core is not model and hasattr(model, method)
        }
        return [
            Tower(
                adapter=self,
                module=core,
                blocks=list(core.encoder.layers),
                num_prefix_tokens=1,
                has_class_token=True,
                width=core.encoder.layers[0].layer_norm1.normalized_shape[0],
                head=None if core is model else model,
                final_norm=core.post_layernorm,
                reader=Reader() if core is model else BlipHead(text, calls),
                parts={
                    "block_call": tuple(block_call)[1:],
                    "returns_tuple": "output_attentions" in block_call,
                },
            )
        ]

    def attend(self, tower: Tower, block: Any, *args: Any, **kwargs: Any) -> Attended:
        given = bound(tower.parts["block_call"], args, kwargs)
        refuse_masks(tower, {"attention_mask": given.pop("attention_mask", None)})
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

    def as_output(self, tower: Tower, tokens: Tensor) -> Any:
        return (tokens,) if tower.parts["returns_tuple"] else tokens

    def instead_of_reentry(self, model: nn.Module, tower: Tower) -> str:
        return advice_of_transformers(model, tower.module) or super().instead_of_reentry(model, tower)

    def projections(self, block: Any) -> Projections:
        attention = block.self_attn
        return Projections.packed(
            attention.qkv,
            attention.projection,
            num_heads=attention.num_heads,
            scale=attention.scale,
            norm=block.layer_norm1,
            qkv=thirds(attention.qkv),
            out=attention.projection,
            dropout=rate(getattr(attention, "dropout", getattr(attention, "attention_dropout", None))),
        )

    # The way between text and image.

    def lift(self, tower: Tower, text: Tensor) -> Tensor:
        """Lift a text: as it is where the widths are equal, else through the joint space."""
        if tower.width == text.shape[-1] and not hasattr(tower.head, "text_model"):
            return text
        if self._joint(tower) is None:
            raise ValueError(
                f"{type(tower.head).__name__} reads text of width {text.shape[-1]} and images of width {tower.width} "
                'and has no joint space between them: use guidance="image"'
            )
        return self._out_of_joint(tower, self._into_joint(tower, text))

    def _joint(self, tower: Tower) -> Any:
        """Return the two projections as they are now: LoRA may have come since `apply`."""
        return joint_space_of(tower.head)  # type: ignore[arg-type]

    def _into_joint(self, tower: Tower, text: Tensor) -> Tensor:
        if hasattr(tower.head, "text_model"):
            return text
        weight = matrix(self._joint(tower)[0])
        return text.to(weight.dtype) @ weight.T

    def _out_of_joint(self, tower: Tower, text: Tensor) -> Tensor:
        weight = matrix(self._joint(tower)[1])
        return text.to(weight.dtype) @ weight

    def read_back(self, tower: Tower, text: Tensor) -> Tensor:
        if tower.head is None:
            return through_norm(text, tower.final_norm)
        if self._joint(tower) is None:
            name = type(tower.head).__name__
            raise ValueError(f'relevance="values" needs a joint space, which {name} does not have: use "keys"')
        return through_norm(self._out_of_joint(tower, self._into_joint(tower, text)), tower.final_norm)

    def grid(self, tower: Tower, pixel_values: Tensor, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return patch_grid(pixel_values, tower.module.get_submodule("embeddings.patch_embedding"))


def own_random_stream(encoder: Any) -> Any:
    """Draw the dropout of a run that the host does not make apart, so that the host's own draws stay the same."""
    if not encoder.training or is_compiling():
        return nullcontext()
    device = next(encoder.parameters()).device
    return fork_rng(devices=[] if device.type == "cpu" else [device], device_type=_kind(device))


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type
