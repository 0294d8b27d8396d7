"""A relevance or a reduction of somebody else's file goes through the speed benchmark like one of the library's own."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

pytest.importorskip("open_clip")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")

from since import since

import patchselect
from benchmarks.accuracy.yours import evaluate
from benchmarks.common.objects import name_of, named
from benchmarks.speed.__main__ import main
from benchmarks.speed.cases import Selection

FILE = """
class Nearest:
    name = "nearest"

class Scaled:
    def __init__(self, scale):
        self.name = f"scaled {scale}"

half = Scaled(0.5)

class Rooms:
    quarters = Scaled(4)

class Nameless:
    pass
"""


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "somebodys_file.py").write_text(FILE)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("keys", "keys"),
        ("somebodys_file:Nearest", "nearest"),
        ("somebodys_file:half", "scaled 0.5"),
        ("somebodys_file:Rooms.quarters", "scaled 4"),
    ],
)
def test_a_name_or_an_object(outside, given, name):
    found = named(given)
    assert name_of(found) == name
    assert isinstance(found, str) == (":" not in given) and not isinstance(found, type)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ("no_such_file:Nearest", "No module named 'no_such_file'"),
        ("somebodys_file:Farthest", "Farthest"),
        ("somebodys_file:Scaled", "scale"),
        ("somebodys_file:Nameless", "has no `name`"),
        (":Nearest", "MODULE:ATTRIBUTE"),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(outside, given, what):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        named(given)
    assert what in str(error.value)


def test_labels_name_what_is_not_the_default(outside):
    plain, chosen = Selection(), Selection(None, named("somebodys_file:half"), "sum")
    assert [plain.label(method) for method in ("unpatched", "text", "image")] == ["unpatched", "text", "image"]
    assert chosen.label("text") == "text, scaled 0.5, fusion sum" and chosen.label("image") == "image, fusion sum"
    assert chosen.label("unpatched") == "unpatched" and chosen.label("tome") == "ToMe as published"


@since("counting")
def test_an_object_from_outside_reaches_apply_and_the_tables(outside, tiny, tmp_path, monkeypatch, capsys):
    """`patchselect.apply` is given the object as it is; here something of the library's own stands in for its work."""
    given, apply = [], patchselect.apply

    def watched(model, keep_rate, layers, guidance, relevance, fusion, **options):
        given.append((guidance, relevance, fusion))
        return apply(model, keep_rate, layers, guidance, None if relevance is None else "keys", "mean", **options)

    monkeypatch.setattr(patchselect, "apply", watched)
    main(
        f"--model {tiny} --batch 1 --keep-rate 0.5 --guidance text image --tome --rounds 1 --output {tmp_path} "
        "--relevance somebodys_file:Nearest --fusion somebodys_file:half".split()
    )
    assert {(g, name_of(r), name_of(f)) for g, r, f in given} == {
        ("text", "nearest", "scaled 0.5"),
        ("image", None, "scaled 0.5"),
    }
    assert len({id(fusion) for _, _, fusion in given}) == 1
    report = json.loads((tmp_path / "speed.json").read_text())
    assert report["settings"]["relevance"] == "nearest" and report["settings"]["fusion"] == "scaled 0.5"
    assert "| text, nearest, fusion scaled 0.5 " in capsys.readouterr().out


def test_zero_shot_calls_an_object_by_its_name(outside):
    found = named("somebodys_file:half")
    assert str(evaluate.Arm("text", found, 0.5)) == "text, scaled 0.5"
    right, sure = evaluate.Seen([torch.tensor([True, True])]), evaluate.Seen([torch.tensor([True, False])])
    records = evaluate.summarise({evaluate.Arm("none"): right, evaluate.Arm("text", found, 0.5): sure})
    assert json.loads(json.dumps(records[1]))["relevance"] == "scaled 0.5"
    assert records[1]["against_none"][0] == -0.5
