"""A tiny language model that reads the tokens of an image in front of a question, as LLaVA does."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy.albef.model import WIDTH

from .questions import WORDS, vocabulary

PATCHES = 100
"""Tokens of an image in the whole prompt."""


class Answerer(nn.Module):
    """Image tokens `(B, m, WIDTH)` through one linear layer, then the words, into transformers' Llama."""

    def __init__(self, names: Tensor, width: int = 64, layers: int = 2, heads: int = 4) -> None:
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
                max_position_embeddings=PATCHES + WORDS,
                tie_word_embeddings=True,
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
        for layer in self.language.model.layers:  # what is alike attends from the start, as in the base
            layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight.data)

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

    def several(self, tokens: Tensor, words: Tensor) -> Tensor:
        """Return logits `(B, Q, vocabulary)` of the answers to `(B, Q, WORDS)`: Q prompts at the cost of little more
        than one, for the tokens of an image do not see the question, and no question sees another.
        """
        rows, asked, length = words.shape
        count = tokens.shape[1]
        embedded = self.embedded(tokens, words.flatten(1))
        own = torch.arange(length) + PATCHES
        positions = torch.cat([torch.arange(PATCHES - count, PATCHES), own.repeat(asked)]).expand(rows, -1)
        part = torch.cat([torch.full((count,), -1), torch.arange(asked).repeat_interleave(length)])
        sees = ((part[None] == part[:, None]) | (part[None] < 0)).tril()
        mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
        found = self.language(
            inputs_embeds=embedded,
            attention_mask=mask.expand(rows, 1, -1, -1),
            position_ids=positions,
            use_cache=False,
            logits_to_keep=count + length * (1 + torch.arange(asked)) - 1,
        )
        return found.logits

    def embedded(self, tokens: Tensor, words: Tensor) -> Tensor:
        table = torch.cat([self.language.get_input_embeddings().weight, self.projection(self.names)])
        return torch.cat([self.projection(tokens), table[words]], dim=1)
