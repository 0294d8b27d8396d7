"""The speed benchmark: it runs, it counts right, and its rival is what the paper says. No wall-clock assertion."""

import json
from types import SimpleNamespace

import pytest
import torch
from since import BENCHMARKS, needs, slow

needs(*BENCHMARKS, module=True)
import transformers

from benchmarks.common.cost import peak_memory
from benchmarks.common.photographs import SOURCES, batch_of, load_photos
from benchmarks.common.tome import attend, front, match, matching_flops, merge, schedule, token_merging
from benchmarks.models.loading import load
from benchmarks.speed import counting
from benchmarks.speed.__main__ import main
from benchmarks.speed.cases import MERGED, Case, Inputs, Selection
from benchmarks.speed.counting import FlopBook
from benchmarks.speed.run import cases_of, inputs_of
from patchselect.functional import as_ratio, merge_schedule, num_kept


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base():
    """ViT-B/16 at 224 pixels, with one image and one text."""
    host = load("ViT-B-16")
    return FlopBook(host, Selection(), inputs_of(host, load_photos(SOURCES[:1]), 1))


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


def vit_base_flops(lengths):
    """ViT-B/16, 2 per multiply-add: patches, attention and MLP at the (attention, MLP) lengths of each block, head."""
    width = 768
    blocks = sum(8 * n * width**2 + 4 * n**2 * width + 16 * m * width**2 for n, m in lengths)
    return 2 * 196 * 768 * width + blocks + 2 * width * 512


def test_flops_of_the_unpatched_model(base):
    assert base.of(Case("unpatched")) == vit_base_flops([(197, 197)] * 12)
    assert base.of(Case("unpatched")) / 1e9 == pytest.approx(35.1, abs=0.05)
    assert base.of(Case("unpatched"), "pair") / 1e9 == pytest.approx(41.1, abs=0.05)


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
def test_flops_of_selection_are_those_of_its_tokens(base, rate):
    first = num_kept(196, rate) + 1
    second = num_kept(first, rate) + 1
    lengths = [197] * 5 + [first + 1] * 5 + [second + 1] * 2
    tokens = vit_base_flops([(n, lengths[min(i + 1, 11)] if i in (4, 9) else n) for i, n in enumerate(lengths)])
    fusion = 2 * 768 * (196 + first)
    assert base.of(Case("random", rate)) == tokens + fusion
    for guidance in ("text", "image"):
        scoring = base.of(Case(guidance, rate)) - tokens - fusion
        assert 0 < scoring < 0.002 * tokens


def test_flops_do_not_depend_on_the_batch(base):
    host, photos = base.host, load_photos(SOURCES[:2])
    assert FlopBook(host, Selection(), inputs_of(host, photos, 2)).of(Case("text", 0.5)) == base.of(Case("text", 0.5))


def test_counts_of_a_real_pass_are_those_of_fake_tensors(tiny, monkeypatch):
    """Which of them is made depends on the size of the model."""
    host, counted = load(tiny), {}
    cases = [Case("text", 0.5), Case("random", 0.5), Case(MERGED, 0.5, own_rate=0.4), Case("tome front", 0.5, 2)]
    original = counting.count_flops
    for limit in (0, 1e11):
        ways = []
        monkeypatch.setattr(counting, "LARGE", limit)
        monkeypatch.setattr(
            counting, "count_flops", lambda call, fake, ways=ways: ways.append(fake) or original(call, fake)
        )
        book = FlopBook(host, Selection(), inputs_of(host, load_photos(SOURCES[:1]), 1))
        counted[limit] = [book.of(case) for case in (Case("unpatched"), *cases)]
        assert ways == [True] + [limit == 0] * len(cases)
    assert counted[0] == counted[1e11]


def test_tome_meets_the_flops_of_selection(base):
    removed = base.tome_removals(Case("text", 0.5))
    assert base.of(Case("tome", 0.5, removed)) == pytest.approx(base.of(Case("text", 0.5)), rel=0.005)


