"""A whole guided CLIP tower against an independent float64 computation, written from the equations alone.

The reference loops over images, heads and patches, has its own LayerNorm, GELU and attention, and reads nothing of the
library but the tensors of the state dict.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hosts import clip_config
from since import needs
from torch import Tensor

import patchselect

WIDTH, HEADS, DEPTH, PATCH, JOINT = 32, 4, 5, 8, 12


def norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight + bias


class Reference:
    """CLIP's ViT, one image at a time, with the selection of METHOD's five steps inside."""

    def __init__(self, model, layers, rates, guidance, relevance, fusion, pairing="paired"):
        self.w = {k: v.double() for k, v in model.state_dict().items()}
        self.layers, self.rates = layers, rates
        self.guidance, self.relevance, self.fusion, self.pairing = guidance, relevance, fusion, pairing

    def linear(self, x, name):
        return x @ self.w[f"{name}.weight"].T + self.w.get(f"{name}.bias", 0.0)

    def norm(self, x, name):
        return norm(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def __call__(self, image: Tensor, texts: Tensor) -> Tensor:
        v = "vision_model."
        size = self.w[v + "embeddings.patch_embedding.weight"]
        rows, columns = image.shape[1] // PATCH, image.shape[2] // PATCH
        tokens = [self.w[v + "embeddings.class_embedding"]]
        for r, c in itertools.product(range(rows), range(columns)):
            window = image[:, PATCH * r : PATCH * (r + 1), PATCH * c : PATCH * (c + 1)]
            tokens.append((size * window).sum(dim=(1, 2, 3)))
        x = torch.stack(tokens) + self.w[v + "embeddings.position_embedding.weight"]
        x = self.norm(x, v + "pre_layrnorm")
        for index in range(DEPTH):
            name = f"{v}encoder.layers.{index}."
            before = x
            x = x + self.attention(self.norm(x, name + "layer_norm1"), name + "self_attn.")
            if index in self.layers:
                x = self.select(x, before, index, self.rates[self.layers.index(index)], texts)
            hidden = self.linear(self.norm(x, name + "layer_norm2"), name + "mlp.fc1")
            x = x + self.linear(hidden * torch.sigmoid(1.702 * hidden), name + "mlp.fc2")
        pooled = self.norm(x[0], v + "post_layernorm")
        return self.w["visual_projection.weight"] @ pooled

    def attention(self, x, name):
        q, k, values = (self.linear(x, name + part) for part in ("q_proj", "k_proj", "v_proj"))
        out = torch.zeros_like(x)
        for head in range(HEADS):
            part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
            logits = q[:, part] @ k[:, part].T / math.sqrt(WIDTH // HEADS)
            out[:, part] = logits.softmax(-1) @ values[:, part]
        return self.linear(out, name + "out_proj")

    def select(self, x, before, index, rate, texts):
        patches = len(x) - 1
        a = self.weights(x, before, index, texts)
        keep = math.ceil(rate * patches - 1e-9)
        ranked = sorted(range(patches), key=lambda i: -float(a[i]))
        kept, rest = sorted(ranked[:keep]), ranked[keep:]
        out = [x[0]] + [x[1 + i] for i in kept]
        if rest and self.fusion != "none":
            fused = sum(a[i] * x[1 + i] for i in rest)
            out.append(fused if self.fusion == "sum" else fused / sum(a[i] for i in rest))
        return torch.stack(out)

    def weights(self, x, before, index, texts):
        name = f"vision_model.encoder.layers.{index}."
        normed = self.norm(before, name + "layer_norm1")
        attends = self.relevance in ("keys", "features")
        per_text = []
        for text in texts if self.guidance == "text" else [None]:
            if attends:
                lifted = None if text is None else self.w["visual_projection.weight"].T @ text
                query = normed[0] if lifted is None else self.norm(lifted, name + "layer_norm1")
                q = self.linear(query, name + "self_attn.q_proj")
                per_text.append(self.attend(q, normed, x, name))
            else:
                per_text.append(self.read_back(text, before, x, index))
        if attends:
            most = torch.stack(per_text).amax(0)
            return most / most.sum()
        standard = torch.stack([(s - s.mean()) / s.std(unbiased=False) for s in per_text]).amax(0)
        return ((standard - standard.mean()) / standard.std(unbiased=False)).softmax(-1)

    def attend(self, q, normed, x, name):
        if self.relevance == "features":
            return torch.stack([q @ token / math.sqrt(WIDTH) for token in x[1:]]).softmax(-1)
        keys = self.linear(normed[1:], name + "self_attn.k_proj")
        heads = []
        for head in range(HEADS):
            part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
            heads.append((keys[:, part] @ q[part] / math.sqrt(WIDTH // HEADS)).softmax(-1))
        return torch.stack(heads).mean(0)

    def read_back(self, text, before, x, index):
        if self.relevance == "joint":
            joint = self.norm(x[1:], "vision_model.post_layernorm") @ self.w["visual_projection.weight"].T
            return joint @ text / joint.norm(dim=-1) / text.norm()
        g = self.w["vision_model.post_layernorm.weight"] * (self.w["visual_projection.weight"].T @ text)
        g = g - g.mean()
        scores = torch.zeros(len(x) - 1, dtype=torch.float64)
        for later in range(index, DEPTH):
            name = f"vision_model.encoder.layers.{later}."
            w = g @ self.w[name + "self_attn.out_proj.weight"] @ self.w[name + "self_attn.v_proj.weight"]
            scores += self.norm((before if later == index else x)[1:], name + "layer_norm1") @ w
        return scores


@pytest.fixture(scope="module")
def model():
    needs("transformers")
    from transformers import CLIPModel

    torch.manual_seed(0)
    sizes = dict(hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=DEPTH, num_attention_heads=HEADS)
    text = dict(sizes, hidden_size=16, vocab_size=99, num_hidden_layers=1)
    config = clip_config(text, dict(sizes, image_size=32, patch_size=PATCH), projection_dim=JOINT)
    built = CLIPModel(config).double().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return built


SETTINGS = [
    (layers, rates, guidance, relevance, fusion)
    for (layers, rates), (guidance, relevance), fusion in itertools.product(
        [((1, 3), (0.5, 0.7)), ((0,), (0.3,)), ((4,), (0.45,)), ((0, 2, 4), (0.9, 0.6, 0.5))],
        [("text", "keys"), ("text", "values"), ("text", "features"), ("text", "joint"), ("image", "keys")],
        ["mean", "sum", "none"],
    )
]


@pytest.mark.parametrize(("layers", "rates", "guidance", "relevance", "fusion"), SETTINGS)
def test_whole_tower(model, layers, rates, guidance, relevance, fusion):
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    texts = torch.randn(2, JOINT, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    patchselect.apply(
        model, keep_rate=list(rates), layers=list(layers), guidance=guidance, relevance=relevance, fusion=fusion
    )
    reference = Reference(model, layers, rates, guidance, relevance, fusion)
    with torch.no_grad():
        if guidance == "text":
            with patchselect.guide(model, texts):
                found = model.get_image_features(pixel_values=images)
        else:
            found = model.get_image_features(pixel_values=images)
        found = getattr(found, "pooler_output", found)
        expected = torch.stack([reference(image, text[None]) for image, text in zip(images, texts)])
    assert ((found - expected).norm() / expected.norm()).item() < 1e-8


@pytest.mark.parametrize("relevance", ["keys", "values", "features", "joint"])
def test_shared_texts(model, relevance):
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    texts = torch.randn(5, JOINT, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    patchselect.apply(model, keep_rate=0.5, layers=[1, 3], relevance=relevance)
    reference = Reference(model, (1, 3), (0.5, 0.5), "text", relevance, "mean")
    with torch.no_grad(), patchselect.guide(model, texts, pairing="shared"):
        found = model.get_image_features(pixel_values=images)
        found = getattr(found, "pooler_output", found)
        expected = torch.stack([reference(image, texts) for image in images])
    assert ((found - expected).norm() / expected.norm()).item() < 1e-8
