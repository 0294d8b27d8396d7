# ruff: noqa: T201
"""Whole image-text models, fusion and heads included: `python -m benchmarks.whole_model`.

Pairs of an image and its text through the whole model (`pair`), and a training step without the optimiser (`train`:
forward with momentum encoders and hard negatives where the model has them, and backward), at the published sizes with
random weights. All cases run in turns, in a new order each round.

`--host blip` needs transformers alone. `--host albef` needs a checkout of salesforce/ALBEF (`ALBEF_DIR`) and the
folder of the runners that build its heads under recent releases (`PATCHSELECT_TARGETS`, with `albef_targets.py`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import patchselect
from patchselect.wiring.towers import find_towers

from .cost import countable
from .measure import synchronise, timed
from .parts import as_parts, parts_table, spent_by_part
from .report import machine, spread, versions

PAPER = "TRIPS (EMNLP 2022) at 384 px on V100s: 79.32 to 115.01 pairs/s, 1.45x, for 76.03 to 55.60 GFLOPs, 1.37x."
COLUMNS = ("work", "px", "method", "keep", "pairs/s", "speed-up", "GFLOPs/pair", "FLOP ratio", "efficiency")


@dataclass
class Whole:
    """One model at one size, and what one call of it does."""

    name: str
    model: nn.Module
    pair: Callable[[], object]
    step: Callable[[], Tensor]
    negatives: Callable[[], Tensor] | None = None
    """The same step, with the image tokens of negative pairs encoded for their own texts (docs/training.md)."""


def albef(work: str, size: int, batch: int, length: int) -> Whole:
    """`model_ve` for pairs (image, text, fusion, head), `model_retrieval` for training (ITC, ITM, momentum)."""
    runners = os.environ.get("PATCHSELECT_TARGETS")
    if not runners or not os.environ.get("ALBEF_DIR"):
        raise SystemExit(
            "--host albef needs ALBEF_DIR and PATCHSELECT_TARGETS, see python -m benchmarks.whole_model -h"
        )
    sys.path.insert(0, runners)
    targets = importlib.import_module("albef_targets")
    name = "ve" if work == "pair" else "retrieval"
    options = {"distill": False} if work == "pair" else {}
    model, make = targets.ALL[name](image_size=size, small=False, train=work == "train", **options)
    arguments, named = make(batch_size=batch, length=length, **({"train": False} if work == "pair" else {}))
    image, text = arguments[:2]

    def step() -> Tensor:
        torch.manual_seed(0)
        return torch.stack(list(model(*arguments, **named))).sum()

    def negatives() -> Tensor:
        loss = step()
        texts = model.text_encoder(text.input_ids, attention_mask=text.attention_mask, return_dict=True, mode="text")
        others = torch.arange(batch).roll(1)
        words = texts.last_hidden_state[:, 0]
        with patchselect.guide(model, torch.cat([words, words[others]])):
            tokens = model.visual_encoder(torch.cat([image[others], image]))
        return loss + 1e-3 * tokens.square().mean()

    return Whole("ALBEF ViT-B/16", model, lambda: model(*arguments, **named), step, negatives)


def blip(work: str, size: int, batch: int, length: int) -> Whole:
    """`BlipForImageTextRetrieval` with its matching head, at the size of blip-itm-base."""
    import transformers

    transformers.logging.set_verbosity_error()
    text_config = dict(encoder_hidden_size=768, initializer_range=0.02)
    vision_config = dict(image_size=size, patch_size=16, initializer_range=0.02)
    config = transformers.BlipConfig(text_config=text_config, vision_config=vision_config)
    model = transformers.BlipForImageTextRetrieval(config).train(work == "train")
    ids = torch.randint(1000, 30000, (batch, length))
    inputs = dict(pixel_values=torch.randn(batch, 3, size, size), input_ids=ids, attention_mask=torch.ones_like(ids))

    def step() -> Tensor:
        return F.cross_entropy(model(**inputs).itm_score, torch.arange(batch) % 2)

    return Whole("BLIP ViT-B/16", model, lambda: model(**inputs), step)


HOSTS = {"albef": albef, "blip": blip}


def run_once(whole: Whole, work: str, method: str) -> None:
    if work == "pair":
        with torch.inference_mode():
            whole.pair()
        return
    whole.model.zero_grad(set_to_none=True)
    step = whole.negatives if method == "text, honest negatives" and whole.negatives is not None else whole.step
    step().backward()


def cases_of(whole: Whole, work: str, rates: Sequence[float]) -> list[tuple[str, float | None]]:
    cases: list[tuple[str, float | None]] = [("unpatched", None), *(("text", rate) for rate in rates)]
    if work == "train" and whole.negatives is not None:
        cases += [("text, honest negatives", rate) for rate in rates]
    return cases


def measure(options: argparse.Namespace, work: str, size: int, bar: tqdm[Any]) -> list[dict[str, Any]]:
    """One record per case."""
    torch.manual_seed(options.seed)
    whole = HOSTS[options.host](work, size, options.batch, options.text_length)
    cases = cases_of(whole, work, options.keep_rate)
    seconds: dict[tuple[str, float | None], list[float]] = {case: [] for case in cases}
    flops: dict[tuple[str, float | None], dict[str, float]] = {}
    by_part: dict[tuple[str, float | None], list[dict[str, float]]] = {case: [] for case in cases}
    device = next(whole.model.parameters()).device
    shuffle = random.Random(options.seed).shuffle
    blocks = find_towers(whole.model)[0].blocks if options.profile and work == "pair" else []
    clock = time.process_time if options.cpu_time else time.perf_counter

    def patched(case: tuple[str, float | None]) -> None:
        patchselect.remove(whole.model)
        if case[1] is not None:
            patchselect.apply(whole.model, case[1], options.layers)

    def spent(case: tuple[str, float | None], clock: Callable[[], float]) -> dict[str, float]:
        found = spent_by_part(lambda: run_once(whole, work, case[0]), blocks, options.layers, clock)
        return {part: each / options.batch for part, each in found.items()}

    for case in cases:  # the warm-up counts FLOPs
        patched(case)
        counter = FlopCounterMode(display=False)
        with countable(), counter:
            flops[case] = spent(case, counter.get_total_flops)
        synchronise(device)
        bar.update()
    for _ in range(options.rounds):
        order = list(cases)
        shuffle(order)
        for case in order:
            patched(case)
            bar.set_description_str(f"{whole.name} {work} {size} px {case[0]}")
            start = time.process_time()
            wall = timed(lambda case=case: by_part[case].append(spent(case, clock)), device)  # type: ignore[misc]
            seconds[case].append(time.process_time() - start if options.cpu_time else wall)
            bar.update()
    base = cases[0]
    return [
        {
            "model": whole.name,
            "work": work,
            "image_size": size,
            "method": method,
            "keep_rate": rate,
            "seconds": seconds[method, rate],
            "pairs_per_second": spread([options.batch / s for s in seconds[method, rate]]),
            "speed_up": spread([b / s for b, s in zip(seconds[base], seconds[method, rate])]),
            "gflops_per_pair": flops[method, rate]["all"] / 1e9,
            "flop_ratio": flops[base]["all"] / flops[method, rate]["all"],
            "parts": as_parts(flops[method, rate], by_part[method, rate]) if blocks else None,
        }
        for method, rate in cases
    ]


def table(records: Sequence[dict[str, Any]]) -> str:
    def cells(record: dict[str, Any]) -> list[str]:
        speed, pace = record["speed_up"], record["pairs_per_second"]["median"]
        first = record["method"] == "unpatched"
        return [
            record["work"],
            str(record["image_size"]),
            record["method"],
            "" if first else f"{record['keep_rate']:.2f}",
            f"{pace:.2f}",
            "1" if first else f"{speed['median']:.2f} [{speed['q1']:.2f}, {speed['q3']:.2f}]",
            f"{record['gflops_per_pair']:.1f}",
            f"{record['flop_ratio']:.2f}",
            "" if first else f"{speed['median'] / record['flop_ratio']:.2f}",
        ]

    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *map(cells, records)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.whole_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add("--host", choices=list(HOSTS), default="blip")
    add("--work", nargs="+", choices=["pair", "train"], default=["pair", "train"])
    add("--image-size", type=int, nargs="+", default=[256, 384], metavar="PIXELS")
    add("--keep-rate", type=float, nargs="+", default=[0.7, 0.5], metavar="RATE")
    add("--layers", type=int, nargs="+", default=[4, 9], metavar="BLOCK", help="0-based; 4 9 are the 5th and the 10th")
    add("--batch", type=int, default=4, metavar="PAIRS")
    add("--text-length", type=int, default=30, metavar="TOKENS")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--cpu-time", action="store_true", help="seconds of the process, where other work shares the machine")
    add("--profile", action="store_true", help="also where the time and the FLOPs of a pair go, part by part")
    add("--output", type=Path, default=Path("results/whole_model.json"))
    add("--seed", type=int, default=0)
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what the JSON file holds."""
    options = parser().parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    records: list[dict[str, Any]] = []
    with tqdm(unit="call", dynamic_ncols=True, file=sys.stderr) as bar:
        for work in options.work:
            for size in options.image_size:
                records += measure(options, work, size, bar)
    found = {
        "machine": machine(torch.device("cpu")),
        "versions": versions(),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "weights": "random",
        "records": records,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1))
    print(table(records))
    for size in options.image_size if options.profile else ():
        pairs = [record for record in records if record["parts"] and record["image_size"] == size]
        print(f"\nwhere a pair at {size} px goes\n\n{parts_table(pairs)}" if pairs else "")
    print(
        f"\nspeed-up: median [quartiles] over {options.rounds} rounds; efficiency: speed-up over FLOP ratio.\n{PAPER}"
    )
    print(f"{found['machine']}, torch {found['versions']['torch']}\n{options.output}")
    return found


if __name__ == "__main__":
    main()
