"""The structure of METER: a tower of CLIP whose blocks want a mask, a RoBERTa run layer by layer, and two streams."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import clip


class Block(clip.Block):
    """Its attention has no default for the mask of keys."""

    def attention(self, x: Tensor, x_mask: Tensor | None) -> Tensor:  # type: ignore[override]
        return self.attn(x, x, x, need_weights=False, key_padding_mask=x_mask)[0]  # type: ignore[no-any-return]

    def forward(self, x: Tensor, x_mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        x = x + self.attention(self.ln_1(x), x_mask)
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(*(Block(width, 4) for _ in range(depth)))

    def forward(self, x: Tensor, x_mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, x_mask)
        return x


class Tower(clip.VisualTower):
    """Returns all tokens, through the norm; there is no projection."""

    def __init__(self, width: int = 32, depth: int = 6) -> None:
        super().__init__(width, depth)
        self.transformer = Transformer(width, depth)
        del self.proj

    def forward(self, image: Tensor, x_mask: Tensor | None) -> Tensor:  # type: ignore[override]
        tokens = self.transformer(self.embed(image).transpose(0, 1), x_mask).transpose(0, 1)
        return self.ln_post(tokens)  # type: ignore[no-any-return]


class Eyes(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.visual = Tower(width)

    def forward(self, image: Tensor, image_mask: Tensor | None = None) -> Tensor:
        return self.visual(image, image_mask)  # type: ignore[no-any-return]


class Layer(nn.Module):
    """A layer of BERT, and with `fused` one that reads the other stream too; masks are added to attention."""

    def __init__(self, width: int, fused: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
        self.crossattention = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True) if fused else None
        self.norm, self.output, self.dropout = nn.LayerNorm(width), nn.Linear(width, width), nn.Dropout(0.1)

    def forward(self, x: Tensor, *given: Tensor) -> tuple[Tensor]:
        other, mask, other_mask = given if self.crossattention is not None else (x, *given, *given)
        x = self.norm(x + self.attention(x, x, x, key_padding_mask=mask[:, 0, 0] < 0, need_weights=False)[0])
        if self.crossattention is not None:
            hidden = other_mask[:, 0, 0] < 0
            x = x + self.crossattention(x, other, other, key_padding_mask=hidden, need_weights=False)[0]
        return (x + self.dropout(self.output(x).tanh()),)


class Embeddings(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.word_embeddings, self.dropout = nn.Embedding(99, width), nn.Dropout(0.1)
        self.positions = nn.Parameter(torch.randn(32, width) * 0.3)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.dropout(self.word_embeddings(input_ids) + self.positions[: input_ids.shape[1]])  # type: ignore[no-any-return]


class Roberta(nn.Module):
    """Never called as a whole."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embeddings, self.encoder = Embeddings(width), nn.Module()
        self.encoder.layer = nn.ModuleList(Layer(width) for _ in range(2))

    @staticmethod
    def get_extended_attention_mask(seen: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
        return (1.0 - seen[:, None, None].float()) * -10000.0


class Pooler(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x[:, 0]).tanh()  # type: ignore[no-any-return]


class Fusing(nn.Module):
    """The tower is 32 wide, the words 24, and both streams 40. `tasks` are what a call trains, each by a run of all."""

    def __init__(self, *tasks: str) -> None:
        super().__init__()
        width, self.tasks = 40, tasks
        self.cross_modal_text_transform, self.cross_modal_image_transform = nn.Linear(24, width), nn.Linear(32, width)
        self.token_type_embeddings = nn.Embedding(3, width)
        self.vit_model, self.text_transformer = Eyes(32), Roberta(24)
        self.cross_modal_image_layers = nn.ModuleList(Layer(width, fused=True) for _ in range(2))
        self.cross_modal_text_layers = nn.ModuleList(Layer(width, fused=True) for _ in range(2))
        self.cross_modal_image_pooler, self.cross_modal_text_pooler = Pooler(width), Pooler(width)
        if "irtr" in tasks:
            self.rank_output = nn.Linear(2 * width, 1)
        if "itm" in tasks:
            self.itm_score = nn.Linear(2 * width, 2)
        if "mlm" in tasks:
            self.mlm_score = nn.Linear(width, 99)
        if "nlvr2" in tasks:
            self.nlvr2_classifier = nn.Linear(4 * width, 2)

    def infer(
        self,
        batch: dict[str, Any],
        mask_text: bool = False,
        mask_image: bool = False,
        image_token_type_idx: int = 1,
        img: Tensor | None = None,
    ) -> dict[str, Tensor]:
        image = batch[f"image_{image_token_type_idx - 1}" if "image_0" in batch else "image"][0] if img is None else img
        seen = batch["text_masks"]
        x = self.text_transformer.embeddings(input_ids=batch["text_ids_mlm" if mask_text else "text_ids"])
        mask = self.text_transformer.get_extended_attention_mask(seen, seen.size(), x.device)
        for layer in self.text_transformer.encoder.layer:
            x = layer(x, mask)[0]
        x, y = self.cross_modal_text_transform(x), self.cross_modal_image_transform(self.vit_model(image))
        whole = torch.ones(y.shape[:2], dtype=torch.long)
        image_mask = self.text_transformer.get_extended_attention_mask(whole, whole.size(), x.device)
        kinds = self.token_type_embeddings(torch.tensor([0, image_token_type_idx]))
        x, y = x + kinds[0], y + kinds[1]
        for of_words, of_image in zip(self.cross_modal_text_layers, self.cross_modal_image_layers):
            x, y = of_words(x, y, mask, image_mask)[0], of_image(y, x, image_mask, mask)[0]
        pooled = torch.cat([self.cross_modal_text_pooler(x), self.cross_modal_image_pooler(y)], dim=-1)
        return {"text_feats": x, "image_feats": y, "cls_feats": pooled}

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        found, labels = {}, torch.arange(len(batch["text_ids"])) % 2
        if "mlm" in self.tasks:
            words = self.mlm_score(self.infer(batch, mask_text=True)["text_feats"])
            found["mlm"] = F.cross_entropy(words.flatten(0, 1), batch["text_ids"].flatten())
        if "itm" in self.tasks:
            found["itm"] = F.cross_entropy(self.itm_score(self.infer(batch)["cls_feats"]), labels)
        if "irtr" in self.tasks:
            found["irtr"] = self.rank_output(self.infer(batch)["cls_feats"])[:, 0]
        if "nlvr2" in self.tasks:
            both = [self.infer(batch, image_token_type_idx=index)["cls_feats"] for index in (1, 2)]
            found["nlvr2"] = F.cross_entropy(self.nlvr2_classifier(torch.cat(both, dim=-1)), labels)
        return found
