"""Calls and releases for which a prompt cannot be shortened are refused in words."""

from __future__ import annotations

import sys

import pytest
import torch
from hosts import build
from hosts.of_prompts import IMAGE, prompts
from prompts_by_hand import both, copy_of, inputs_of, patched
from since import needs

import patchselect

needs("short prompts", module=True)


@both
@torch.no_grad()
def test_a_wrong_split_between_rows_is_refused_by_its_row(name):
    case, _, _ = patched(name, guidance="image")
    inputs = inputs_of(case, (1, 1), (7, 7))
    ids = inputs["input_ids"]
    moved = ids.clone()  # as many placeholders as before, one of them in the other row
    moved[0, (ids[0] == IMAGE).nonzero()[-1]] = 5
    moved[1, (ids[1] != IMAGE).nonzero()[-1]] = IMAGE
    twin = copy_of(case)
    assert twin(**{**inputs, "input_ids": moved}).logits is not None, "transformers compares the sums"
    for method in (case.model, case.model.generate):
        with pytest.raises(ValueError, match="row 0 of the prompts has 15 image placeholders"):
            method(**{**inputs, "input_ids": moved})
    fewer = ids.clone()
    fewer[1][fewer[1] == IMAGE] = 5
    with pytest.raises(ValueError, match="2 images came, and the 2 rows of the prompts have placeholders for 1"):
        case.model(**{**inputs, "input_ids": fewer})
    with pytest.raises(ValueError, match="row 1 of the prompts has 16 image placeholders.*no image is left"):
        case.model(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})
    encoded = case.model.get_image_features(pixel_values=inputs["pixel_values"])
    rest = {k: v for k, v in inputs.items() if k != "pixel_values"}
    with pytest.raises(ValueError, match="come encoded in mm_encoder_outputs: give their pixels"):
        case.model(**rest, mm_encoder_outputs={"image": encoded})
    with pytest.raises(ValueError, match="pixel_values or mm_encoder_outputs, not both"):
        case.model(**inputs, mm_encoder_outputs={"image": encoded})


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_other_releases_are_refused_by_name(name, monkeypatch):
    import patchselect.adapters.readers as readers

    case = build(name)
    transformers = sys.modules["transformers"]
    monkeypatch.setattr(readers, "takes_encoded", lambda core: False)
    for release in ("4.53.3", "5.10.0"):
        monkeypatch.setattr(transformers, "__version__", release)
        message = rf"of transformers {release} does not take encoded images.*use transformers 4\.57, or 5\.23 and newer"
        with pytest.raises(TypeError, match=message):
            patchselect.apply(case.model, 0.5)
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    assert patchselect.apply(case.model, 0.5, guidance="image")


@torch.no_grad()
def test_what_cannot_be_cut_is_refused():
    case, _, _ = patched("llava", guidance="image")
    inputs = inputs_of(case, (1, 1), (7, 7))
    length = inputs["input_ids"].shape[1]
    for message, more in (
        ("logits_to_keep as a tensor", dict(logits_to_keep=torch.tensor([1, 2]))),
        ("weights is as long as the prompt", dict(weights=torch.ones(2, length))),
        (r"attention_mask must be \(rows, columns\)", dict(attention_mask=torch.ones(2, 1, length, length))),
        ("image_sizes is for towers", dict(image_sizes=torch.tensor([[64, 64]] * 2))),
        ("would get tokens that nobody has selected", dict(vision_feature_layer=1)),
        ("pixel_values must be", dict(pixel_values=inputs["pixel_values"][None])),
    ):
        with pytest.raises(ValueError, match=message):
            case.model(**{**inputs, **more})
    first = case.model(**inputs, use_cache=True)
    with pytest.raises(ValueError, match="this call brings images: a prompt with images starts a new cache"):
        case.model(**inputs, past_key_values=first.past_key_values)
    with pytest.raises(
        ValueError, match=r"select in block 5, and the language model reads the vision tower after block 4"
    ):
        patchselect.apply(case.model, 0.5, layers=[1, 5], guidance="image")
    short = prompts((1, 1), (7, 7), 17)
    with pytest.raises(ValueError, match="row 0 of the prompts has 17 image placeholders"):
        case.model(**short)
    assert case.model(**short, vision_feature_select_strategy="full").logits is not None
