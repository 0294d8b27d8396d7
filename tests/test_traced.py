"""Every measured figure of README and docs stands in the file that its section names."""

from __future__ import annotations

import pytest
from since import BENCHMARKS, needs

needs(*BENCHMARKS, module=True)

from benchmarks import traced

RESULTS = "benchmarks/RESULTS.md#frozen-clip-which-relevance-needs-no-training"
NOTE = f"<!-- figures from: {RESULTS} -->\n"
EVERY = 2
"""Of the figures, so many are changed one at a time."""


@pytest.mark.parametrize("path", traced.PAGES, ids=lambda path: path.name)
def test_figures_are_those_of_their_sources(path):
    assert traced.of_page(path) == []


def changed():
    """Yield small pages with one row or paragraph of a page, of whose figures one has another last digit."""
    count = 0
    for path in traced.PAGES:
        for part in traced.sections(path.read_text(encoding="utf-8")):
            names = [*traced.NOTE.findall(part.text), *filter(None, [traced.named_for(path).get(part.title)])]
            notes = "".join(f"<!-- figures from: {name} -->\n" for name in names)
            for text, _, row in part.units():
                for found in traced.figures_in(text):
                    count += 1
                    if count % EVERY == 0:
                        end = found.end("value")
                        other = text[: end - 1] + str((int(text[end - 1]) + 1) % 10) + text[end:]
                        yield f"# Title\n\n{notes}\n" + ("| |\n|-|\n" if row else "") + other


def test_a_changed_digit_is_noticed():
    noticed = [bool(traced.untraced(page)) for page in changed()]
    assert len(noticed) > 40 and sum(noticed) / len(noticed) > 0.8, "the others are somewhere in their source too"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("Measured: 60.4 % right.", "60.4"),
        ("One selection loses 0.6 ± 0.4 points.", "0.6 ± 0.4"),
        ("It is 1.3 times as fast.", "1.3"),
        ("| | keep 0.7 |\n|---|---|\n| values | 59.8 |", "59.8"),
        ("Bars of 12 points.", "12"),
    ],
)
def test_a_section_with_figures_names_their_source(text, wrong):
    (found,) = traced.untraced(f"# Title\n\n{text}\n")
    assert found.startswith(f"{wrong}, line ") and "'Title'" in found


@pytest.mark.parametrize(
    "text",
    [
        "keep 0.7, 0.5, 0.3 and 0.15; Python 3.8, torch 2.14.1, transformers 4.8; [2202.07800](https://a.b/c)",
        "`merge=0.25`, blocks 3 and 5 of 12, 224 px, a grid of 2 × 2\n\n```python\nrate = 0.33\n# 4.5 %\n```",
        "| keep | 0.25 |\n|---|---|\n| a | b |",
    ],
)
def test_settings_and_releases_are_no_figures(text):
    assert traced.untraced(f"# Title\n\n{text}\n") == []


def test_a_source_holds_what_is_said_of_it():
    said = "ToMe loses 1.0 ± 0.3, 1.3 ± 0.4, 2.4 ± 0.5 and 4.6 ± 0.6 points; texts alone are at 6.2 %, or 0.062.\n"
    assert traced.untraced(f"# Title\n\n{NOTE}\n{said}") == []
    (found,) = traced.untraced(f"# Title\n\n{NOTE}\n{said.replace('2.4 ± 0.5', '2.4 ± 0.9')}")
    assert found.startswith("2.4 ± 0.9, line 5, ")


def test_a_row_is_one_row_of_its_source():
    table = "| | 0.7 | 0.5 |\n|---|---|---|\n| random | 52.8 | {} |\n"
    assert traced.untraced(f"# Title\n\n{NOTE}\n{table.format('46.2')}") == []
    # 0.591 is there, in the row of ToMe.
    (found,) = traced.untraced(f"# Title\n\n{NOTE}\n{table.format('59.1')}")
    assert found.startswith("59.1, line 7")


def test_an_excuse_is_for_decimals_alone():
    assert traced.untraced("# Title\n\n<!-- no figures: releases -->\n\nRelease 4.33, and 2.0 of the other.\n") == []
    found = traced.untraced("# Title\n\n<!-- no figures: releases -->\n\nIt gains 4.3 ± 0.2, which is 5 % more.\n")
    assert [each.split(",")[0] for each in found] == ["4.3 ± 0.2", "5"]


@pytest.mark.parametrize("name", ["benchmarks/none.json", "benchmarks/RESULTS.md#no-such-section", "docs/accuracy.md"])
def test_a_source_exists_and_is_no_page(name):
    with pytest.raises(ValueError, match="figures from: .*there is no such"):
        traced.untraced(f"# Title\n\n<!-- figures from: {name} -->\n\n60.4 %\n")
