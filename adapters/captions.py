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
from dataclasses import dataclass
from typing import Any, Callable

import torch
from torch import Tensor, nn

from patchselect.adapter import TextCall, TextRun, Texts, Tower, Wrapper, bound
from patchselect.wiring.guidance import current
from patchselect.wiring.text_calls import call_with_text, recall_text, refusal_of_all, remembered

from .albef import is_tower
from .blip import own_random_stream
from .heads import (
    BertHead,
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
from .matching import fused_from_ids, ids_and_mask, matching_layer, matching_probability, states_of, text_mode

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


@dataclass(eq=False)
class CaptionHead(BertHead):
    """A head of salesforce/BLIP or LAVIS, called with strings.

    Where there is no half for the text alone, every layer of its text encoder reads the image, from the ids. The first
    token of such a text says what is asked for: [CLS] of the text alone, and [ENC] of text and image in the heads
    whose own code puts it there. Both are set here, whatever the ids begin with.
    """

    calls: Mapping[str, tuple[str, ...]]
    """The parameters of each method that takes an image."""
    text_given: Callable[[dict[str, Any], tuple[str, ...]], Any]
    """Finds the text among the arguments of a call: a string, strings, tokens, or `None`."""
    halves: bool
    """Whether its text encoder has a half for the text alone."""
    tokenizing: dict[str, Any]
    """The arguments with which it tokenises."""
    first_token: int | None
    """[ENC], where its own code sets it."""
    repeats: bool
    """Whether it makes the run of the text alone itself."""

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        if self.text_encoder is None:
            return [(self.module, dict.fromkeys(self.calls, call_captioner))]
        recall: dict[str, Wrapper] = {"forward": resume_text if self.halves else recall_text}
        named = ("forward_text", "forward_automask") if self.halves else ("forward_text",)
        recall.update({name: recall_tokenized for name in named if hasattr(self.text_encoder, name)})
        return [(self.module, dict.fromkeys(self.calls, call_with_text)), (self.text_encoder, recall)]

    def text_of_call(
        self, model: nn.Module, tower: Tower, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TextCall | None:
        names = self.calls[method]
        given = bound(names, args, kwargs)
        if "multimodal" not in given.get("mode", "multimodal"):  # features of the image, or of the text, alone
            return None
        tokens = self._tokens(self.text_given(given, names))
        if tokens is None:
            return None
        run = {"attention_mask": tokens[1], "return_dict": True, **text_mode(self.text_encoder)}
        by_cosine = "match_head" in names and given.get("match_head", "itm") == "itc"
        repeated = by_cosine if "match_head" in names else self.halves or (self.repeats and "mode" not in names)
        with nullcontext() if repeated else own_random_stream(self.text_encoder):
            result = self.text_encoder(tokens[0], **run)
        remembered_run = Alike(self.text_encoder, "forward", (tokens[0],), run, result)
        images = 2 if self.image_pairs else 1
        return TextCall(result.last_hidden_state[:, 0], (remembered_run,), images, compares_all=by_cosine)

    def _tokens(self, text: Any) -> tuple[Tensor, Tensor] | None:
        """Return ids and mask of the text of a call, made by the head's own tokenizer where it is in words."""
        tokenizer: Any = getattr(self.module, "tokenizer", None)
        tokens = tokens_of(text)
        if text is None or tokens is not None or not callable(tokenizer):
            return tokens
        made = tokenizer([text] if isinstance(text, str) else list(text), **self.tokenizing, return_tensors="pt")
        device = next(self.text_encoder.parameters()).device
        return made.input_ids.to(device), made.attention_mask.to(device)

    def encode_texts(self, model: Any, tower: Tower, texts: Any) -> Texts:
        if self.text_encoder is None or self.halves:
            return super().encode_texts(model, tower, texts)
        matching_layer(self.module)
        ids, mask = ids_and_mask(texts, self.text_encoder)
        first, tokenizer = self.first_token, getattr(self.module, "tokenizer", None)
        alone = ids if first is None else _begun_with(ids, tokenizer.cls_token_id)  # type: ignore[union-attr]
        half = text_mode(self.text_encoder)
        states = self.text_encoder(alone, attention_mask=mask, return_dict=True, **half).last_hidden_state
        return Texts(states[:, 0], {"tokens": ids if first is None else _begun_with(ids, first), "mask": mask})

    def score(self, model: Any, tower: Tower, rows: Tensor, texts: Texts) -> Tensor:
        if self.text_encoder is None or self.halves:
            return super().score(model, tower, rows, texts)
        matching = matching_layer(self.module)
        fused = fused_from_ids(self.text_encoder, rows, *states_of(self.module, texts))
        return matching_probability(matching(fused[:, 0]))


def _begun_with(ids: Tensor, first: int) -> Tensor:
    ids = ids.clone()
    ids[:, 0] = first
    return ids


def vits_and_head(
    model: nn.Module,
    knows: Callable[[Mapping[str, tuple[str, ...]], bool], bool],
    text_given: Callable[[dict[str, Any], tuple[str, ...]], Any],
) -> tuple[list[nn.Module], CaptionHead] | None:
    """Return the ViTs of a model and the head around them; `None` for a ViT alone, or a head of another family.

    Args:
        model: What `apply` was given.
        knows: Tells a head of the family by the parameters of its calls, and by whether it has a text half.
        text_given: See `CaptionHead`.
    """
    found: list[Any] = [module for module in model.modules() if is_tower(module)]
    berts: list[Any] = [module for module in model.modules() if is_bert(module)]
    if not found or found == [model] or not berts:
        return None
    half = text_encoder_of(model)
    head: Any = owner_of(model, found[0], half or berts[0])
    calls = {
        name: tuple(inspect.signature(getattr(type(head), name)).parameters)[1:]
        for name in CALLS
        if getattr(type(head), name, None) not in (None, nn.Module.forward)
    }
    if not knows(calls, half is not None):
        return None
    check_twins(model, found)
    functions = functions_of(head, *CALLS[:2])
    spoken = names_in(functions)
    constants = {constant for function in functions for code in codes_of(function) for constant in code.co_consts}
    # A decoder's BERT stands inside of what predicts words; a text encoder is a part of the head.
    encoder: Any = half or trained([part for part in head.children() if is_bert(part)])
    first = getattr(getattr(head, "tokenizer", None), "enc_token_id", None)
    return found, CaptionHead(
        module=head,
        text_encoder=encoder,
        fusion=None,
        width=(encoder or berts[0]).embeddings.word_embeddings.embedding_dim,
        call=(),
        image_pairs="split" in spoken,
        calls=calls,
        text_given=text_given,
        halves=half is not None,
        tokenizing=tokenizing(head, functions),
        first_token=first if "enc_token_id" in spoken else None,
        repeats="text" in constants or "forward_text" in spoken,
    )
