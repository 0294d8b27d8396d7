"""Tiny models: one thread is faster than several, and tests that run side by side do not fight for the cores."""

import json

import pytest
import torch
from since import needs

torch.set_num_threads(1)

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
