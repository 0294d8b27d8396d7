"""N images against M texts: the shared part of the encoder once per image, the rest once per pair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Texts
from ..wiring.guidance import check_text, scope
from ..wiring.state import Wiring, wiring_of
from .batches import Batch, batches, count, stacked
from .chunks import Chunks, plan_chunks, texts_at_once
from .evaluation import without_dropout
from .prefix import Prefix, take_prefix
from .processes import gather, share
from .progress import Bar
from .storage import Finished


@torch.no_grad()
def score_pairs(
    model: nn.Module,
    images: Any,
    texts: Any,
    *,
    candidates: Tensor | None = None,
    memory_limit: float = 2**30,
    resume: str | Path | None = None,
    progress: bool | None = None,
    distributed: bool = True,
) -> Tensor:
    """Score N images against M texts with image features that each text guides.

    The blocks before the first selection layer run once per image, the rest once per pair on fewer tokens: about
    `prefix + M * suffix` per image instead of `M` whole passes. Dual encoders (CLIP, SigLIP) give the cosine of the
    two features, without `logit_scale`; hosts with an image-text matching head (ALBEF, mPLUG, BLIP) the probability
    of a match. With a guidance that needs no text, every image is encoded once. Dropout is off for this call alone: a
    model in training mode stays in it for whoever else uses it.

    Args:
        model: a model that `patchselect.apply` patched.
        images: pixels `(N, 3, H, W)`, a list of images of one size, a `Prefix`, a mapping (`pixel_values` and what
            else the tower takes), or a loader of batches of these in a fixed order (of a tuple, the first counts).
        texts: features `(M, D_text)`, token ids `(M, L)`, what the host's tokenizer returns, or a loader of these.
            Matching heads read the tokens themselves, so they need ids; ids without a mask are masked where they are
            the `pad_token_id` of the text encoder's config, and all words where that names none.
        candidates: `(N, K)` indices of texts: each image is scored against its own K texts alone, which re-ranks the
            best of a cheap first pass.
        memory_limit: bytes that activations may take at once, whatever N and M are (inputs, weights and the scores
            come on top); the sizes of the chunks follow from it.
        resume: a folder in which each finished chunk of images is stored. Called again with the same arguments after
            an interruption, the chunks that are there are not computed again.
        progress: show a bar (needs tqdm); `None` shows one where tqdm is installed and the work takes over 5 s.
        distributed: share the images out over the processes of an initialised `torch.distributed` group; every
            process calls this with the same arguments and gets the whole matrix.

    Returns:
        `(N, M)`, or `(N, K)` with candidates, in float32 on the CPU.

    Raises:
        ValueError: the model is not patched; shapes that do not fit; a limit too small for one image with one text
            (it says how much that takes); a folder with chunks of other weights, texts or images.
        TypeError: images or texts of a kind that cannot be read.
    """
    wiring = without_dropout(wiring_of(model))
    tower = wiring.towers[0]
    if tower.single_stream:
        raise ValueError(
            f"{type(tower.module).__name__} reads image and text as one sequence, so every pair is a whole pass: call "
            "the model with both"
        )
    weight = next(tower.module.parameters())
    images = stacked(images, tower)
    encoded = _encode_texts(wiring, texts, weight, memory_limit)
    columns = _check_candidates(candidates, count(images), len(encoded))
    rank, world = share(distributed)
    finished = Finished(resume, wiring, encoded, candidates)
    rows: dict[int, Tensor] = {}
    with Bar(progress if rank == 0 else False, count(images)) as bar:
        for batch in batches(images, tower, rank, world):
            if isinstance(batch.images, Prefix):
                batch.images.check(wiring)
            chunks = plan_chunks(wiring, batch, encoded, columns, memory_limit)
            for chunk in batch.split(chunks.images):
                chosen = None if candidates is None else candidates[chunk.start : chunk.start + len(chunk)]
                scores = finished.load(chunk)
                if scores is None:
                    scores = _score_chunk(_Chunk(wiring, chunk.to(weight), chunks), encoded, chosen)
                    finished.save(chunk, scores)
                rows[chunk.start] = scores
                bar.update(len(chunk))
    return gather(rows, columns, weight.device, world)


@dataclass(frozen=True)
class _Chunk:
    """Images that are in memory together, and how many texts may join them."""

    wiring: Wiring
    batch: Batch
    chunks: Chunks


def _score_chunk(chunk: _Chunk, texts: Texts, candidates: Tensor | None) -> Tensor:
    """Return `(B, M)` or `(B, K)` scores of the images of one chunk, on the CPU."""
    wiring, batch = chunk.wiring, chunk.batch
    tower, host = wiring.towers[0], wiring.model
    size, device = len(batch), texts.features.device
    by_text = wiring.plan.guidance == "text"
    if not by_text:
        encoded = tower.adapter.encode_images(host, tower, batch.images, **batch.options)
    elif isinstance(batch.images, Prefix):
        prefix = batch.images
    else:
        prefix = take_prefix(wiring, batch.images, batch.options, batch.images.shape[1:])
    columns = []
    width = len(texts) if candidates is None else candidates.shape[1]
    for low in range(0, width, chunk.chunks.texts):
        high = min(low + chunk.chunks.texts, width)
        if candidates is None:
            some = texts[low:high]
            features, paired = some.features, some.repeat(size)
        else:
            paired = texts[candidates[:, low:high].flatten().to(device)]
            features = paired.features.unflatten(0, (size, high - low))
        if by_text:
            with scope(wiring, features, "all", prefix=prefix):
                rows = tower.adapter.encode_images(host, tower, prefix.images, **batch.options)
        else:
            rows = encoded.repeat_interleave(high - low, dim=0)
        scores = tower.adapter.score(host, tower, rows, paired)
        columns.append(scores.view(size, high - low).float().cpu())
    return torch.cat(columns, dim=1)


def _encode_texts(wiring: Wiring, texts: Any, like: Tensor, limit: float) -> Texts:
    """Encode all texts, in pieces that fit the limit."""
    tower = wiring.towers[0]
    parts = []
    for batch in _text_batches(texts):
        if isinstance(batch, Tensor) and batch.is_floating_point():
            if batch.dim() != 2:
                raise ValueError(f"text features must be (texts, width), got {tuple(batch.shape)}")
            if wiring.plan.guidance == "text":
                check_text(wiring, batch)
            parts.append(Texts(batch.to(like.device)))
            continue
        rows = len(batch["input_ids"]) if isinstance(batch, Mapping) else len(batch)
        step = texts_at_once(batch, limit)
        for low in range(0, rows, step):
            piece = (
                {name: value[low : low + step].to(like.device) for name, value in batch.items()}
                if isinstance(batch, Mapping)
                else batch[low : low + step].to(like.device)
            )
            parts.append(tower.adapter.encode_texts(wiring.model, tower, piece))
    if not parts or not sum(map(len, parts)):
        raise ValueError("score_pairs got no text: give features (M, width), token ids (M, L) or a loader of these")
    return Texts.cat(parts)


def _text_batches(texts: Any) -> Iterator[Any]:
    if isinstance(texts, Tensor) or (isinstance(texts, Mapping) and "input_ids" in texts):
        yield texts
        return
    if hasattr(texts, "input_ids"):
        yield {"input_ids": texts.input_ids, "attention_mask": texts.attention_mask}
        return
    if isinstance(texts, (str, bytes, Mapping)) or not hasattr(texts, "__iter__"):
        raise TypeError(
            f"texts must be features, token ids, a tokenizer's output or a loader of these, got "
            f"{type(texts).__name__}: run the host's own tokenizer first"
        )
    for item in texts:
        yield from _text_batches(item[0] if isinstance(item, (tuple, list)) and item else item)


def _check_candidates(candidates: Tensor | None, images: int | None, texts: int) -> int:
    """Return the number of columns of the scores."""
    if candidates is None:
        return texts
    if not isinstance(candidates, Tensor) or candidates.is_floating_point() or candidates.dim() != 2:
        raise TypeError("candidates must be an integer tensor (images, K) of text indices")
    if candidates.shape[1] < 1 or (images is not None and candidates.shape[0] != images):
        raise ValueError(f"candidates must be ({images}, K): one row per image; got {tuple(candidates.shape)}")
    if candidates.numel() and not 0 <= int(candidates.min()) <= int(candidates.max()) < texts:
        raise ValueError(f"candidates must be indices of the {texts} texts, 0 to {texts - 1}")
    return candidates.shape[1]
