"""Tiny models: one thread is faster than several, and tests that run side by side do not fight for the cores."""

import inspect
import json

import pytest
import torch
from since import needs

torch.set_num_threads(1)
pytest.register_assert_rewrite("prompts_by_hand", "refusals", "tooling")  # as in tests: what failed is shown

TINY = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 64, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
"""A small architecture of open_clip."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The name of a small open_clip architecture."""
    needs("open_clip")
    import open_clip

    path = tmp_path_factory.mktemp("configs") / "patchselect-tiny.json"
    path.write_text(json.dumps(TINY))
    open_clip.add_model_config(path)
    return path.stem


@pytest.fixture(scope="module")
def one_thread():
    """Small tensors: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scenes():
    """Scenes of the accuracy benchmark."""
    from benchmarks.accuracy.world.scenes import make_scenes

    return make_scenes(24, seed=3)


@pytest.fixture
def flops():
    """FLOPs can be counted; a test that counts them is skipped under an older torch."""
    from benchmarks.common.cost import FlopCounterMode

    if FlopCounterMode is None:
        pytest.skip(f"counting FLOPs takes torch 2.3 or newer, this is {torch.__version__}")


@pytest.fixture
def any_size():
    """The mini-ALBEF can be built; a test of it is skipped under an older timm."""
    timm = pytest.importorskip("timm")
    if "dynamic_img_size" not in inspect.signature(timm.models.vision_transformer.VisionTransformer).parameters:
        pytest.skip(f"the mini-ALBEF takes a timm whose ViT has dynamic_img_size, this is {timm.__version__}")
