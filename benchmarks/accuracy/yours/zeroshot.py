"""Zero-shot accuracy of any CLIP with and without selection: `python -m benchmarks.accuracy zeroshot`.

For whoever has weights and a folder of classes: what the small CLIP of this benchmark cannot show. Every batch is
decoded once and runs through all arms in turns, so that accuracies are compared on the same images and throughputs
under the same load.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import command
from benchmarks.common.objects import OUTSIDE, named
from benchmarks.common.show import aligned, quartiles
from benchmarks.models.loading import load

from .classes import TEMPLATES, class_features, images_of, prompts
from .evaluate import DTYPES, arms_of, evaluate, summarise


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with one folder of images for each class")
    command.add_model(parser)
    add("--random-weights", action="store_true", help="a dry run: go on where weights or tokenizer are missing")
    add("--classes", type=Path, help="one class name a line, in the order of the sorted folders; default: their names")
    add("--templates", nargs="+", default=list(TEMPLATES), help="prompts with {} for the class, averaged; or one file")
    add(
        "--relevance",
        nargs="+",
        type=named,
        default=["values", "keys", "joint"],
        metavar="NAME",
        help=f"of text, {OUTSIDE}",
    )
    add("--guidance", nargs="+", default=["text", "image", "random"], choices=("text", "image", "random"))
    add("--keep-rate", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    command.add_layers(parser)
    add("--image-size", type=int, help="pixels; default: the model's own")
    add("--batch", type=int, default=32)
    add("--limit", type=int, help="images, evenly over the data set; default: all")
    add("--outlier", type=float, default=3.0, help="a patch is an outlier above this multiple of the median norm")
    add("--diagnose", type=int, default=8, help="batches on which kept patches are looked at")
    add("--workers", type=int, default=0, help="processes that decode images")
    add("--precision", choices=tuple(DTYPES), default="fp32")
    command.add_device(parser)
    add("--seed", type=int, default=0, help="of random guidance and of the order of the arms")
    command.add_output(parser, "results/zeroshot")


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return accuracy and speed by arm."""
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
                "–" if plain or speed is None else quartiles(speed, 3),
            ]
        )
    return aligned(rows)


def outlier_table(records: Sequence[dict[str, Any]]) -> str:
    """Return how often patches of outlying norm are kept, against chance."""
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
    report = command.report_on(options, options.device)
    about = report["machine"]
    data, names = images_of(options, host)
    arms, notes = arms_of(options, host)
    seen, count = evaluate(host, options, data, class_features(host, names, prompts(options.templates)), arms)
    records = summarise(seen)
    report.update(
        model={"name": host.name, "library": host.library, "weights": host.weights},
        notes=[*host.notes, *notes],
        classes=len(names),
        results=records,
    )
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
    command.write(options.output / "zeroshot.json", report, "\n\n".join(parts))
    return report


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    return command.parse("benchmarks.accuracy zeroshot", __doc__, add_arguments, arguments)
