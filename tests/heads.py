"""The table of heads that fuse image and text: structural doubles always, the real ALBEF and mPLUG where they are.

The real ones run with `ALBEF_DIR` and `MPLUG_DIR` set to checkouts and `PATCHSELECT_TARGETS` to a folder of runners;
without these they skip. Both codebases pin releases that are long gone, so how their heads are built under newer ones
is the business of the runners, `albef_targets.py` and `mplug_targets.py`:

- `ALL[name](**options)` returns a small model in training mode, its patches 4 x 4 and its vision tower six blocks deep,
  and `batch`; mPLUG's take `large` (a tower wider than the text). The names are in `HEADS` below.
- `batch(seed=…)` returns the positional and the named arguments of a training call, on any number of pairs.
- `active()` is a context in which the model can be pickled.

(`benchmarks.speed.whole_model` asks for `image_size=…, small=False, train=…, distill=…`, and for
`batch(batch_size=…, length=…, train=…)`.)
"""

from __future__ import annotations

import copy
import functools
import importlib
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from doubles import albef, blip, meter, mplug
from doubles.text import pictures, sentences
from since import missing
from torch import Tensor, nn

import patchselect


@dataclass
class Head:
    """A model and how to call it."""

    model: nn.Module
    batch: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
    """Arguments of a training call from a seed; `pictures_in` and `texts_in` find the images and the texts."""
    patches: int = 16
    images: int = 3
    captions: bool = False
    """Whether the text must come from `guide`."""
    same_stream: bool = True
    """Whether the random stream in training is that of the unpatched model."""
    extra_text_layers: int = 0
    """Layers of the text encoder that run once more, for the guidance alone."""
    active: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Inside, the head can be pickled."""

    def towers(self) -> list[Any]:
        return patchselect.wiring.towers.find_towers(self.model)

    def text_features(self, seed: int = 4) -> Tensor:
        tower = self.towers()[0]
        width = tower.adapter.text_width(tower)
        return torch.randn(self.images, width, generator=torch.Generator().manual_seed(seed))

    def call(self, batch: Any = None, model: nn.Module | None = None, seed: int = 7, text: Tensor | None = None) -> Any:
        """The outputs of one call, its randomness fixed; a captioning head gets a text for each image."""
        model = self.model if model is None else model
        args, kwargs = self.batch(0) if batch is None else batch
        torch.manual_seed(seed)
        patched = any("_patchselect" in vars(part) for part in model.modules())
        if not (self.captions and patched):
            return model(*args, **kwargs)
        with patchselect.guide(model, self.text_features() if text is None else text):
            return model(*args, **kwargs)


def floats(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, dict) else output
    return [tensor for part in parts if isinstance(part, Tensor) for tensor in floats(part)]


def loss_of(output: Any) -> Tensor:
    return torch.stack([part.float().sum() for part in floats(output)]).sum()


def rewound(head: Head) -> Callable[[], object]:
    """Gives back the weights of now: heads of these families move queues and momentum weights in their forward."""
    state = copy.deepcopy(head.model.state_dict())
    return lambda: head.model.load_state_dict(state)


def pictures_in(batch: Any) -> Any:
    """The images of a call, whatever they come in."""
    first = batch[0][0]
    if isinstance(first, dict) and "text_ids" in first:
        return first["image"][0]  # METER
    if isinstance(first, dict):
        return torch.cat([first[name] for name in ("image", "image0", "image1") if name in first])
    return getattr(first, "tensors", first)


def texts_in(batch: Any) -> Any:
    """The texts of a call: strings, ids, or what holds ids."""
    first, *more = batch[0]
    if isinstance(first, dict) and "text_ids" in first:
        return SimpleNamespace(input_ids=first["text_ids"], attention_mask=first["text_masks"])
    return first["text_input"] if isinstance(first, dict) else more[0]


def ids_in(text: Any) -> Any:
    """Rows of a text that tell its length: its ids, or its strings."""
    for name in ("input_ids", "tensors"):
        if hasattr(text, name):
            return getattr(text, name)
    return text


def changed(batch: Any, row: int) -> Any:
    """The same batch with other words in one of its texts."""
    args, kwargs = batch
    text = texts_in(batch)
    if isinstance(text, list):
        text = [other_words(words) if index == row else words for index, words in enumerate(text)]
        if isinstance(args[0], dict):
            return ({**args[0], "text_input": text}, *args[1:]), kwargs
        return (args[0], text, *args[2:]), kwargs
    if isinstance(args[0], dict):
        others = {name: reworded(ids, row) for name, ids in args[0].items() if name.startswith("text_ids")}
        return ({**args[0], **others}, *args[1:]), kwargs
    ids = reworded(ids_in(text), row)
    if isinstance(text, Tensor):
        return (args[0], ids, *args[2:]), kwargs
    nested = hasattr(text, "tensors")
    mask = text.mask if nested else text.attention_mask
    names = ("tensors", "mask") if nested else ("input_ids", "attention_mask")
    other = SimpleNamespace(**dict(zip(names, (ids, mask))))
    return (args[0], other, *args[2:]), kwargs


def reworded(ids: Tensor, row: int) -> Tensor:
    """The same ids with two others in one row."""
    ids = ids.clone()
    ids[row, 1:3] = ids[row, 1:3] % 90 + 5
    return ids


def other_words(words: str) -> str:
    """A sentence of the same length."""
    return " ".join(reversed(words.split()))


def _double(model: nn.Module, *more: Any, **extra: Any) -> Head:
    images = extra.get("images", 3)
    return Head(model, lambda seed: ((pictures(images, seed=seed), sentences(3, seed=seed), *more), {}), **extra)


CAPTIONS = ("a red dog runs", "two small birds sleep under the tree", "an old boat")
QUESTIONS = ("where is the dog", "how many birds are on the tree", "is it old")


def _said(texts: tuple[str, ...], seed: int) -> list[str]:
    return [f"{text} {'abcdef'[(seed + row) % 6]}" for row, text in enumerate(texts)]


def _spoken(model: nn.Module, *more: Any, texts: tuple[str, ...] = CAPTIONS, **extra: Any) -> Head:
    """A head of BLIP, called with strings."""
    images = extra.get("images", 3)
    return Head(model, lambda seed: ((pictures(images, seed=seed), _said(texts, seed), *more), {}), **extra)


def _samples(model: nn.Module, **extra: Any) -> Head:
    """A head of LAVIS, called with a dictionary."""

    def batch(seed: int) -> Any:
        given = dict(image=pictures(3, seed=seed), text_input=_said(CAPTIONS, seed), label=torch.tensor([0, 1, 1]))
        return (given,), {}

    return Head(model, batch, **extra)


def _batch(model: nn.Module, **extra: Any) -> Head:
    """A model of METER, called with a batch of its datasets."""

    def batch(seed: int) -> Any:
        text = sentences(4, seed=seed)
        masked = text.input_ids.clone()
        masked[:, 3] = 2
        words = dict(text_ids=text.input_ids, text_ids_mlm=masked, text_masks=text.attention_mask)
        return ({"image": [pictures(4, seed=seed)], **words},), {}

    return Head(model, batch, images=4, **extra)


def _video(large: bool) -> Head:
    labels = sentences(2, seed=1)
    model = mplug.VideoCaptioning(large)
    return Head(
        model, lambda seed: ((pictures(6, seed=seed).unflatten(0, (2, 3)), None, labels), {}), images=6, captions=True
    )


def _grounding(large: bool) -> Head:
    def batch(seed: int) -> Any:
        text = sentences(3, seed=seed)
        nested = SimpleNamespace(tensors=text.input_ids, mask=text.attention_mask)
        return (SimpleNamespace(tensors=pictures(3, seed=seed), mask=None), nested), {}

    return Head(mplug.Grounding(large), batch, same_stream=False)


def _real(family: str, name: str, **options: Any) -> Head:
    directory, runners = os.environ.get(f"{family.upper()}_DIR"), os.environ.get("PATCHSELECT_TARGETS")
    if not directory or not runners:
        pytest.skip(f"set {family.upper()}_DIR and PATCHSELECT_TARGETS to run the real {family}")
    if runners not in sys.path:
        sys.path.insert(0, runners)
    targets = importlib.import_module(f"{family}_targets")
    try:
        model, batch = targets.ALL[name](**options)
    except ModuleNotFoundError as missing:
        pytest.skip(f"the real {family} imports {missing.name}, which is not installed")
    rows = len(batch()[0][0].tensors if name == "grounding" else batch()[0][0].flatten(0, -4))

    def seeded(seed: int) -> Any:
        torch.manual_seed(seed)
        return batch(seed=seed)

    return Head(
        model,
        seeded,
        images=rows,
        captions="caption" in name,
        same_stream=family == "albef" and name != "nlvr_pretrain",
        active=targets.active,
    )


def skip_what_autocast_cannot_run(name: str) -> None:
    """Skip a head that fails under autocast on CPU without any selection, on releases of torch that know no better."""
    reason = missing("mask under autocast")
    if reason is None:
        return
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            build(name).call()
    except RuntimeError as error:
        pytest.skip(f"{reason}; so does this head as it comes: {str(error).splitlines()[0]}")


HEADS: dict[str, Callable[[], Head]] = {
    "albef-retrieval": lambda: _double(albef.Retrieval()),
    "albef-answering": lambda: _double(albef.Answering(), sentences(3, seed=1)),
    "albef-pairs": lambda: _double(albef.Pairs(twins=False), torch.tensor([0, 1, 1]), images=6),
    "albef-two-widths": lambda: _double(albef.Retrieval(width=48)),
    "blip-retrieval": lambda: _spoken(blip.Retrieval()),
    "blip-matching": lambda: _spoken(blip.Matching(), extra_text_layers=2),
    "blip-answering": lambda: _spoken(blip.Answering(), ["a dog", "two", "no"], texts=QUESTIONS, extra_text_layers=2),
    "blip-pairs": lambda: _spoken(blip.Pairs(), torch.tensor([0, 1, 1]), images=6, extra_text_layers=2),
    "blip-captioning": lambda: _spoken(blip.Captioning(), captions=True),
    "lavis-albef-retrieval": lambda: _samples(blip.LavisRetrieval()),
    "lavis-albef-classification": lambda: _samples(blip.LavisClassification(blip.HalvedWords())),
    "lavis-blip-classification": lambda: _samples(blip.LavisClassification(blip.MixedWords()), extra_text_layers=2),
    "meter-itm": lambda: _batch(meter.Fusing("itm")),
    "meter-mlm": lambda: _batch(meter.Fusing("mlm")),
    "meter-irtr": lambda: _batch(meter.Fusing("irtr")),
}
for _large in (False, True):
    _size = "large" if _large else "base"
    HEADS.update(
        {
            f"mplug-retrieval-{_size}": lambda large=_large: _double(mplug.Retrieval(large), same_stream=False),
            f"mplug-answering-{_size}": lambda large=_large: _double(mplug.Answering(large), same_stream=False),
            f"mplug-grounding-{_size}": lambda large=_large: _grounding(large),
            f"mplug-captioning-{_size}": lambda large=_large: _double(
                mplug.Captioning(large), sentences(3, seed=1), captions=True
            ),
            f"mplug-video-{_size}": lambda large=_large: _video(large),
        }
    )
for _name in ("retrieval", "pretrain", "vqa", "nlvr", "nlvr_pretrain", "ve"):
    HEADS[f"real-albef-{_name}"] = functools.partial(_real, "albef", _name)
for _name in ("retrieval", "vqa", "grounding", "caption", "caption_vatex"):
    for _large in (False, True):
        _size = "large" if _large else "base"
        HEADS[f"real-mplug-{_name}-{_size}"] = functools.partial(_real, "mplug", _name, large=_large)


def build(name: str) -> Head:
    torch.manual_seed(0)
    return HEADS[name]()
