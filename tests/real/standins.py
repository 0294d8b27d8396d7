"""Random stand-ins for the data that constructors want to download: vocabulary, configuration, weights. No code."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

WORDS = (
    *("a", "the", "of", "on", "in", "is", "are", "there", "what", "which", "how", "many", "under", "over", "and"),
    *("red", "green", "blue", "black", "white", "big", "small", "old", "new", "one", "two", "three", "yes", "no"),
    *("dog", "cat", "birds", "horse", "house", "tree", "car", "boat", "man", "woman", "table", "street", "water"),
    *("sky", "stands", "sits", "runs", "sleep", "picture", "photo"),
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = 1024
"""Ids 0 to 1023; BLIP adds two tokens."""
CAPTIONS = ("a red dog on the street", "two birds sleep", "the man sits under a big tree", "a small boat in the water")
QUESTIONS = ("what is on the table", "how many birds are there", "is the sky blue", "which car is old")
ANSWERS = ("a dog", "two", "yes", "no", "the red one", "three birds")


def bert(folder: Path, **config: Any) -> Path:
    """A folder `bert-base-uncased` with a vocabulary, a configuration and a weights file that holds no weight.

    `from_pretrained` initialises what it does not find there, as it does with new layers.
    """
    place = folder / "bert-base-uncased"
    place.mkdir(exist_ok=True)
    pieces = [*SPECIAL, *WORDS, *string.ascii_lowercase, *("##" + letter for letter in string.ascii_lowercase)]
    unused = [f"[unused{number}]" for number in range(VOCABULARY - len(pieces))]
    (place / "vocab.txt").write_text("\n".join([*pieces, *unused]) + "\n")
    sizes = dict(vocab_size=VOCABULARY, hidden_size=768, num_attention_heads=12, num_hidden_layers=4)
    (place / "config.json").write_text(json.dumps({"model_type": "bert", **sizes, **config}))
    torch.save({}, place / "pytorch_model.bin")
    return place


def json_file(path: Path, **config: Any) -> str:
    path.write_text(json.dumps(config))
    return str(path)


def one_process(folder: Path) -> None:
    """A group of one process, which retrieval and pretraining heads gather over."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)


def pictures(count: int, seed: int, size: int = 64) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def sentences(count: int, seed: int, pool: tuple[str, ...] = CAPTIONS) -> list[str]:
    """Captions that differ from row to row and from seed to seed."""
    return [pool[(row + seed) % len(pool)] + " " + WORDS[(7 * row + 3 * seed) % len(WORDS)] for row in range(count)]
