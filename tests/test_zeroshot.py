"""Zero-shot accuracy on a folder of classes, outlying patches, and pairs of one's own."""

import json

import pytest
import torch
from since import BENCHMARKS, needs, since

needs(*BENCHMARKS, module=True)
import numpy as np
import open_clip
import tokenizers
import transformers
from PIL import Image

import patchselect
from benchmarks.accuracy import align
from benchmarks.accuracy.clip import model as clip
from benchmarks.accuracy.yours import classes as folders
from benchmarks.accuracy.yours import evaluate, outliers, pairs, zeroshot
from benchmarks.models.loading import load

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 64, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
SMALLEST = "ViT-S-32-alt"  # of open_clip's own
DEEP = {"layers": 24, "width": 32, "attentional_pool": True, "attn_pooler_heads": 4}


@pytest.fixture(scope="module", params=["tiny", "deep, pooled by attention"])
def name(request, tmp_path_factory):
    """The name of a small open_clip architecture."""
    path = tmp_path_factory.mktemp("configs") / f"zeroshot-{request.param.split(',')[0]}.json"
    vision = {**TINY["vision_cfg"], **(DEEP if "deep" in request.param else {})}
    path.write_text(json.dumps({**TINY, "vision_cfg": vision}))
    open_clip.add_model_config(path)
    return path.stem


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of seven noisy pictures each."""
    root, random = tmp_path_factory.mktemp("classes"), np.random.default_rng(0)
    for kind in ("red_cat", "tree"):
        (root / kind).mkdir()
        for number in range(7):
            pixels = random.integers(0, 255, (70, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / kind / f"{number}.png")
    return root


def test_zeroshot_end_to_end(name, folder, tmp_path):
    torch.manual_seed(0)
    arguments = f"--data {folder} --model {name} --keep-rate 1 0.5 --batch 4 --outlier 1.05".split()
    arguments += ["--output", str(tmp_path), "--random-weights"]
    report = zeroshot.main(zeroshot.parse(arguments))
    assert json.loads((tmp_path / "zeroshot.json").read_text())["classes"] == 2
    base, *others = report["results"]
    assert base["arm"] == "no selection" and base["images"] == 14
    assert {r["arm"] for r in others} >= {"text, values", "text, keys", "image", "random"}
    assert len(others) % 2 == 0
    for record in others:
        assert round(14 * record["accuracy"], 6) == round(14 * record["accuracy"])
        assert record["accuracy"] - base["accuracy"] == pytest.approx(record["against_none"][0])
        assert len(record["speed_up"]) == 3
        if record["keep_rate"] == 1:
            assert record["against_none"] == (0.0, 0.0)
            assert all(o["kept_share"] in (1.0, None) and o["chance"] == 1.0 for o in record["outliers"])
        else:
            first = next(o for o in record["outliers"] if o["norms_in"] == o["selection_in"])
            assert first["chance"] == pytest.approx(0.5)
    # Attentional pooling has no joint space for patches: left out, and said so.
    assert any("joint" in note for note in report["notes"]) == ("deep" in name)


def test_zeroshot_accuracy_is_that_of_the_model(folder):
    host = load(SMALLEST)
    options = zeroshot.parse(f"--data {folder} --model x --limit 4 --batch 3 --diagnose 0 --device cpu".split())
    data, names = folders.images_of(options, host)
    assert names == ["red cat", "tree"] and len(data) == 4
    classes = folders.class_features(host, names, ["a {}", "the {}"])
    seen, count = evaluate.evaluate(host, options, data, classes, [evaluate.Arm("none")])
    with torch.no_grad():
        features = host.encode_image(torch.stack([image for image, _ in data]))
    wanted = (features @ classes.T).argmax(-1) == torch.tensor([label for _, label in data])
    assert count == 4 and torch.equal(torch.cat(seen[evaluate.Arm("none")].right), wanted)


def test_random_weights_are_refused(folder, tmp_path):
    missing = f"--data {folder} --model {SMALLEST} --pretrained {tmp_path / 'missing.pt'} --output {tmp_path}".split()
    with pytest.raises(ValueError, match="random weights, .*missing.pt.* could not be loaded.* --random-weights"):
        zeroshot.main(zeroshot.parse(missing))
    with pytest.raises(ValueError, match="random weights, .*missing.pt.* could not be loaded.* --random-weights"):
        align.main(align.parse([*missing, "--threads", "1"]))
    assert not any(tmp_path.iterdir())


def test_zeroshot_says_what_is_wrong(folder, tmp_path):
    with pytest.raises(ValueError, match="needs {} where"):
        folders.prompts(["a photo"])
    (tmp_path / "names").write_text("one\n")
    options = zeroshot.parse(["--data", str(folder), "--model", "x", "--classes", str(tmp_path / "names")])
    with pytest.raises(ValueError, match="names 1 classes, .* has 2 folders"):
        folders.images_of(options, load(SMALLEST))


def test_planted_outliers_are_counted():
    patches = torch.ones(2, 10, 4)
    patches[0, 3] *= 8
    patches[1, 0] *= 2.5
    outlying = outliers.outliers(patches, 3.0)
    assert outlying.nonzero().tolist() == [[0, 3]]
    diagnosis = outliers.Diagnosis()
    diagnosis.add(5, 2, outlying, torch.tensor([[3, 1, -1], [0, 1, 2]]))
    assert diagnosis.report() == [
        {"norms_in": 5, "selection_in": 2, "share": 0.05, "share_of_kept": 0.2, "kept_share": 1.0, "chance": 0.25}
    ]


def test_inputs_of_blocks_are_the_patches():
    model = clip.build()
    (tower,) = patchselect.wiring.towers.find_towers(model)
    with outliers.inputs_of_blocks(tower, [0, 5]) as found:
        model.encode_image(torch.randn(2, 3, clip.SIZE, clip.SIZE))
    assert {index: tuple(x.shape) for index, x in found.items()} == {0: (2, 64, 64), 5: (2, 64, 64)}
    assert not tower.blocks[0]._forward_pre_hooks


# Pairs of one's own.


def test_table_of_pairs(folder, tmp_path):
    host = load(SMALLEST)
    table = tmp_path / "pairs.tsv"
    table.write_text("red_cat/0.png\ta red cat\n\ntree/1.png\ta tree\n")
    data = pairs.table_pairs(table, folder, host)
    image, tokens = data[1, 0]
    assert len(data) == 2 and image.shape == (3, host.image_size, host.image_size) and tokens["text"].dim() == 1
    table.write_text("red_cat/0.png a red cat\n")
    with pytest.raises(ValueError, match="pairs.tsv:1 has no tab"):
        pairs.table_pairs(table, folder, host)


@pytest.fixture
def table(folder, tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{k}/{n}.png\ta {k} {n}\n" for k in ("red_cat", "tree") for n in range(3)))
    return path


def aligned(model, table, folder, output, *more):
    arguments = f"--model {model} --data {table} --images {folder} --steps 2 --batch 3 --rate 1e-3 --threads 1".split()
    return align.main(align.parse([*arguments, "--device", "cpu", "--output", str(output), *more]))


@since("folders of open_clip")
def test_aligned_open_clip_is_evaluated_by_its_folder(table, folder, tmp_path, capsys):
    report = aligned(SMALLEST, table, folder, tmp_path / "out", "--random-weights")
    assert len(report["losses"]) == 2 and f"--model {tmp_path / 'out' / 'model'}" in capsys.readouterr().out
    state = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["model"]
    host = load(str(tmp_path / "out" / "model"))
    assert all(torch.equal(value, state[name]) for name, value in host.model.state_dict().items())
    host.check_accuracy()


def test_aligned_transformers_is_evaluated_by_its_folder(table, folder, tmp_path, capsys):
    """From weights in half precision, with a processor and a tokenizer of its own."""
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2)
    vision, text = (
        {**small, **dict(image_size=32, patch_size=8)},
        {**small, **dict(vocab_size=9, max_position_embeddings=6)},
    )
    config = transformers.CLIPConfig(
        vision_config=vision, text_config={**text, **dict(eos_token_id=8)}, projection_dim=16
    )
    transformers.CLIPModel(config).half().save_pretrained(tmp_path / "folder")
    sizes = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
    transformers.CLIPImageProcessor(**sizes).save_pretrained(tmp_path / "folder")
    words = {word: place for place, word in enumerate(["?", "a", "red_cat", "tree", "0", "1", "2", "end"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="end", unk_token="?")
    fast.save_pretrained(tmp_path / "folder")

    report = aligned(tmp_path / "folder", table, folder, tmp_path / "out")
    assert all(loss > 0 for loss in report["losses"]) and not capsys.readouterr().out.startswith("Note")
    before, after = (load(str(path)) for path in (tmp_path / "folder", tmp_path / "out" / "model"))
    after.check_accuracy()
    state = torch.load(tmp_path / "out" / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(value, state[name]) for name, value in after.model.state_dict().items())
    picture = Image.open(folder / "tree" / "0.png")
    assert torch.equal(before.preprocess(picture), after.preprocess(picture))
    assert before.tokenize(["a tree"])["input_ids"].tolist() == after.tokenize(["a tree"])["input_ids"].tolist()
    assert after.tokenize(["a tree"])["input_ids"].tolist() == [[1, 3, 7, 7, 7, 7]]
    evaluated = f"--data {folder} --model {tmp_path / 'out' / 'model'} --keep-rate 0.5 --batch 7 --device cpu".split()
    zeroshot.main(zeroshot.parse([*evaluated, "--output", str(tmp_path / "zeroshot")]))
