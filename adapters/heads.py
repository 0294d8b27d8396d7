"""What the heads of ALBEF and mPLUG have in common: they encode the image first and the text with a BERT of their own.

Heads and text encoders are found by their structure, so a copied file with other class or attribute names is
recognised too. The text half of the text encoder runs before the image, from the arguments of the head's own forward,
and the head's own run of that half is answered from memory: no layer of the text encoder runs twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import CodeType
from typing import Any

from torch import Tensor, nn

from patchselect.adapter import TextCall, TextRun, Tower, Wrapper, bound
from patchselect.wiring.text_calls import call_with_text, recall_text, remembered
from patchselect.wiring.wording import as_code

from .matching import BertMatching, text_mode

FUSION_ARGUMENTS = ("encoder_hidden_states", "encoder_attention_mask")


def is_bert(module: Any) -> bool:
    """A BERT of these codebases: it can start from `encoder_embeds` and read an image through cross-attention."""
    layers = getattr(getattr(module, "encoder", None), "layer", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0 or not hasattr(module, "embeddings"):
        return False
    return {"input_ids", "encoder_embeds"} <= set(inspect.signature(type(module).forward).parameters)


def reads_text_alone(module: Any) -> bool:
    """A text encoder: its first layer has no cross-attention (fusion encoders and decoders have one there)."""
    return is_bert(module) and not hasattr(module.encoder.layer[0], "crossattention")


def text_encoder_of(model: nn.Module) -> nn.Module | None:
    """The text encoder that is trained; a momentum twin is frozen."""
    return trained([module for module in model.modules() if reads_text_alone(module)])


def fusion_encoder_of(head: nn.Module, spoken: set[str]) -> nn.Module | None:
    """A BERT of the head that reads the image in every layer and that its forward speaks of, if there is one.

    mPLUG's momentum twin of it is neither frozen nor run. ALBEF needs none: its text encoder has a fusion half.
    """
    parts = [part for name, part in head.named_children() if name in spoken and is_bert(part)]
    return trained([part for part in parts if not reads_text_alone(part)])


def trained(found: list[nn.Module]) -> nn.Module | None:
    """The first that has weights to train, else the first."""
    trained = [module for module in found if any(weight.requires_grad for weight in module.parameters())]
    return next(iter(trained or found), None)


def _build(tower: nn.Module) -> tuple[Any, ...]:
    """How long its sequences are and how deep it is, whatever adapters are in one of two twins."""
    shapes = sorted((name, tuple(weight.shape)) for name, weight in tower.named_parameters(recurse=False))
    return shapes, [len(part) for part in tower.modules() if isinstance(part, (nn.ModuleList, nn.Sequential))]


def check_twins(model: nn.Module, towers: list[nn.Module]) -> None:
    """Raise a `TypeError` unless all towers of a head (the trained one and its momentum twin) are built alike."""
    if any(_build(tower) != _build(towers[0]) for tower in towers):
        names = [name for name, part in model.named_modules() if any(part is tower for tower in towers)]
        raise TypeError(
            f"{type(model).__name__} holds vision towers of different shapes ({', '.join(names)}), which one call "
            "cannot keep at one length: call patchselect.apply on each of them"
        )


def owner_of(model: nn.Module, *parts: nn.Module) -> nn.Module:
    """The smallest module inside `model` (or `model`) that holds all parts: the head, whoever wraps it."""
    for child in model.children():
        held = set(child.modules())
        if all(part in held and part is not child for part in parts):
            return owner_of(child, *parts)
    return model


def functions_of(model: nn.Module, *methods: str) -> list[Any]:
    """These methods of the class and those that they call, in that order; what every `nn.Module` has is left out."""
    found: list[Any] = []
    todo = list(methods)
    for name in todo:
        function = inspect.unwrap(getattr(type(model), name, None) or (lambda: None))
        if isinstance(getattr(function, "__code__", None), CodeType) and function not in found:
            found.append(function)
            called = (name for code in codes_of(function) for name in code.co_names)
            todo += [
                name for name in called if callable(getattr(type(model), name, None)) and not hasattr(nn.Module, name)
            ]
    return found


def codes_of(function: Any) -> list[CodeType]:
    """The code of a function and of the functions and comprehensions inside it."""
    found = [function.__code__]
    for code in found:
        found += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return found


def names_in(functions: list[Any]) -> set[str]:
    """The names that the code of these functions speaks of."""
    return {name for function in functions for code in codes_of(function) for name in code.co_names}


def names_in_forward(model: nn.Module) -> set[str]:
    """The names that the code of `forward`, and of the methods it calls, speaks of."""
    return names_in(functions_of(model, "forward"))


def tokens_of(value: Any) -> tuple[Tensor, Tensor] | None:
    """Token ids and attention mask of a tokenizer's output, or of a nested tensor of integers (mPLUG's grounding)."""
    if getattr(value, "input_ids", None) is not None:
        return value.input_ids, value.attention_mask
    tensors = getattr(value, "tensors", None)
    if isinstance(tensors, Tensor) and not tensors.is_floating_point():
        return tensors, value.mask
    return None


def resume_text(encoder: nn.Module, name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
    """A text encoder that has run its text half already.

    A call for that half is answered from memory. A call for both halves (`mode="multi_modal"`: VQA, NLVR2, visual
    entailment) goes on from there with the fusion layers, which is the same function.
    """
    if kwargs.get("mode", "multi_modal") == "multi_modal" and kwargs.get("encoder_hidden_states") is not None:
        half = {**{key: value for key, value in kwargs.items() if key not in FUSION_ARGUMENTS}, "mode": "text"}
        run = remembered(encoder, name, args, half)
        if run is not None:
            both = {key: kwargs.get(key) for key in ("attention_mask", "return_dict", *FUSION_ARGUMENTS)}
            return original(encoder_embeds=run.result.last_hidden_state, mode="fusion", **both)
    return recall_text(encoder, name, original, *args, **kwargs)


class Heads(BertMatching):
    """What the heads of ALBEF and mPLUG share: `head(image, text, ...)`, and who encodes that text."""

    default_relevance = "keys"

    def head_parts(self, model: nn.Module, towers: list[nn.Module], family: str) -> dict[str, Any]:
        """The head around `towers` and its text encoder; `{}` for a tower alone.

        Raises:
            TypeError: what holds the towers is not a head of this family.
        """
        if towers == [model]:
            return {}
        encoder = text_encoder_of(model)
        bert: Any = encoder or next((module for module in model.modules() if is_bert(module)), None)
        if bert is None:
            path = next(path for path, part in model.named_modules() if part is towers[0])
            raise TypeError(
                f"{type(model).__name__} cannot be patched as a whole: it holds a vision tower of {family}, but no "
                "BERT of that family, and what reads its tokens may need a fixed number. If it takes any number, call "
                f"patchselect.apply({as_code(model, path)})"
            )
        check_twins(model, towers)
        head = owner_of(model, towers[0], bert)
        spoken = names_in_forward(head)
        path = next((path for path, part in head.named_modules() if part is encoder), "")
        return {
            "head": head,
            "text_encoder": encoder if path.split(".")[0] in spoken else None,
            "fusion": fusion_encoder_of(head, spoken),
            "text_width": bert.embeddings.word_embeddings.embedding_dim,
            "call": tuple(inspect.signature(type(head).forward).parameters)[1:],
            "image_pairs": "split" in spoken,
        }

    def text_width(self, tower: Tower) -> int:
        return tower.parts.get("text_width", tower.width)

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        parts = towers[0].parts
        if parts.get("text_encoder") is None:
            return []
        return [(parts["head"], {"forward": call_with_text}), (parts["text_encoder"], {"forward": resume_text})]

    def text_of_call(
        self, model: nn.Module, tower: Tower, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TextCall | None:
        given = bound(tower.parts["call"], args, kwargs)
        values = [given.get(name) for name in tower.parts["call"]]
        text = next((found for found in map(tokens_of, values) if found is not None), None)
        if text is None:
            return None
        encoder = tower.parts["text_encoder"]
        run = {"attention_mask": text[1], "return_dict": True, **text_mode(encoder)}
        result = encoder(text[0], **run)
        images = 2 if tower.parts["image_pairs"] else 1
        remembered_run = TextRun(encoder, "forward", (text[0],), run, result)
        return TextCall(result.last_hidden_state[:, 0], (remembered_run,), images)
