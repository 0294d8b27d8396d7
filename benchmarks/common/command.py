"""The skeleton of every benchmark: read the options, say what it ran on, write JSON and Markdown."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .clock import CLOCKS
from .machine import commit, machine, versions
from .objects import name_of

SCHEMA = 1
"""Of the JSON files: counted up when a name in them changes its meaning."""


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show descriptions as they were written, and the defaults that are values."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parse(
    module: str,
    about: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], None],
    arguments: Sequence[str] | None,
) -> argparse.Namespace:
    """Read the options of `python -m MODULE`; `None` reads those that the process was started with."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=about, formatter_class=Help)
    add_arguments(parser)
    return parser.parse_args(arguments)


def add_layers(parser: argparse.ArgumentParser, default: Sequence[int] | None = None) -> None:
    """Add `--layers`; without a default the adapter decides."""
    about = "0-based selection blocks" + ("; default: 5th and 10th of 12, scaled" if default is None else "")
    parser.add_argument("--layers", type=int, nargs="+", default=default, metavar="BLOCK", help=about)


def add_model(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """Add `--model` and `--pretrained`, as `benchmarks.models.loading.load` takes them."""
    about = "open_clip or transformers name, hf-hub:ORG/REPO, or a local checkpoint (folder or file)"
    parser.add_argument("--model", default=default, required=default is None, help=about)
    parser.add_argument("--pretrained", help="open_clip: a tag or a file; transformers: hub, to download")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device`."""
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def add_clock(parser: argparse.ArgumentParser) -> None:
    """Add `--clock` and `--threads`; `settle_clock` chooses where they are not given."""
    about = "cpu: CPU time, which other work hardly changes (default on a CPU); wall"
    parser.add_argument("--clock", choices=CLOCKS, help=about)
    parser.add_argument("--threads", type=int, help="default: 1 with CPU time, else all")


def settle_clock(options: argparse.Namespace, device: str = "cpu") -> None:
    """Choose clock and threads where nobody did, and set the threads.

    Raises:
        SystemExit: CPU time was asked for on an accelerator.
    """
    cuda = torch.device(device).type == "cuda"
    options.clock = options.clock or ("wall" if cuda else "cpu")
    options.threads = options.threads or (1 if options.clock == "cpu" else torch.get_num_threads())
    if options.clock == "cpu" and cuda:
        sys.exit("--clock cpu tells nothing of what an accelerator does: use --clock wall")
    torch.set_num_threads(options.threads)


def add_output(parser: argparse.ArgumentParser, default: str, about: str = "folder for JSON and Markdown") -> None:
    """Add `--output`, a path."""
    parser.add_argument("--output", type=Path, default=Path(default), help=about)


def report_on(options: argparse.Namespace, device: str = "cpu") -> dict[str, Any]:
    """Start a report with machine, releases, commit and settings; call it before the run, for load and commit."""
    settings = {name: _plain(value) for name, value in vars(options).items()}
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    about = {"schema": SCHEMA, "created": created, "commit": commit()}
    return {**about, "machine": machine(torch.device(device)), "versions": versions(), "settings": settings}


def _plain(value: Any) -> Any:
    """Return what JSON can hold: of a path its text, of an object its name."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, (str, int, float)):
        return value
    return str(value) if isinstance(value, Path) else name_of(value)


def write(path: Path, report: dict[str, Any], text: str) -> None:
    """Write the report to `path` as JSON, the text beside it as Markdown, and the text to the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    text = text.rstrip("\n") + "\n"
    path.with_suffix(".md").write_text(text)
    sys.stdout.write(text)
