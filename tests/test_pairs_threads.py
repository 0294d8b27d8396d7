"""`score_pairs` on a model that other threads train: their dropout stays on, that of the scores is off."""

from __future__ import annotations

import threading

import torch
from hosts import build
from torch import nn

import patchselect


def clip_with_dropout() -> nn.Module:
    model = build("clip").model
    for block in model.vision_model.encoder.layers:
        block.self_attn.dropout = 0.5
    return model


def test_four_threads_on_a_model_in_training_mode():
    model = clip_with_dropout()
    handle = patchselect.apply(model, 0.5)
    images, texts = torch.randn(3, 3, 64, 64), torch.randn(4, 24)
    expected = patchselect.score_pairs(model.eval(), images, texts, progress=False)
    model.train()
    scores, seen, begin = [], [], threading.Barrier(4)

    def score() -> None:
        begin.wait()
        for _ in range(4):
            scores.append(patchselect.score_pairs(model, images, texts, progress=False))

    def train() -> None:
        begin.wait()
        for _ in range(12):
            with torch.no_grad(), patchselect.guide(model, texts[:3]):
                once, again = (model.get_image_features(pixel_values=images) for _ in range(2))
            once, again = (getattr(found, "pooler_output", found) for found in (once, again))
            seen.append((all(part.training for part in model.modules()), torch.equal(once, again)))

    threads = [threading.Thread(target=run) for run in (score, score, train, train)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(scores) == 8 and all(torch.allclose(found, expected, atol=1e-5) for found in scores)
    assert len(seen) == 24 and all(training and not equal for training, equal in seen)
    assert handle.wiring.patched and model.training
