"""Where the time of an answer goes, and what selection saves of it: `python -m benchmarks.multimodal`.

A LLaVA with CLIP's L/14-336 and a language model of 0.5 B parameters, random weights unless `--weights` names some:
the tower, the prefill of the language model, decoding per word, the whole answer, FLOPs of each and bytes of the
cache. Unpatched; selection in the tower by text, by image and at random; as many tokens dropped after the tower, which
shortens the prompt alike and saves nothing in the tower. All cases run in turns, in a new order each round.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

import patchselect
from benchmarks.common.clock import timed, turns
from benchmarks.common.command import add_device, add_layers, add_output, parse, report_on, write
from benchmarks.common.cost import countable
from benchmarks.common.show import aligned, quartiles, spread, threads

from .models import LANGUAGES, TOWERS, build, check_release, load, prompts
from .stages import STAGES, answer

CASES = ("unpatched", "text", "image", "random", "after the tower")
COLUMNS = ("method", "prompt", "cache MB", "stage", "ms", "GFLOPs", "speed-up", "FLOP ratio", "efficiency")


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return one record per case."""
    dtype = getattr(torch, options.dtype)
    if options.weights:
        model = load(options.weights, dtype).to(options.device)
    else:
        model = build(options.tower, options.language, dtype, options.seed).to(options.device)
    check_release(model)
    device = torch.device(options.device)
    inputs = prompts(model, options.batch, options.prompt_words, options.seed)
    width = model.config.vision_config.hidden_size
    text = torch.randn(options.batch, width, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    left = tokens_left(model, options, inputs, text)
    records: dict[str, dict[str, Any]] = {}

    def run(case: str, words: int, stage: Callable[[str, Callable[[], Any]], Any]) -> dict[str, int]:
        patchselect.remove(model)
        if case in ("text", "image", "random"):
            patchselect.apply(model, options.keep_rate, options.layers, guidance=case)
        return answer(model, case, inputs, text, left, words, stage)

    with tqdm(total=len(CASES) * (options.rounds + 1), unit="answer", dynamic_ncols=True, file=sys.stderr) as bar:
        for case in CASES:  # the warm-up counts FLOPs
            flops: dict[str, float] = {}

            def counted(name: str, call: Callable[[], Any], flops: dict[str, float] = flops) -> Any:
                with countable() as counter:
                    found = call()
                flops[name] = counter.get_total_flops() / 1e9
                return found

            found = run(case, 1, counted)
            records[case] = {"method": case, **found, "gflops": flops, "seconds": {name: [] for name in STAGES}}
            bar.update()
        for order in turns(CASES, options.rounds, options.seed):
            for case in order:
                bar.set_description_str(case)
                seconds = records[case]["seconds"]

                def clocked(name: str, call: Callable[[], Any], seconds: dict[str, list[float]] = seconds) -> Any:
                    found: list[Any] = []
                    spent = timed(lambda: found.append(call()), device)
                    seconds[name].append(spent / (options.words if name == "decode" else 1))
                    return found[0]

                records[case]["cache_bytes"] = run(case, options.words, clocked)["cache_bytes"]
                bar.update()
    patchselect.remove(model)
    for record in records.values():
        record["seconds"]["answer"] = whole(record["seconds"], options.words)
        once = {name: [each] for name, each in record["gflops"].items()}
        record["gflops"]["answer"] = whole(once, options.words)[0]
    for record in records.values():
        base = records["unpatched"]
        record["speed_up"] = {
            name: spread([a / b for a, b in zip(base["seconds"][name], record["seconds"][name])])
            for name in record["seconds"]
        }
        record["flop_ratio"] = {name: base["gflops"][name] / record["gflops"][name] for name in record["gflops"]}
    return list(records.values())


def whole(stages: dict[str, list[float]], words: int) -> list[float]:
    """Add the stages of an answer, which decodes so many words."""
    return [a + b + words * c for a, b, c in zip(*(stages[name] for name in STAGES))]


@torch.inference_mode()
def tokens_left(model: Any, options: argparse.Namespace, inputs: dict[str, Any], text: torch.Tensor) -> int:
    """Return how many tokens the selection leaves of an image."""
    patchselect.apply(model, options.keep_rate, options.layers, guidance="image")
    found = len(model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output[0])
    patchselect.remove(model)
    return found


def table(records: Sequence[dict[str, Any]]) -> str:
    rows = [COLUMNS]
    for record in records:
        first = record["method"] == "unpatched"
        head = (record["method"], str(record["prompt_tokens"]), f"{record['cache_bytes'] / 1e6:.2f}")
        for name in (*STAGES, "answer"):
            speed, ratio = record["speed_up"][name], record["flop_ratio"][name]
            rows.append(
                (
                    *(head if name == STAGES[0] else ("", "", "")),
                    "decode, a word" if name == "decode" else name,
                    f"{spread(record['seconds'][name])['median'] * 1e3:.1f}",
                    f"{record['gflops'][name]:.2f}",
                    "1" if first else quartiles(speed, 2),
                    f"{ratio:.2f}",
                    "" if first else f"{speed['median'] / ratio:.2f}",
                )
            )
    return aligned(rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--tower", choices=list(TOWERS), default="L/14-336")
    add("--language", choices=list(LANGUAGES), default="0.5B")
    add("--weights", help="a LLaVA to load with from_pretrained, in place of these")
    add(
        "--keep-rate", type=float, default=1 / 3, metavar="RATE", help="one third of 576 patches and a fused token: 193"
    )
    add_layers(parser, [9])
    add("--batch", type=int, default=1, metavar="PROMPTS")
    add("--prompt-words", type=int, default=32, metavar="TOKENS")
    add("--words", type=int, default=32, metavar="TOKENS", help="of the answer")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    add_device(parser)
    add_output(parser, "results/multimodal.json", "JSON file; the table goes beside it")
    add("--seed", type=int, default=0)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark; returns what the JSON file holds."""
    options = parse("benchmarks.multimodal", __doc__, add_arguments, arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    report = report_on(options, options.device)
    report.update(weights=options.weights or "random", results=measure(options))
    text = (
        f"{table(report['results'])}\n\nweights: {report['weights']}; ms: medians of {options.rounds} rounds; speed-"
        "up: median [quartiles] against unpatched; efficiency: speed-up over FLOP ratio; an answer: tower, prefill and "
        f"{options.words} words\n{report['machine']['processor']}, {threads(report['machine']['threads'])}, torch "
        f"{report['versions']['torch']}"
    )
    write(options.output, report, text)
    return report


if __name__ == "__main__":
    main()
