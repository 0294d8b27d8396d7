"""The image encoder up to the first selection, kept: what does not depend on the text runs once per image."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .adapter import Attended, Tower
from .blocks import Layer, Original
from .checksums import checksums
from .compat import allow_in_files
from .guidance import Guidance, current, scope
from .patching import Handle, handle_of, patch

_patching = threading.Lock()


class Held(Protocol):
    """A prefix that is being taken or used, as the blocks of a tower meet it."""

    def skips(self, layer: Layer) -> bool:
        """Whether this block need not run."""

    def recall(self, layer: Layer, hidden: Tensor) -> Attended | None:
        """What this block's attention gave, if that is known already; in the host's own layout."""

    def take(self, layer: Layer, attended: Attended) -> bool:
        """Offer what this block's attention gave; whether it was what was wanted, and the rest need not run."""


@dataclass(frozen=True)
class Origin:
    """What a prefix depends on besides the pixels."""

    model: str
    width: int
    layers: tuple[int, ...]
    weights: tuple[str, ...]
    """One checksum per parameter and buffer up to the first selection layer."""

    @classmethod
    def of(cls, handle: Handle) -> Origin:
        tower = handle.towers[0]
        kind = f"{type(tower.module).__module__}.{type(tower.module).__qualname__}"
        return cls(kind, tower.width, handle.layers, checksums(_until(tower, handle.layers[0])))


@dataclass(frozen=True, eq=False)
class Prefix:
    """Images on the way through the encoder, up to the attention of the first selection layer.

    `prefix[i]`, `prefix[2:5]` and `prefix[index]` choose images, `len(prefix)` counts them, `prefix.to(device)` moves
    them, and `torch.save` stores them; `torch.load` reads them wherever patchselect is imported. It holds no pixels,
    and two tensors of `(B, N, D)` in the dtype of the tokens.
    """

    tokens: Tensor
    """`(B, N, D)`: after attention and its residual."""
    normed: Tensor
    """`(B, N, D)`: the block's input after its pre-attention norm."""
    shape: tuple[int, ...]
    """Shape of one image."""
    origin: Origin | None
    """`None` in a prefix that does not outlive the call that made it."""
    rest: Any = None

    @property
    def images(self) -> Tensor:
        """A stand-in for the images, `(B, 3, H, W)` without memory: hosts want something to be called with.

        It is NaN, so that a call without `prefix=` gives no features of images that are not there.
        """
        return self.tokens.new_full((), float("nan")).expand(len(self), *self.shape)

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, images: int | slice | Sequence[int] | Tensor) -> Prefix:
        if isinstance(images, int):
            images = [range(len(self))[images]]
        return replace(self, tokens=self.tokens[images], normed=self.normed[images])

    def to(self, device: torch.device | str) -> Prefix:
        """Return the same prefix on another device."""
        return replace(self, tokens=self.tokens.to(device), normed=self.normed.to(device))

    def check(self, handle: Handle) -> None:
        """Raise if this is not a prefix of the model as it is now. Reads the weights of the prefix once.

        Raises:
            ValueError: another model, other selection layers, or other weights up to the first of them.
        """
        if self.origin is None:
            return
        now = Origin.of(handle)
        again = "call patchselect.encode_prefix(model, images) again"
        if (now.model, now.width) != (self.origin.model, self.origin.width):
            raise ValueError(
                f"this prefix is of another model, {self.origin.model} of width {self.origin.width}; this one is "
                f"{now.model} of width {now.width}: {again}"
            )
        if now.layers != self.origin.layers:
            raise ValueError(
                f"this prefix was made for selection in layers {list(self.origin.layers)}, this model selects in "
                f"{list(now.layers)}: {again}"
            )
        if now.weights != self.origin.weights:
            raise ValueError(
                f"the weights before the first selection are not those that this prefix was made with: {again}"
            )
        prepare(handle)

    def skips(self, layer: Layer) -> bool:
        """Return whether this block need not run: it comes before the first selection."""
        self._check_tower(layer)
        return layer.index < layer.handle.layers[0]

    def recall(self, layer: Layer, hidden: Tensor) -> Attended | None:
        """Return what the attention of the first selection layer gave; `None` for a later block."""
        self._check_tower(layer)
        if not layer.first:
            return None
        found = hidden if layer.tower.batch_first else hidden.transpose(0, 1)
        if found.shape != self.tokens.shape:
            raise ValueError(
                f"the prefix holds {len(self)} images of {self.tokens.shape[1]} tokens, the encoder was called with "
                f"{found.shape[0]} of {found.shape[1]}: call it with prefix.images, or with what the prefix was made of"
            )
        if found.device != self.tokens.device:
            raise ValueError(f"the prefix is on {self.tokens.device}, the model on {found.device}: use prefix.to(…)")
        if layer.tower.batch_first:
            return Attended(self.tokens, self.normed, self.rest)
        return Attended(self.tokens.transpose(0, 1), self.normed.transpose(0, 1), self.rest)

    def take(self, layer: Layer, attended: Attended) -> bool:
        """Return `False`: a prefix that is used takes nothing."""
        return False

    @staticmethod
    def _check_tower(layer: Layer) -> None:
        if layer.tower is not layer.handle.towers[0]:
            raise ValueError(
                "a prefix holds the first vision tower alone, but this call runs another one too (a momentum encoder): "
                "use prefixes for inference, with model.eval()"
            )


