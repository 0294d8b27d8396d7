"""The API reference builds without a warning and has every public name, each with words of its own."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path

import pytest

import patchselect

ROOT = Path(__file__).resolve().parent.parent
MODULES = (ROOT / "docs" / "api.txt").read_text(encoding="utf-8").split()
"""What `./run docs` builds."""


def test_the_reference_has_every_public_name(tmp_path):
    pdoc = pytest.importorskip("pdoc", reason="the reference is built by pdoc, which is not installed")
    pdoc.render.configure(docformat="google")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # pdoc cannot evaluate the annotations of named tuples under `from __future__ import annotations`.
        warnings.filterwarnings("ignore", "Error parsing type annotation ForwardRef", UserWarning)
        pdoc.pdoc(*MODULES, output_directory=tmp_path)
    page = (tmp_path / "patchselect.html").read_text(encoding="utf-8")
    for name in patchselect.__all__:
        assert f'id="{name}"' in page or f"patchselect/{name}" in page, f"the reference lacks {name}"
    for module in MODULES[1:]:
        assert (tmp_path / (module.replace(".", "/") + ".html")).exists()
    for file in tmp_path.rglob("*.html"):
        for link in re.findall(r'href="([^"#:]+\.html)', file.read_text(encoding="utf-8")):
            assert (file.parent / link).resolve().exists(), f"{file.name} links to {link}, which is not there"


@pytest.mark.parametrize("name", patchselect.__all__)
def test_a_public_name_is_documented(name):
    found = getattr(patchselect, name)
    assert inspect.getdoc(found), f"patchselect.{name} has no docstring"
    if inspect.isclass(found):
        for key, member in vars(found).items():
            if inspect.isfunction(member) and not key.startswith("_"):
                assert inspect.getdoc(member), f"{member.__qualname__} has no docstring"
