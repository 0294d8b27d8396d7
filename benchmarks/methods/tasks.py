"""The models and the questions that methods are compared on, all of which no text answers alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import patchselect
from adapters.timm import TimmViT
from benchmarks.accuracy.albef import evaluate
from benchmarks.accuracy.albef import model as albef
from benchmarks.accuracy.albef.base import base
from benchmarks.accuracy.clip import model as clip
from benchmarks.accuracy.clip.questions import TEST, VALIDATION, make_questions, right
from benchmarks.accuracy.world import text_alone
from benchmarks.accuracy.world.candidates import CHOICES
from benchmarks.accuracy.world.captions import EMOJI, captions, concepts, concepts_of
from benchmarks.accuracy.world.sampling import Sampler
from benchmarks.accuracy.world.scenes import PLAIN, make_scenes
from benchmarks.common.cost import countable
from patchselect.adapter import Tower
from patchselect.weights import through_norm

from .generic import known
from .method import Host, Method

SPLITS = (VALIDATION, TEST)
ALBEF_SEEDS = {VALIDATION: evaluate.VALIDATION_SEED, TEST: evaluate.TEST_SEED}
"""Of the matching questions: those of the tests are the ones of every other table."""
COUNTED = 8
"""Images that share one list of texts where FLOPs are counted and several texts guide one selection, as the classes of
a classifier do: what is done once a text is done once for so many images."""


@dataclass(frozen=True)
class Task:
    """One kind of question. `ask` takes a seed of the model, a method, a knob, how many questions and which split."""

    title: str
    about: str
    seeds: tuple[int, ...]
    count: int
    host: Callable[[int], Host]
    ask: Callable[[Host, Method, int, int, str], Tensor]
    """`(N,)`, how right each answer was, in [0, 1]."""
    blind: Callable[[int, str], Tensor]
    """The same of a classifier that sees the texts alone."""
    call: Callable[[Host, Method, int], object]
    """Encode blank images, for counting."""
    images: int = 1
    """In that call."""

    def flops(self, host: Host, method: Method, knob: int) -> float:
        """Count the FLOPs of the vision tower for one image, relevance and all."""
        with torch.no_grad(), countable() as counter:
            self.call(host, method, knob)
        return counter.get_total_flops() / self.images


# The small CLIPs: one caption of sixteen fits.


@lru_cache(maxsize=None)
def clip_host(seed: int) -> Host:
    model = clip.load(seed)
    side = clip.SIZE // clip.PATCH
    words = [(place,) for place in known(concepts())]
    with torch.no_grad():
        generic = model.encode_text(clip.tokenize(words), normalize=True)

    def encode_at(images: Tensor, shape: tuple[int, int]) -> Tensor:
        small = F.interpolate(images, [clip.PATCH * length for length in shape], mode="bilinear", antialias=True)
        first, rest = model.visual.positional_embedding.split([1, side * side])
        square = rest.T.unflatten(1, (side, side)).unsqueeze(0)
        square = F.interpolate(square, shape, mode="bicubic", antialias=True).flatten(2)[0].T
        state = {"positional_embedding": torch.cat([first, square])}
        return torch.func.functional_call(model.visual, state, (small,))

    return Host(model, model.encode_image, encode_at, clip.LAYERS, clip.DEPTH, (side, side), generic)


@lru_cache(maxsize=4)
def clip_asked(seed: int, count: int, split: str) -> tuple[Tensor, Tensor]:
    questions = make_questions(count, split)
    return questions.images(), questions.texts(clip_host(seed).model)


@torch.no_grad()
def nouns(host: Host) -> Tensor:
    """Return the features of all concepts, `(32, E)`."""
    return host.model.encode_text(clip.tokenize([(concept,) for concept in range(len(EMOJI))]))  # type: ignore[operator]


def clip_features(host: Host, method: Method, knob: int, images: Tensor, texts: Tensor, guided: str) -> Tensor:
    """Return image features `(N, E)`, or `(N, CHOICES, E)` where each caption guides its own."""
    if not method.reads_text:
        with method.put(host, knob) as encode:
            return torch.cat([encode(part) for part in images.split(256)])
    pairing, parts = "all" if guided == "paired" else "shared", []
    with method.put(host, knob) as encode:
        for rows in torch.arange(len(images)).split(16 if guided == "paired" else 128):
            given = nouns(host) if guided == "nouns" else texts[rows]
            with patchselect.guide(host.model, given, pairing):
                parts.append(encode(images[rows]))
    found = torch.cat(parts)
    return found.unflatten(0, (len(images), -1)) if guided == "paired" else found


@torch.no_grad()
def ask_clip(guided: str, host: Host, method: Method, knob: int, count: int, split: str) -> Tensor:
    seed = next(seed for seed in (0, 1) if clip_host(seed) is host)
    images, texts = clip_asked(seed, count, split)
    torch.manual_seed(0)  # random guidance
    return right(clip_features(host, method, knob, images, texts, guided), texts).double()


def call_clip(guided: str, host: Host, method: Method, knob: int) -> object:
    shared = guided != "paired"
    images = torch.zeros(COUNTED if shared else 1, 3, clip.SIZE, clip.SIZE)
    texts = torch.zeros(len(EMOJI) if guided == "nouns" else CHOICES if shared else 1, clip.WIDTH)
    with method.put(host, knob) as encode:
        if not method.reads_text:
            return encode(images)
        with patchselect.guide(host.model, texts, "shared" if shared else "paired"):
            return encode(images)


def clip_blind(count: int, split: str) -> Tensor:
    questions = make_questions(count, split)
    return text_alone.answered(questions.candidates, text_alone.TRAINED, questions.kind)


def clip_task(title: str, about: str, guided: str, count: int) -> Task:
    ask, call = partial(ask_clip, guided), partial(call_clip, guided)
    return Task(title, about, (0, 1), count, clip_host, ask, clip_blind, call, 1 if guided == "paired" else COUNTED)


# The mini-ALBEF: does the caption fit?


class JointTimm(TimmViT):
    """The mini-ALBEF's tower for texts that are in its joint space."""

    name = "mini-ALBEF, joint space"

    def __init__(self, model: Any) -> None:
        self.model = model

    def text_width(self, tower: Tower) -> int:
        return albef.JOINT

    def lift(self, tower: Tower, text: Tensor) -> Tensor:
        return text @ self.model.vision_proj.weight

    def read_back(self, tower: Tower, text: Tensor) -> Tensor:
        return through_norm(self.lift(tower, text), tower.final_norm)

    def project(self, tower: Tower, patches: Tensor) -> Tensor:
        return self.model.vision_proj(self.model.vision.norm(patches))


