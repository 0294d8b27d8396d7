"""What a relevance answers, and what it is shown: subclass `Relevance` for a new way to rank patches.

A subclass must answer `scores`. Everything else has a default: which weights follow from the scores, how several texts
become one selection, what it costs. CONTRIBUTING.md has a worked example of about 40 lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence

import torch
from torch import Tensor, nn

from ..adapter import Tower, Turn
from ..compat import flop_counter
from ..weights import Projections, mean_key, place_of
from .kernels import combine_attention, in_tiles, standardise


@dataclass
class Candidates:
    """The tokens that one selection layer chooses from, as its block knows them.

    `B` images, `P` prefix tokens, `n` patches, `D` the width of the tower. Autocast is off while scores are computed,
    so tokens may be in half precision beside weights in float32: `projected` casts as the host
    would, `patchselect.weights.normalised` too.
    """

    tower: Tower
    index: int
    """0-based index of the block."""
    block: nn.Module
    all_normed: Tensor
    """`(B, P + n, D)`: the block's input after its pre-attention norm."""
    all_tokens: Tensor
    """`(B, P + n, D)`: after attention and its residual."""
    num_prefix_tokens: int
    place: int | None = None
    """Which token guides where no text does: the image [CLS] (in a single stream the text's), `None` the mean patch."""
    selecting: tuple[int, ...] = ()
    """The selection layers of this tower from this one on."""
    stash: list[Any] | None = None
    """Where the first selection layer of an inference pass may leave what later ones would compute again."""
    sizes: Tensor | None = None
    """`(B, P + n)`: how many patches of the image each token stands for; `None` means one each, or not counted."""
    memory: dict[str, Any] | None = None
    """What lasts until the `guide` block ends, for what depends on text and weights alone; `None`: keep nothing."""
    keys: Tensor | None = None
    """`(B, P + n, E)`: the keys of this block's attention, averaged over the heads, where they are at hand."""
    turn: Turn | None = None
    """How the block turns keys `(B, n, H, E)` of the patches by their places; `None` where it does not."""

    @property
    def normed(self) -> Tensor:
        """Patches `(B, n, D)`: the block's input after its pre-attention norm."""
        return self.all_normed[:, self.num_prefix_tokens :]

    @property
    def patches(self) -> Tensor:
        """Patches `(B, n, D)` after attention and its residual."""
        return self.all_tokens[:, self.num_prefix_tokens :]

    @property
    def weights(self) -> Projections:
        """The weights of this block's attention."""
        return self.tower.adapter.projections(self.block)

    def mean_keys(self) -> Tensor:
        """Return the keys `(B, P + n, E)` of this block's attention, averaged over the heads."""
        return mean_key(self.weights, self.all_normed) if self.keys is None else self.keys

    def guiding(self, tokens: Tensor) -> Tensor:
        """Return the token `(B, 1, D)` of `all_normed` or `all_tokens` that guides where no text does (EViT)."""
        if self.place is None:
            return tokens[:, self.num_prefix_tokens :].mean(dim=1, keepdim=True)
        return tokens[:, self.place : self.place + 1]

    def projected(self, tokens: Tensor) -> Tensor:
        """Map tokens `(B, m, D)` through the final norm and projection into the joint space, `(B, m, E)`."""
        return projected(self.tower, tokens)


def projected(tower: Tower, tokens: Tensor) -> Tensor:
    """Map tokens into the joint space, fed to the final norm in the dtype of its weights."""
    weight = getattr(tower.half.final_norm, "weight", None)
    return tower.project(tokens if weight is None else tokens.to(weight.dtype))


