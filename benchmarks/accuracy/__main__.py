"""`python -m benchmarks.accuracy COMMAND`: see `--help`."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common.command import Help
from benchmarks.common.machine import commit
from benchmarks.methods import __main__ as methods

from . import align
from .albef.base import RESULTS, base, file_of
from .albef.curves import ARMS, run, train_all
from .albef.merging import STEPS, choosing, merging
from .albef.model import USUAL, Shape
from .albef.report import asked, curve_report, draw_curves, write
from .albef.studies import FROM_STAGE_1, QUERIES, STUDIES
from .albef.throughput import throughput
from .albef.train import Arm
from .answering import study as answering
from .clip import study as clip
from .leaks import study as leaks
from .yours import retrieval, zeroshot


def curves(
    name: str, seeds: tuple[int, ...], arms: tuple[Arm, ...], steps: int, queries: int, pool: int, folder: Path
) -> None:
    """Draw curves over the keep rates: as it is, and after `steps` of training with selection."""
    records = run(seeds, arms, steps, queries, pool, folder)
    speeds = throughput(base(seeds[0], folder))
    folder.mkdir(parents=True, exist_ok=True)
    draw_curves(records, speeds, folder / f"{name}.png")
    command = asked("full", seeds) if name == "full" else f"python -m benchmarks.accuracy {name}"
    write(folder, name, command, curve_report(records, steps, queries, pool), results=records, speeds=speeds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train bases (20 to 30 minutes each on one core)")
    train.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    quick = commands.add_parser("quick", help="curves from the committed base, at most 5 minutes on 2 cores")
    full = commands.add_parser(
        "full", help="3 bases, all arms, standard errors; about an hour on 2 cores, a third of it for the bases"
    )
    study = commands.add_parser(
        "study",
        help="one question each",
        description="\n".join(f"{name}: {made.__doc__}" for name, made in STUDIES.items()),
        formatter_class=Help,
    )
    study.add_argument("name", choices=list(STUDIES), metavar="name", help="of the study: one of those above")
    for command in (full, study):
        command.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    for command in (train, study):
        command.add_argument("--depth", type=int, default=Shape.depth, help="blocks of the ViT (of studies: merging's)")
        command.add_argument("--registers", type=int, default=Shape.registers, help="register tokens of the ViT")
    about = "of training with each way, one after the other (of merging)"
    study.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help=about)
    about = "ask what was chosen among, on validation questions (of merging)"
    study.add_argument("--validation", action="store_true", help=about)
    for command in (train, quick, full, study):
        command.add_argument("--output", type=Path, default=RESULTS)
    others = {
        "clip": (clip, "frozen small CLIP: relevances and rivals at equal tokens"),
        "leaks": (leaks, "what texts alone, or the places of kept patches alone, answer of the questions"),
        "answering": (answering, "a tiny language model on what a tower has left, with old and new positions"),
        "align": (align, "a short alignment under selection, of the small CLIP or of your model and data"),
        "methods": (methods, "methods side by side at equal FLOPs, as a leaderboard"),
        "retrieval": (retrieval, "any CLIP on Flickr30K or COCO, in two passes, with and without selection"),
        "zeroshot": (zeroshot, "any CLIP on a folder of classes, with and without selection"),
    }
    for name, (module, about) in others.items():
        module.add_arguments(commands.add_parser(name, help=about, description=module.__doc__, formatter_class=Help))
    options = parser.parse_args()
    commit()  # asked for now: files may be changed while this runs
    if options.command in others:
        others[options.command][0].main(options)
        return
    options.output.mkdir(parents=True, exist_ok=True)
    if options.command == "quick":
        curves(
            "quick",
            (0,),
            tuple(Arm(guidance) for guidance in ("text", "values", "image", "random", "front", "merged")),
            100,
            640,
            32,
            options.output,
        )
        return
    if options.command == "train":
        train_all(tuple(reversed(options.seed)), options.output, Shape(options.depth, options.registers))
        return
    shape = USUAL
    if options.command == "study":
        shape = Shape(options.depth, options.registers)
        given = shape != USUAL or tuple(options.steps) != STEPS or options.validation
        if options.name != "merging" and given:
            parser.error(f"--depth, --registers, --steps, --validation are of the study merging, not of {options.name}")
    if options.command == "full" or options.name != "scratch":
        stage = 1 if options.command == "study" and options.name in FROM_STAGE_1 else 2
        lacking = [seed for seed in reversed(options.seed) if file_of(seed, options.output, stage, shape) is None]
        train_all(tuple(lacking), options.output, shape)
    if options.command == "full":
        curves("full", tuple(options.seed), ARMS, 400, QUERIES, 48, options.output)
    elif options.name == "merging" and options.validation:
        choosing(options.output, options.seed, shape)
    elif options.name == "merging":
        merging(options.output, options.seed, shape, options.steps)
    else:
        STUDIES[options.name](options.output, options.seed)


if __name__ == "__main__":
    main()
