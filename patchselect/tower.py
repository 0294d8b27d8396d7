"""A vision tower taken apart, a block of it half done, and who reads what it returns beside a text."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from typing import Any, Callable, Mapping, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .texts import TextCall, Texts

Wrapper = Callable[..., Any]
"""`wrapper(module, name, original, *args, **kwargs)`: a module-level function that stands in for method `name`."""

Turn = Callable[[Tensor], Tensor]
"""Queries or keys `(B, N, H, E)`, of which the last are those of the patches, to the same, turned by their places."""


class Attended(NamedTuple):
    """A block half done: between its attention and its MLP."""

    tokens: Tensor
    """After attention and its residual, in the host's own layout."""
    normed: Tensor
    """The block's input after its pre-attention norm, in the host's own layout."""
    rest: Any = None
    """Whatever the adapter needs to finish the block the host's way (attention maps, flags)."""
    num_prefix_tokens: int | None = None
    """Where it differs from call to call (single stream: the text tokens and the image [CLS])."""
    keys: Tensor | None = None
    """`(B, N, E)`, the keys averaged over the heads, where they were at hand."""


class Images(NamedTuple):
    """The images that a padded or packed tower is called with."""

    sizes: list[tuple[int, int]]
    """Height and width of each, in patches."""
    padding: bool
    """Whether some of the tokens are none of their patches."""

    @property
    def counts(self) -> list[int]:
        """The number of patches of each image."""
        return [height * width for height, width in self.sizes]


class Reader:
    """Who reads the images of a tower beside a text. By default a dual encoder, of which only the image half is known.

    A part of a `Tower`: it answers the questions of the same names that the adapter of the tower does not answer.
    Families with several heads have a class for them.
    """

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        """Return the methods of the model, and of what encodes its texts, that bring a text along or repeat it."""
        return []

    def text_width(self, tower: Tower) -> int:
        """Return the width that text features must have."""
        return tower.width

    def text_of_call(
        self, model: nn.Module, tower: Tower, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TextCall | None:
        """Return the text that came with this call of `model.method`, encoded by the model's own text encoder."""
        return None

    def fuses(self, model: nn.Module, tower: Tower, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether this call reads each image beside the text of its row: it takes as many of both."""
        return False

    def encode_images(self, model: nn.Module, tower: Tower, images: Any, **kwargs: Any) -> Tensor:
        """Return what `score` reads of the images, under whatever text guides them: one row per image, or per pair."""
        found = tower.module(images, **kwargs)
        return found if isinstance(found, Tensor) else found[0]

    def encode_texts(self, model: nn.Module, tower: Tower, texts: Any) -> Texts:
        """Encode a batch of token ids `(M, L)`, or of what a tokenizer returns, with the host's own text encoder."""
        raise ValueError(
            f"{type(model).__name__} has no text encoder that is known here: give score_pairs the text features, "
            "(texts, width) in floating point"
        )

    def score(self, model: nn.Module, tower: Tower, rows: Tensor, texts: Texts) -> Tensor:
        """Return the score `(R,)` of row i of the images with text i: here the cosine of their features."""
        if rows.dim() != 2 or rows.shape[1] != texts.features.shape[1]:
            raise ValueError(
                f"the image side of {type(model).__name__} gave {tuple(rows.shape)}, which cannot be compared with "
                f"text features of width {texts.features.shape[1]}: score_pairs needs one feature of that width per "
                "image, or a host with a fusion encoder"
            )
        wide = torch.promote_types(rows.dtype, torch.float32)
        return F.cosine_similarity(rows.to(wide), texts.features.to(wide), dim=-1)


@dataclass
class Tower:
    """One vision tower, taken apart."""

    adapter: Any
    """The `Adapter` of its family."""
    module: nn.Module
    """What is called with pixels."""
    blocks: list[nn.Module]
    """The transformer blocks, in order."""
    num_prefix_tokens: int
    has_class_token: bool
    """Whether token 0 is an image [CLS]."""
    width: int
    batch_first: bool = True
    rotary: bool = False
    """Whether attention turns queries and keys by the place of each patch: `turn` and `at_places` say how."""
    padded: bool = False
    """Whether a call may bring images of several sizes, padded to one length: `images` and `fit_masks` say how."""
    packed: bool = False
    """Whether images stand one behind the other in one sequence `(N, D)`: `images`, `order`, `at_rows` say how."""
    single_stream: bool = False
    """Whether text and image share one sequence: token 0 is the text [CLS], the last prefix token the image [CLS]."""
    head: nn.Module | None = None
    """The module that holds the projection into the joint space, if there is one."""
    final_norm: nn.Module | None = None
    reader: Any = field(default_factory=Reader)
    """The `Reader` of its images, where that is a part of its own."""
    parts: dict[str, Any] = field(default_factory=dict)
    """Adapter-specific modules and names."""
    text_side: Tower | None = None
    """The tower of the dual encoder that this one came from: a text is lifted and read by its projection and norm."""

    @property
    def half(self) -> Tower:
        """The tower beside whose text half the texts were made."""
        return self if self.text_side is None else self.text_side

    def text_width(self) -> int:
        """Return the width that text features must have."""
        return self.half.adapter.text_width(self.half)

    def lift(self, text: Tensor) -> Tensor:
        """Lift text features `(..., D_text)` to the width of the tower."""
        return self.half.adapter.lift(self.half, text)

    def read_back(self, text: Tensor) -> Tensor:
        """Map text features `(..., D_text)` to the direction in the residual stream that the head reads them from."""
        return self.half.adapter.read_back(self.half, text)

    def project(self, patches: Tensor) -> Tensor:
        """Map patches `(B, n, D)` through the final norm and projection into the joint space."""
        return self.half.adapter.project(self.half, patches)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tower:
        """Go along with a copy of the model; a text side stands outside of it, and is shared."""
        made = memo[id(self)] = copy.copy(self)
        for each in fields(self):
            if each.name not in ("adapter", "text_side"):
                setattr(made, each.name, copy.deepcopy(getattr(self, each.name), memo))
        return made
