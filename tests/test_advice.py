"""What a refusal advises is what works: the path in it is the path of something supported."""

from __future__ import annotations

import re

import pytest
import torch
from doubles.text import pictures
from heads import build as head_of
from hosts import build, ids
from since import needs
from torch import nn

import patchselect


class Own(nn.Module):
    """A model of a user's own around a CLIP."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        self.clip, self.classes = clip, nn.Linear(24, 3)


def refusal(model: nn.Module) -> str:
    before = [type(part) for part in model.modules()]
    with pytest.raises(TypeError) as caught:
        patchselect.apply(model, 0.5)
    assert [type(part) for part in model.modules()] == before
    return str(caught.value)


def advised(model: nn.Module) -> nn.Module:
    """The module that the refusal says `apply` to, as Python reads it."""
    code = re.search(r"patchselect\.apply\((model(?:[^()]|\('[^']*'\))*)\)", refusal(model))
    assert code is not None, refusal(model)
    return eval(code.group(1), {"model": model})


@pytest.mark.parametrize("name", ["clip", "siglip", "open_clip", "openai_clip", "blip"])
def test_a_model_around_a_dual_encoder_is_told_its_path(name):
    case = build(name)
    model = Own(case.model)
    assert advised(model) is case.model
    handle = patchselect.apply(advised(model), 0.5, pairing="paired")
    with torch.no_grad(), handle.record() as trace:
        case.pair(model.clip, case.images(2), ids(2))
    assert len(trace) == len(handle.layers)


def test_a_module_in_a_sequence_is_written_as_python():
    """A SentenceTransformer is an `nn.Sequential` whose first module holds the CLIP."""
    case = build("clip")
    holder = nn.Module()
    holder.model = case.model
    assert "patchselect.apply(model[0].model)" in refusal(nn.Sequential(holder, nn.Identity()))
    assert advised(nn.Sequential(holder)) is case.model
    odd = nn.Module()
    odd.add_module("my-clip", case.model)
    assert advised(odd) is case.model


def test_a_tower_alone_is_named_where_there_is_no_more():
    case = build("timm_class_token")
    assert advised(Own(case.model)) is case.model
    assert "may need a fixed number of patches" in refusal(Own(case.model))
    assert "only wraps the vision tower 'clip'" in refusal(nn.ModuleDict({"clip": case.model}))


def test_a_dual_encoder_goes_before_a_tower():
    model = nn.ModuleDict({"eyes": build("clip_vision").model, "whole": build("open_clip").model})
    assert advised(model) is model["whole"]


def test_a_wrapper_of_one_tower_is_no_reader_of_its_tokens():
    needs("transformers")
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Kosmos2Config"):
        pytest.skip("there is no Kosmos-2 in this release")
    from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2VisionModel

    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4, image_size=64)
    model = Kosmos2VisionModel(
        transformers.Kosmos2Config(vision_config=dict(sizes, patch_size=16)).vision_config
    ).eval()
    assert "as a whole" not in refusal(model)
    patchselect.apply(advised(model), 0.5, guidance="image")
    with torch.no_grad():
        assert model(pixel_values=torch.randn(1, 3, 64, 64)).last_hidden_state.shape[1] < 17


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Swin", "it attends in windows|its attention has relative positions"),
        ("ResNet", "it has no sequence of transformer blocks"),
    ],
)
def test_what_no_adapter_knows_is_told_why_and_how_to_write_one(name, why):
    needs("transformers")
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, f"{name}Model"):
        pytest.skip(f"there is no {name} in this release")
    said = refusal(getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")()))
    assert re.search(f"no adapter knows .*{name}Model: (?:{why})", said), said
    assert "patchselect.Adapter" in said and "examples/plain_vit.py" in said


def test_a_call_that_brought_no_text_is_not_told_to_bring_what_it_has():
    case = build("open_clip")
    patchselect.apply(case.model, 0.5)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"bring it with the call of CLIP\.forward \(no text was found"):
            case.model(case.images(2))
        with pytest.raises(ValueError, match="call the whole model with image and text together"):
            case.model.encode_image(case.images(2))
        with pytest.raises(ValueError, match="call the whole model with image and text together"):
            case.model.visual(case.images(2))


def test_the_matching_head_of_blip_has_a_text_encoder():
    head = head_of("blip-matching")
    patchselect.apply(head.model.eval(), 0.5, [1, 3])
    tokens = head.model.tokenizer(["a cat", "two dogs on a sofa"], padding=True, return_tensors="pt")
    assert patchselect.score_pairs(head.model, pictures(2), tokens, progress=False).shape == (2, 2)
