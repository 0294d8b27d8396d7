"""What a language model that reads patches among its words is asked: the questions of `Adapter`, and a few more."""

from __future__ import annotations

import inspect
from typing import Any, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Texts, Tower
from ..weights import products_of
from ..wiring.journey import Journey
from .encoded import tokens_in
from .squares import squares_of


class Prompted(Adapter):
    """A family of hosts whose prompts hold one placeholder per token of an image."""

    image_arguments: tuple[str, ...] = ("pixel_values",)
    """Arguments of a call that the encoding of its images takes, the pixels first."""
    squares_together: bool = False
    """Whether the tokens of a square that becomes one follow each other."""
    renumbers: bool = True
    """Whether positions are columns, and can be counted anew."""

    def core(self, model: nn.Module) -> Any:
        """Return the part of `model` that puts the tokens of images among the words."""
        raise NotImplementedError

    def placeholders(self, core: Any, given: Mapping[str, Any]) -> Tensor:
        """Return `(B, L)`, bool: the columns of a call that stand for tokens of images."""
        token = core.config.image_token_id
        if given.get("input_ids") is not None:
            return given["input_ids"] == token  # type: ignore[no-any-return]
        embeds: Tensor = given["inputs_embeds"]
        embedded = core.get_input_embeddings()(torch.tensor(token, device=embeds.device))
        return (embeds == embedded).all(dim=-1)

    def sizes(self, tower: Tower, core: Any, given: Mapping[str, Any]) -> list[int]:
        """Return how many placeholders each image of a call has before a selection."""
        raise NotImplementedError

    def encode(self, core: Any, given: Mapping[str, Any]) -> tuple[Any, Sequence[Tensor]]:
        """Encode the images of a call; return what the host returns, and the tokens `(m_i, D)` of each image."""
        known = inspect.signature(type(core).get_image_features).parameters
        named = {name: given[name] for name in self.image_arguments if name in known and given.get(name) is not None}
        found = core.get_image_features(**named)
        return found, self.tokens_of(found)

    def tokens_of(self, encoded: Any) -> Sequence[Tensor]:
        """Return the tokens `(m_i, D)` of each image, from what the host returns of them."""
        return tokens_in(encoded)

    def first_position(self, core: Any) -> int:
        """Return the position of the first column in a call of `forward` that gives none."""
        return 0

    def positions(self, core: Any, given: Mapping[str, Any], rows: int, length: int, device: Any) -> Tensor:
        """Return the positions `(…, B, L)` of the whole prompt in a call of `forward` that gives none."""
        return torch.arange(length, device=device) + self.first_position(core)

    def counted(self, model: nn.Module, given: Mapping[str, Any], positions: Tensor | None) -> Tensor | None:
        """Return the positions `(…, B, L)` that `generate` begins with, where `positions` are counted by the mask."""
        return positions

    def settle(self, core: Any, cut: dict[str, Any]) -> Tensor | None:
        """Finish a call that was cut; return by how much positions go before the number of tokens, `(B, 1)`.

        `None`: positions are columns of the whole prompt.
        """
        return None

    def check(self, model: nn.Module, tower: Tower, layers: tuple[int, ...]) -> None:
        """Raise a ValueError if what a selection in these layers leaves would not be read."""

    def side(self, core: Any) -> int:
        """Return how many patches high and wide the square is that becomes one token of the prompt."""
        return 1

    def sources(self, core: Any, journey: Journey) -> Tensor | None:
        """Return which placeholder of its image `(I, m)` each token of now is, from 0; -1 is a fused one."""
        if self.side(core) == 1 or journey.sources is None:
            return journey.sources
        found = squares_of(journey, self.side(core))
        if found is not None:
            return found
        squares = journey.sources.shape[1] // self.side(core) ** 2
        return torch.arange(squares, device=journey.sources.device).expand(len(journey.sources), -1)

    def left(self, core: Any, journeys: Sequence[Journey]) -> list[Tensor]:
        """Return the same of each image of some calls of the tower, `(m,)`."""
        known = [self.sources(core, journey) for journey in journeys]
        return [row for found in known if found is not None for row in found.unbind()]

    def extra(self, core: Any, given: Mapping[str, Any]) -> int:
        """Return how many tokens in front of the patches have placeholders too."""
        return 0

    def language(self, core: Any) -> Any:
        """Return the language model, whose `layers` are its blocks."""
        return core.language_model

    def projector_of(self, core: Any) -> nn.Module:
        """Return what takes each token of an image to the width of the language model."""
        raise NotImplementedError

    def prompt_cost(self, core: Any, image_tokens: int, words: int) -> int:
        """Return the multiply-adds of a prompt with one image, in projector and language model.

        Products with weights, and the attention of each token to all: `2 L^2` times the width of the queries.

        Raises:
            ValueError: not every token meets every weight (a mixture of experts).
        """
        tokens, total = image_tokens + words, image_tokens * products_of(self.projector_of(core))
        for block in self.language(core).layers:
            if any("experts" in name for name, _ in block.named_modules()):
                raise ValueError(
                    f"{type(block).__name__} sends each token to some experts alone: its cost is not known"
                )
            total += tokens * products_of(block) + 2 * tokens**2 * block.self_attn.q_proj.out_features
        return total

    # A pair has no score here, and what reads the patches needs them all.

    def encode_images(self, model: Any, tower: Tower, images: Any, **kwargs: Any) -> Tensor:
        raise ValueError(
            f"{type(model).__name__} answers prompts and has no score of an image and a text: use the dual encoder "
            "that its tower came from, or its answers"
        )

    def encode_texts(self, model: Any, tower: Tower, texts: Any) -> Texts:
        return Texts(self.encode_images(model, tower, texts))

    def reads_patches(self, model: nn.Module, tower: Tower) -> str | None:
        return "the language model reads them"
