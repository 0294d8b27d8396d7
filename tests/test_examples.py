"""Every script in examples/ runs as its first lines say, and the notebook runs from its first cell to its last."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest
from since import slow

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
NEEDED = {
    "plain_vit": (),
    "quarters": ("open_clip", "skimage"),
    "trim": ("open_clip", "skimage"),
    "what_was_kept": ("open_clip", "skimage", "matplotlib"),
}
"""Packages of examples; of those not named here, `open_clip` and `skimage`."""


def environment() -> dict[str, str]:
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def test_there_are_examples():
    assert {"zero_shot", "what_was_kept", "rerank", "train_step"} <= {path.stem for path in SCRIPTS}
    assert [path.name for path in NOTEBOOKS] == ["tour.ipynb"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_runs_without_arguments_and_without_a_download(path, tmp_path, monkeypatch, capsys):
    for package in NEEDED.get(path.stem, ("open_clip", "skimage")):
        pytest.importorskip(package, reason=f"{path.name} needs {package}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")  # not in a process of its own: importing torch takes longer
    assert capsys.readouterr().out.strip()


LONGER = {"plain_vit": 110, "quarters": 75}
"""One holds a whole vision transformer besides its adapter, the other says where every token went."""


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_read_at_one_sitting(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < LONGER.get(path.stem, 60), f"{path.name} has {len(lines)} lines"
    assert f"python examples/{path.name}" in path.read_text(encoding="utf-8"), "how to run it stands on top"


@slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs(path):
    for package in ("nbclient", "nbformat", "ipykernel", "open_clip", "skimage", "matplotlib"):
        pytest.importorskip(package, reason=f"{path.name} needs {package}")
    import nbclient
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    before, os.environ["PYTHONPATH"] = os.environ.get("PYTHONPATH"), environment()["PYTHONPATH"]
    try:
        nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    pictures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if {"image/png", "image/jpeg"} & set(output.get("data", {}))
    ]
    assert len(pictures) >= 2