@lru_cache(maxsize=None)
def albef_parts(seed: int) -> tuple[Any, Host]:
    model = base(seed)
    side = 80 // albef.PATCH

    def encode_at(images: Tensor, shape: tuple[int, int]) -> Tensor:
        pixels = [albef.PATCH * length for length in shape]
        return model.encode_image(F.interpolate(images, pixels, mode="bilinear", antialias=True))

    with torch.no_grad():
        generic = model.text_proj(model.text(captions([(place,) for place in known(concepts())]))[:, 0])
    host = Host(model.vision, model.encode_image, encode_at, albef.LAYERS, 6, (side, side), generic, JointTimm(model))
    return model, host


@lru_cache(maxsize=2)
def albef_asked(count: int, split: str) -> tuple[Tensor, Tensor, Tensor]:
    scenes = make_scenes(count, ALBEF_SEEDS[split], split == TEST, PLAIN)
    batch = Sampler(scenes, PLAIN.size // albef.PATCH, ALBEF_SEEDS[split]).ask(range(count))
    return batch.images, batch.fitting, batch.other


def albef_encode(model: Any, host: Host, method: Method, encode: Any, images: Tensor, text: Tensor) -> Tensor:
    if not method.reads_text:
        return encode(images)  # type: ignore[no-any-return]
    given = model.text_proj(text) if method.space == "joint" else text
    with patchselect.guide(host.model, given):
        return encode(images)  # type: ignore[no-any-return]


@torch.no_grad()
def ask_albef(host: Host, method: Method, knob: int, count: int, split: str) -> Tensor:
    model = albef_parts(0)[0]
    images, fitting, other = albef_asked(count, split)
    torch.manual_seed(0)
    with method.put(host, knob) as encode:
        encode_pair = partial(albef_encode, model, host, method, encode)
        yes, no = (evaluate.match_logits(model, encode_pair, images, ids) for ids in (fitting, other))
    return ((yes > 0).double() + (no < 0).double()) / 2  # the two questions of a scene are not independent


def albef_blind(count: int, split: str) -> Tensor:
    _, fitting, other = albef_asked(count, split)
    yes, no = (torch.from_numpy(text_alone.fits(concepts_of(ids))) for ids in (fitting, other))
    return ((yes > 0).double() + (no < 0).double()) / 2


def call_albef(host: Host, method: Method, knob: int) -> object:
    model = albef_parts(0)[0]
    with method.put(host, knob) as encode:
        images, text = torch.zeros(1, 3, 80, 80), torch.zeros(1, albef.WIDTH)
        given = model.text_proj(text) if method.space == "joint" else text
        if not method.reads_text:
            return encode(images)
        with patchselect.guide(host.model, given):
            return encode(images)


TASKS = {
    "matching": Task(
        "Matching: a small ALBEF, each pair with its own caption",
        "does the caption fit (chance 50 %)? On each scene one fits and one does not; one base",
        (0,),
        640,
        lambda seed: albef_parts(seed)[1],
        ask_albef,
        albef_blind,
        call_albef,
    ),
    "candidates": clip_task(
        "Candidates: small CLIPs, one selection for the 16 captions of a question",
        "which of 16 captions fits (chance 6.2 %)? Mean of two models",
        "candidates",
        2048,
    ),
    "nouns": clip_task(
        "Nouns: small CLIPs, one selection for a list of 32 nouns",
        "the same questions and models; the list is the same for all images",
        "nouns",
        2048,
    ),
    "paired": clip_task(
        "Paired captions: small CLIPs, each of the 16 captions selects for itself",
        "the same kind of questions and the same models",
        "paired",
        512,
    ),
}
