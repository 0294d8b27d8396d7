"""A small ALBEF-like model, defined as a user's would be: it knows nothing of patch selection.

Text first (2 layers), a ViT (6 layers, a small convolutional stem, 8 x 8 patches), then 2 layers in which the text
looks at the image (cross-attention) and says whether they match; a joint space for contrastive losses beside it.
About 0.56 million parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from benchmarks.accuracy.world.captions import CAPTION_LENGTH, PAD, vocabulary_size

WIDTH = 64
JOINT = 32
HEADS = 4
PATCH = 8


@dataclass(frozen=True)
class Shape:
    """How the ViT is built."""

    depth: int = 6
    registers: int = 0
    """Tokens behind the [CLS] that stand for no patch."""

    @property
    def layers(self) -> tuple[int, int]:
        """Of the paper's two selections: inside the 3rd and the 5th of 6 blocks, the 5th and the 10th of 12."""
        return 4 * self.depth // 12, 9 * self.depth // 12

    @property
    def prefix(self) -> int:
        """How many tokens stand before the patches."""
        return 1 + self.registers

    def __str__(self) -> str:
        """Name it in files: nothing, or what differs from the committed base."""
        blocks = f"-{self.depth}-blocks" if self.depth != Shape.depth else ""
        return blocks + (f"-{self.registers}-registers" if self.registers else "")

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> Shape:
        """Read it from the names and sizes of weights."""
        places = {name.split(".")[2] for name in weights if name.startswith("vision.blocks.")}
        registers = weights.get("vision.reg_token")
        return cls(len(places), 0 if registers is None else registers.shape[1])


USUAL = Shape()
"""Of the committed base."""
LAYERS = USUAL.layers


def stem(width: int) -> nn.Sequential:
    """Build three strided convolutions in place of one patch embedding: small models need them to see edges."""
    return nn.Sequential(
        nn.Conv2d(3, width // 4, 3, 2, 1),
        nn.GELU(),
        nn.Conv2d(width // 4, width // 2, 3, 2, 1),
        nn.GELU(),
        nn.Conv2d(width // 2, width, 3, 2, 1),
    )


class TextEncoder(nn.Module):
    """Token ids `(B, L)` to hidden states `(B, L, WIDTH)`; the first token is the [CLS]."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size(), WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(CAPTION_LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(WIDTH), enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids) + self.positions[: ids.shape[1]]
        return self.layers(hidden, src_key_padding_mask=ids == PAD)


class MiniAlbef(nn.Module):
    """Image-text matching over fused features, and a joint space of both encoders' [CLS].

    Args:
        image_size: in pixels; images of other sizes are taken, too.
        shape: of the ViT.
    """

    def __init__(self, image_size: int = 80, shape: Shape = USUAL) -> None:
        super().__init__()
        self.shape = shape
        self.vision: Any = VisionTransformer(
            image_size,
            PATCH,
            num_classes=0,
            embed_dim=WIDTH,
            depth=shape.depth,
            num_heads=HEADS,
            reg_tokens=shape.registers,
            dynamic_img_size=True,
        )
        self.vision.patch_embed.proj = stem(WIDTH)
        self.text = TextEncoder()
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.fusion = nn.TransformerDecoder(layer, 2, nn.LayerNorm(WIDTH))
        for block in self.fusion.layers:  # what is alike attends from the start, which shortens training by far
            weight = block.multihead_attn.in_proj_weight.data
            weight[WIDTH : 2 * WIDTH] = weight[:WIDTH]
        self.matching = nn.Linear(WIDTH, 2)
        self.vision_proj = nn.Linear(WIDTH, JOINT)
        self.text_proj = nn.Linear(WIDTH, JOINT)

    def encode_image(self, images: Tensor) -> Tensor:
        """Return `(B, 3, S, S)` to tokens `(B, prefix + patches, WIDTH)`."""
        return self.vision.forward_features(images)

    def match(self, image_tokens: Tensor, text: Tensor, ids: Tensor) -> Tensor:
        """Return logits `(B, 2)` of whether text i (hidden states `(B, L, WIDTH)`) fits image i."""
        fused = self.fusion(text, image_tokens, tgt_key_padding_mask=ids == PAD)
        return self.matching(fused[:, 0])

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        return self.match(self.encode_image(images), self.text(ids), ids)
