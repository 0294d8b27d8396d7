"""What ships: the wheel and the sdist hold the library with its adapters, and importing it is light."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("patchselect", "adapters", "pyproject.toml", "README.md", "LICENSE")
SHIPPED = {path.relative_to(ROOT).as_posix() for path in (ROOT / "patchselect").rglob("*.py")} | {
    f"patchselect/adapters/{path.name}" for path in (ROOT / "adapters").glob("*.py")
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the sources, so that building leaves nothing behind."""
    copy = tmp_path_factory.mktemp("sources") / "patchselect"
    copy.mkdir()
    for name in SOURCES:
        source, skip = ROOT / name, shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(source, copy / name, ignore=skip) if source.is_dir() else shutil.copy(source, copy / name)
    return copy


def build(tree: Path, kind: str) -> Path:
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}('dist'))"
    out = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True, check=True)
    return tree / "dist" / out.stdout.split()[-1]


def imported(folder: Path) -> str:
    code = "import patchselect, patchselect.adapters as a; print(patchselect.__file__, a.__file__, len(a.ADAPTERS))"
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return run.stdout


def test_the_wheel_holds_the_library_and_its_adapters(tree, tmp_path):
    with zipfile.ZipFile(build(tree, "wheel")) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path)
    assert names >= SHIPPED | {"patchselect/py.typed"}
    assert not [name for name in names if name.startswith(("adapters/", "benchmarks/", "tests/"))]
    core, adapters, count = imported(tmp_path).split()
    assert core.startswith(str(tmp_path)) and adapters.startswith(str(tmp_path)) and int(count) >= 5
    metadata = next(tmp_path.glob("patchselect-*.dist-info/METADATA")).read_text()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(line.split()[1].split(">")[0] for line in required) == ["einops", "torch"]


def test_the_sdist_can_be_built_from(tree, tmp_path):
    with tarfile.open(build(tree, "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    source = next(tmp_path.iterdir())
    with zipfile.ZipFile(build(source, "wheel")) as wheel:
        assert set(wheel.namelist()) >= SHIPPED


def test_importing_is_light():
    """No host library comes with `import patchselect`, nor with its adapters."""
    hosts = "{'transformers', 'open_clip', 'timm', 'matplotlib', 'torchvision', 'PIL'}"
    code = f"import sys, patchselect, patchselect.adapters; print(sorted({hosts} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
