"""Measured speed of every method and keep rate on pairs, next to the FLOPs of the image encoder."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.accuracy.world.captions import captions
from benchmarks.common.clock import timed, turns
from benchmarks.common.show import spread

from .arms import METHODS, reduced, vision_flops
from .evaluate import match_logits
from .model import MiniAlbef
from .train import KEEP_RATES


def throughput(model: MiniAlbef, rounds: int = 7, batch: int = 128, image_size: int = 80) -> list[dict[str, Any]]:
    """Measure pairs per second of matching (image, text and fusion encoder), all in turns, in a new order each round.

    Returns:
        One record per method and keep rate: `speed_up` over no reduction (median and quartiles of the rounds) and
        `flop_ratio` of the image encoder (the limit where that encoder is all there is).
    """
    cases = [("none", 1.0), *((method, rate) for method in (*METHODS, "values") for rate in KEEP_RATES)]
    images = torch.rand(batch, 3, image_size, image_size)
    ids, device = captions([(row % 7, 8 + row % 5) for row in range(batch)]), torch.device("cpu")
    seconds: dict[tuple[str, float], list[float]] = {case: [] for case in cases}
    for turn, order in enumerate(tqdm(turns(cases, rounds + 1), "throughput", rounds + 1, unit="round")):
        for method, rate in order:
            with reduced(model, method, rate) as encode:
                spent = timed(lambda encode=encode: match_logits(model, encode, images, ids), device)
            if turn:  # the first round is the warm-up
                seconds[method, rate].append(spent)
    records = []
    for (method, rate), spent in seconds.items():
        ratios = [base / own for base, own in zip(seconds["none", 1.0], spent)]
        records.append(
            {
                "method": method,
                "keep_rate": rate,
                "pairs_per_second": batch / statistics.median(spent),
                "speed_up": spread(ratios),
                "flop_ratio": vision_flops(image_size, 1.0) / vision_flops(image_size, rate, method=method),
            }
        )
    return records
