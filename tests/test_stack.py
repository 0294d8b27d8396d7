"""torch.compile, torch.export and ONNX: a guided call is one graph, which takes texts as inputs."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from hosts import build, ids
from hosts.calls import Guided, ready
from since import missing, since, slow

import patchselect

if missing("compile") is None:
    from torch._dynamo.utils import counters

COMPILED = ["clip", "siglip", "open_clip", "timm_registers", "open_clip_siglip"]


@since("fullgraph")
@pytest.mark.parametrize(
    ("name", "relevance"),
    [("clip", "keys")]
    + [(name, "values") for name in COMPILED]
    + [pytest.param(name, "keys", marks=slow) for name in COMPILED[1:]],
)
def test_compile_without_graph_breaks_or_recompiles(name, relevance):
    case = ready(name, relevance=relevance)
    torch._dynamo.reset()
    counters.clear()
    program = Guided(case)
    inside = torch.compile(program, fullgraph=True, backend="aot_eager")
    outside = torch.compile(lambda images: case.image_side(case.model, images), fullgraph=True, backend="aot_eager")
    images = case.images(3)
    graphs = []
    for seed in range(3):
        text = torch.randn(3, case.text_width, generator=torch.Generator().manual_seed(seed))
        expected = program(images, text)
        torch.testing.assert_close(inside(images, text), expected)
        with patchselect.guide(case.model, text):
            torch.testing.assert_close(outside(images), expected)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [2, 2, 2], "a new text must not compile anything anew"


@since("fullgraph")
@pytest.mark.parametrize("name", ["clip", "open_clip"])
def test_compiled_paired_calls_take_their_text_from_the_call(name):
    case = ready(name, pairing="paired")
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(lambda images, tokens: case.pair(case.model, images, tokens), fullgraph=True,
                             backend="aot_eager")  # fmt: skip
    for seed in range(3):
        tokens = ids(3, seed)
        torch.testing.assert_close(compiled(case.images(3), tokens), case.pair(case.model, case.images(3), tokens))
    assert counters["stats"]["unique_graphs"] == 1


@since("compiled selection")
@pytest.mark.parametrize("relevance", ["keys", "values"])
@pytest.mark.parametrize("name", ["clip", pytest.param("openai_clip", marks=slow)])
def test_plain_compile_takes_new_texts(name, relevance):
    """With graph breaks: on releases that trace no guided call whole, and on the newest."""
    case = ready(name, relevance=relevance)
    torch._dynamo.reset()
    compiled = torch.compile(lambda images: case.image_side(case.model, images), backend="aot_eager")
    images = case.images(3)
    for grad, seed in itertools.product((True, False), range(3)):
        text = torch.randn(3, case.text_width, generator=torch.Generator().manual_seed(seed))
        with torch.set_grad_enabled(grad), patchselect.guide(case.model, text):
            torch.testing.assert_close(compiled(images), case.image_side(case.model, images))


@since("compiled selection")
@pytest.mark.parametrize("name", ["clip_vision", "albef_tower"])
def test_applying_and_removing_reaches_a_model_that_was_compiled_from_it(name):
    case = build(name)
    torch._dynamo.reset()
    compiled = torch.compile(case.model, backend="aot_eager")
    images = case.images(2)
    with torch.no_grad():
        plain = case.image_side(compiled, images)
        handle = patchselect.apply(case.model, 0.5, guidance="image")
        selected = case.image_side(compiled, images)
        assert not torch.allclose(selected, plain)
        torch.testing.assert_close(selected, case.image_side(case.model, images))
        handle.remove()
        torch.testing.assert_close(case.image_side(compiled, images), plain)


@slow
def test_inductor_gives_the_same_numbers():
    case = ready("open_clip")
    torch._dynamo.reset()
    program, images, text = Guided(case), case.images(2), torch.randn(2, 24)
    torch.testing.assert_close(torch.compile(program)(images, text), program(images, text), rtol=1e-3, atol=1e-4)


@since("export")
@pytest.mark.parametrize("relevance", ["keys", "values"])
@pytest.mark.parametrize("name", ["clip", "open_clip", "timm_class_token"])
def test_export_with_a_dynamic_batch(name, relevance):
    case = ready(name, relevance=relevance)
    program, batch = Guided(case), torch.export.Dim("batch", min=2, max=64)
    example = case.images(3), torch.randn(3, case.text_width)
    exported = torch.export.export(program, example, dynamic_shapes=({0: batch}, {0: batch}))
    other = torch.randn(7, *example[0].shape[1:]), torch.randn(7, case.text_width)
    torch.testing.assert_close(exported.module()(*other), program(*other))


@since("ONNX", "onnxruntime", "onnxscript")
def test_onnx_with_a_dynamic_batch(tmp_path):
    import onnxruntime as runtime

    case = ready("clip")
    program, batch = Guided(case), torch.export.Dim("batch", min=2, max=64)
    example = case.images(3), torch.randn(3, 24)
    path = tmp_path / "guided.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            program, example, str(path), dynamo=True, input_names=["images", "text"], verbose=False,
            dynamic_shapes=({0: batch}, {0: batch}),
        )  # fmt: skip
    other = torch.randn(5, 3, 64, 64), torch.randn(5, 24)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": other[0].numpy(), "text": other[1].numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), program(*other), rtol=1e-3, atol=1e-4)
