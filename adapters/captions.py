"""What the heads of BLIP and LAVIS have in common: they are called with strings, and tokenise them after the image.

The text half of their text encoder runs before the image, on the tokens that the head's own tokenizer makes, called as
the head's own code calls it. Where the head makes the same run itself it is answered from memory; elsewhere (matching
and answering heads of BLIP, whose text encoder reads the image in every layer) it is one run more, with dropout drawn
apart from the host's.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from patchselect.adapter import TextCall, TextRun, Tower, Wrapper, bound
from patchselect.wiring.guidance import current
from patchselect.wiring.text_calls import call_with_text, recall_text, refusal_of_all, remembered

from .albef import Albef, is_tower, joint_of
from .blip import own_random_stream
from .heads import (
    check_twins,
    codes_of,
    functions_of,
    is_bert,
    names_in,
    owner_of,
    resume_text,
    text_encoder_of,
    tokens_of,
    trained,
)
from .matching import CaptionMatching, text_mode

CALLS = ("forward", "extract_features", "generate", "predict_answers")
"""Methods of a head that take an image, and most of them a text."""
TOKENIZING = {"padding": True, "truncation": True}


class Alike(TextRun):
    """A run that is found again by what its tensors hold: the head tokenises the same strings into new ones."""

    __slots__ = ()

    def matches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        names = {name for name in (*self.kwargs, *kwargs) if name != "return_dict"}
        pairs = [(self.kwargs.get(name), kwargs.get(name)) for name in names]
        return len(args) == len(self.args) and all(_alike(a, b) for a, b in (*zip(self.args, args), *pairs))


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b)))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and (a == b or (not a and not b))


def recall_tokenized(encoder: Any, name: str, original: Any, tokenized_text: Any, *args: Any, **kwargs: Any) -> Any:
    """Answer LAVIS' `forward_text` and `forward_automask`, which take a tokenizer's output and go past `forward`."""
    ids, mask = tokenized_text.input_ids, tokenized_text.attention_mask
    half = {"attention_mask": mask, "return_dict": True, **text_mode(encoder)}
    if remembered(encoder, "forward", (ids,), half) is None:
        return original(tokenized_text, *args, **kwargs)
    if name == "forward_text":
        return encoder.forward(ids, **half)
    seen = args[0] if args else kwargs["visual_embeds"]
    read = dict(encoder_hidden_states=seen, encoder_attention_mask=seen.new_ones(seen.shape[:-1], dtype=torch.long))
    return encoder.forward(ids, attention_mask=mask, return_dict=True, **read)


def call_captioner(model: nn.Module, name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a captioning head: what comes with its image is the caption to learn, or nothing."""
    wiring: Any = model._patchselect
    if wiring.plan.guidance == "text" and current(wiring) is None:
        raise ValueError(
            f"{type(model).__name__}.{name} reads no text before the image (a caption that comes along is what the "
            "model must learn, so it guides nothing): give the features of a text with `with patchselect.guide(model, "
            'text_features):`, or choose patchselect.apply(model, guidance="image")'
        )
    guidance = current(wiring)
    if guidance is not None and guidance.pairing == "all" and guidance.text.shape[-2] > 1:
        raise ValueError(refusal_of_all(f"{type(model).__name__}.{name}"))
    return original(*args, **kwargs)


def tokenizing(head: nn.Module, functions: list[Any]) -> dict[str, Any]:
    """Return the arguments with which a head tokenises the first text of its call; sensible ones if it cannot be read.

    Padding and the longest length decide whether its own run of the text is the one that is remembered, and how much
    of a long text guides.
    """
    for function in functions:
        for call in _tokenizer_calls(function):
            try:
                found = {given.arg: _value(given.value, head, function) for given in call.keywords}
            except LookupError:
                return dict(TOKENIZING)
            return {str(name): value for name, value in found.items() if name != "return_tensors"}
    return dict(TOKENIZING)


