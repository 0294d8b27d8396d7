"""Retrieval on Flickr30K and COCO, any CLIP, in two passes: `python -m benchmarks.accuracy retrieval`.

    python -m benchmarks.accuracy retrieval --data dataset_flickr30k.json --images flickr30k-images \\
        --model ViT-B-16 --pretrained openai

`--data` is a split of Karpathy or a list of ALBEF's kind; the images lie where you have put them, nothing is
downloaded. The first pass compares all images with all texts without selection. The second compares the best of each
direction again, each image selected by the text of the pair; so do the arms that read no text (image, random, merging
and a smaller image at the FLOPs of text guidance), so that all arms rank the same candidates. R@K is in percent.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import patchselect
from benchmarks.common import command
from benchmarks.common.cost import count_flops
from benchmarks.common.objects import OUTSIDE, name_of, named
from benchmarks.common.show import aligned
from benchmarks.common.tome import front, matching_flops, token_merging
from benchmarks.models.host import Host, first_line
from benchmarks.models.loading import load
from patchselect.metrics import retrieval_recall
from patchselect.wiring.towers import find_towers

from .albef import load_albef
from .evaluate import DTYPES
from .karpathy import Pool, read_pool
from .rerank import candidates_of, ranked, rescored
from .signs import Opposite

KS = (1, 5, 10)
OTHERS = ("image", "random", "merging", "smaller")


@dataclass(frozen=True)
class Arm:
    """One way to run the vision tower in the second pass."""

    kind: str
    """`text` or one of `OTHERS`."""
    keep_rate: float
    relevance: Any = None

    def __str__(self) -> str:
        return f"text, {name_of(self.relevance)}" if self.kind == "text" else self.kind


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, help="dataset_flickr30k.json, dataset_coco.json, or flickr30k_test.json")
    add("--images", type=Path, help="folder that the paths start from; default: that of --data")
    add("--split", default="test")
    add("--captions", type=int, default=5, help="of each image")
    add("--limit", type=int, help="so many images, the first ones; default: all")
    command.add_model(parser, "ViT-B-16")
    about = "a config of ALBEF (configs/Retrieval_flickr.yaml): its own model and head instead, see docs/accuracy.md"
    add("--albef", type=Path, metavar="CONFIG", help=about)
    add("--random-weights", action="store_true", help="a dry run: go on where weights or tokenizer are missing")
    about = f"of text, {OUTSIDE}"
    add("--relevance", nargs="+", type=named, default=["values", "keys", "joint"], metavar="NAME", help=about)
    add("--one-sign", action="store_true", help="leave out the arms that keep what a relevance calls least relevant")
    add("--against", nargs="*", default=list(OTHERS), choices=OTHERS)
    add("--keep-rate", type=float, nargs="+", default=[0.7, 0.5])
    command.add_layers(parser)
    add("--best", type=int, default=16, help="candidates of each query in the second pass (ALBEF: 128 and 256)")
    add("--batch", type=int, default=32)
    add("--precision", choices=tuple(DTYPES), default="fp32")
    command.add_device(parser)
    add("--seed", type=int, default=0, help="of random guidance")
    command.add_output(parser, "results/retrieval", "folder for retrieval.json, retrieval.md and what is finished")


def flops_of(host: Host, arm: Arm, layers: Sequence[int] | None, removed: int = 0) -> int:
    """FLOPs of one image with one text."""

    def call() -> None:
        device = next(host.model.parameters()).device
        images = torch.zeros(1, 3, host.image_size, host.image_size, device=device)
        tower = find_towers(host.model)[0]
        text = torch.zeros(1, tower.adapter.text_width(tower), device=device)
        if arm.kind == "text":
            with patchselect.guide(host.model, text):
                host.encode_image(images)
        else:
            host.encode_image(images)

    with patched(host, arm, layers, removed):
        return count_flops(call)


@contextmanager
def patched(host: Host, arm: Arm, layers: Sequence[int] | None, removed: int = 0) -> Iterator[None]:
    """Patch the model as an arm wants it; in any case, as `score_pairs` asks."""
    rate = arm.keep_rate if arm.kind in ("text", "image", "random") else 1.0
    guidance = arm.kind if arm.kind in ("text", "image") else "random"
    handle = patchselect.apply(host.model, rate, layers, guidance, arm.relevance)
    try:
        if arm.kind == "merging":
            with token_merging(host.model, removed, first=front(len(find_towers(host.model)[0].blocks))):
                yield
        else:
            yield
    finally:
        handle.remove()


class Search:
    """One pool and one model: the first pass, and the second of each arm."""

    def __init__(self, host: Host, pool: Pool, options: argparse.Namespace) -> None:
        self.host, self.pool, self.options = host, pool, options
        self.place = next(host.model.parameters())
        self.tokens = host.tokens(pool.captions) if host.reads_tokens else {}
        self.texts = self.encoded_texts()
        self.first = self.compared()
        self.of_images, self.of_texts = candidates_of(self.first, options.best)

    @torch.inference_mode()
    def encoded_texts(self) -> Tensor:
        """`(M, E)`"""
        captions, batch = self.pool.captions, 8 * self.options.batch
        starts = tqdm(range(0, len(captions), batch), "texts", file=sys.stderr)
        return torch.cat([self.host.encode_text(self.host.tokens(captions[i : i + batch])) for i in starts])

    def pixels(self, places: Sequence[int], host: Host | None = None) -> Tensor:
        found = self.host if host is None else host
        return found.images([self.pool.open(place) for place in places])

    @torch.inference_mode()
    def compared(self) -> Tensor:
        """Make the first pass, `(N, M)`: cosines without selection."""
        places = torch.arange(len(self.pool.paths)).split(self.options.batch)
        found = [self.host.encode_image(self.pixels(some.tolist())) for some in tqdm(places, "images", file=sys.stderr)]
        return (F.normalize(torch.cat(found).float(), dim=-1) @ F.normalize(self.texts.float(), dim=-1).T).cpu()

    def again(self, arm: Arm, host: Host, removed: int) -> Tensor:
        """Make the second pass: scores of the candidates of both directions."""
        torch.manual_seed(self.options.seed)
        features = self.texts.clone()  # inference tensors may not leave their mode

        def texts(chosen: Tensor) -> Any:
            chosen = chosen.to(features.device)
            return {name: ids[chosen] for name, ids in self.tokens.items()} if self.tokens else features[chosen]

        with patched(host, arm, self.options.layers, removed):
            return rescored(
                host.model, lambda places: self.pixels(places, host), texts,
                self.of_images | self.of_texts, self.options.batch, f"{arm} {arm.keep_rate:g}",
                self.options.output / "finished" / f"{arm} {arm.keep_rate:g}",
            )  # fmt: skip

    def recalls(self, scores: Tensor | None) -> dict[str, dict[int, float]]:
        """R@K in both directions; of the first pass alone without `scores`."""
        owner = torch.tensor(self.pool.owner)
        found = {}
        for direction, again in (("image_to_text", self.of_images), ("text_to_image", self.of_texts)):
            matrix = self.first if scores is None else ranked(self.first, scores, again)
            found[direction] = retrieval_recall(matrix, owner, KS)[direction]
        return found


def smaller(options: argparse.Namespace, target: float, whole: float, host: Host) -> Host:
    """Load the model at the image size whose tokens cost closest to `target`, where its own cost `whole`."""
    tower = find_towers(host.model)[0]
    side = host.image_size // tower.adapter.grid(tower, torch.zeros(1, 3, host.image_size, host.image_size))[0]

    def cost(size: int) -> float:
        tokens = (size // side) ** 2 + tower.num_prefix_tokens
        return 12 * tokens * tower.width**2 + 2 * tokens**2 * tower.width

    wanted = target / whole * cost(host.image_size)
    size = min(range(side, host.image_size, side), key=lambda size: abs(cost(size) - wanted))
    found = loaded(options, size)
    found.model.to(next(host.model.parameters()))
    return found


def loaded(options: argparse.Namespace, size: int | None = None) -> Host:
    """Load the model that was asked for, in evaluation."""
    if options.albef is not None:
        return load_albef(options.albef, options.pretrained, size)
    host = load(options.model, size, options.pretrained)
    host.model.eval()
    return host


def run(host: Host, pool: Pool, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """One record per arm and keep rate, and what had to be left out."""
    search, notes = Search(host, pool, options), []
    whole = flops_of(host, Arm("random", 1.0), options.layers)
    alone = {"keep_rate": None, "flop_share": 1.0}
    records: list[dict[str, Any]] = [{"arm": "no selection", **alone, "recall": search.recalls(None)}]
    if host.reads_tokens:  # a head that ranks again tells more than the first pass, without selection too
        records[0]["arm"] = "first pass alone"
        again = search.recalls(search.again(Arm("random", 1.0), host, 0))
        records.append({"arm": "no selection", **alone, "recall": again})
    signs: list[Callable[[Any], Any]] = [lambda x: x] + [Opposite] * (not options.one_sign)
    kinds = [("text", sign(relevance)) for relevance in options.relevance for sign in signs]
    for kind, relevance in [*kinds, *((name, None) for name in options.against)]:
        for rate in options.keep_rate:
            arm, used, removed = Arm(kind, rate, relevance), host, 0
            try:
                if kind in ("merging", "smaller"):
                    target = flops_of(host, Arm("text", rate), options.layers)
                    if kind == "merging":
                        tower = find_towers(host.model)[0]
                        height, width = tower.adapter.grid(tower, search.pixels([0]))
                        count = lambda n, arm=arm: flops_of(host, arm, options.layers, n)  # noqa: E731
                        removed = matching_flops(target, count, height * width - len(tower.blocks))
                    else:
                        used = smaller(options, target, whole, host)
                share = flops_of(used, arm, options.layers, removed) / whole
            except (ValueError, TypeError) as error:
                notes.append(f"{arm} is left out: {first_line(error)}")
                break
            scores = search.again(arm, used, removed)
            about = {"image_size": used.image_size, "removed": removed or None}
            records.append({"arm": str(arm), "keep_rate": rate, "flop_share": share, **about,
                            "recall": search.recalls(scores)})  # fmt: skip
    return records, notes


def table(records: Sequence[dict[str, Any]]) -> str:
    """Write one row per arm and rate."""
    ways = (("image_to_text", "I→T"), ("text_to_image", "T→I"))
    rows = [["arm", "keep", "FLOPs", *(f"{short} R@{k}" for _, short in ways for k in KS)]]
    for r in records:
        found = [f"{r['recall'][way][k]:.2f}" for way, _ in ways for k in KS]
        rows.append(
            [r["arm"], "–" if r["keep_rate"] is None else f"{r['keep_rate']:g}", f"{r['flop_share']:.3f}", *found]
        )
    return aligned(rows)


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Search, print the table, write JSON and Markdown; a ValueError where accuracy would mean nothing."""
    pool = read_pool(options.data, options.images, options.split, options.captions, options.limit)
    host = loaded(options)
    if not options.random_weights:
        host.check_accuracy()
    host.model.to(options.device, DTYPES[options.precision])
    report = command.report_on(options, options.device)
    records, notes = run(host, pool, options)
    report.update(
        model={"name": host.name, "library": host.library, "weights": host.weights},
        images=len(pool.paths), captions=len(pool.captions), notes=[*host.notes, *notes], results=records,
    )  # fmt: skip
    parts = [
        f"# Retrieval of {host.name} with patch selection",
        f"{host.library}; {host.weights}. {len(pool.paths)} images, {len(pool.captions)} captions of "
        f"{options.data.name}, {host.image_size} px, {options.precision}. FLOPs: of one image with one text, against "
        "no selection; the first pass, which all arms need, comes on top. "
        f"The {options.best} best of each query are ranked again.",
        *(f"Note: {note}." for note in report["notes"]),
        table(records),
    ]
    command.write(options.output / "retrieval.json", report, "\n\n".join(parts))
    return report


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return command.parse("benchmarks.accuracy retrieval", __doc__, add_arguments, arguments)
