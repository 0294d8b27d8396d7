"""Environments in which patchselect is tested: `./run lanes` for all of them, `./run lanes albef bare` for some.

A lane is a Python, a torch and the hosts that people have beside it: the releases are pinned, so that a lane stays
what it was when docs/compatibility.md was written. A lane whose interpreter is not on this machine is skipped by nox,
which names it.
"""

from __future__ import annotations

import os
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


class Checkout(NamedTuple):
    """A real code base that its variable names, and the releases that it asks for."""

    variable: str
    python: str
    packages: tuple[str, ...]


OLD = ("torch==1.13.1", "torchvision==0.14.1", "timm==0.4.9", "numpy<2")
LAVIS_IMPORTS = (
    *("torch==2.0.1", "torchvision==0.15.2", "torchaudio==2.0.2", "timm==0.4.12", "numpy<2", "fairscale==0.4.4"),
    *("omegaconf", "iopath", "pandas", "webdataset", "opencv-python-headless==4.5.5.64", "pycocotools", "decord"),
    *("pycocoevalcap", "peft<0.6", "accelerate<0.24", "diffusers<=0.16.0", "huggingface_hub<0.26", "scikit-image"),
    *("easydict==1.9", "soundfile", "moviepy<2", "imageio-ffmpeg", "python-magic", "nltk", "opendatasets", "ftfy"),
    *("contexttimer", "sentencepiece", "h5py", "matplotlib", "ipython", "spacy<3.8", "open3d<0.17", "scikit-learn"),
)
"""What `import lavis.models` imports; open3d 0.13, which LAVIS asks for, does not exist for Python 3.9."""
REAL = {
    "albef": Checkout("ALBEF_DIR", "3.8", (*OLD, "transformers==4.8.1")),
    "mplug": Checkout("MPLUG_DIR", "3.8", (*OLD, "transformers==4.14.1", "ftfy", "matplotlib", "icecream")),
    "clip": Checkout("OPENAI_CLIP_DIR", "3.8", (*OLD, "ftfy", "regex", "tqdm")),
    "blip": Checkout(
        "BLIP_DIR",
        "3.8",
        ("torch==1.10.1", "torchvision==0.11.2", "transformers==4.15.0", "timm==0.4.12", "numpy<2", "fairscale==0.4.4"),
    ),
    "lavis": Checkout("LAVIS_DIR", "3.9", (*LAVIS_IMPORTS, "transformers==4.33.2")),
    "lavis-blip": Checkout("LAVIS_DIR", "3.9", (*LAVIS_IMPORTS, "transformers==4.25.1")),
    "llava": Checkout(
        "LLAVA_DIR", "3.10", ("torch==2.1.2", "torchvision==0.16.2", "transformers==4.37.2", "sentencepiece", "numpy<2")
    ),
}
"""LAVIS' BLIP models refuse the transformers that its requirements ask for, hence its second environment."""


def _real(name: str, checkout: Checkout) -> None:
    """Make the session `real-NAME`: `ALBEF_DIR=… ./run real albef`. Nothing of the checkout is changed."""

    @nox.session(name=f"real-{name}", python=checkout.python, default=False)
    def run(session: nox.Session) -> None:
        if not os.environ.get(checkout.variable):
            session.skip(f"set {checkout.variable} to a checkout")
        session.install("-q", "--prefer-binary", *checkout.packages, "einops", "pytest", "setuptools>=64", "wheel")
        session.run("python", "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--editable", ".")
        alone = {other.variable: "" for other in REAL.values() if other.variable != checkout.variable}
        family = f"{name.partition('-')[0]}-"
        session.run("python", "-m", "pytest", "tests/real", "-q", "-rs", "-k", family, *session.posargs, env=alone)


for _name, _checkout in REAL.items():
    _real(_name, _checkout)
