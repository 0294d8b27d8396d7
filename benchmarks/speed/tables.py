"""Tables of the pages from what the further speed commands have written: see `benchmarks.pages`."""

from __future__ import annotations

from typing import Any

from benchmarks.common.show import markdown, quartiles, ratio, speed_up

Report = dict[str, Any]
WAYS = {
    "guided pass per pair": "a guided pass per pair",
    "every text on one prefix (all)": 'every text on one prefix (`"all"`, `score_pairs`)',
    "the same from a kept prefix": "the same from a kept prefix",
    "one pass for all texts (shared)": 'one pass for all texts (`"shared"`)',
}


def whole(report: Report) -> str:
    """Write FLOPs and speed-ups of a whole model."""
    rows = [["px", "keep", "GFLOPs/pair", "FLOP ratio", "speed-up, median [quartiles]"]]
    for r in report["results"]:
        first = r["method"] == "unpatched"
        cells = ["–", "1", "1"] if first else [f"{r['keep_rate']:g}", f"{r['flop_ratio']:.2f}", ratio(r["speed_up"])]
        rows.append([str(r["image_size"]), cells[0], f"{r['gflops_per_pair']:.1f}", *cells[1:]])
    return markdown(rows)


def parts(report: Report) -> str:
    """Write where the time and the FLOPs of a pair go, at the largest image."""
    size = max(r["image_size"] for r in report["results"])
    cases = [r for r in report["results"] if r["image_size"] == size]
    names = ["unpatched", *(f"keep {r['keep_rate']:g}" for r in cases[1:])]
    rows = [["part", *(f"{name}, s" for name in names), *(f"{name}, GFLOPs" for name in names)]]
    for part in cases[0]["parts"]:
        seconds = [f"{r['parts'][part]['seconds']:.2f}" for r in cases]
        rows.append([part, *seconds, *(f"{r['parts'][part]['gflops']:.1f}" for r in cases)])
    return markdown(rows)


def resolution(report: Report) -> str:
    """Write which keep rate pays for a larger image."""
    rows = [["image", "patches", "keep rate", "FLOPs", "without selection", "time, median [quartiles]"]]
    for r in report["results"]:
        if "refused" in r:
            least = float(r["refused"].split("[")[1].split(",")[0])
            rows.append([f"{r['size']} px", "", f"from {least:.2f} times the FLOPs up", "", "", ""])
            continue
        numbers = [f"{r['rate']:.3f}", f"{r['share']:.3f}", f"{r['unpatched']:.2f}", ratio(r["time_ratio"])]
        rows.append([f"{r['size']} px", str(r["patches"]), *numbers])
    return markdown(rows)


def last_block(report: Report) -> str:
    """Write what the last block saves."""
    rows = [["keep rate", "GFLOPs", "with it", "saved", "speed-up, median [quartiles]", "the output moves by"]]
    for r in report["results"]:
        flops = [f"{r['gflops']:.2f}", f"{r['gflops_with']:.2f}", f"{100 * r['saved']:.1f} %"]
        rows.append([f"{r['keep_rate']:g}", *flops, ratio(r["speed_up"], 3), f"{r['moved']:.0e} of its largest"])
    return markdown(rows)


def sized_attention(report: Report) -> str:
    """Write what two ways to count sizes cost."""
    rows = [["tokens", "type", "a mask of log sizes", "a wider key"]]
    for r in report["results"]:
        rows.append([str(r["tokens"]), r["dtype"], *(ratio(r["ratios"][way]) for way in ("mask", "wider key"))])
    return markdown(rows)


def pairs(report: Report) -> str:
    """Write what each way of encoding an image for many texts costs."""
    rows = [["texts", "encoded by", "GFLOPs", "of the FLOPs", "of the time, median [quartiles]"]]
    for r in report["results"]:
        shares = [f"{r['gflops']:.1f}", f"{r['flop_ratio']:.3f}", ratio(r["time_ratio"], 3)]
        rows.append([str(r["texts"]), WAYS[r["way"]], *shares])
    return markdown(rows)


def classes(report: Report) -> str:
    """Write what one selection for many classes costs."""
    rows = [["", "1 text", "1000, batch 1", "batch 8", "batch 64"]]
    for r in report["results"]:
        rows.append([r["model"], *(f"{share:.2f}" for share in (r["classes"]["one"], *r["classes"]["many"]))])
    return markdown(rows)


def merging(report: Report) -> str:
    """Write what merging before one selection costs beside two selections."""
    rows = [["patch tokens after it, `T`", "of the encoder", "two layers: of the encoder", "at `keep_rate`"]]
    for r in report["results"][0]["merging"]:
        rows.append([str(r["tokens"]), f"{r['share']:.3f}", f"{r['two_layers']:.3f}", f"{r['keep_rate']:g}"])
    return markdown(rows)


def tower(report: Report) -> str:
    """Write text guidance in another tower beside what its FLOPs allow."""
    rows = [["keep rate", "FLOP ratio (the limit)", "speed-up, median [quartiles]", "efficiency"]]
    for r in report["results"]:
        if r["method"] == "text":
            found = speed_up(r, digits=3, digits_unsettled=3)
            rows.append([f"{r['keep_rate']:g}", f"{r['flop_ratio']:.3f}", found, f"{r['efficiency']:.3f}"])
    model = report["model"]
    return f"{markdown(rows)}\n\n{model['name']} ({model['library']}), batch {report['results'][0]['batch']}"


def multimodal(report: Report) -> str:
    """Write what each stage of an answer saves."""
    rows = [
        ["", "tokens of the prompt", "cache, MB", "stage", "FLOP ratio (the limit)", "speed-up, median [quartiles]"]
    ]
    for r in report["results"]:
        if r["method"] != "unpatched":
            head = [r["method"], str(r["prompt_tokens"]), f"{r['cache_bytes'] / 1e6:.1f}"]
            for stage, speed_up in r["speed_up"].items():
                named = "decoding, a word" if stage == "decode" else stage
                rows.append([*head, named, f"{r['flop_ratio'][stage]:.2f}", quartiles(speed_up, 2)])
                head = ["", "", ""]
    plain = next(r for r in report["results"] if r["method"] == "unpatched")
    return (
        f"{markdown(rows)}\n\nUnpatched: {plain['prompt_tokens']} tokens, {plain['cache_bytes'] / 1e6:.1f} MB; an "
        f"answer is the tower, the prefill and {report['settings']['words']} words"
    )


def processes(report: Report) -> str:
    """Write time and equality of scores over processes."""
    rows = [["processes", "seconds, median [quartiles]", "times as fast", "scores apart by at most"]]
    for r in report["results"]:
        row = [str(r["processes"]), quartiles(r["seconds"], 2), f"{r['speed_up']:.2f}", f"{r['apart']:.0e}"]
        rows.append(row)
    return markdown(rows)


TABLES = {
    "whole": whole, "parts": parts, "resolution": resolution, "last-block": last_block, "classes": classes,
    "sized-attention": sized_attention, "pairs": pairs, "merging": merging, "processes": processes,
    "tower": tower, "multimodal": multimodal,
}  # fmt: skip
