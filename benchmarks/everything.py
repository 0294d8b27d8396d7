"""All figures of this machine in one command: `python -m benchmarks.everything [--device cuda]`.

Each question is a run of its own; its JSON goes to `benchmarks/results/MACHINE/`, to be committed, and the tables of
the pages that name it are made anew. `estimators` and `steadiness` ask for a busy machine, the others for a
quiet one.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import pages
from benchmarks.common import results
from benchmarks.common.command import add_device, add_output, parse
from benchmarks.multimodal import __main__ as multimodal
from benchmarks.speed import __main__ as speed
from benchmarks.speed import (
    arithmetic,
    estimators,
    last_block,
    pairs,
    processes,
    resolution,
    scale,
    sized_attention,
    steadiness,
    whole_model,
)

PLAIN = "--keep-rate 0.5 --merge 0 --tome"
QUESTIONS: dict[str, tuple[Callable[[Sequence[str]], dict[str, Any]], str]] = {
    "speed": (speed.main, "--batch 8 1 --seconds 540"),
    "batch1": (speed.main, f"{PLAIN} --batch 1 --rounds 15 --guidance text again random"),
    "precision": (speed.main, f"{PLAIN} --batch 1 --precision fp32 bf16 --seconds 150"),
    "compiled": (speed.main, f"{PLAIN} --batch 1 --precision fp32 bf16 --seconds 200 --compile"),
    **{
        model.lower(): (speed.main, f"--model {model} --batch 8 --merge 0 --tome --seconds 200")
        for model in ("EVA02-B-16", "PE-Core-B-16", "dinov2-base")
    },
    "scale": (scale.main, ""),
    "estimators": (estimators.main, ""),
    "steadiness": (steadiness.main, ""),
    "pairs": (pairs.main, "--model ViT-B-16 --texts 16 --rounds 8"),
    "resolution": (resolution.main, "--sizes 224 256 288 320 336 384 --batch 1"),
    "resolution-384": (
        resolution.main,
        "--own-size 384 --relevance keys --sizes 384 416 448 480 512 --batch 1 --rounds 8",
    ),
    "last-block": (last_block.main, ""),
    "sized-attention": (sized_attention.main, "--tokens 197"),
    "arithmetic": (arithmetic.main, ""),
    "processes": (processes.main, ""),
    "multimodal": (multimodal.main, "--rounds 7 --words 16"),
    "blip": (whole_model.main, "--host blip --work pair --image-size 384 --batch 1"),
    "albef": (whole_model.main, "--host albef --work pair --batch 1 --profile"),
}
"""The command behind each question."""
FILES = (
    "estimators", "steadiness", "last-block", "sized-attention", "arithmetic", "processes", "multimodal", "blip",
    "albef",
)  # fmt: skip
"""Questions whose command wants a file for its output, others a folder."""
CPU_ALONE = ("estimators", "steadiness", "arithmetic", "processes", "blip", "albef")
NOT_ASKED = ("estimators", "steadiness", "albef")
"""Only where `--only` names them: two want a busy machine, the other a checkout."""
STUDIES = ("quick", "clip", "answering")
"""Files of results that a command of `benchmarks.accuracy` has written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [name for name in QUESTIONS if name not in NOT_ASKED]
    parser.add_argument("--only", nargs="+", choices=list(QUESTIONS), default=names, metavar="QUESTION")
    add_device(parser)
    add_output(parser, "results/everything", "folder for all that each run writes")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all questions, keep their files, and make the pages anew."""
    options = parse("benchmarks.everything", __doc__, add_arguments, arguments)
    for name in options.only:
        run, asked = QUESTIONS[name]
        start, folder = time.monotonic(), options.output / name
        device = [] if name in CPU_ALONE else ["--device", options.device]
        output = folder / f"{name}.json" if name in FILES else folder
        sys.stdout.write(f"# {name}\n\n")
        path = results.keep(run([*asked.split(), *device, "--output", str(output)]), name)
        for picture in folder.glob("*.png"):
            shutil.copy(picture, path.with_suffix(".png"))
        sys.stdout.write(f"\n{path}, after {time.monotonic() - start:.0f} s\n\n")
    pages.main([])


if __name__ == "__main__":
    main()
