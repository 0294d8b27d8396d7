"""What people put around a language model with a shortened prompt: attention kernels, compiled towers, LoRA."""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from hosts import texts
from hosts.of_prompts import packed_prompts
from packed_by_hand import GRIDS, WORDS
from packed_by_hand import patched as patched_packed
from prompts_by_hand import guided, inputs_of, patched
from since import needs, slow

import patchselect

needs("short prompts", module=True)


@slow
@torch.no_grad()
def test_a_compiled_tower_is_refused_in_words():
    case, _, _ = patched("llava")
    case.model.model.vision_tower.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled: compile the language model alone"):
        guided(case, texts(case, 3), **inputs_of(case))


@pytest.mark.parametrize("name", ["llava", "paligemma", "internvl", "qwen2_vl", "qwen3_vl"])
@torch.no_grad()
def test_kernels_of_attention_agree(name):
    packed = name.startswith("qwen")
    case, _, _ = (patched_packed if packed else patched)(name)
    text, inputs = texts(case, 3), packed_prompts(GRIDS, WORDS) if packed else inputs_of(case)
    found = {}
    for kind in ("eager", "sdpa"):
        case.model.set_attn_implementation(kind)
        assert case.model.config.vision_config._attn_implementation == kind
        with patchselect.guide(case.model, text):
            short = patchselect.shorten(case.model, **inputs)
        found[kind] = case.model(**short).logits[short["attention_mask"].bool()]
    torch.testing.assert_close(found["eager"], found["sdpa"], rtol=1e-4, atol=1e-4)


@slow
@torch.no_grad()
def test_flexible_attention_of_the_language_model_agrees():
    case, _, _ = patched("llava")
    text, inputs = texts(case, 3), inputs_of(case)
    with patchselect.guide(case.model, text):
        short = patchselect.shorten(case.model, **inputs)
    seen = short["attention_mask"].bool()
    expected = case.model(**short).logits[seen]
    case.model.set_attn_implementation({"text_config": "flex_attention"})
    assert case.model.config.text_config._attn_implementation == "flex_attention"
    torch.testing.assert_close(case.model(**short).logits[seen], expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_flash_attention_is_refused_by_the_host_where_it_is_not_installed():
    case, _, _ = patched("llava")
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash_attn is installed")
    with pytest.raises(ImportError, match=r"(?i)flash.?attn|flash.?attention|kernels"):
        case.model.set_attn_implementation("flash_attention_2")
    assert guided(case, texts(case, 3), **inputs_of(case)).logits is not None, "the model is as it was"


def test_lora_on_the_language_model():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    case, _, handle = patched("llava")
    text, inputs = texts(case, 3), inputs_of(case, (1, 1, 1), (5, 9, 12))
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    plain = guided(case, text, **inputs)
    length = inputs["input_ids"].shape[1] - plain.logits.shape[1]
    settings = peft.LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    model = peft.get_peft_model(case.model, settings)
    case.model = model
    found = guided(case, text, **inputs)
    torch.testing.assert_close(found.loss, plain.loss)
    found.loss.backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained and all("lora_" in name and "language_model" in name for name in trained)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
        changed = guided(case, text, **inputs).logits
        assert not torch.allclose(changed, plain.logits, atol=1e-2)
        case.model = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(guided(case, text, **inputs).logits, changed, rtol=1e-3, atol=1e-4)
    handle.remove()
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] == changed.shape[1] + length