@pytest.mark.parametrize("rate", [pytest.param(0.3, marks=slow), 0.7])
def test_merging_early_meets_the_flops_of_selection(base, rate):
    """At every rate; and what merging, ranking and fusing cost by themselves is a small share of it."""
    text = Case("text", rate)
    front = Case("tome front", rate, base.tome_removals(text, "tome front"))
    assert base.of(front) == pytest.approx(base.of(text), rel=0.005)
    own = base.merged_rate(text)
    found = base.of(Case(MERGED, rate, own_rate=own))
    assert found == pytest.approx(base.of(text), rel=0.005)
    patches, lengths = 196, []
    for merged in merge_schedule(196, as_ratio(own), 0.5, 4):
        lengths.append((1 + patches, 1 + patches - merged))
        patches -= merged
    left = num_kept(196, own) + 2
    tokens = vit_base_flops([*lengths, (1 + patches, left), *[(left, left)] * 7])
    assert 0 < found - tokens < 0.005 * tokens


def test_matching_flops_finds_the_closest():
    for target in (1000.0, 996.0, 333.3, 5.0, 0.0, 2000.0):
        best = min(range(101), key=lambda removed: abs(1000 - 9.9 * removed - target))
        for guess in (None, 0, best, best + 1, best - 1, best + 50, 100, 1000, -3):
            assert matching_flops(target, lambda removed: 1000 - 9.9 * removed, 100, guess) == best


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_a_good_guess_saves_counts(off):
    asked = []
    found = matching_flops(333.3, lambda removed: asked.append(removed) or 1000 - 9.9 * removed, 100, 67 + off)
    assert found == 67 and len(asked) <= 4 and len(set(asked)) == len(asked)


def test_peak_memory_counts_what_lives_together():
    def call():
        first = torch.empty(1_000_000)
        del first
        return torch.empty(500_000) + torch.empty(500_000)  # three half-sized tensors at once

    assert peak_memory(call, torch.device("cpu")) == pytest.approx(6e6, rel=0.01)


def test_merging_against_a_slow_reference():
    """Each of A to its most similar of B, the `r` best merged, as loops over float64."""
    torch.manual_seed(0)
    tokens, sizes = torch.randn(2, 12, 5).double(), torch.randint(1, 4, (2, 12, 1)).double()
    keys, removed, prefix = torch.randn(2, 12, 3).double(), 4, 1
    merged, grown = merge(tokens, sizes, keys, removed, prefix)
    for row in range(2):
        a, b = list(range(prefix, 12, 2)), list(range(prefix + 1, 12, 2))
        alike = {i: {j: torch.cosine_similarity(keys[row, i], keys[row, j], dim=0).item() for j in b} for i in a}
        edges = sorted(((max(alike[i].values()), i, max(alike[i], key=alike[i].get)) for i in a), reverse=True)
        groups = {j: [j] for j in b}
        for _, i, j in edges[:removed]:
            groups[j].append(i)
        gone = {i for _, i, _ in edges[:removed]}
        members = [[0], *([i] for i in a if i not in gone), *groups.values()]
        for place, group in enumerate(members):
            weights = sizes[row, group]
            torch.testing.assert_close(grown[row, place], weights.sum(dim=0))
            torch.testing.assert_close(merged[row, place], (weights * tokens[row, group]).sum(dim=0) / weights.sum())


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_merging_conserves(prefix):
    tokens, keys, sizes = torch.randn(2, prefix + 15, 8), torch.randn(2, prefix + 15, 4), torch.ones(2, prefix + 15, 1)
    merged, grown = merge(tokens, sizes, keys, 5, prefix)
    assert merged.shape == (2, prefix + 10, 8) and grown.shape == (2, prefix + 10, 1)
    assert torch.equal(merged[:, :prefix], tokens[:, :prefix])
    torch.testing.assert_close(grown.sum(dim=1), sizes.sum(dim=1))
    torch.testing.assert_close((merged * grown).sum(dim=1), tokens.sum(dim=1))
    assert merge(tokens, sizes, keys, 99, prefix)[0].shape[1] == prefix + 8  # half of the patches can go
    assert merge(tokens, sizes, keys, 0, prefix)[0] is tokens


