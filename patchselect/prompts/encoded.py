"""Call a host with images that come encoded, whether its release of transformers takes them or not.

Since 5.23 hosts take them as `mm_encoder_outputs`. In 4.57 the tokens of the images stand where a call has its pixels,
the host's own `get_image_features` hands them on, and what follows is the host's: it puts them among the words. Its
`generate` knows neither that there are images nor where a short prompt has its positions, so each of its steps is told
which tokens and which positions its columns have.
"""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from typing import Any, Callable, Mapping, NamedTuple, Sequence

import torch
from torch import Tensor

from ..calls import bound

ENCODED = "mm_encoder_outputs"
NAMES_OF_CACHES = ("past_key_values", "cache")
"""What calls and outputs name a cache, up to transformers 5.23 and from 5.24 on."""


def takes_encoded(core: Any) -> bool:
    """Tell whether this release of a host takes encoded images."""
    return ENCODED in inspect.signature(type(core).forward).parameters


def cache_in(found: Any) -> Any:
    """Return the cache among arguments, or of an output of transformers, which is a mapping too."""
    held = found if isinstance(found, Mapping) else {}
    return next((held[name] for name in NAMES_OF_CACHES if name in held and held[name] is not None), None)


def length_of(cache: Any) -> int:
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0


def has_layers(encoded: Any) -> bool:
    """Tell whether a host of 4.57 returned features of several layers beside the tokens of its images (DeepStack)."""
    return isinstance(encoded, tuple) and isinstance(encoded[-1], list)


def tokens_in(encoded: Any) -> Sequence[Tensor]:
    """Return the tokens `(m_i, D)` of each image, from what a host of any release returns of them."""
    found = encoded[0] if has_layers(encoded) else getattr(encoded, "pooler_output", encoded)
    return list(found)


class Prompt(NamedTuple):
    """A short prompt whose images are encoded, while a host that takes no encoded images is called."""

    core: Any
    """The part of the host that puts the tokens of images among the words."""
    encoded: Any
    """What the host returned of its images."""
    pixels: str
    """The argument that pixels have in a call."""
    tokens: Tensor
    """`(M, D * (1 + layers))`: the tokens of all images, and side by side what is read of other layers."""
    which: Tensor
    """`(B, L)`: which of these each column is; -1 is none."""
    positions: Tensor | None
    """`(…, B, L)`: of the columns; `None` where each call has its own."""
    following: Tensor | None
    """`(…, B, 1)`: the position after the last column."""

    @classmethod
    def of(cls, core: Any, pixels: str, placeholders: Tensor, given: Mapping[str, Any], first: int) -> Prompt:
        """Return the prompt of a call with `placeholders` `(B, L)`, whose positions begin with `first`."""
        encoded = given[ENCODED]["image"]
        tokens = torch.cat([*tokens_in(encoded)])
        if has_layers(encoded):
            tokens = torch.cat([tokens, *encoded[1]], dim=-1)
        index = (placeholders.flatten().cumsum(0) - 1).view(placeholders.shape).masked_fill(~placeholders, -1)
        positions: Tensor | None = given.get("position_ids")
        if positions is None:
            return cls(core, encoded, pixels, tokens, index, None, None)
        positions, mask = positions + first, given.get("attention_mask")
        real = positions if mask is None else positions.masked_fill(mask == 0, -1)
        last = real.amax(dim=-1, keepdim=True)
        if positions.dim() == 3:  # time, height and width of patches; words have one number three times
            last = last.amax(dim=0, keepdim=True).expand(len(positions), -1, -1)
        return cls(core, encoded, pixels, tokens, index, positions, last + 1)

    def step(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return a call with some columns of the prompt, and of what follows, with their tokens and positions."""
        words: Tensor = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        place, found = given.get("cache_position"), dict(given)
        start = int(place[0]) if isinstance(place, Tensor) else length_of(cache_in(given))
        end, length = start + words.shape[1], self.which.shape[1]
        copies = len(words) // len(self.which)  # beams
        held = self.which[:, start:end].repeat_interleave(copies, dim=0)
        if bool((held >= 0).any()):
            found[self.pixels] = self.tokens[held[held >= 0]]
        if self.positions is not None and self.following is not None:
            more = torch.arange(max(end - length, 0), device=self.which.device)
            each = torch.cat([self.positions, self.following + more], dim=-1)[..., start:end]
            found["position_ids"] = each.repeat_interleave(copies, dim=-2)
        return found

    def features(self, tokens: Tensor) -> Any:
        """Return tokens `(m, D * (1 + layers))` as the host returns those of its images."""
        if has_layers(self.encoded):
            own, *layers = tokens.chunk(1 + len(self.encoded[1]), dim=-1)
            return [own], layers
        return tokens.unsqueeze(1) if isinstance(self.encoded, Tensor) else [tokens]  # as images of one token each


_prompt: ContextVar[Prompt | None] = ContextVar("patchselect_prompt", default=None)


def prompt_of(core: Any) -> Prompt | None:
    """Return the prompt that a host is being called with, where its release takes no encoded images."""
    found = _prompt.get()
    return found if found is not None and found.core is core else None


def features_in_call(core: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what `get_image_features` returns where tokens stand for pixels; `None` where these are pixels."""
    prompt = prompt_of(core)
    return None if prompt is None else prompt.features(bound((prompt.pixels,), args, kwargs)[prompt.pixels])


def call_encoded(original: Callable[..., Any], host: Any, core: Any, given: Mapping[str, Any], first: int = 0) -> Any:
    """Call `forward` or `generate` of a host, with images that come encoded or with none.

    Args:
        original: the method.
        host: the adapter, a `Prompted`.
        core: the part of the host that puts the tokens of images among the words.
        given: the arguments by their names; encoded images as `mm_encoder_outputs`.
        first: what the host adds to positions that `generate` is given.
    """
    if (given.get(ENCODED) or {}).get("image") is None or takes_encoded(core):
        return original(**given)
    prompt = Prompt.of(core, host.image_arguments[0], host.placeholders(core, given), given, first)
    token = _prompt.set(prompt)
    try:
        return original(**{name: value for name, value in given.items() if name not in (ENCODED, "position_ids")})
    finally:
        _prompt.reset(token)
