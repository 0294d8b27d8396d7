"""From names, folders and files to models: the right weights, activation and words, or plain ones of what lacks."""

import pytest
import torch
from conftest import TINY
from since import BENCHMARKS, needs, since

needs(*BENCHMARKS, module=True)
import open_clip
import transformers

from benchmarks.common.photographs import SOURCES, load_photos
from benchmarks.models.from_open_clip import name_of_shapes
from benchmarks.models.from_transformers import preprocessing
from benchmarks.models.loading import load
from benchmarks.speed.run import inputs_of


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
        vision_config={**small, **dict(image_size=32, patch_size=8)}, text_config=small, projection_dim=16
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
    config = {**open_clip.get_model_config(name), **changed}
    with torch.device("meta"):
        state = open_clip.CLIP(**config).state_dict()
    torch.save(state, folder / f"{name}.pt")
    return folder / f"{name}.pt"


def test_a_file_is_recognised_by_all_of_its_shapes(tmp_path):
    # Size of the images, and not CoCa, whose towers look the same.
    assert name_of_shapes(saved_shapes("ViT-B-32-256", tmp_path)) == "ViT-B-32-256"
    assert name_of_shapes(saved_shapes("ViT-S-32-alt", tmp_path)) == "ViT-S-32-alt"
    with pytest.raises(ValueError, match="no CLIP of open_clip has the shapes .* say which it is, --model NAME"):
        vision = {**open_clip.get_model_config("ViT-B-32")["vision_cfg"], "image_size": 320}
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


@since("folders of open_clip")
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
    configs = {name: {**TINY, "quick_gelu": "quick" in name} for name in ("small", "small-quickgelu")}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", configs)
    torch.save(open_clip.create_model("small").state_dict(), tmp_path / "weights.pt")
    plain, quick = (load(name, pretrained=str(tmp_path / "weights.pt")) for name in configs)
    assert "give --model small-quickgelu" in plain.notes[0] and not quick.notes
    assert (activation(plain), activation(quick)) == ("GELU", "QuickGELU")


@since("folders of open_clip")
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
        vision_config={**SMALL, **dict(image_size=32, patch_size=8)}, text_config=SMALL, projection_dim=16
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
        vision_config={**SMALL, **dict(image_size=32, patch_size=8)}, text_config={**SMALL, **dict(vocab_size=100)}
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
