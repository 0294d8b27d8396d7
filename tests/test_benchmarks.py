"""The speed benchmark: it runs, it counts right, and its rival is what the paper says. No wall-clock assertion."""

import json
from itertools import pairwise

import pytest
import torch

open_clip = pytest.importorskip("open_clip")
pytest.importorskip("skimage")
pytest.importorskip("matplotlib")
transformers = pytest.importorskip("transformers")

from benchmarks.cases import Case, Inputs  # noqa: E402
from benchmarks.cost import peak_memory  # noqa: E402
from benchmarks.counting import FlopBook  # noqa: E402
from benchmarks.data import SOURCES, batch_of, load_photos  # noqa: E402
from benchmarks.models import load  # noqa: E402
from benchmarks.models_open_clip import name_of_shapes  # noqa: E402
from benchmarks.models_transformers import preprocessing  # noqa: E402
from benchmarks.run import inputs_of  # noqa: E402
from benchmarks.speed import main  # noqa: E402
from benchmarks.tome import match, matching_flops, merge, schedule, token_merging  # noqa: E402
from patchselect.functional import num_kept  # noqa: E402

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 64, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The name of a small open_clip architecture."""
    path = tmp_path_factory.mktemp("configs") / "patchselect-tiny.json"
    path.write_text(json.dumps(TINY))
    open_clip.add_model_config(path)
    return path.stem


@pytest.fixture(scope="module")
def base():
    """ViT-B/16 at 224 pixels, with one image and one text."""
    host = load("ViT-B-16")
    return FlopBook(host, None, None, inputs_of(host, load_photos(SOURCES[:1]), 1))


def test_command_line(tiny, tmp_path, capsys):
    main(
        f"--model {tiny} --batch 2 --keep-rate 0.5 --pass forward train checkpointed "
        f"--tome published fused --rounds 2 --output {tmp_path}".split()
    )
    report = json.loads((tmp_path / "speed.json").read_text())
    assert {"created", "machine", "versions", "model", "notes", "settings", "flop_limit", "results"} <= set(report)
    assert {"processor", "threads", "cores", "device"} <= set(report["machine"])
    assert {"torch", "patchselect", "open_clip_torch"} <= set(report["versions"])
    assert report["model"]["random_weights"] and report["model"]["layers"] == [1, 2]
    methods = {record["method"] for record in report["results"]}
    assert methods == {"unpatched", "text", "image", "random", "tome", "fused tome", "text encoder"}
    for record in report["results"]:
        assert len(record["seconds"]) == record["rounds"] == 2
        assert record["peak_memory_bytes"] > 0 and record["gflops_per_image"] > 0
        assert set(record["images_per_second"]) == {"median", "q1", "q3"}
        if record["method"] == "text encoder":
            continue
        assert record["efficiency"] == pytest.approx(record["speed_up"]["median"] / record["flop_ratio"])
        guided = record["method"] in ("text", "image", "random")
        assert (record["selecting_share"] is not None) == (guided and record["work"] == "forward")
        if guided and record["work"] == "forward":
            assert 0 < record["selecting_share"]["median"] < 1
        if record["method"] == "text" and record["work"] != "checkpointed":
            assert set(record["against_tome"]) == {"tome", "fused tome"}
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
    "arguments", ["--keep-rate 1.0", "--view pair --pass train", "--batch 0", "--rounds 0", "--keep-rate -1"]
)
def test_options_that_make_no_sense(arguments):
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert str(stop.value).startswith("--")


def test_unknown_model_says_what_is_known():
    with pytest.raises(ValueError, match=r"no model 'ViT-Q-7'.*ViT-B-16.*hf-hub"):
        load("ViT-Q-7")


def test_local_checkpoints(tiny, tmp_path):
    """A file is recognised by its shapes; a folder of transformers and one by name run the same way."""
    torch.manual_seed(0)
    model = open_clip.create_model(tiny)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    host = load(str(tmp_path / "weights.pt"))
    assert host.name == tiny and not host.random_weights and "weights.pt" in host.weights
    assert torch.equal(host.model.visual.proj, model.visual.proj)
    missing = load(tiny, pretrained=str(tmp_path / "missing.pt"))
    assert missing.random_weights and "could not be loaded" in missing.notes[0]

    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    config = transformers.CLIPConfig(
        vision_config=small | dict(image_size=32, patch_size=8), text_config=small, projection_dim=16
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path / "folder")
    for size in (None, 48):
        host = load(str(tmp_path / "folder"), image_size=size)
        assert not host.random_weights
        inputs = inputs_of(host, load_photos(SOURCES[:2]), 2)
        assert inputs.images.shape[-1] == (size or 32) and inputs.text.shape == (2, 16)
        assert host.encode_image(inputs.images).shape == (2, 16)


def saved_shapes(name, folder, **changed):
    """A file with the shapes of an architecture, and no values."""
    config = open_clip.get_model_config(name) | changed
    with torch.device("meta"):
        state = open_clip.CLIP(**config).state_dict()
    torch.save(state, folder / f"{name}.pt")
    return folder / f"{name}.pt"


def test_a_file_is_recognised_by_all_of_its_shapes(tmp_path):
    # Size of the images, and not CoCa, whose towers look the same.
    assert name_of_shapes(saved_shapes("ViT-B-32-256", tmp_path)) == "ViT-B-32-256"
    assert name_of_shapes(saved_shapes("ViT-S-32-alt", tmp_path)) == "ViT-S-32-alt"
    with pytest.raises(ValueError, match="no CLIP of open_clip has the shapes .* say which it is, --model NAME"):
        vision = open_clip.get_model_config("ViT-B-32")["vision_cfg"] | {"image_size": 320}
        name_of_shapes(saved_shapes("ViT-B-32", tmp_path, vision_cfg=vision))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "scripted.pt")
    with pytest.raises(ValueError, match="holds no state dict that torch can read safely"):
        name_of_shapes(tmp_path / "scripted.pt")


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14-336"])
def test_a_file_does_not_tell_its_activation(name, tmp_path):
    for which in (name, f"{name}-quickgelu"):
        path = saved_shapes(which, tmp_path)
        with pytest.raises(ValueError, match=f"fits {name} and {name}-quickgelu, .* --model NAME --pretrained {path}"):
            load(str(path))
    with pytest.raises(ValueError, match="leaves --pretrained openai no place"):
        load(str(path), pretrained="openai")


def activation(host):
    return type(host.model.visual.transformer.resblocks[0].mlp.gelu).__name__


def test_a_tag_brings_its_activation(tiny, tmp_path, monkeypatch):
    """open_clip alone warns, and runs OpenAI's weights with GELU; what is saved keeps it too."""
    torch.manual_seed(0)
    torch.save(open_clip.create_model(tiny).state_dict(), tmp_path / "weights.pt")
    tags = {tag: {"hf_hub": "org/repo/file.bin", "quick_gelu": tag == "quick"} for tag in ("quick", "plain")}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, tiny, tags)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "weights.pt"))
    quick = load(tiny, pretrained="quick")
    assert activation(quick) == "QuickGELU" and not quick.random_weights
    assert activation(load(tiny, pretrained="plain")) == "GELU" and activation(load(tiny)) == "GELU"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "file.bin")
    found = load(tiny)
    assert found.weights == "weights: quick" and activation(found) == "QuickGELU"
    quick.save(tmp_path / "saved")
    again, image = load(str(tmp_path / "saved")), torch.randn(1, 3, 64, 64)
    assert activation(again) == "QuickGELU" and not again.random_weights
    torch.testing.assert_close(again.encode_image(image), quick.encode_image(image))


