"""Trace the figures of the pages to what they were taken from: `python -m benchmarks.traced` lists those that lack it.

A section of a page, from one heading to the next, names the files that its measured figures stand in, in a comment
that a browser does not show; `#anchor` is a section of a page of results, with those below it:

    <!-- figures from: benchmarks/RESULTS.md#a-section, benchmarks/results/MACHINE/clip.json -->

Measured is a number with decimals, with `±`, or with a unit (`UNITS`), outside of code and of links; the settings of
the pages, `RATES`, and versions (`VERSION`) are not. A row of a table has to be found in one row of a table, or in
those records of a JSON file that have all names in common; a sentence's figures one by one, each with its `±`.
0.604 ± 0.009 is also 60.4 ± 0.9, and digits may be rounded off. A section whose decimals are nothing measured says
what they are; that excuses decimals, and nothing with an error or a unit:

    <!-- no figures: releases -->
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.common.results import FOLDER
from benchmarks.pages import BLOCK

ROOT = FOLDER.parent.parent
MADE = "leaderboard.md"
"""This page is made as a whole, and compared by a test of its own."""
PAGES = (ROOT / "README.md", *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.name != MADE))

FRONT = {
    "patchselect": "benchmarks/RESULTS.md#a-small-albef-like-model-accuracy-over-keep-rates",
    "How good": "benchmarks/RESULTS.md#merge-then-select-at-equal-flops",
    "What to know before you trust it": "benchmarks/RESULTS.md#merge-then-select-on-the-frozen-clips",
}
"""What the sections of the README name: it stays free of such comments, for many read it as plain text."""

RATES = ("0.7", "0.5", "0.3", "0.15")
"""Keep rates and shares to merge, where they stand without a sign, an error and a unit."""
UNITS = r" ?%|×|x\b| ?(?:points?|times|seconds?|minutes?|hours?|m?s|GFLOPs?|[KMG]i?B)\b"
PROGRAMS = r"torch|transformers|timm|open_clip|Python|accelerate|LLaVA|BY|BY-SA|SigLIP"
VERSION = re.compile(rf"(?<![\w-])(?:{PROGRAMS}) (?:≥ |>= )?\d+\.\d+(?:\.\d+)*")

NOTE = re.compile(r"<!-- figures from: (.+?) -->", re.DOTALL)
EXCUSE = re.compile(r"<!-- no figures: (.+?) -->", re.DOTALL)
HIDDEN = re.compile(
    r"^```.*?^```$|<!--.*?-->|!\[[^\]]*\]\([^)]*\)|`[^`\n]+`|\[[\d.]+\](?=[(\[])|(?<=\])\([^)]*\)|https?://\S+",
    re.DOTALL | re.MULTILINE,
)
NUMBER = r"\d+(?:\.\d+)?(?:e-?\d+)?"
FIGURE = re.compile(
    rf"(?<![\w.§/^-])(?P<value>[+−-]?{NUMBER})(?: ± (?P<error>{NUMBER}))?(?!\w|\.\d)"
    rf"(?P<unit>(?=(?: to {NUMBER})?(?:{UNITS})))?"
)
ANY = re.compile(rf"(?<![\w.])(?P<value>[+−-]?{NUMBER})(?: ± (?P<error>{NUMBER}))?(?!\w|\.\d)")
"""Any number of a source, whatever it means there."""


@dataclass(frozen=True)
class Figure:
    """A number, its standard error where it has one, and its sign where that is written."""

    value: Decimal
    error: Decimal | None = None
    sign: str = ""
    unit: bool = field(default=False, compare=False)

    def among(self, found: frozenset[Figure]) -> bool:
        """Tell whether one of the figures found is this one, as it is or in percent."""
        return any(self.same(other) for other in found)

    def same(self, other: Figure) -> bool:
        if self.sign and other.sign and self.sign != other.sign:
            return False
        pairs = [(self.value, other.value)]
        if self.error is not None:
            if other.error is None:
                return False
            pairs.append((self.error, other.error))
        return any(all(rounds(theirs * scale, mine) for mine, theirs in pairs) for scale in (1, 100))


def rounds(value: Decimal, to: Decimal) -> bool:
    """Tell whether a value, with the digits of the other, is the other."""
    return value.quantize(Decimal(1).scaleb(to.as_tuple().exponent), ROUND_HALF_UP) == to  # type: ignore[arg-type]


def figure(found: re.Match[str]) -> Figure:
    text = found["value"].replace("−", "-")
    error = None if found["error"] is None else Decimal(found["error"])
    unit = found.groupdict().get("unit") is not None
    return Figure(Decimal(text.lstrip("+-")), error, text[0] if text[0] in "+-" else "", unit)


def blank(found: re.Match[str]) -> str:
    """Return as many spaces, so that places and lines stay."""
    return re.sub(r"[^\n]", " ", found.group())


def figures_in(text: str) -> list[re.Match[str]]:
    """List where the measured figures of a text stand that holds nothing hidden."""
    found = FIGURE.finditer(VERSION.sub(blank, text))
    return [
        each
        for each in found
        if each["error"] or each["unit"] is not None or ("." in each["value"] and each["value"] not in RATES)
    ]


@dataclass
class Section:
    """A part of a page with its own heading."""

    title: str
    level: int
    text: str
    start: int
    """Where it begins in the page."""

    def shown(self) -> str:
        """Return what can hold figures: without code, comments, links and what is made from JSON."""
        return HIDDEN.sub(blank, BLOCK.sub(blank, self.text))

    def units(self) -> Iterator[tuple[str, int, bool]]:
        """Yield rows of tables and paragraphs, where they begin in the page, and whether they are rows."""
        shown, place = self.shown(), 0
        head = False
        for line in shown.splitlines(keepends=True):
            row = line.lstrip().startswith("|")
            if (row and head) or (line.strip() and not row):  # the first row of a table is its head
                yield line, self.start + place, row
            head = row
            place += len(line)


def sections(page: str) -> list[Section]:
    """Split a page at its headings; code may hold lines that look like one."""
    plain = re.sub(r"^```.*?^```$", blank, page, flags=re.DOTALL | re.MULTILINE)
    heads = list(re.finditer(r"^(#+) (.+)$", plain, re.MULTILINE))
    ends = [*(head.start() for head in heads), len(page)]
    parts = [Section("", 0, page[: ends[0]], 0)]
    return parts + [
        Section(head[2], len(head[1]), page[head.end() : end], head.end()) for head, end in zip(heads, ends[1:])
    ]


def anchor(title: str) -> str:
    """Return what a link to a heading says."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


