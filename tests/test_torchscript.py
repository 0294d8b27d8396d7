"""`torch.jit.script` is refused; `torch.jit.trace` takes the text as an input and not from outside."""

from __future__ import annotations

import copy

import pytest
import torch
from hosts import build, ids, texts
from since import missing, needs
from torch import nn

import patchselect
from patchselect import compat

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
NAMES = ["clip", "timm_class_token", "openai_clip", "albef"]


class Guided(nn.Module):
    def __init__(self, case, pairing="paired"):
        super().__init__()
        self.model, self.image_side, self.pairing = case.model, case.image_side, pairing

    def forward(self, images, text):
        with patchselect.guide(self.model, text, pairing=self.pairing):
            return self.image_side(self.model, images)


@pytest.mark.parametrize("guidance", ["text", "image"])
@pytest.mark.parametrize("name", NAMES)
def test_scripting_is_refused(name, guidance):
    case = build(name)
    patchselect.apply(case.model, 0.5, guidance=guidance)
    for module in (case.model, nn.Sequential(case.model), copy.deepcopy(case.tower(case.model))):
        with pytest.raises(TypeError, match=r"torch\.jit\.script compiles the source of .*patchselect.remove first"):
            torch.jit.script(module)
    block = patchselect.handle_of(case.model).wiring.patched[0]
    with pytest.raises(TypeError, match="knows nothing of a selection"):
        torch.jit.script(block)


def test_scripting_is_as_before_without_a_selection():
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor):
            return self.layer(x)

    from patchselect.wiring.swapping import swap

    plain, swapped = Tower(), Tower()
    swap(swapped, {})
    assert torch.jit.script(plain).code == torch.jit.script(swapped).code


@pytest.mark.parametrize("pairing", ["paired", "shared"])
@pytest.mark.parametrize("name", NAMES)
def test_a_traced_text_is_an_input(name, pairing):
    needs("tracing")
    case = build(name)
    patchselect.apply(case.model, 0.5)
    program, images = Guided(case, pairing), case.images(2)
    with torch.no_grad():
        traced = torch.jit.trace(program, (images, texts(case, 2)), check_trace=False)
        for seed in (4, 5):
            text = texts(case, 2, seed=seed)
            torch.testing.assert_close(traced(images, text), program(images, text), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(traced(images, texts(case, 2, seed=4)), traced(images, texts(case, 2, seed=5)))


@pytest.mark.parametrize("change", [lambda text: text, lambda text: nn.functional.normalize(text, dim=-1)])
@pytest.mark.parametrize("name", NAMES)
def test_a_text_from_outside_of_a_trace_is_refused(name, change):
    needs("tracing")
    case = build(name)
    case.model.requires_grad_(False)
    patchselect.apply(case.model, 0.5)
    text = texts(case, 2)

    def inside(images):
        with patchselect.guide(case.model, change(text)):
            return case.image_side(case.model, images)

    with torch.no_grad(), pytest.raises(ValueError, match="would keep this one text for ever"):
        torch.jit.trace(inside, (case.images(2),), check_trace=False)
    with torch.no_grad(), patchselect.guide(case.model, text):
        with pytest.raises(ValueError, match="trace a function of images and text features"):
            torch.jit.trace(lambda x: case.image_side(case.model, x), (case.images(2),), check_trace=False)
        case.image_side(case.model, case.images(2))


def test_a_whole_model_is_traced_with_its_own_text():
    needs("tracing")
    case = build("openai_clip")
    patchselect.apply(case.model, 0.5, pairing="paired")
    with torch.no_grad():
        traced = torch.jit.trace(case.model, (case.images(2), ids(2)), check_trace=False)
        for seed in (1, 2):
            found, expected = traced(case.images(2), ids(2, seed)), case.model(case.images(2), ids(2, seed))
            torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)


def test_guidance_by_the_image_needs_no_text_in_a_trace():
    needs("tracing")
    case = build("timm_class_token" if missing("timm") is None else "albef_tower")
    patchselect.apply(case.model, 0.5, guidance="image")
    with torch.no_grad():
        traced = torch.jit.trace(case.model, (case.images(2),), check_trace=False)
        images = torch.randn_like(case.images(2))
        torch.testing.assert_close(traced(images), case.model(images), rtol=1e-4, atol=1e-5)


def test_a_release_that_traces_wrongly_is_refused(monkeypatch):
    case = build("openai_clip")
    case.model.requires_grad_(False)
    patchselect.apply(case.model, 0.5, guidance="image")
    monkeypatch.setattr(compat, "TRACES", False)
    case.model.visual(case.images(2))
    with pytest.raises(ValueError, match=r"needs torch 1\.13 or newer"):
        torch.jit.trace(case.model.visual, (case.images(2),), check_trace=False)
