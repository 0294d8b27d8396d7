"""The pages: every Python block runs, and every link to a file or a heading of this repository leads somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "RESULTS.md"]
MODULE = re.compile(r"python -m (benchmarks[\w.]*|patchselect[\w.]*)")
FILE = re.compile(r"(?:python|pytest) ((?:docs|examples|tests)/\w+\.py)")
TEST = re.compile(r"(tests/[\w/]+\.py)::(\w+)")
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]:\s+(\S+)|<img src=\"([^\"]+)\"", re.MULTILINE)


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """The page without its code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ +(.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=named)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_python_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    pytest.importorskip("sybil", reason="the blocks of pages are found and run by sybil, which is not installed")
    for package in ("open_clip", "skimage") if page.name == "README.md" else ():
        pytest.importorskip(package, reason=f"{named(page)} uses {package}")
    from sybil.document import Document
    from sybil.parsers.markdown import PythonCodeBlockParser

    monkeypatch.chdir(tmp_path)
    examples = list(Document.parse(str(page), PythonCodeBlockParser(future_imports=["annotations"])))
    assert len(examples) >= page.read_text(encoding="utf-8").count("\n```python")
    for example in examples:
        example.evaluate()


def test_the_first_snippet_of_the_readme_runs_when_pasted(tmp_path, capsys):
    for package in ("open_clip", "skimage"):
        pytest.importorskip(package, reason=f"the snippet needs {package}")
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    (tmp_path / "pasted.py").write_text(block.group(1), encoding="utf-8")
    runpy.run_path(str(tmp_path / "pasted.py"))
    assert "197 tokens, then [140, 100]" in capsys.readouterr().out


def test_the_readme_is_that_of_a_newcomer():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 140


@pytest.mark.parametrize("page", ALL, ids=named)
def test_links_lead_somewhere(page):
    for found in LINK.findall(prose(page)):
        link = next(filter(None, found))
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{named(page)} links to {link}, which is not there"
        if heading:
            assert heading in headings(target), f"{named(page)} links to {link}: no such heading"


@pytest.mark.parametrize("page", ALL, ids=named)
def test_tests_that_a_page_names_are_there(page):
    for path, name in TEST.findall(page.read_text(encoding="utf-8")):
        source = (ROOT / path).read_text(encoding="utf-8")
        assert f"\ndef {name}(" in source, f"{named(page)} names {path}::{name}, which is not there"


@pytest.mark.parametrize("page", ALL, ids=named)
def test_commands_name_what_is_there(page):
    text = page.read_text(encoding="utf-8")
    for module in set(MODULE.findall(text)):
        path = ROOT / module.replace(".", "/")
        known = path.with_suffix(".py").exists() or (path / "__main__.py").exists()
        assert known, f"{named(page)} runs {module}, which is not there"
    for file in set(FILE.findall(text)):
        assert (ROOT / file).exists(), f"{named(page)} runs {file}, which is not there"
    jobs = re.findall(r"^([a-z]+)\)$", (ROOT / "run").read_text(encoding="utf-8"), re.MULTILINE)
    for job in set(re.findall(r"\./run ([a-z]+)", text)):
        assert job in jobs, f"{named(page)} asks for ./run {job}, which run does not know"
