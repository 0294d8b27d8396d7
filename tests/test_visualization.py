"""Pictures of the selection: what they show is what was recorded, on any grid."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hosts import HOSTS, build, texts
from since import needs

import patchselect

needs("matplotlib", "pillow", module=True)
from patchselect import visualization


def traced(name: str, count: int = 2, rate: float = 0.5, fusion: str = "mean"):
    case = build(name)
    handle = patchselect.apply(case.model, rate, [1, 3], fusion=fusion)
    text = texts(case, count)
    with torch.no_grad(), handle.record() as trace, patchselect.guide(case.model, text, "all"):
        case.image_side(case.model, case.images(1))
    return case, trace


@pytest.mark.parametrize(
    ("name", "fusion"), [*((name, "mean") for name in HOSTS), ("clip", "none"), ("siglip", "none")]
)
def test_one_row_per_text_and_one_column_per_layer_on_every_grid(name, fusion, tmp_path):
    case, trace = traced(name, fusion=fusion)
    height, width = case.grid
    photo = torch.rand(3, height * 16, width * 16)
    path = tmp_path / "kept.png"
    figure = visualization.draw_selection(
        photo, trace, ["a cat", "a very long text that needs several lines"], path=path
    )
    assert path.read_bytes()[:4] == b"\x89PNG"
    axes = figure.get_axes()
    assert len(axes) == 2 * 4
    assert [axis.get_title() for axis in axes[:4]] == [
        "image", "relevance, block 1", "left after block 1", "left after block 3",
    ]  # fmt: skip
    for row in range(2):
        for axis, entry in zip(axes[4 * row + 2 : 4 * row + 4], trace):
            kept = visualization.kept_map(entry, row)
            assert kept.shape == case.grid
            shown = torch.as_tensor(axis.images[0].get_array()).permute(2, 0, 1)
            same = (shown == photo).all(dim=0).unflatten(0, (height, 16)).unflatten(2, (width, 16))
            assert torch.equal(same.all(dim=3).all(dim=1), kept)
            note = axis.texts[0].get_text()
            assert note.startswith(f"{int(kept.sum())} of {height * width} patches")
            assert ("fused" in note) == (fusion != "none")


def test_the_fused_share_is_the_relevance_of_what_was_fused():
    _, trace = traced("clip", rate=0.4)
    for row in range(2):
        first = trace[0].relevance[row]
        gone = [place for place in range(16) if place not in trace[0].kept[row].tolist()]
        shares = visualization.fused_shares(trace, row)
        assert shares[0] == pytest.approx(float(first[gone].sum()), abs=1e-5)
        before = [*trace[0].kept[row].tolist(), -1]
        gone = [i for i, place in enumerate(before) if place not in trace[1].kept[row].tolist()]
        assert shares[1] == pytest.approx(float(trace[1].relevance[row][gone].sum()), abs=1e-5)
        assert torch.equal(visualization.relevance_map(trace[0], row).flatten(), first)


@pytest.mark.parametrize("layers", [[1], [0, 2, 4], [0, 1, 2, 3, 5]])
def test_the_share_is_that_of_the_least_relevant_after_any_number_of_layers(layers):
    """Several fused tokens may be among the patches of a later layer, and all carry the place -1."""
    case = build("clip")
    handle = patchselect.apply(case.model, 0.6, layers)
    with torch.no_grad(), handle.record() as trace, patchselect.guide(case.model, torch.randn(3, 24)):
        case.image_side(case.model, case.images(3))
    for row in range(3):
        for entry, share in zip(trace, visualization.fused_shares(trace, row)):
            least = entry.relevance[row].sort().values[: entry.relevance.shape[1] - entry.kept.shape[1]]
            assert share == pytest.approx(float(least.sum()), abs=1e-5)


def test_pixels_of_any_range_are_drawn_and_colours_come_back():
    _, trace = traced("clip", count=1)
    for photo in (torch.randn(1, 3, 64, 64), torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)):
        figure = visualization.draw_selection(photo, trace)
        shown = figure.get_axes()[0].images[0].get_array()
        assert shown.min() >= 0 and shown.max() <= 1
    photo = torch.rand(3, 8, 8)
    mean = torch.tensor([0.4815, 0.4578, 0.4082]).view(3, 1, 1)
    deviation = torch.tensor([0.2686, 0.2613, 0.2758]).view(3, 1, 1)
    torch.testing.assert_close(visualization.denormalise((photo - mean) / deviation), photo)
    with pytest.raises(ValueError, match="statistics must be one of"):
        visualization.denormalise(photo, "coco")


def test_photos_of_other_libraries_and_one_entry_are_drawn():
    import numpy
    from PIL import Image as image

    _, trace = traced("clip", count=1)
    photo = torch.randint(0, 256, (3, 64, 48), dtype=torch.uint8)
    last = photo.permute(1, 2, 0).numpy()
    for source in (image.fromarray(last), last, last[None], photo.numpy(), last / numpy.float64(255)):
        shown = visualization.draw_selection(source, trace).get_axes()[0].images[0].get_array()
        torch.testing.assert_close(torch.as_tensor(shown).float(), photo.permute(1, 2, 0) / 255)
    titles = [axis.get_title() for axis in visualization.draw_selection(photo, trace[0]).get_axes()]
    assert titles == ["image", "relevance, block 1", "left after block 1"]
    with pytest.raises(ValueError, match=r"pass trace\[0\]"):
        visualization.draw_selection(photo, trace[1])
    with pytest.raises(TypeError, match="a NumPy array or a PIL image, got str"):
        visualization.draw_selection("photo.jpg", trace)


def test_class_scores_of_the_tokens_that_are_left_make_a_dense_map():
    """The worked example of the page on seeing."""
    case = build("clip")
    model, pixels, classes = case.model, case.images(2), torch.randn(5, case.text_width)
    handle = patchselect.apply(model, 0.5, [1, 3])
    with torch.no_grad(), handle.record() as trace, patchselect.guide(model, classes, pairing="shared"):
        tokens = model.vision_model(pixels).last_hidden_state
        patches = model.visual_projection(model.vision_model.post_layernorm(tokens))
    grid = patchselect.restore(patches, trace, fill="fused")
    logits = torch.nn.functional.normalize(grid, dim=-1) @ torch.nn.functional.normalize(classes, dim=-1).T
    assert logits.shape == (2, 4, 4, 5)
    for row in range(2):
        for token, places in enumerate(places_of_tokens(trace, row)):
            for place in places:
                assert torch.equal(grid[row].flatten(0, 1)[place], patches[row, 1 + token])


def places_of_tokens(trace, row: int) -> list[set[int]]:
    """For each token after the prefix, the places of the grid that it holds, layer by layer from the relevance."""
    tokens = [{place} for place in range(trace[0].relevance.shape[1])]
    for entry in trace:
        stays = set(entry.relevance[row].topk(entry.kept.shape[1]).indices.tolist())
        goes = [places for index, places in enumerate(tokens) if index not in stays]
        tokens = [places for index, places in enumerate(tokens) if index in stays]
        tokens += [set().union(*goes)] if entry.fused else []
    return tokens


@pytest.mark.parametrize("pairing", ["paired", "all"])
@pytest.mark.parametrize("layers", [[1, 3], [0, 1, 2, 3, 4]])
def test_every_removed_place_gets_the_token_that_it_went_into(layers, pairing):
    """Fused tokens are chosen again by later layers, or fused again."""
    case = build("clip_vision")
    handle = patchselect.apply(case.model, 0.6, layers, relevance="keys")
    fused_again, fused_twice = 0, 0
    for seed in range(6):
        text = torch.randn(4, case.text_width, generator=torch.Generator().manual_seed(seed))
        images = case.images(4 if pairing == "paired" else 2)
        with torch.no_grad(), handle.record() as trace, patchselect.guide(case.model, text, pairing):
            tokens = case.model(images).last_hidden_state
        grid = patchselect.restore(tokens, trace, fill="fused").flatten(1, 2)
        plain = patchselect.restore(tokens, trace, fill=float("nan")).flatten(1, 2)
        for row in range(len(tokens)):
            held = places_of_tokens(trace, row)
            assert set().union(*held) == set(range(16))
            for token, places in enumerate(held):
                for place in places:
                    assert torch.equal(grid[row, place], tokens[row, 1 + token])
                    alone = int(trace[-1].kept[row, token]) == place if token < len(held) - 1 else False
                    assert alone != bool(plain[row, place].isnan().all())
            fused = trace[-1].kept[row] < 0
            fused_again, fused_twice = fused_again + int(fused.any()), fused_twice + int(fused.sum() > 1)
    assert fused_again and (fused_twice or len(layers) == 2)


def test_a_place_that_nothing_holds_any_more_has_no_fused_token():
    case = build("clip_vision")
    handle = patchselect.apply(case.model, 0.5, [1, 3], guidance="image", fusion="none")
    with torch.no_grad(), handle.record() as trace:
        tokens = case.model(case.images(2)).last_hidden_state
    assert trace[-1].holders.min() == -1
    with pytest.raises(ValueError, match='"fused" where a fused token exists'):
        patchselect.restore(tokens, trace, fill="fused")


def test_what_does_not_fit_is_refused():
    _, trace = traced("clip")
    photo = torch.rand(3, 64, 64)
    for wrong, message in (
        (lambda: visualization.draw_selection(photo, []), "trace is empty"),
        (lambda: visualization.draw_selection(photo, [*trace, *trace]), "several calls"),
        (lambda: visualization.draw_selection(torch.rand(3, 3, 8, 8), trace), "divisor of the 2 rows"),
        (lambda: visualization.draw_selection(photo, trace, ["a", "b", "c"]), "as many texts"),
        (lambda: visualization.relevance_map(trace[1]), "only the first selection layer"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_the_command_line_writes_a_picture(tmp_path, monkeypatch):
    needs("open_clip")
    import open_clip
    from PIL import Image as image

    from patchselect.visualization import __main__ as visualize

    case = build("open_clip")
    image.new("RGB", (90, 60), "orange").save(tmp_path / "photo.jpg")
    made = (case.model, None, lambda photo: torch.rand(3, 64, 64))
    monkeypatch.setattr(open_clip, "create_model_and_transforms", lambda name, pretrained: made)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: lambda texts: torch.ones(len(texts), 7).long())
    arguments = [str(tmp_path / "photo.jpg"), "a cat", "a dog", "--model", "open_clip:tiny", "--keep-rate", "0.4"]
    written = visualize.main(arguments)
    assert written == tmp_path / "photo-kept.png" and written.stat().st_size > 10_000
    assert visualize.main([*arguments, "--output", str(tmp_path / "out.png"), "--layers", "0", "2"]).exists()


def stored(name: str, folder) -> str:
    """A tiny model of transformers in a folder of its own, with a processor whose tokenizer knows no length."""
    needs("image processors", "processors of any tokenizer", "SigLIP 2" if name == "siglip2" else "transformers")
    import tokenizers
    import transformers

    vocabulary = {"<pad>": 1, "<eos>": 98, "<unk>": 0, "a": 2, "cat": 3, "and": 4, "dog": 5}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    ended = tokenizers.processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 98)])
    words.post_processor = ended  # CLIP reads its text there
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    if name == "clip":
        images = transformers.CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
        processor = transformers.CLIPProcessor(images, tokenizer)
    else:
        images = transformers.Siglip2ImageProcessor(max_num_patches=16, patch_size=16)
        processor = transformers.Siglip2Processor(images, tokenizer)
    for part in (build(name).model, processor):
        part.save_pretrained(folder / name)
    return str(folder / name)


@pytest.mark.parametrize("name", ["clip", "siglip2"])
def test_the_command_line_draws_models_of_transformers(name, tmp_path, monkeypatch):
    from PIL import Image as image

    from patchselect.visualization import __main__ as visualize

    photo = tmp_path / "photo.png"
    image.new("RGB", (90, 60), "orange").save(photo)
    drawn = {}
    draw = visualize.draw_selection
    monkeypatch.setattr(
        visualize, "draw_selection", lambda *given, **more: drawn.update(given=given) or draw(*given, **more)
    )
    written = visualize.main([str(photo), "a cat", "a cat and a dog", "--model", stored(name, tmp_path)])
    assert written.stat().st_size > 10_000
    seen, trace, texts = drawn["given"]
    assert seen.shape == (1, 3, 64, 64) if name == "clip" else (1, 3, 60, 90), "what the model gets to see"
    assert trace[0].grid == (4, 4) if name == "clip" else (3, 4)
    assert texts == ["a cat", "a cat and a dog"] and not torch.equal(*trace[0].relevance)


def test_the_command_line_refuses_a_model_without_text_features(tmp_path):
    needs("ViLT")
    import transformers
    from PIL import Image as image

    from patchselect.visualization import __main__ as visualize

    image.new("RGB", (90, 60), "orange").save(tmp_path / "photo.png")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=9)
    transformers.ViltModel(transformers.ViltConfig(**sizes)).save_pretrained(tmp_path / "vilt")
    with pytest.raises(SystemExit, match="ViltModel, which has no text features of its own"):
        visualize.main([str(tmp_path / "photo.png"), "a cat", "--model", str(tmp_path / "vilt")])


def test_importing_the_package_imports_nothing_to_draw_with():
    program = """
import sys, torch
before = set(sys.modules)
import patchselect, patchselect.visualization
assert not (set(sys.modules) - before) & {"matplotlib", "tqdm", "transformers", "open_clip", "timm", "PIL"}
"""
    subprocess.run([sys.executable, "-c", program], check=True)
