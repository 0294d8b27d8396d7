"""Frozen CLIP, training-free: which relevance, guided by which texts. `python -m benchmarks.accuracy clip`.

A small CLIP that saw no loss but InfoNCE names the one of 16 captions that fits a scene, while its vision tower drops
patches. All arms answer the same questions, so that their differences have small errors.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import patchselect
from benchmarks.report import machine, versions
from benchmarks.tome import schedule, token_merging
from patchselect.functional import as_ratio, num_kept

from . import clip
from .captions import EMOJI
from .clip import DEPTH, LAYERS, PATCH, SIZE, load, tokenize
from .clip_report import document, draw
from .questions import CHOICES, SEEDS, TEST, Questions, encode, make_questions, right

RATES = (0.7, 0.5, 0.3, 0.15)
GRID = SIZE // PATCH


@dataclass(frozen=True)
class Arm:
    """One way to spend fewer tokens."""

    name: str
    guidance: str = "text"
    """`text`, `image`, `random`, `grid`, `tome` or `none`."""
    relevance: str | None = None
    texts: str = ""
    """`paired`: each caption guides its own pass; `candidates`: the 16 of a scene share one; `nouns`: all concepts."""


ARMS = (
    Arm("no selection", "none"),
    Arm("values, shared by the candidates", "text", "values", "candidates"),
    Arm("values, shared by all nouns", "text", "values", "nouns"),
    Arm("values, per caption", "text", "values", "paired"),
    Arm("joint, shared by the candidates", "text", "joint", "candidates"),
    Arm("joint, per caption", "text", "joint", "paired"),
    Arm("keys, shared by the candidates", "text", "keys", "candidates"),
    Arm("keys, per caption (TRIPS)", "text", "keys", "paired"),
    Arm("keys, shared by all nouns", "text", "keys", "nouns"),
    Arm("features, shared by all nouns", "text", "features", "nouns"),
    Arm("image [CLS] (EViT)", "image"),
    Arm("random", "random"),
    Arm("smaller grid, equal tokens", "grid"),
    Arm("ToMe, equal tokens", "tome"),
)
NONE, SHARED = ARMS[0].name, ARMS[1].name
RIVALS = ("image [CLS] (EViT)", "keys, per caption (TRIPS)", "keys, shared by the candidates", "ToMe, equal tokens")


def tokens_with(rate: float) -> int:
    """Tokens that all MLPs of the tower see, [CLS] and fused token included: what "equal tokens" compares."""
    total, patches = 0, GRID * GRID
    for index in range(DEPTH):
        if index in LAYERS and rate < 1:
            patches = min(patches, num_kept(patches, as_ratio(rate)) + 1)
        total += 1 + patches
    return total


def tokens_merged(removed: int) -> int:
    """The same for token merging, where a layer can merge no more than half of its patches."""
    total, patches = 0, GRID * GRID
    for step in schedule(removed, DEPTH):
        patches -= min(step, patches // 2)
        total += 1 + patches
    return total


def merged_like(tokens: int) -> int:
    """How many patches ToMe removes in all to spend `tokens`, or as close as it gets."""
    return min(range(GRID * GRID), key=lambda removed: (abs(tokens_merged(removed) - tokens), removed))


def grid_like(tokens: int) -> tuple[int, int]:
    """The grid, square or one longer, that spends about as many."""
    sides = [(side, side + longer) for side in range(1, GRID) for longer in (0, 1)]
    return min(sides, key=lambda side: abs(DEPTH * (1 + side[0] * side[1]) - tokens))


def spent(arm: Arm, rate: float) -> int:
    """Tokens of this arm over all blocks."""
    if arm.guidance == "none":
        return tokens_with(1.0)
    if arm.guidance == "tome":
        return tokens_merged(merged_like(tokens_with(rate)))
    if arm.guidance == "grid":
        height, width = grid_like(tokens_with(rate))
        return DEPTH * (1 + height * width)
    return tokens_with(rate)


@torch.no_grad()
def encode_smaller(model: Any, images: Tensor, side: tuple[int, int]) -> Tensor:
    """`(N, E)` features of scaled-down images, with the position embeddings scaled like them."""
    small = F.interpolate(images, [PATCH * length for length in side], mode="bilinear", antialias=True)
    first, rest = model.visual.positional_embedding.split([1, GRID * GRID])
    square = rest.T.unflatten(1, (GRID, GRID)).unsqueeze(0)
    square = F.interpolate(square, side, mode="bicubic", antialias=True).flatten(2)[0].T
    state = {"positional_embedding": torch.cat([first, square])}
    return torch.cat([torch.func.functional_call(model.visual, state, (part,)) for part in small.split(256)])


@torch.no_grad()
def answers(model: Any, arm: Arm, rate: float, images: Tensor, texts: Tensor, fusion: Any = "mean") -> Tensor:
    """Image features `(N, E)`, or `(N, CHOICES, E)` where each caption guides its own.

    Args:
        model: in evaluation mode, without selection; it is left so.
        arm: what to do.
        rate: keep rate of both layers.
        images: `(N, 3, S, S)`.
        texts: `(N, CHOICES, E)`.
        fusion: of `patchselect.apply`.
    """
    if arm.guidance == "none":
        return encode(model, images)
    if arm.guidance == "grid":
        return encode_smaller(model, images, grid_like(tokens_with(rate)))
    if arm.guidance == "tome":
        with token_merging(model, merged_like(tokens_with(rate))):
            return encode(model, images)
    handle = patchselect.apply(model, rate, LAYERS, arm.guidance, arm.relevance, fusion)
    try:
        if arm.guidance != "text":
            return encode(model, images)
        if arm.texts == "nouns":
            nouns = model.encode_text(tokenize([(concept,) for concept in range(len(EMOJI))]))
            with patchselect.guide(model, nouns, "shared"):
                return encode(model, images)
        pairing = "all" if arm.texts == "paired" else "shared"
        parts = []
        for rows in torch.arange(len(images)).split(8 if pairing == "all" else 128):
            with patchselect.guide(model, texts[rows], pairing):
                parts.append(model.encode_image(images[rows]))
        found = torch.cat(parts)
        return found.unflatten(0, (-1, CHOICES)) if pairing == "all" else found
    finally:
        handle.remove()


Progress = Callable[[str], None]


def ask(
    model: Any, questions: Questions, arms: Sequence[Arm], rates: Sequence[float], fusion: str, progress: Progress
) -> dict[tuple[str, float], Tensor]:
    """By arm and rate, `(N,)`: 1 where the answer was right, else 0. Without selection, the rate is 1."""
    images, texts, found = questions.images(), questions.texts(model), {}
    for arm in arms:
        for rate in (1.0,) if arm.guidance == "none" else rates:
            progress(f"{arm.name} {rate:g}")
            torch.manual_seed(0)  # random guidance
            found[arm.name, rate] = right(answers(model, arm, rate, images, texts, fusion), texts).double()
    return found


def mean(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error of one value for each question, `(N,)`."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def summarise(found: Sequence[dict[tuple[str, float], Tensor]], arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """One record per arm and rate. Questions are the same for all models: a question's value is its mean over them."""
    average = {key: torch.stack([one[key] for one in found]).mean(0) for key in found[0]}
    kinds, records = {arm.name: arm for arm in arms}, []
    for (name, rate), values in average.items():
        record: dict[str, Any] = {"arm": name, "keep_rate": rate, "tokens": spent(kinds[name], rate)}
        record["by_model"] = [float(one[name, rate].mean()) for one in found]
        record["accuracy"], record["standard_error"] = mean(values)
        if (NONE, 1.0) in average and name != NONE:
            record["against_none"] = mean(values - average[NONE, 1.0])
        if (SHARED, rate) in average and name not in (SHARED, NONE):
            record["shared_values_ahead"] = mean(average[SHARED, rate] - values)
        records.append(record)
    return records