def test_a_file_with_a_name_that_has_a_twin_is_noted(tmp_path, monkeypatch):
    configs = {name: TINY | {"quick_gelu": "quick" in name} for name in ("small", "small-quickgelu")}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", configs)
    torch.save(open_clip.create_model("small").state_dict(), tmp_path / "weights.pt")
    plain, quick = (load(name, pretrained=str(tmp_path / "weights.pt")) for name in configs)
    assert "give --model small-quickgelu" in plain.notes[0] and not quick.notes
    assert (activation(plain), activation(quick)) == ("GELU", "QuickGELU")


def test_folders_of_open_clip(tiny, tmp_path):
    """Without weights they are random and said to be; with other weights, those are loaded."""
    host = load(tiny)
    host.save(tmp_path)
    (weights,) = tmp_path.glob("*.bin")
    other = open_clip.create_model(tiny).state_dict()
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="--pretrained can be a file with others, got 'openai'"):
        load(str(tmp_path), pretrained="openai")
    given = load(str(tmp_path), pretrained=str(tmp_path / "other.pt"))
    assert torch.equal(given.model.visual.proj, other["visual.proj"]) and "other.pt" in given.weights
    assert torch.equal(load(str(tmp_path)).model.visual.proj, host.model.visual.proj)
    weights.unlink()
    empty = load(str(tmp_path))
    assert empty.random_weights and "could not be loaded" in empty.notes[0]
    with pytest.raises(ValueError, match="random weights, .*could not be loaded.* --random-weights for a dry run"):
        empty.check_accuracy()
    given.check_accuracy()


SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)


def small_clip():
    config = transformers.CLIPConfig(
        vision_config=SMALL | dict(image_size=32, patch_size=8), text_config=SMALL, projection_dim=16
    )
    return transformers.CLIPModel(config)


