"""How long the methods take at equal FLOPs: a ViT-B/16 of open_clip with random weights, on this machine."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import open_clip
import torch
from torch import Tensor
from tqdm import tqdm

import patchselect
from benchmarks.common.cost import countable
from benchmarks.common.show import spread
from benchmarks.common.tome import matching_flops

from .method import STEPS, Host, Method
from .study import NONE, PAPER

MODEL, SIZE, BATCH, ROUNDS = "ViT-B-16", 224, 4, 5


def vit_b() -> Host:
    """Return the host; its texts are of width 512, one an image."""
    model = open_clip.create_model(MODEL).eval()

    def encode_at(images: Tensor, shape: tuple[int, int]) -> Tensor:
        first, rest = model.visual.positional_embedding.split([1, 196])
        square = rest.T.unflatten(1, (14, 14)).unsqueeze(0)
        square = torch.nn.functional.interpolate(square, shape, mode="bicubic").flatten(2)[0].T
        small = torch.nn.functional.interpolate(images, [16 * length for length in shape])
        state = {"positional_embedding": torch.cat([first, square])}
        return torch.func.functional_call(model.visual, state, (small,))

    return Host(model, model.encode_image, encode_at, (4, 9), 12, (14, 14), torch.randn(6, 512))


@torch.no_grad()
def call(host: Host, method: Method, knob: int, batch: int) -> object:
    """Encode random images, each guided by a text of its own."""
    images = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with method.put(host, knob) as encode:
        if not method.reads_text:
            return encode(images)
        with patchselect.guide(host.model, torch.randn(batch, 512)):
            return encode(images)


def flops(host: Host, method: Method, knob: int) -> int:
    """Count one image."""
    with countable() as counter:
        call(host, method, knob, 1)
    return counter.get_total_flops()


@torch.no_grad()
def seconds(host: Host, method: Method, knob: int) -> float:
    """Return the processor time of one encoding; putting the method in and out is not counted."""
    images = torch.zeros(BATCH, 3, SIZE, SIZE)
    texts = torch.ones(BATCH, 512)
    with method.put(host, knob) as encode:
        for _ in range(2):
            began = time.process_time()
            if method.reads_text:
                with patchselect.guide(host.model, texts):
                    encode(images)
            else:
                encode(images)
            took = time.process_time() - began
    return took


def measure(methods: Sequence[Method], rates: Sequence[float]) -> dict[str, Any]:
    """Measure in turns, the untouched tower before each method; a figure is a share of the untouched time."""
    host = vit_b()
    whole, knobs, goals = flops(host, NONE, 0), {}, {}
    jobs = [(method, rate) for method in methods for rate in rates]
    with tqdm(total=len(jobs) * (1 + ROUNDS), file=sys.stderr, desc="time") as bar:
        for method, rate in jobs:
            goals.setdefault(rate, flops(host, PAPER, round(STEPS * (1 - rate))))
            count = partial(flops, host, method)
            knobs[method.name, rate] = matching_flops(goals[rate], count, method.most(host))
            bar.update()
        taken: dict[tuple[str, float], list[float]] = {}
        for _ in range(ROUNDS):
            for method, rate in jobs:
                full = seconds(host, NONE, 0)
                taken.setdefault((method.name, rate), []).append(seconds(host, method, knobs[method.name, rate]) / full)
                bar.update()
    about = (
        f"Processor time of encoding {BATCH} images by open_clip's {MODEL} with random weights, as a share of the "
        f"untouched tower's, which ran just before each: medians of {ROUNDS} rounds in turns, with quartiles; "
        f"{torch.get_num_threads()} thread, torch {torch.__version__}."
    )
    return {
        "about": about,
        "flops": {f"{rate:g}": round(goals[rate] / whole, 4) for rate in rates},
        "methods": {m.name: {f"{r:g}": spread(taken[m.name, r]) for r in rates} for m in methods},
    }
