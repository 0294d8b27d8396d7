"""The speed benchmark runs, and refuses options that make no sense. No wall-clock assertion."""

import json
from types import SimpleNamespace

import pytest
import torch
from since import BENCHMARKS, needs

needs(*BENCHMARKS, module=True)

from benchmarks.common.cost import peak_memory
from benchmarks.common.photographs import batch_of, load_photos
from benchmarks.common.tome import token_merging
from benchmarks.speed.__main__ import main
from benchmarks.speed.cases import MERGED, Inputs
from benchmarks.speed.run import cases_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_command_line(tiny, tmp_path, capsys):
    main(
        f"--model {tiny} --batch 2 --keep-rate 0.5 --pass forward train checkpointed "
        "--guidance text image random "
        f"--tome published fused front --text-encoder --memory --merge-at --rounds 2 --output {tmp_path}".split()
    )
    report = json.loads((tmp_path / "speed.json").read_text())
    assert {"schema", "created", "commit", "machine", "versions", "settings"} <= set(report)
    assert {"model", "notes", "flop_limit", "results"} <= set(report)
    assert {"processor", "threads", "cores", "device"} <= set(report["machine"])
    assert {"torch", "patchselect", "open_clip_torch"} <= set(report["versions"])
    assert report["model"]["random_weights"] and report["model"]["layers"] == [1, 2]
    methods = {record["method"] for record in report["results"]}
    tomes = {"tome", "fused tome", "tome front"}
    assert methods == {"unpatched", "text", "image", "random", "merged", *tomes, "text encoder"}
    for record in report["results"]:
        assert len(record["seconds"]) == record["rounds"] == 2
        assert record["peak_memory_bytes"] > 0 and record["gflops_per_image"] > 0
        assert set(record["images_per_second"]) == {"median", "q1", "q3"}
        if record["method"] == "text encoder":
            continue
        assert record["efficiency"] == pytest.approx(record["speed_up"]["median"] / record["flop_ratio"])
        guided = record["method"] in ("text", "image", "random", "merged")
        assert (record["selecting_share"] is not None) == (guided and record["work"] == "forward")
        if guided and record["work"] == "forward":
            assert 0 < record["selecting_share"]["median"] < 1
        if record["method"] in ("text", "merged") and record["work"] != "checkpointed":
            assert set(record["against_tome"]) == tomes
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"
    shown = capsys.readouterr().out
    assert (tmp_path / "speed.md").read_text() in shown
    assert "random weights: the speed does not depend on them" in shown
    assert "with gradient checkpointing" in shown and "| text " in shown


def test_pair_view_and_two_sizes(tiny, tmp_path, capsys):
    report = main(
        f"--model {tiny} --image-size 64 96 --batch 3 --view pair --guidance text --keep-rate 0.7 "
        f"--precision bf16 amp --rounds 1 --output {tmp_path}".split()
    )
    assert set(report["flop_limit"]) == {"64/pair", "96/pair"}
    assert [record["method"] for record in report["results"]] == ["unpatched", "text"] * 4
    assert "the text encoder is inside" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        "--keep-rate 1.0",
        "--view pair --pass train",
        "--batch 0",
        "--rounds 0",
        "--keep-rate -1",
        "--merge 1",
        "--layers 0 5",
    ],
)
def test_options_that_make_no_sense(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert str(stop.value).startswith("--")


def test_photos_keep_their_captions():
    photos = load_photos()
    assert len(photos) >= 6
    batch = batch_of(photos, 2 * len(photos) + 1)
    assert [photo.caption for photo in batch] == [photo.caption for photo in [*photos, *photos, photos[0]]]


def test_peak_memory_counts_what_lives_together():
    def call():
        first = torch.empty(1_000_000)
        del first
        return torch.empty(500_000) + torch.empty(500_000)  # three half-sized tensors at once

    assert peak_memory(call, torch.device("cpu")) == pytest.approx(6e6, rel=0.01)


def test_what_a_model_does_not_take_is_left_out_with_a_note():
    """Merging alone has no place for its tokens in a rotary tower; the rest of the comparison goes on."""
    needs("rotary towers")
    from timm.models.eva import Eva

    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=0, use_rot_pos_emb=True)
    tower, notes = Eva(**sizes).eval(), []

    def removals(case, method):
        with token_merging(tower, 4), torch.no_grad():
            return tower(torch.randn(1, 3, 32, 32))

    book = SimpleNamespace(tome_removals=removals, merged_rate=lambda text: 0.4)
    options = SimpleNamespace(
        guidance=["text"], keep_rate=[0.5], merge=0.5, merge_at=None, tome=["front"], text_encoder=False
    )
    found = [case.method for case in cases_of(options, book, "tower", notes)]
    assert found == ["unpatched", "text", MERGED]
    assert notes == [
        "ToMe-front, fused attention is left out: ToMe does not say where a merged token stands, which rotary "
        "positions ask"
    ]


def test_inputs_fake_has_the_same_shapes():
    inputs = Inputs(torch.randn(2, 3, 4, 4), {"text": torch.ones(2, 7, dtype=torch.long)}, torch.randn(2, 5))
    fake = inputs.fake()
    assert fake.images.shape == inputs.images.shape and fake.tokens["text"].dtype == torch.long