def test_transformers_take_no_file_of_weights(tmp_path):
    model = small_clip()
    model.save_pretrained(tmp_path / "folder")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="--pretrained hub .* alone, got .*weights.pt.* --model FOLDER"):
        load(str(tmp_path / "folder"), pretrained=str(tmp_path / "weights.pt"))
    host = load(str(tmp_path / "folder"))
    host.check_accuracy()
    # A folder without a tokenizer, of a model with CLIP's vocabulary: CLIP's own words.
    assert host.tokenize(["a cat"])["input_ids"][0, :4].tolist() == [49406, 320, 2368, 49407]


def test_weights_that_a_folder_lacks_are_random(tmp_path):
    model = small_clip()
    state = {name: value for name, value in model.state_dict().items() if name != "text_projection.weight"}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="lacks 1 weights, which are random: text_projection.weight"):
        load(str(tmp_path)).check_accuracy()


def test_a_tokenizer_in_anothers_place_is_refused(tmp_path):
    config = transformers.CLIPConfig(
        vision_config=SMALL | dict(image_size=32, patch_size=8), text_config=SMALL | dict(vocab_size=100)
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    host = load(str(tmp_path))
    assert not host.random_weights
    with pytest.raises(ValueError, match="another model's tokenizer, .*CLIP's stands in"):
        host.check_accuracy()


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize(
    "processor",
    [
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
        transformers.ChineseCLIPImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False),
        transformers.ChineseCLIPImageProcessor(size={"shortest_edge": 32}, do_center_crop=False),
        transformers.SiglipImageProcessor(size={"height": 32, "width": 32}, do_resize=False),
    ],
    ids=["crop", "crop of more", "exact", "not square", "not resized"],
)
def test_preprocessing_ends_square(processor, size, request):
    kind, picture = request.node.callspec.id, load_photos(SOURCES[:1])[0].image.resize((90, 70))
    pixels = preprocessing(processor, size)(picture)
    assert pixels.shape == (3, size, size)
    if size == 32 and "not" not in kind:  # the model's own size: nothing of the processor is changed
        assert torch.equal(pixels, processor(picture, return_tensors="pt")["pixel_values"][0])
    if size == 48 and "more" in kind:
        sizes = dict(size={"shortest_edge": 60}, crop_size={"height": 48, "width": 48})
        assert torch.equal(pixels, processor(picture, return_tensors="pt", **sizes)["pixel_values"][0])


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
    assert FlopBook(host, None, None, inputs_of(host, photos, 2)).of(Case("text", 0.5)) == base.of(Case("text", 0.5))


def test_tome_meets_the_flops_of_selection(base):
    removed = base.tome_removals(Case("text", 0.5))
    assert base.of(Case("tome", 0.5, removed)) == pytest.approx(base.of(Case("text", 0.5)), rel=0.005)


def test_matching_flops_finds_the_closest():
    for target in (1000.0, 996.0, 333.3, 5.0, 0.0, 2000.0):
        best = min(range(101), key=lambda removed: abs(1000 - 9.9 * removed - target))
        assert matching_flops(target, lambda removed: 1000 - 9.9 * removed, 100) == best


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
    for stay, go in zip(found.stay, found.go, strict=True):
        assert sorted([*stay.tolist(), *go.tolist()]) == list(range(6))
    assert found.into.min() >= 0 and found.into.max() < 5


def test_schedule_is_even_and_complete():
    for total in (0, 5, 12, 141):
        steps = schedule(total, 12)
        assert sum(steps) == total and max(steps) - min(steps) <= 1


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
@pytest.mark.parametrize("fused", [False, True])
def test_tome_in_a_model(tiny, library, fused):
    if library == "open_clip":
        host = load(tiny)
        blocks, lengths = host.model.visual.transformer.resblocks, [17, 14, 11, 8, 5]
    else:
        small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2)
        config = transformers.CLIPConfig(
            vision_config=small | dict(image_size=32, patch_size=8), text_config=small, projection_dim=16
        )
        model = transformers.CLIPModel(config).eval()
        host = type("Host", (), {"model": model, "encode_image": lambda _, x: model.get_image_features(x)[1]})()
        blocks, lengths = model.vision_model.encoder.layers, [17, 14, 11, 8, 5]
    images = torch.randn(2, 3, 64, 64) if library == "open_clip" else torch.randn(2, 3, 32, 32)
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, args, out: seen.append((args[0].shape[1], out.shape[1])))
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
        assert seen == list(pairwise(lengths))
        assert torch.equal(host.encode_image(images), before)
    for hook in hooks:
        hook.remove()


def test_proportional_attention_counts_copies():
    """A token of size 3 is attended to as three equal tokens are."""
    from benchmarks.tome import attend

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