@dataclass(frozen=True)
class Source:
    """The figures of a file: all of them, and row by row where it has tables."""

    all: frozenset[Figure]
    rows: tuple[frozenset[Figure], ...]


@lru_cache(maxsize=None)
def source(name: str) -> Source:
    """Read what a section names.

    Raises:
        ValueError: there is no such file or section, or it is not committed text.
    """
    name, _, wanted = name.partition("#")
    path = ROOT / name
    if not path.is_file() or path in PAGES:
        raise ValueError(f"figures from: {name}: there is no such file of results")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        held = json.loads(text)
        records = held if isinstance(held, list) else held["results"]
        groups: dict[tuple[str, ...], list[str]] = {}
        for record in records:
            named = tuple(value for value in record.values() if isinstance(value, str))
            groups.setdefault(named, []).extend(json_numbers(record))
        return Source(of(" ".join(json_numbers(held))), tuple(of(" ".join(group)) for group in groups.values()))
    if wanted:
        parts = sections(text)
        first = next((i for i, part in enumerate(parts) if anchor(part.title) == wanted), None)
        if first is None:
            raise ValueError(f"figures from: {name}#{wanted}: there is no such section")
        last = next((i for i in range(first + 1, len(parts)) if parts[i].level <= parts[first].level), len(parts))
        text = "\n".join(part.text for part in parts[first:last])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return Source(of(text), tuple(of(row) for row in rows))


def of(text: str) -> frozenset[Figure]:
    """Return all numbers of a text; an error is also a number of its own."""
    found = [figure(each) for each in ANY.finditer(text)]
    return frozenset([*found, *(Figure(each.error) for each in found if each.error is not None)])


def json_numbers(held: Any) -> Iterator[str]:
    """Yield every number of a JSON file; one with its error, `[60.4, 0.9]` or two names of a record, also as such."""
    if isinstance(held, dict):
        error = held.get("error", held.get("standard_error"))
        if isinstance(error, float):
            yield from json_numbers([held["accuracy"], error])
        held = list(held.values())
    if isinstance(held, list):
        if len(held) == 2 and all(isinstance(each, float) for each in held):
            yield f"{held[0]:f} ± {abs(held[1]):f}"
        for each in held:
            yield from json_numbers(each)
    elif isinstance(held, (int, float)) and not isinstance(held, bool):
        yield f"{held:f}"


def untraced(page: str, named: Mapping[str, str] = MappingProxyType({})) -> list[str]:
    """List what a page says that its sources do not, each with the section and the line.

    Args:
        page: its text.
        named: sources of sections, by title, besides those in its comments.
    """
    wrong = []
    for part in sections(page):
        notes = [*NOTE.findall(part.text), *filter(None, [named.get(part.title)])]
        names = [name.strip() for note in notes for name in note.split(",")]
        excused = EXCUSE.search(part.text) is not None
        sources = [source(name) for name in names]
        everything = frozenset[Figure]().union(*(each.all for each in sources))
        rows = [row for each in sources for row in each.rows]
        for text, start, is_row in part.units():
            found = list(map(figure, figures_in(text)))
            if excused and not names:
                found = [each for each in found if each.error is not None or each.unit]
            if is_row and len(found) > 1:
                best = max(rows, key=lambda row: sum(each.among(row) for each in found), default=frozenset())
            else:
                best = everything
            line = page.count("\n", 0, start) + 1
            for each in found:
                if not each.among(best):
                    error = "" if each.error is None else f" ± {each.error}"
                    where = f"line {line}, {part.title!r}: {text.strip()[:60]!r}"
                    wrong.append(f"{each.sign}{each.value}{error}, {where}")
    return wrong


def of_page(path: Path) -> list[str]:
    """List what is wrong on one of `PAGES`."""
    return untraced(path.read_text(encoding="utf-8"), named_for(path))


def named_for(path: Path) -> Mapping[str, str]:
    """Return the sources of a page that are not named in it."""
    return FRONT if path.name == "README.md" else {}


def main() -> None:
    """List the figures of all pages that their sources do not have."""
    found = 0
    for page in PAGES:
        for each in of_page(page):
            sys.stdout.write(f"{page.relative_to(ROOT)}: {each}\n")
            found += 1
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
