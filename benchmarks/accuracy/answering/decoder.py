"""A tiny language model that reads the tokens of an image in front of a question, as LLaVA does."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy.albef.model import WIDTH

from .questions import START, WORDS, vocabulary

PATCHES = 100
"""Tokens of an image in the whole prompt."""


class Answerer(nn.Module):
    """Image tokens `(B, m, WIDTH)` through one linear layer, then the words, into transformers' Llama.

    Names of things are what the base's text encoder makes of them (`names`, `(concepts, WIDTH)`), through the same
    layer: the base has learned to make patches and names alike.
    """

    def __init__(self, names: Tensor, width: int = 64, layers: int = 2, heads: int = 2) -> None:
        super().__init__()
        self.register_buffer("names", names)
        transformers = importlib.import_module("transformers")
        self.projection = nn.Linear(WIDTH, width)
        self.language: Any = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=len(vocabulary()),
                hidden_size=width,
                intermediate_size=3 * width,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=1 + PATCHES + WORDS,
                tie_word_embeddings=True,
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        begin(self)

    def forward(self, tokens: Tensor, words: Tensor, positions: Tensor) -> Tensor:
        """Return logits `(B, vocabulary)` of the answers.

        Args:
            tokens: `(B, m, WIDTH)`, what is left of each image; m may be 0.
            words: `(B, WORDS)`, a question each.
            positions: `(B, m + WORDS)`.
        """
        embedded = self.embedded(tokens, words)
        # Without a mask, transformers reads jumps between positions as borders of packed sequences.
        mask = torch.ones(embedded.shape[:2], dtype=torch.long)
        found = self.language(
            inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
        )
        return found.logits[:, 0]

    def several(self, tokens: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Answer Q questions about each whole image at the cost of little more than one: the tokens of an image do not
        see the questions, and no question sees another.

        Args:
            tokens: `(B, PATCHES, WIDTH)`
            words: `(B, Q, WORDS)`

        Returns:
            Logits `(B, Q, vocabulary)` of the answers and `(B, PATCHES, vocabulary)` at the tokens of the image.
        """
        rows, asked, length = words.shape
        image = 1 + tokens.shape[1]
        positions = torch.cat([torch.arange(image), (image + torch.arange(length)).repeat(asked)])
        part = torch.cat([torch.full((image,), -1), torch.arange(asked).repeat_interleave(length)])
        sees = ((part[None] == part[:, None]) | (part[None] < 0)).tril()
        mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
        logits = self.language(
            inputs_embeds=self.embedded(tokens, words.flatten(1)),
            attention_mask=mask.expand(rows, 1, -1, -1),
            position_ids=positions.expand(rows, -1),
            use_cache=False,
        ).logits
        return logits[:, image:].unflatten(1, (asked, length))[:, :, -1], logits[:, 1:image]

    def embedded(self, tokens: Tensor, words: Tensor) -> Tensor:
        """Return `(B, 1 + m + L, width)`: the start, the image, the words."""
        table = torch.cat([self.language.get_input_embeddings().weight, self.projection(self.names)])
        start = table[START].expand(len(words), 1, -1)
        return torch.cat([start, self.projection(tokens), table[words]], dim=1)


def begin(answerer: Answerer, alike: float = 1.3) -> None:
    """Start where learning is short: what is alike attends to each other, as in the base; `alike` says how much."""
    language = answerer.language
    for weight in language.model.layers.parameters():
        if weight.dim() == 2:
            nn.init.xavier_uniform_(weight)
    for layer in language.model.layers:
        nn.init.orthogonal_(layer.self_attn.q_proj.weight, alike)
        layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight)
    nn.init.normal_(language.get_input_embeddings().weight, std=0.5)
    nn.init.constant_(language.model.norm.weight, 0.2)  # answers begin about equally likely
    nn.init.orthogonal_(answerer.projection.weight)