def bars(records: Sequence[dict[str, Any]], rate: float = 0.3) -> list[dict[str, Any]]:
    """What shared values must show at this rate, and whether they do."""
    at = {record["arm"]: record for record in records if record["keep_rate"] == rate}
    checked = []
    if "against_none" in at.get(SHARED, {}):
        gap, error = at[SHARED]["against_none"]
        checked.append({"what": f"not below {NONE} by more than 1", "gap": gap, "error": error, "met": gap >= -error})
    for name in RIVALS:
        if "shared_values_ahead" in at.get(name, {}):
            gap, error = at[name]["shared_values_ahead"]
            checked.append({"what": f"above {name} by more than 2", "gap": gap, "error": error, "met": gap > 2 * error})
    return checked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    clip.add_arguments(parser)
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0, 1], help="models of the table")
    add("--count", type=int, default=1024, help="questions")
    add("--split", choices=tuple(SEEDS), default=TEST, help="choices are made on validation")
    add("--keep-rate", type=float, nargs="+", default=list(RATES))
    add("--arms", nargs="+", default=[], help="those whose names contain one of these; default: all")
    add("--fusion", choices=("mean", "sum", "none"), default="mean")
    add("--output", type=Path, default=Path("results/clip"))


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Ask all models, print the tables, write JSON, Markdown and plot; with `--train`, make a checkpoint instead."""
    if options.train:
        return clip.main(options)
    torch.set_num_threads(options.threads)
    about = machine(torch.device("cpu"))
    arms = [arm for arm in ARMS if not options.arms or any(part in arm.name for part in (*options.arms, NONE))]
    questions = make_questions(options.count, options.split)
    runs = len(options.seeds) * sum(1 if arm.guidance == "none" else len(options.keep_rate) for arm in arms)
    with tqdm(total=runs, file=sys.stderr) as bar:

        def progress(what: str) -> None:
            bar.set_description_str(what)
            bar.update()

        models = (load(seed, options.checkpoints) for seed in options.seeds)
        found = [ask(model, questions, arms, options.keep_rate, options.fusion, progress) for model in models]
    records = summarise(found, arms)
    report = {
        "machine": about,
        "versions": versions(),
        "settings": {**vars(options), **{key: str(vars(options)[key]) for key in ("output", "checkpoints")}},
        "results": records,
        "bars": bars(records),
        "bars_by_model": {seed: bars(summarise([one], arms)) for seed, one in zip(options.seeds, found)},
    }
    report["settings"] = {k: v for k, v in report["settings"].items() if isinstance(v, (str, int, float, list))}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"clip-{options.split}.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / f"clip-{options.split}.md").write_text(document(report))
    draw(report, options.output / f"clip-{options.split}.png")
    sys.stdout.write(document(report))
    return report


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.clip_study", description=__doc__)
    add_arguments(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
