"""A relevance, a reduction and a host from a file of the user's own are compiled and exported like built-in ones."""

from __future__ import annotations

import warnings

import pytest
import torch
from hosts import texts
from hosts.calls import Guided
from outside import patched
from since import since


@since("fullgraph")
@pytest.mark.parametrize("kind", ["both"])
@pytest.mark.parametrize("name", ["plain_vit", "open_clip"])
def test_compile_without_graph_breaks_or_recompiles(name, kind):
    from torch._dynamo.utils import counters

    case, _ = patched(name, kind)
    case.model.requires_grad_(False)
    torch._dynamo.reset()
    counters.clear()
    program = Guided(case)
    compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        text = texts(case, 3, seed=seed)
        torch.testing.assert_close(compiled(case.images(3), text), program(case.images(3), text))
    assert counters["stats"]["unique_graphs"] == 1


@since("export")
@pytest.mark.parametrize("kind", ["both"])
@pytest.mark.parametrize("name", ["plain_vit", "open_clip"])
def test_export_with_a_dynamic_batch(name, kind):
    case, _ = patched(name, kind)
    case.model.requires_grad_(False)
    program, batch = Guided(case), torch.export.Dim("batch", min=2, max=64)
    example = case.images(3), texts(case, 3)
    exported = torch.export.export(program, example, dynamic_shapes=({0: batch}, {0: batch}))
    other = torch.randn(7, 3, 64, 64), texts(case, 7)
    torch.testing.assert_close(exported.module()(*other), program(*other))


@since("ONNX")
@pytest.mark.parametrize("kind", ["both"])
def test_onnx(tmp_path, kind):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    case, _ = patched("plain_vit", kind)
    case.model.requires_grad_(False)
    program, batch = Guided(case), torch.export.Dim("batch", min=2, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            program, (case.images(3), texts(case, 3)), str(tmp_path / "it.onnx"), dynamo=True, verbose=False,
            input_names=["images", "text"], dynamic_shapes=({0: batch}, {0: batch}),
        )  # fmt: skip
    other = torch.randn(5, 3, 64, 64), texts(case, 5)
    session = runtime.InferenceSession(str(tmp_path / "it.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": other[0].numpy(), "text": other[1].numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), program(*other), rtol=1e-3, atol=1e-4)
