"""Every class of transformers that takes pixels is accepted or refused by a sentence, and accepted means right.

Takes about a quarter of an hour, one test a module: `PATCHSELECT_SLOW=1 python -m pytest tests/test_sweep.py -v`.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
from pathlib import Path

import pytest
import sweeping
import torch
from hosts import HOSTS, PROMPTED, build
from since import SLOW

import patchselect

MODULES = sweeping.modules() if SLOW else ["all modules of transformers"]
CODE = {str(Path(patchselect.__file__).resolve().parent), str(Path(patchselect.adapters.__file__).resolve().parent)}
pytestmark = pytest.mark.skipif(not SLOW, reason="takes a quarter of an hour: set PATCHSELECT_SLOW=1")


def classes(model):
    return {path: type(part) for path, part in model.named_modules()}


def is_ours(error):
    """A TypeError or ValueError that patchselect itself raises, in words."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    raised = (last.line or "").lstrip().startswith("raise")
    inside = any(str(Path(last.filename).resolve()).startswith(folder) for folder in CODE)
    return isinstance(error, (TypeError, ValueError)) and inside and raised and len(str(error)) > 40


@pytest.mark.parametrize("module", MODULES)
def test_accepted_or_refused_in_words(module):
    try:
        kinds = sweeping.classes_of(module)
    except ModuleNotFoundError as error:
        pytest.skip(f"transformers.models.{module} needs {error.name}")
    unbuilt, raw, unknown, seen = [], [], [], set()
    for kind in kinds:
        try:
            model = sweeping.on_meta(kind)
        except Exception as error:
            unbuilt.append(f"{kind.__name__}: {type(error).__name__}: {' '.join(str(error).split())[:80]}")
            continue
        for path, part in sweeping.parts(model):
            if path and type(part) in seen:
                continue
            seen.add(type(part))
            before = classes(part)
            try:
                patchselect.apply(part, 0.5).remove()
            except Exception as error:
                if not is_ours(error):
                    raw.append(f"{kind.__name__}.{path} ({type(part).__name__}): {error!r}")
            else:
                name = f"{type(part).__module__[len('transformers.models.') :]}:{type(part).__name__}"
                if name not in ACCEPTED and not shown(name) and type(part).__name__ not in in_hosts():
                    unknown.append(f"{kind.__name__}.{path}: {name}")
            assert classes(part) == before, (kind.__name__, path)
    assert not raw, "\n".join(raw)
    assert not unknown, "accepted, and in no table of what is shown to be right: " + ", ".join(unknown)
    if unbuilt and len(unbuilt) == len(kinds):
        pytest.skip("none can be built from the defaults of its configuration: " + "; ".join(unbuilt))


ACCEPTED = (
    "altclip.modeling_altclip:AltCLIPVisionModel",
    "blip.modeling_blip:BlipVisionModel",
    "blip_2.modeling_blip_2:Blip2VisionModel",
    "chinese_clip.modeling_chinese_clip:ChineseCLIPVisionModel",
    "clip.modeling_clip:CLIPVisionModel",
    "clip.modeling_clip:CLIPVisionModelWithProjection",
    "clip.modeling_clip:CLIPForImageClassification",
    "git.modeling_git:GitVisionModel",
    "idefics2.modeling_idefics2:Idefics2VisionTransformer",
    "idefics3.modeling_idefics3:Idefics3VisionTransformer",
    "instructblip.modeling_instructblip:InstructBlipVisionModel",
    "instructblipvideo.modeling_instructblipvideo:InstructBlipVideoVisionModel",
    "metaclip_2.modeling_metaclip_2:MetaClip2VisionModel",
    "metaclip_2.modeling_metaclip_2:MetaClip2VisionModelWithProjection",
    "metaclip_2.modeling_metaclip_2:MetaClip2ForImageClassification",
    "siglip.modeling_siglip:SiglipVisionModel",
    "siglip.modeling_siglip:SiglipForImageClassification",
    "smolvlm.modeling_smolvlm:SmolVLMVisionTransformer",
)
"""Towers and heads without text that `apply` accepts, called with pixels alone; tests/hosts has those with text."""


