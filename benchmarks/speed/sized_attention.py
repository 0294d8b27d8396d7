"""Two ways in which attention can count sizes: a mask of `log s`, or keys that are one number wider.

`python -m benchmarks.speed.sized_attention`
Attention of a ViT-B block alone, without and with sizes, timed in turns. The library uses the mask
(`patchselect/attention.py` says why).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common.clock import timed, turns
from benchmarks.common.command import add_clock, add_device, add_output, parse, report_on, settle_clock, write
from benchmarks.common.show import aligned, ratio
from patchselect.functional import sized_attention

from . import steady

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def plain(query: Tensor, key: Tensor, value: Tensor, sizes: Tensor) -> Tensor:
    """Attend without counting sizes."""
    return F.scaled_dot_product_attention(query, key, value)


def widened(query: Tensor, key: Tensor, value: Tensor, sizes: Tensor) -> Tensor:
    """Attend with `q' = [q, sqrt(E)]` and `k' = [k, log s]`, whose logits are `q.k / sqrt(E) + log s`; padded to 8."""
    width, padding = query.shape[-1], -(query.shape[-1] + 1) % 8
    ones = torch.full_like(query[..., :1], width**0.5)
    logs = sizes.log().to(key.dtype)[:, None, :, None].expand_as(key[..., :1])
    nothing = query.new_zeros(()).expand(*query.shape[:-1], padding)
    query, key = torch.cat([query, ones, nothing], dim=-1), torch.cat([key, logs, nothing], dim=-1)
    value = F.pad(value, (0, padding + 1))
    return F.scaled_dot_product_attention(query, key, value, scale=width**-0.5)[..., :width]


WAYS: dict[str, Attention] = {"no sizes": plain, "mask": sized_attention, "wider key": widened}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=[197, 136, 100, 69], metavar="N")
    add("--batch", type=int, default=8)
    add("--dtype", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    add("--rounds", type=int, default=60, help="at most: until all have settled")
    add_device(parser)
    add_clock(parser)
    add_output(parser, "results/sized_attention.json", "JSON file; the table goes beside it")


@torch.inference_mode()
def measure(tokens: int, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure the seconds of each way, and how far the two ways that count sizes are apart."""
    device = torch.device(options.device)
    like = dict(device=device, dtype=DTYPES[dtype])
    query, key, value = (torch.randn(options.batch, 12, tokens, 64, **like) for _ in range(3))
    sizes = torch.randint(1, 4, (options.batch, tokens), device=device).float()
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for name in WAYS:  # warm up
        WAYS[name](query, key, value, sizes)
    for order in turns(list(WAYS), options.rounds):
        if steady.known(seconds["no sizes"], seconds.values()):
            break
        for name in order:
            seconds[name].append(timed(lambda way=WAYS[name]: way(query, key, value, sizes), device, options.clock))
    apart = (sized_attention(query, key, value, sizes) - widened(query, key, value, sizes)).abs().max()
    ratios = {name: steady.compared(seconds[name], seconds["no sizes"]) for name in ("mask", "wider key")}
    return {"tokens": tokens, "dtype": dtype, "seconds": seconds, "ratios": ratios, "apart": float(apart)}


def table(records: Sequence[dict[str, Any]]) -> str:
    rows = [["tokens", "dtype", "mask", "wider key", "apart by"]]
    for r in records:
        ratios = [ratio(r["ratios"][name], 2) for name in ("mask", "wider key")]
        rows.append([str(r["tokens"]), r["dtype"], *ratios, f"{r['apart']:.0e}"])
    return aligned(rows)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what the JSON file holds."""
    options = parse("benchmarks.speed.sized_attention", __doc__, add_arguments, arguments)
    settle_clock(options, options.device)
    report = report_on(options, options.device)
    report["results"] = [measure(tokens, dtype, options) for dtype in options.dtype for tokens in options.tokens]
    about = f"12 heads of width 64, batch {options.batch}; time against attention without sizes, median [quartiles]"
    write(options.output, report, f"{about}\n\n{table(report['results'])}")
    return report


if __name__ == "__main__":
    main()
