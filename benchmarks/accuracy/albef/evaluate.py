"""What is measured of a model and a way to spend less: matching, retrieval, and which patches were kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import patchselect
from benchmarks.accuracy.world import text_alone
from benchmarks.accuracy.world.captions import captions, concepts_of, unique_captions
from benchmarks.accuracy.world.sampling import Sampler
from benchmarks.accuracy.world.scenes import PLAIN, Layout, make_scenes
from patchselect.metrics import retrieval_recall

from .arms import RELEVANCE, Encode, lifted, selecting
from .model import PATCH, MiniAlbef

CHUNK = 128
TEST_SEED, VALIDATION_SEED = 77, 277
"""Of the questions of all tables of matching, and of those that choices are made on."""


@dataclass(frozen=True)
class Questions:
    """A fixed test: scenes with one caption that fits and one that does not, and a pool for retrieval."""

    images: Tensor
    fitting: Tensor
    other: Tensor
    named: Tensor
    """`(N, patches)`: the patches of the objects that the fitting caption names."""
    pool_images: Tensor
    pool_captions: Tensor

    @classmethod
    def make(cls, count: int, pool: int, seed: int, layout: Layout = PLAIN, test: bool = True) -> Questions:
        """Make `count` scenes of photographs that training never sees, and `pool` scenes with unique captions.

        Without `test`, they are new crops of the training's photographs: choices are made on them.
        """
        scenes = make_scenes(count, seed, test, layout)
        sampler = Sampler(scenes, layout.size // PATCH, seed)
        batch = sampler.ask(range(count))
        more = make_scenes(24 * pool, seed + 1, test, layout)
        rows, texts = unique_captions(more.objects, pool, seed)
        pool_images = more.images(torch.tensor(rows))
        return cls(batch.images, batch.fitting, batch.other, batch.named, pool_images, captions(texts))


@torch.inference_mode()
def match_logits(model: MiniAlbef, encode: Encode, images: Tensor, ids: Tensor) -> Tensor:
    """Return `(B,)`: how much more likely each pair is to fit than not, every pair encoded with its own text."""
    logits = []
    for rows in torch.arange(len(images)).split(CHUNK):
        text = model.text(ids[rows])
        logits.append(model.match(encode(images[rows], text[:, 0]), text, ids[rows]))
    both = torch.cat(logits)
    return both[:, 1] - both[:, 0]


def matching_hits(model: MiniAlbef, encode: Encode, questions: Questions) -> Tensor:
    """Return `(2 N,)` booleans: which questions (fits, fits not) are answered right."""
    fitting = match_logits(model, encode, questions.images, questions.fitting)
    other = match_logits(model, encode, questions.images, questions.other)
    return torch.cat([fitting > 0, other < 0])


def retrieval(model: MiniAlbef, encode: Encode, questions: Questions) -> dict[str, dict[int, float]]:
    """Compute R@K both ways: every image of the pool with every caption, each pair encoded with its own text."""
    count = len(questions.pool_images)
    scores = [
        match_logits(model, encode, image.expand(count, -1, -1, -1), questions.pool_captions)
        for image in questions.pool_images
    ]
    return retrieval_recall(torch.stack(scores), torch.arange(count))


def without_picture(questions: Questions) -> tuple[Tensor, dict[str, dict[int, float]]]:
    """Return `matching_hits` and `retrieval` of a classifier that saw the captions of other questions alone."""
    fitting, other, pool = (
        torch.from_numpy(text_alone.fits(concepts_of(ids)))
        for ids in (questions.fitting, questions.other, questions.pool_captions)
    )
    scores = pool.expand(len(questions.pool_images), -1)  # it sees no picture: all have the same scores
    return torch.cat([fitting > 0, other < 0]), retrieval_recall(scores, torch.arange(len(pool)))


@torch.inference_mode()
def patch_recall(model: MiniAlbef, method: str, keep_rate: float, questions: Questions) -> float:
    """Return the share of the named objects' patches that the first selection does not fuse; merged ones count.

    Chance is about the keep rate where nothing has merged before.
    """
    handle = selecting(model, method, keep_rate, model.shape.layers[:1])
    kept = torch.ones_like(questions.named)
    try:
        for rows in torch.arange(len(kept)).split(CHUNK):
            text = model.text(questions.fitting[rows])[:, 0]
            with handle.record() as trace:
                if method in RELEVANCE:
                    with patchselect.guide(model.vision, lifted(model, method, text)):
                        model.encode_image(questions.images[rows])
                else:
                    model.encode_image(questions.images[rows])
            if trace[0].fused:
                kept[rows] = trace[0].holders < trace[0].kept.shape[1]
    finally:
        handle.remove()
    return float((kept & questions.named).sum() / questions.named.sum())