WITH_WORDS = ("Llava", "VipLlava", "PaliGemma", "Idefics3", "SmolVLM", "InternVL")
"""Language models that read images: test_multimodal.py."""
ACCEPTED_ELSEWHERE = {
    *("BlipForImageTextRetrieval", "BlipForConditionalGeneration", "BlipForQuestionAnswering"),
    *("ViltModel", "ViltForImageAndTextRetrieval", "ViltForImagesAndTextClassification", "ViltForMaskedLM"),
    *("ViltForQuestionAnswering", "ViltForTokenClassification"),
    *("Aimv2Model", "BlipModel"),  # with a text: test_plain.py, test_generative.py
    *("TimmWrapperModel", "TimmWrapperForImageClassification"),  # the tower that they name: test_plain.py
    "ViTMAEModel",  # leaves out patches by chance: test_plain.py
    *("IdeficsVisionTransformer", "Kosmos2VisionTransformer"),  # CLIP's tower under another configuration
    *("DepthProPatchEncoder", "DepthProImageEncoder"),  # parts of DepthProModel, which is refused as a whole
    *(f"{name}{head}" for name in WITH_WORDS for head in ("Model", "ForConditionalGeneration")),
    *("Siglip2VisionModel", "Siglip2ForImageClassification"),  # called with patches that are cut out: SigLIP 2 in hosts
}
"""Models that are called with more than pixels, each with promises of its own: test_generative.py, tests/hosts."""


@functools.lru_cache(maxsize=None)
def in_hosts():
    """The names of all classes in the models of tests/hosts, on which every promise is tested, and of ACCEPTED."""
    models = []
    for name in (*HOSTS, *PROMPTED):
        with contextlib.suppress(pytest.skip.Exception):
            models.append(build(name).model)
    models += [sweeping.small(name)[0] for name in ACCEPTED]
    return {type(part).__name__ for model in models for part in model.modules()} | ACCEPTED_ELSEWHERE


@functools.lru_cache(maxsize=None)
def shown(name):
    """Whether a class that is accepted can be built small and called with pixels alone; if so, it has been shown right.

    Else it must be in another table of tests.
    """
    torch.manual_seed(0)
    try:
        model, size = sweeping.small(name)
        model.eval()
        with torch.no_grad():
            found = model(pixel_values=torch.randn(3, 3, size, size), return_dict=True)
        assert "mask" not in found  # ViTMAE leaves other patches out in each call
        patchselect.apply(model, 0.5).remove()
    except Exception:
        return False
    check_right(model, size)
    return True


@pytest.mark.parametrize("name", ACCEPTED if SLOW else ["all that are accepted"])
def test_accepted_means_right(name):
    torch.manual_seed(0)
    model, size = sweeping.small(name)
    check_right(model.eval(), size)


def check_right(model, size):
    """Assert that `keep_rate=1.0` and `remove` are bit-equal, rows independent, and that the text matters."""
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    images = torch.randn(3, 3, size, size)

    def run(pixels):
        found = model(pixel_values=pixels, return_dict=True)
        if getattr(found, "feature_maps", None):
            return found.feature_maps[-1]
        return found.logits if hasattr(found, "logits") else getattr(found, "image_embeds", found[0])

    with torch.no_grad():
        plain = run(images)
        before = classes(model)
        handle = patchselect.apply(model, 1.0)
        text = torch.randn(3, handle.towers[0].adapter.text_width(handle.towers[0]))
        with patchselect.guide(model, text):
            assert torch.equal(run(images), plain), "keep_rate=1.0"
        patchselect.apply(model, 0.5)
        with patchselect.guide(model, text):
            guided = run(images)
        order = torch.tensor([2, 0, 1])
        with patchselect.guide(model, text[order]):
            torch.testing.assert_close(run(images[order]), guided[order], rtol=1e-4, atol=1e-4)
        with patchselect.guide(model, text[:1]):
            torch.testing.assert_close(run(images[:1]), guided[:1], rtol=1e-4, atol=1e-4)
        with patchselect.guide(model, text[order]):
            assert not torch.allclose(run(images), guided, rtol=1e-4, atol=1e-4), "the text matters"
        patchselect.remove(model)
        assert classes(model) == before and torch.equal(run(images), plain)
