"""What the heads of ALBEF and mPLUG have in common: they encode the image first and the text with a BERT of their own.

Heads and text encoders are found by their structure, so a copied file with other class or attribute names is
recognised too. The text half of the text encoder runs before the image, from the arguments of the head's own forward,
and the head's own run of that half is answered from memory: no layer of the text encoder runs twice.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import Tensor, nn

from patchselect.adapter import Reader, TextCall, TextRun, Texts, Tower, Wrapper, bound
from patchselect.wiring.text_calls import call_with_text, recall_text, remembered
from patchselect.wiring.wording import as_code

from .matching import ids_and_mask, matching_layer, matching_probability, seen_whole, states_of, text_mode

FUSION_ARGUMENTS = ("encoder_hidden_states", "encoder_attention_mask")


def is_bert(module: Any) -> bool:
    """Tell whether this is a BERT of these code bases: it can start from `encoder_embeds` and read an image."""
    layers = getattr(getattr(module, "encoder", None), "layer", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0 or not hasattr(module, "embeddings"):
        return False
    return {"input_ids", "encoder_embeds"} <= set(inspect.signature(type(module).forward).parameters)


def reads_text_alone(module: Any) -> bool:
    """Tell whether this is a text encoder: fusion encoders and decoders have cross-attention in their first layer."""
    return is_bert(module) and not hasattr(module.encoder.layer[0], "crossattention")


def text_encoder_of(model: nn.Module) -> nn.Module | None:
    """Return the text encoder that is trained; a momentum twin is frozen."""
    return trained([module for module in model.modules() if reads_text_alone(module)])


def fusion_encoder_of(head: nn.Module, spoken: set[str]) -> nn.Module | None:
    """Return a BERT of the head that reads the image in every layer and that its forward speaks of, if there is one.

    mPLUG's momentum twin of it is neither frozen nor run. ALBEF needs none: its text encoder has a fusion half.
    """
    parts = [part for name, part in head.named_children() if name in spoken and is_bert(part)]
    return trained([part for part in parts if not reads_text_alone(part)])


def trained(found: list[nn.Module]) -> nn.Module | None:
    """Return the first that has weights to train, else the first."""
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
    """Return the smallest module inside `model` (or `model`) that holds all parts: the head, whoever wraps it."""
    for child in model.children():
        held = set(child.modules())
        if all(part in held and part is not child for part in parts):
            return owner_of(child, *parts)
    return model


def functions_of(model: nn.Module, *methods: str) -> list[Any]:
    """Return these methods of the class and those that they call, in that order; without what every `nn.Module` has."""
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
    """Return the code of a function and of the functions and comprehensions inside it."""
    found = [function.__code__]
    for code in found:
        found += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return found


def names_in(functions: list[Any]) -> set[str]:
    """Return the names that the code of these functions speaks of."""
    return {name for function in functions for code in codes_of(function) for name in code.co_names}


def names_in_forward(model: nn.Module) -> set[str]:
    """Return the names that the code of `forward`, and of the methods it calls, speaks of."""
    return names_in(functions_of(model, "forward"))


def tokens_of(value: Any) -> tuple[Tensor, Tensor] | None:
    """Return ids and mask of a tokenizer's output, or of a nested tensor of integers (mPLUG's grounding)."""
    if getattr(value, "input_ids", None) is not None:
        return value.input_ids, value.attention_mask
    tensors = getattr(value, "tensors", None)
    if isinstance(tensors, Tensor) and not tensors.is_floating_point():
        return tensors, value.mask
    return None


def resume_text(encoder: nn.Module, name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
    """Go on from the text half that a text encoder has run already.

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


def head_parts(model: nn.Module, towers: list[nn.Module], family: str) -> dict[str, Any] | None:
    """Return what a `BertHead` around `towers` is made of; `None` for a tower alone.

    Raises:
        TypeError: what holds the towers is not a head of this family.
    """
    if towers == [model]:
        return None
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
        "module": head,
        "text_encoder": encoder if path.split(".")[0] in spoken else None,
        "fusion": fusion_encoder_of(head, spoken),
        "width": bert.embeddings.word_embeddings.embedding_dim,
        "call": tuple(inspect.signature(type(head).forward).parameters)[1:],
        "image_pairs": "split" in spoken,
    }


@dataclass(eq=False)
class BertHead(Reader):
    """A head of ALBEF or mPLUG around its towers: `head(image, text, ...)`, with a BERT of its own."""

    module: nn.Module
    text_encoder: Any
    """Who encodes its texts; `None` where it reads none (captioning)."""
    fusion: nn.Module | None
    """Who reads text and image together, where that is not the upper half of the text encoder (ALBEF)."""
    width: int
    """Of its texts."""
    call: tuple[str, ...]
    """The parameters of its forward."""
    image_pairs: bool
    """Whether a text speaks of two images (NLVR2)."""

    def text_width(self, tower: Tower) -> int:
        return self.width

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        if self.text_encoder is None:
            return []
        return [(self.module, {"forward": call_with_text}), (self.text_encoder, {"forward": resume_text})]

    def text_of_call(
        self, model: nn.Module, tower: Tower, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TextCall | None:
        given = bound(self.call, args, kwargs)
        values = [given.get(name) for name in self.call]
        text = next((found for found in map(tokens_of, values) if found is not None), None)
        if text is None:
            return None
        run = {"attention_mask": text[1], "return_dict": True, **text_mode(self.text_encoder)}
        result = self.text_encoder(text[0], **run)
        remembered_run = TextRun(self.text_encoder, "forward", (text[0],), run, result)
        return TextCall(result.last_hidden_state[:, 0], (remembered_run,), 2 if self.image_pairs else 1)

    # Pairs.

    def encode_texts(self, model: Any, tower: Tower, texts: Any) -> Texts:
        self._check_text()
        ids, mask = ids_and_mask(texts, self.text_encoder)
        half = text_mode(self.text_encoder)
        states = self.text_encoder(ids, attention_mask=mask, return_dict=True, **half).last_hidden_state
        return Texts(states[:, 0], {"tokens": states, "mask": mask})

    def as_fused(self, tower: Tower, rows: Tensor) -> Tensor:
        """Return image tokens of the tower as the fusion encoder of its head reads them."""
        return rows

    def score(self, model: Any, tower: Tower, rows: Tensor, texts: Texts) -> Tensor:
        """Score with the matching layer; ALBEF fuses in its text encoder's upper half, mPLUG in `fusion`."""
        matching = matching_layer(self.module)
        self._check_text()
        tokens, mask = states_of(self.module, texts)
        inputs = dict(
            encoder_embeds=tokens,
            attention_mask=mask,
            encoder_hidden_states=self.as_fused(tower, rows),
            encoder_attention_mask=seen_whole(rows),
        )
        if text_mode(self.text_encoder):
            fused = self.text_encoder(**inputs, return_dict=True, mode="fusion").last_hidden_state
        elif self.fusion is not None:
            _, fused = self.fusion(**inputs, return_dict=False)  # what became of the image tokens, and of the text
        else:
            raise ValueError(
                f"{type(self.module).__name__} runs no fusion encoder that is known here (a BERT with cross-attention "
                "in its first layer), so its pairs have no score"
            )
        return matching_probability(matching(fused[:, 0]))

    def _check_text(self) -> None:
        if self.text_encoder is None:
            raise ValueError(
                f"{type(self.module).__name__} runs no text encoder, so its pairs have no score: use a retrieval or "
                "pretraining head"
            )