allow_in_files(Prefix, Origin)


class _Taking:
    """Runs the blocks up to the first selection layer and takes what its attention gives."""

    def __init__(self) -> None:
        self.attended: Attended | None = None

    def skips(self, layer: Layer) -> bool:
        return layer.index > layer.handle.layers[0]

    def recall(self, layer: Layer, hidden: Tensor) -> None:
        return None

    def take(self, layer: Layer, attended: Attended) -> bool:
        self.attended = attended
        return True


@torch.no_grad()
def encode_prefix(model: nn.Module, images: Any, **kwargs: Any) -> Prefix:
    """Encode images up to the first selection layer: all that does not depend on the text.

        prefix = patchselect.encode_prefix(model, pixel_values)
        with patchselect.guide(model, text_features, prefix=prefix):
            image_features = model.get_image_features(prefix.images)

    Every later question about these images costs the blocks after the first selection, on fewer tokens (and the patch
    embedding of the stand-in, under 1 % of a ViT). The numbers are those from the pixels. Without gradients: a prefix
    is for inference, call `model.eval()` first.

    Args:
        model: a model that `patchselect.apply` patched with `guidance="text"`.
        images: `(B, 3, H, W)`, or whatever else `score_pairs` takes as images: a list, a mapping with `pixel_values`,
            a loader. The prefix of all of them is held at once.
        kwargs: further arguments of the vision tower (SigLIP 2: `spatial_shapes`, …), for a tensor or a mapping.

    Raises:
        ValueError: the model is not patched, or not guided by text; nothing of it is independent of the text; images
            of a wrong shape, of several sizes, or none.
        TypeError: images of a kind that cannot be read.
    """
    handle = handle_of(model)
    if handle.guidance != "text":
        raise ValueError(
            f"this model is guided by {handle.guidance!r}: each image is encoded once whatever the texts, so there is "
            'no prefix to keep; apply(model, guidance="text") first'
        )
    tower = handle.towers[0]
    if tower.single_stream:
        raise ValueError(
            f"in {type(tower.module).__name__} image and text share one sequence from the first block on: no part of "
            "the image side is independent of the text, so there is no prefix to keep"
        )
    from .batches import batches

    if isinstance(images, Prefix):
        raise TypeError("images are a Prefix already: give it to guide(prefix=…) or score_pairs")
    weight, origin = next(tower.module.parameters()), Origin.of(handle)
    parts = []
    for batch in batches(images, tower):
        pixels = batch.to(weight)
        tokens, normed, rest = take_prefix(handle, pixels.images, {**pixels.options, **kwargs})
        parts.append(Prefix(tokens, normed, tuple(batch.images.shape[1:]), origin, rest))
    if len({(part.shape, part.tokens.shape[1:]) for part in parts}) != 1:
        raise ValueError(
            "a prefix holds images of one size, at least one of them; got "
            + str(sorted({part.shape for part in parts}))
        )
    if len(parts) == 1:
        return parts[0]
    tokens, normed = (torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "normed"))
    return replace(parts[0], tokens=tokens, normed=normed)


def take_prefix(handle: Handle, images: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Any]:
    """Tokens and normed tokens `(B, N, D)` after the attention of the first selection layer, and the adapter's rest."""
    tower = handle.towers[0]
    prepare(handle)
    taking = _Taking()
    with scope(handle, torch.zeros(0), "prefix", prefix=taking):
        tower.adapter.encode_images(handle.model, tower, images, **kwargs)
    if taking.attended is None:
        raise ValueError(f"{type(tower.module).__name__} did not come to its first selection layer")
    tokens, normed, rest, _ = taking.attended
    if not tower.batch_first:
        tokens, normed = tokens.transpose(0, 1), normed.transpose(0, 1)
    return tokens, normed, None if isinstance(rest, Tensor) else rest


def prepare(handle: Handle) -> None:
    """Let the blocks that select nothing be skipped where a prefix is taken or used."""
    tower = handle.towers[0]
    with _patching:
        for index, block in enumerate(tower.blocks):
            if "_patchselect" not in vars(block):
                patch(handle, block, {"forward": pass_block}, Layer(handle, tower, index, False, (1, 1)))


def pass_block(block: nn.Module, name: str, original: Original, *args: Any, **kwargs: Any) -> Any:
    """A block that selects nothing: it runs, unless a prefix makes it needless."""
    layer: Layer = block._patchselect  # type: ignore[assignment]
    guidance: Guidance | None = kwargs.pop("_patchselect_guidance", None)
    if guidance is not None:
        args = args[:-1]
    else:
        guidance = current(layer.handle)
    if guidance is None or guidance.prefix is None or not guidance.prefix.skips(layer):
        return original(*args, **kwargs)
    return layer.tower.adapter.as_output(layer.tower, args[0] if args else next(iter(kwargs.values())))


def _until(tower: Tower, first: int) -> list[Tensor]:
    """What the prefix depends on: all of the tower but its later blocks."""
    later = {id(tensor) for block in tower.blocks[first + 1 :] for tensor in (*block.parameters(), *block.buffers())}
    tensors = (*tower.module.parameters(), *tower.module.buffers())
    return [tensor for tensor in tensors if id(tensor) not in later]