class Relevance:
    """How relevant each patch is to a text. Instances hold settings, never tensors of one call."""

    name: str = ""
    """What error messages, records and tables call it."""
    scores_are_weights: bool = False
    """Whether `scores` are weights already: at least 0, and their sum over the patches is 1."""
    takes_tiles: bool = False
    """Whether `scores` takes fewer rows of texts than images, to be repeated in tiles; others get them repeated."""

    def scores(self, seen: Candidates, text: Tensor) -> Tensor:
        """Score every patch for every text.

        Args:
            seen: the patches, their block and their tower.
            text: `(B', T, D_text)`, as given to `guide`; B' is B or 1 (with `takes_tiles` any divisor of B).

        Returns:
            `(B, T, n)`, any scale; higher is more relevant.
        """
        raise NotImplementedError

    def scores_by_image(self, seen: Candidates) -> Tensor:
        """Score every patch, `(B, 1, n)`, by the token that guides where no text does.

        Here that token stands in for a text, after its way into the joint space.
        """
        return self.scores(seen, seen.projected(seen.guiding(seen.all_tokens)))

    def weights(self, scores: Tensor) -> Tensor:
        """Turn scores `(B, T, n)` into weights `(B, T, n)` that sum to 1: one selection per image and text."""
        return scores if self.scores_are_weights else standardise(scores).softmax(dim=-1)

    def combine(self, scores: Tensor) -> Tensor:
        """Turn scores `(B, T, n)` into weights `(B, n)` that sum to 1: one selection per image for all texts.

        Here each patch gets its highest weight over all texts.
        """
        return combine_attention(self.weights(scores))

    def weigh(self, seen: Candidates, text: Tensor | None, apart: bool) -> Tensor:
        """Return the weights of one call: `(B, n)`, one selection per image, or `(B, T, n)` with `apart`.

        Here they follow from `scores` alone, by `weights` or `combine`. Answer this where how texts become one
        selection depends on the patches too (a diversity among them).

        Args:
            seen: the patches, their block and their tower.
            text: `(B', T, D_text)` with B' = 1, B or a divisor of B; `None` where no text guides.
            apart: whether each text has a selection of its own (`pairing="all"`).
        """
        if text is None:
            scores = self.scores_by_image(seen)
        else:
            scores = self.scores(seen, text if self.takes_tiles else in_tiles(text, seen.all_tokens.shape[0]))
        return self.weights(scores) if apart else self.combine(scores)

    def check(self, tower: Tower, layers: Sequence[int], guidance: str) -> None:
        """Raise a ValueError at `apply` if patches of this tower cannot be scored this way; says what to do.

        The default scores a few random tokens, so that a host that lacks something is refused before its first batch.
        """
        self._scored(tower, layers[0], 4, guidance)

    def reads(self, tower: Tower, layers: Sequence[int]) -> Sequence[int]:
        """Return the blocks whose attention weights `scores` reads, here those that select.

        `apply` makes sure that their attention computes with these weights.
        """
        return layers

    def cost(self, tower: Tower, index: int, first: bool, guidance: str) -> tuple[int, int]:
        """Return the multiply-adds of one text in one selection layer: once an image, and per patch.

        The default counts the matrix products of `scores` with PyTorch's counter.

        Args:
            tower: the tower.
            index: 0-based block.
            first: whether this is the first selection layer of the tower.
            guidance: `"text"`, `"image"` or `"random"`.
        """
        counts = []
        for patches in (8, 16):
            with flop_counter() as counter:
                self._scored(tower, index, patches, guidance)
            counts.append(counter.get_total_flops() // 2)
        each = (counts[1] - counts[0]) // 8
        return counts[0] - 8 * each, each

    @torch.no_grad()
    def _scored(self, tower: Tower, index: int, patches: int, guidance: str) -> Tensor:
        seen, text = self.sample(tower, index, patches, guidance)
        kind = seen.all_tokens.device.type
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
            return self.scores_by_image(seen) if text is None else self.scores(seen, text)

    def sample(
        self, tower: Tower, index: int, patches: int, guidance: str, rows: int = 1, texts: int = 1
    ) -> tuple[Candidates, Tensor | None]:
        """Return made-up patches of `rows` images, as block `index` would see them, and as many texts for each.

        The text `(rows, texts, D_text)` is `None` where no text guides.
        """
        place = place_of(tower.blocks[index])
        tokens = torch.linspace(-1, 1, rows * (tower.num_prefix_tokens + patches) * tower.width, **place)
        tokens = tokens.view(rows, -1, tower.width)
        seen = Candidates(
            tower, index, tower.blocks[index], tokens, tokens, tower.num_prefix_tokens,
            guiding_place(tower, guidance), (index,), turn=self._sample_turn(tower, index, tokens),
        )  # fmt: skip
        if guidance != "text" or tower.single_stream:
            return seen, None
        return seen, torch.ones(1, texts, tower.text_width(), **place).expand(rows, -1, -1)

    @staticmethod
    def _sample_turn(tower: Tower, index: int, tokens: Tensor) -> Turn | None:
        if not tower.rotary:
            return None
        args, kwargs = tower.adapter.sample_call(tower, tower.blocks[index], tokens)
        return tower.adapter.turn(tower, tower.blocks[index], *args, **kwargs)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{self.name}({settings})" if settings else self.name


def guiding_place(tower: Tower, guidance: str, num_prefix_tokens: int | None = None) -> int | None:
    """Return the place of the token that guides where no text does, or `None` for the mean of the patches.

    In a single stream the text is one of the tokens: guidance by text means its [CLS], token 0, guidance by the image
    the last prefix token.
    """
    if tower.single_stream and guidance != "text":
        return (tower.num_prefix_tokens if num_prefix_tokens is None else num_prefix_tokens) - 1
    return 0 if tower.has_class_token else None


def probe(tower: Tower) -> Tensor:
    """Return a text of zeros `(1, D_text)` on the device and in the dtype of the tower."""
    return torch.zeros(1, tower.text_width(), **place_of(tower.blocks[0]))


@torch.no_grad()
def check_projects(tower: Tower, name: str, guidance: str) -> None:
    """Raise a ValueError if a token of this tower does not reach the joint space."""
    token = torch.zeros(1, 1, tower.width, **place_of(tower.blocks[0]))
    try:
        tower.project(token)
    except ValueError as error:
        if guidance != "image":
            raise
        raise ValueError(
            f'guidance="image" with relevance={name!r} reads the image token in the joint image-text space, into '
            f'which {type(tower.module).__name__} has no way for one token: use relevance="keys" or "features"'
        ) from error


def multiply_adds(run: Any) -> int:
    """Count the multiply-adds of something small that each adapter does in its own way."""
    with torch.no_grad(), flop_counter() as counter:
        run()
    return counter.get_total_flops() // 2


def lift_cost(tower: Tower, guidance: str, read_back: bool = False) -> int:
    """Count the multiply-adds that lift one text to the tower's width, or read it back into the residual stream."""
    if guidance != "text" or tower.single_stream:
        return 0
    way = tower.read_back if read_back else tower.lift
    return multiply_adds(lambda: way(probe(tower)))