def _tokenizer_calls(function: Any) -> Iterator[ast.Call]:
    """Yield the calls of `self.tokenizer` in the source of a function, in order; none where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
        if _attribute_of_self(call.func) == "tokenizer":
            yield call


def _attribute_of_self(node: Any) -> str | None:
    of_self = isinstance(node, ast.Attribute) and getattr(node.value, "id", None) == "self"
    return node.attr if of_self else None


def _value(node: Any, head: nn.Module, function: Any) -> Any:
    """Return what an argument is: constant, attribute of the head or name of the module; else a `LookupError`."""
    if isinstance(node, ast.Constant):
        return node.value
    name = _attribute_of_self(node)
    if name is not None and hasattr(head, name):
        return getattr(head, name)
    return function.__globals__[getattr(node, "id", None)]


class Captions(CaptionMatching, Albef):
    """Heads with ALBEF's ViT, called with strings. A family says which heads are its own and where the text is."""

    def knows(self, head: nn.Module, calls: Mapping[str, tuple[str, ...]], halves: bool) -> bool:
        """Tell whether a head is of this family, from the parameters of its calls and whether it has a text half."""
        raise NotImplementedError

    def text_given(self, given: dict[str, Any], names: tuple[str, ...]) -> Any:
        """Return the text among the arguments of a call: a string, strings, tokens, or `None`."""
        raise NotImplementedError

    def towers(self, model: nn.Module) -> list[Tower]:
        found: list[Any] = [module for module in model.modules() if is_tower(module)]
        berts = [module for module in model.modules() if is_bert(module)]
        if not found or found == [model] or not berts:
            return []
        encoder = text_encoder_of(model)
        head = owner_of(model, found[0], encoder or berts[0])
        calls = {
            name: tuple(inspect.signature(getattr(type(head), name)).parameters)[1:]
            for name in CALLS
            if getattr(type(head), name, None) not in (None, nn.Module.forward)
        }
        if not self.knows(head, calls, encoder is not None):
            return []
        check_twins(model, found)
        return self.vit_towers(found, self._parts(head, encoder, berts[0], calls))

    def _parts(
        self, head: Any, half: nn.Module | None, bert: Any, calls: Mapping[str, tuple[str, ...]]
    ) -> dict[str, Any]:
        functions = functions_of(head, *CALLS[:2])
        spoken = names_in(functions)
        constants = {constant for function in functions for code in codes_of(function) for constant in code.co_consts}
        # A decoder's BERT stands inside of what predicts words; a text encoder is a part of the head.
        encoder: Any = half or trained([part for part in head.children() if is_bert(part)])
        first = getattr(getattr(head, "tokenizer", None), "enc_token_id", None)
        return {
            "head": head,
            "text_encoder": encoder,
            "halves": half is not None,
            "fusion": None,
            "text_width": (encoder or bert).embeddings.word_embeddings.embedding_dim,
            "joint": joint_of(head),
            "calls": calls,
            "tokenizing": tokenizing(head, functions),
            "first_token": first if "enc_token_id" in spoken else None,
            "repeats": "text" in constants or "forward_text" in spoken,
            "image_pairs": "split" in spoken,
        }

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        parts = towers[0].parts
        head, encoder = parts["head"], parts["text_encoder"]
        own = [found for found in super().methods(model, towers) if found[0] not in (head, encoder)]
        if encoder is None:
            return [*own, (head, dict.fromkeys(parts["calls"], call_captioner))]
        recall: dict[str, Wrapper] = {"forward": resume_text if parts["halves"] else recall_text}
        named = ("forward_text", "forward_automask") if parts["halves"] else ("forward_text",)
        recall.update({name: recall_tokenized for name in named if hasattr(encoder, name)})
        return [*own, (head, dict.fromkeys(parts["calls"], call_with_text)), (encoder, recall)]

    def text_of_call(
        self, model: nn.Module, tower: Tower, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TextCall | None:
        parts, names = tower.parts, tower.parts["calls"][method]
        given = bound(names, args, kwargs)
        if "multimodal" not in given.get("mode", "multimodal"):  # features of the image, or of the text, alone
            return None
        head, encoder = parts["head"], parts["text_encoder"]
        text = self.text_given(given, names)
        tokens = tokens_of(text)
        if text is None or (tokens is None and not callable(getattr(head, "tokenizer", None))):
            return None
        if tokens is None:
            texts = [text] if isinstance(text, str) else list(text)
            made = head.tokenizer(texts, **parts["tokenizing"], return_tensors="pt")
            device = next(encoder.parameters()).device
            tokens = made.input_ids.to(device), made.attention_mask.to(device)
        run = {"attention_mask": tokens[1], "return_dict": True, **text_mode(encoder)}
        repeated = parts["halves"] or (parts["repeats"] and "mode" not in names)
        if "match_head" in names:
            repeated = given.get("match_head", "itm") == "itc"
        with nullcontext() if repeated else own_random_stream(encoder):
            result = encoder(tokens[0], **run)
        remembered_run = Alike(encoder, "forward", (tokens[0],), run, result)
        images = 2 if parts["image_pairs"] else 1
        by_cosine = "match_head" in names and given.get("match_head", "itm") == "itc"
        return TextCall(result.last_hidden_state[:, 0], (remembered_run,), images, compares_all=by_cosine)

    def lift(self, tower: Tower, text: Tensor) -> Tensor:
        if self.text_width(tower) != tower.width and not tower.parts["joint"]:
            raise ValueError(
                f"{type(tower.parts['head']).__name__} reads text of width {self.text_width(tower)} and images of "
                f"width {tower.width} and has no text_proj and vision_proj to lift the one to the other: use "
                f'guidance="image", or call patchselect.apply on its vision tower and give guide() vectors of width '
                f"{tower.width}"
            )
        return super().lift(tower, text)
