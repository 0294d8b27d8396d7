"""Zero-shot accuracy of any CLIP with and without selection: `python -m benchmarks.accuracy zeroshot`.

For whoever has weights and a folder of classes: what the small CLIP of this benchmark cannot show. Every batch is
decoded once and runs through all arms in turns, so that accuracies are compared on the same images and throughputs
under the same load.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import patchselect
from benchmarks.host import Host, first_line
from benchmarks.measure import timed
from benchmarks.models import load
from benchmarks.report import machine, spread, versions

from .clip_report import aligned
from .outliers import Diagnosis, diagnose

TEMPLATES = ("a photo of a {}.", "a picture of the {}.", "{}")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Arm:
    """One way to run the tower."""

    guidance: str
    """`none`, `text` (all classes share one selection per image), `image` or `random`."""
    relevance: str | None = None
    keep_rate: float = 1.0

    def __str__(self) -> str:
        if self.guidance == "none":
            return "no selection"
        return f"text, {self.relevance}" if self.guidance == "text" else self.guidance


@dataclass
class Seen:
    """What an arm did so far."""

    right: list[Tensor] = field(default_factory=list)
    """`(B,)` bool of each batch."""
    seconds: list[float] = field(default_factory=list)
    """Of each full batch."""
    diagnosis: Diagnosis = field(default_factory=Diagnosis)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with one folder of images for each class")
    add("--model", required=True, help="open_clip or transformers name, hf-hub:ORG/REPO, a local folder or file")
    add("--pretrained", help="open_clip: a tag or a file; transformers: hub, to download")
    add("--random-weights", action="store_true", help="a dry run: go on where weights or tokenizer are missing")
    add("--classes", type=Path, help="one class name a line, in the order of the sorted folders; default: their names")
    add("--templates", nargs="+", default=list(TEMPLATES), help="prompts with {} for the class, averaged; or one file")
    add("--relevance", nargs="+", default=["values", "keys", "joint"], help="of text guidance")
    add("--guidance", nargs="+", default=["text", "image", "random"], choices=("text", "image", "random"))
    add("--keep-rate", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    add("--layers", type=int, nargs="+", help="0-based selection blocks; default: 5th and 10th of 12, scaled")
    add("--image-size", type=int, help="pixels; default: the model's own")
    add("--batch", type=int, default=32)
    add("--limit", type=int, help="images, evenly over the data set; default: all")
    add("--outlier", type=float, default=3.0, help="a patch is an outlier above this multiple of the median norm")
    add("--diagnose", type=int, default=8, help="batches on which kept patches are looked at")
    add("--workers", type=int, default=0, help="processes that decode images")
    add("--precision", choices=tuple(DTYPES), default="fp32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0, help="of random guidance and of the order of the arms")
    add("--output", type=Path, default=Path("results/zeroshot"))


def images_of(options: argparse.Namespace, host: Host) -> tuple[Any, list[str]]:
    """The data set and the names of its classes.

    Raises:
        ValueError: names that do not fit the folders.
        FileNotFoundError: no folder, or no image in a class.
    """
    from torchvision.datasets import ImageFolder

    data = ImageFolder(str(options.data), transform=lambda picture: host.preprocess(picture.convert("RGB")))
    names = [name.replace("_", " ").replace("-", " ") for name in data.classes]
    if options.classes is not None:
        names = [line.strip() for line in options.classes.read_text().splitlines() if line.strip()]
        if len(names) != len(data.classes):
            raise ValueError(
                f"{options.classes} names {len(names)} classes, {options.data} has {len(data.classes)} folders"
            )
    if options.limit is not None and options.limit < len(data):
        picked = torch.linspace(0, len(data) - 1, options.limit).round().long().tolist()
        return torch.utils.data.Subset(data, picked), names
    return data, names


def prompts(given: Sequence[str]) -> list[str]:
    """Templates, given one by one or as a file with one a line.

    Raises:
        ValueError: a template without a place for the class.
    """
    if len(given) == 1 and Path(given[0]).is_file():
        given = [line for line in Path(given[0]).read_text().splitlines() if line.strip()]
    for template in given:
        if "{}" not in template:
            raise ValueError(f"a template needs {{}} where the class goes, got {template!r}")
    return list(given)


@torch.inference_mode()
def class_features(host: Host, names: Sequence[str], templates: Sequence[str], batch: int = 64) -> Tensor:
    """`(classes, E)`, normalised: the mean of the normalised prompts of each class (Radford et al., 2021)."""
    texts = [template.replace("{}", name) for name in names for template in templates]
    parts = [host.encode_text(host.tokens(texts[i : i + batch])) for i in range(0, len(texts), batch)]
    features = F.normalize(torch.cat(parts), dim=-1).unflatten(0, (len(names), -1))
    return F.normalize(features.mean(1), dim=-1)


def arms_of(options: argparse.Namespace, host: Host) -> tuple[list[Arm], list[str]]:
    """What this host can do of what was asked for, and why it cannot do the rest."""
    asked = [(g, r) for g in options.guidance for r in (options.relevance if g == "text" else [None])]
    arms, notes = [Arm("none")], []
    for guidance, relevance in asked:
        try:
            patchselect.apply(host.model, 0.5, options.layers, guidance, relevance).remove()
        except ValueError as error:
            notes.append(f"{Arm(guidance, relevance)} is left out: {first_line(error)}")
            continue
        arms += [Arm(guidance, relevance, rate) for rate in options.keep_rate]
    return arms, notes


@contextmanager
def selecting(host: Host, arm: Arm, layers: Sequence[int] | None, classes: Tensor) -> Iterator[Any]:
    """The model as this arm wants it; yields the handle, or `None` without selection."""
    if arm.guidance == "none":
        yield None
        return
    handle = patchselect.apply(host.model, arm.keep_rate, layers, arm.guidance, arm.relevance)
    try:
        if arm.guidance == "text":
            with patchselect.guide(host.model, classes, "shared"):
                yield handle
        else:
            yield handle
    finally:
        handle.remove()


@torch.inference_mode()
def evaluate(
    host: Host, options: argparse.Namespace, data: Any, classes: Tensor, arms: Sequence[Arm]
) -> tuple[dict[Arm, Seen], int]:
    """Run every batch through all arms, in a new order each time; returns what came out and the number of images."""
    device, dtype = torch.device(options.device), DTYPES[options.precision]
    loader = torch.utils.data.DataLoader(data, options.batch, num_workers=options.workers)
    seen, shuffle = {arm: Seen() for arm in arms}, random.Random(options.seed).shuffle
    for number, (images, labels) in enumerate(tqdm(loader, "batches", file=sys.stderr)):
        pixels = images.to(device, dtype)
        order = list(arms)
        shuffle(order)
        for arm in order:
            torch.manual_seed(options.seed + number)
            features: list[Tensor] = []

            def call(pixels: Tensor = pixels, features: list[Tensor] = features) -> None:
                features.append(host.encode_image(pixels))

            with selecting(host, arm, options.layers, classes):
                taken = timed(call, device)
            # The first batch warms up, the last may be short.
            if len(images) == options.batch and (number or len(loader) == 1):
                seen[arm].seconds.append(taken)
            cosines = F.normalize(features[0].float(), dim=-1) @ classes.float().T
            seen[arm].right.append(cosines.argmax(-1).cpu() == labels)
        if number < options.diagnose:
            diagnose(host, pixels, {arm: one.diagnosis for arm, one in seen.items()}, options, classes, selecting)
    return seen, len(data)


def summarise(seen: dict[Arm, Seen]) -> list[dict[str, Any]]:
    """One record per arm: accuracy and throughput, both against no selection on the same images and batches."""
    base = seen[Arm("none")]
    base_right, records = torch.cat(base.right).double(), []
    for arm, one in seen.items():
        right = torch.cat(one.right).double()
        root = len(right) ** 0.5
        record: dict[str, Any] = {**vars(arm), "arm": str(arm), "images": len(right), "accuracy": float(right.mean())}
        record["standard_error"] = float(right.std(unbiased=False) / root)
        gap = right - base_right
        record["against_none"] = (float(gap.mean()), float(gap.std(unbiased=False) / root))
        if one.seconds:
            record["speed_up"] = spread([b / s for b, s in zip(base.seconds, one.seconds)])
        record["outliers"] = one.diagnosis.report()
        records.append(record)
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """Accuracy and speed by arm."""
    rows = [["guidance", "keep", "accuracy", "against no selection", "speed-up [quartiles]"]]
    for r in records:
        speed = r.get("speed_up")
        gap, error = r["against_none"]
        plain = r["guidance"] == "none"
        rows.append(
            [
                r["arm"],
                "–" if plain else f"{r['keep_rate']:g}",
                f"{r['accuracy']:.4f} ± {r['standard_error']:.4f}",
                "–" if plain else f"{gap:+.4f} ± {error:.4f}",
                "–" if plain or speed is None else f"{speed['median']:.3f} [{speed['q1']:.3f}, {speed['q3']:.3f}]",
            ]
        )
    return aligned(rows)


def outlier_table(records: Sequence[dict[str, Any]]) -> str:
    """How often patches of outlying norm are kept, against chance."""
    rows = [
        ["guidance", "keep", "norms in block", "outliers", "selection in block", "of the kept", "kept", "by chance"]
    ]
    for r in records:
        for o in r["outliers"]:
            shares = (o["share_of_kept"], o["kept_share"], o["chance"])
            cells = ["–" if share is None else f"{100 * share:.2f} %" for share in (o["share"], *shares)]
            rows.append(
                [r["arm"], f"{r['keep_rate']:g}", str(o["norms_in"]), cells[0], str(o["selection_in"]), *cells[1:]]
            )
    return aligned(rows)


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Load, evaluate, print the tables, write JSON and Markdown; a ValueError where accuracy would mean nothing."""
    host = load(options.model, options.image_size, options.pretrained)
    if not options.random_weights:
        host.check_accuracy()
    host.model.eval().to(options.device, DTYPES[options.precision])
    about = machine(torch.device(options.device))
    data, names = images_of(options, host)
    arms, notes = arms_of(options, host)
    seen, count = evaluate(host, options, data, class_features(host, names, prompts(options.templates)), arms)
    records = summarise(seen)
    report = {
        "machine": about,
        "versions": versions(),
        "model": {"name": host.name, "library": host.library, "weights": host.weights},
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()},
        "notes": [*host.notes, *notes],
        "classes": len(names),
        "results": records,
    }
    report["settings"] = {k: v for k, v in report["settings"].items() if isinstance(v, (str, int, float, list))}
    parts = [
        f"# Zero-shot accuracy of {host.name} with patch selection",
        f"{host.library}; {host.weights}. {count} images, {len(names)} classes, {host.image_size} px; "
        f"{about['processor']}, {about['threads']} threads, {options.precision}. ± is one standard error; the "
        "differences are on the same images, the speed-ups of the image encoder on the same batches, in turns.",
        *(f"Note: {note}." for note in report["notes"]),
        table(records),
        f"Patches whose norm is above {options.outlier:g} times the median of their image, without selection, on "
        f"{min(count, options.diagnose * options.batch)} images. Kept far above chance, they may be registers that "
        "the model needs, or noise that the relevance mistakes for evidence: the accuracy says which.",
        outlier_table(records),
    ]
    text = "\n\n".join(parts) + "\n"
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "zeroshot.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "zeroshot.md").write_text(text)
    sys.stdout.write(text)
    return report


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy.zeroshot", description=__doc__)
    add_arguments(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(parse())