def test_matching_is_a_partition():
    found = match(torch.randn(3, 11, 4), 4)
    for stay, go in zip(found.stay, found.go):
        assert sorted([*stay.tolist(), *go.tolist()]) == list(range(6))
    assert found.into.min() >= 0 and found.into.max() < 5


def test_schedule_is_even_and_complete():
    for total in (0, 5, 12, 141):
        steps = schedule(total, 12)
        assert sum(steps) == total and max(steps) - min(steps) <= 1
        early = schedule(total, 12, front(12))
        assert sum(early) == total and len(early) == 12 and early[4:] == [0] * 8
        assert max(early[:4]) - min(early[:4]) <= 1


def first(out):
    """Return what a layer gives the next one: layers of transformers 4 return tuples."""
    return out[0] if isinstance(out, tuple) else out


def features(out):
    """Return features of images, which transformers 4 gives bare."""
    return out if isinstance(out, torch.Tensor) else out.pooler_output


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
@pytest.mark.parametrize("fused", [False, True])
def test_tome_in_a_model(tiny, library, fused):
    if library == "open_clip":
        host = load(tiny)
        blocks, lengths = host.model.visual.transformer.resblocks, [17, 14, 11, 8, 5]
    else:
        small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2)
        config = transformers.CLIPConfig(
            vision_config={**small, **dict(image_size=32, patch_size=8)}, text_config=small, projection_dim=16
        )
        model = transformers.CLIPModel(config).eval()
        host = type("Host", (), {"model": model, "encode_image": lambda _, x: features(model.get_image_features(x))})()
        blocks, lengths = model.vision_model.encoder.layers, [17, 14, 11, 8, 5]
    images = torch.randn(2, 3, 64, 64) if library == "open_clip" else torch.randn(2, 3, 32, 32)
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, args, out: seen.append((args[0].shape[1], first(out).shape[1])))
        for block in blocks
    ]
    with torch.no_grad():
        before = host.encode_image(images)
        seen.clear()
        with token_merging(host.model, 0, fused):
            torch.testing.assert_close(host.encode_image(images), before, atol=1e-5, rtol=1e-4)
        seen.clear()
        with token_merging(host.model, 12, fused):
            host.encode_image(images)
        assert seen == list(zip(lengths, lengths[1:]))
        seen.clear()
        with token_merging(host.model, 8, fused, first=1):
            host.encode_image(images)
        assert seen == [(17, 9)] + [(9, 9)] * 3
        assert torch.equal(host.encode_image(images), before)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", ["Dinov2", "ViT"])
def test_tome_in_a_plain_vit_of_transformers(kind):
    """Without a removal it is the model itself."""
    needs("plain layers")
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    config = getattr(transformers, f"{kind}Config")(**sizes, image_size=32, patch_size=8)
    model, images = getattr(transformers, f"{kind}Model")(config).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(images).last_hidden_state
        with token_merging(model, 0):
            torch.testing.assert_close(model(images).last_hidden_state, plain, atol=1e-5, rtol=1e-4)
        with token_merging(model, 6):
            assert model(images).last_hidden_state.shape[1] == 17 - 6


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


def test_proportional_attention_counts_copies():
    """A token of size 3 is attended to as three equal tokens are."""
    query, key, value = torch.randn(3, 2, 4, 6, 8).double().unbind(0)
    sizes = torch.tensor([1, 3, 1, 2, 1, 1]).double()
    copied = [x.repeat_interleave(sizes.long(), dim=2) for x in (key, value)]
    for fused in (False, True):
        expected = attend(query, *copied, 0.3, None, fused)
        torch.testing.assert_close(
            attend(query, key, value, 0.3, sizes.view(1, 6, 1).expand(2, -1, -1), fused), expected
        )


def test_inputs_fake_has_the_same_shapes():
    inputs = Inputs(torch.randn(2, 3, 4, 4), {"text": torch.ones(2, 7, dtype=torch.long)}, torch.randn(2, 5))
    fake = inputs.fake()
    assert fake.images.shape == inputs.images.shape and fake.tokens["text"].dtype == torch.long
