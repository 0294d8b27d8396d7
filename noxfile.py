"""Environments in which patchselect is tested: `./run lanes` for all of them, `./run lanes albef bare` for some.

A lane is a Python, a torch and the hosts that people have beside it: the releases are pinned, so that a lane stays
what it was when docs/compatibility.md was written. A lane whose interpreter is not on this machine is skipped by nox,
which names it.
"""

from __future__ import annotations

from typing import NamedTuple

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

TOOLS = ("pytest", "pytest-xdist", "hypothesis")
"""What every lane is tested with."""


class Lane(NamedTuple):
    """One environment of users."""

    python: str
    packages: tuple[str, ...]
    more: tuple[str, ...] = ()
    """What tests need besides, and would skip without."""


LANES = {
    "newest": Lane(
        "3.11",
        ("torch==2.14.1", "torchvision==0.29.1", "transformers==5.23.0", "open_clip_torch==3.3.0", "timm==1.0.31"),
        ("onnx", "onnxruntime", "onnxscript"),
    ),
    "newest-313": Lane(
        "3.13",
        ("torch==2.14.1", "torchvision==0.29.1", "transformers==5.23.0", "open_clip_torch==3.3.0", "timm==1.0.31"),
        ("onnx", "onnxruntime", "onnxscript"),
    ),
    "middle": Lane(
        "3.12",
        ("torch==2.7.1", "torchvision==0.22.1", "transformers==4.53.3", "open_clip_torch==2.32.0", "timm==1.0.15"),
        ("onnx", "onnxruntime", "onnxscript"),
    ),
    "bare": Lane("3.10", ("torch==2.4.1", "numpy<2")),
    "llava": Lane(
        "3.10",
        (
            "torch==2.1.2",
            "torchvision==0.16.2",
            "transformers==4.37.2",
            "open_clip_torch==2.24.0",
            "timm==0.9.12",
            "numpy<2",
        ),
    ),
    "lavis": Lane(
        "3.9",
        (
            "torch==2.0.1",
            "torchvision==0.15.2",
            "transformers==4.33.2",
            "open_clip_torch==2.20.0",
            "timm==0.4.12",
            "numpy<2",
        ),
    ),
    "albef": Lane("3.8", ("torch==1.13.1", "torchvision==0.14.1", "transformers==4.8.1", "timm==0.4.9", "numpy<2")),
    "blip": Lane("3.8", ("torch==1.10.1", "torchvision==0.11.2", "transformers==4.15.0", "timm==0.4.12", "numpy<2")),
}


def _session(name: str, lane: Lane) -> None:
    @nox.session(name=name, python=lane.python)
    def run(session: nox.Session) -> None:
        session.install("--prefer-binary", *lane.packages, *lane.more, *TOOLS)


for _name, _lane in LANES.items():
    _session(_name, _lane)
