"""The image encoder up to the first selection, kept: what does not depend on the text runs once per image."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Callable

import torch
from torch import Tensor, nn

from ..adapter import Attended, Tower
from ..compat import allow_in_files
from ..reading import held, plain_tensors
from ..wiring.guidance import Guidance, current, scope
from ..wiring.journey import journey_of, travelling
from ..wiring.recomputation import in_backward
from ..wiring.state import STATE, Layer, Wiring
from .answers import Answer, answer_of_embedding, run_few_tokens
from .checksums import checksums

TENSORS = ("tokens", "normed", "sizes", "sources", "within")
_patching = threading.Lock()


@dataclass(frozen=True)
class Origin:
    """What a prefix depends on besides the pixels."""

    model: str
    width: int
    layers: tuple[int, ...]
    weights: tuple[str, ...]
    """One checksum per parameter and buffer up to the first selection layer."""
    answer: Answer | None = None
    """What its layers make of a few tokens: adapters that are switched, and hooks, change no parameter."""
    merging: tuple[Any, ...] = ()
    """How patches merge before it: the share, the keep rate that it depends on, and whether attention counts sizes."""

    @classmethod
    def of(cls, wiring: Wiring) -> Origin:
        """Describe a selection as it is now."""
        tower = wiring.towers[0]
        kind = f"{type(tower.module).__module__}.{type(tower.module).__qualname__}"
        layers = wiring.plan.layers
        return cls(kind, tower.width, layers, checksums(_until(tower, layers[0])), _answer(wiring), merging_of(wiring))


def merging_of(wiring: Wiring) -> tuple[Any, ...]:
    """Return what a prefix depends on where patches merge; `()` where they do not."""
    plan = wiring.plan
    return (plan.merge, plan.keep_rates[0], plan.sizes) if plan.merge and plan.selects else ()


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
    sizes: Tensor | None = None
    """`(B, N)`: how many patches of the image each token stands for; `None` where none has merged."""
    sources: Tensor | None = None
    """`(B, n')`: the place in the image of each patch token."""
    within: Tensor | None = None
    """`(B, n)`: the patch token that each patch of the image is in."""

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
        return self._each(lambda tensor: tensor[images])

    def to(self, device: torch.device | str) -> Prefix:
        """Return the same prefix on another device."""
        return self._each(lambda tensor: tensor.to(device))

    @classmethod
    def cat(cls, parts: Sequence[Prefix]) -> Prefix:
        """Put prefixes of one model, and of images of one size, below each other."""
        found = {name: [getattr(part, name) for part in parts] for name in TENSORS}
        joined: dict[str, Any] = {name: None if held[0] is None else torch.cat(held) for name, held in found.items()}
        return parts[0] if len(parts) == 1 else replace(parts[0], **joined)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Prefix:
        held = {name: getattr(self, name) for name in TENSORS}
        changed: dict[str, Any] = {name: change(tensor) for name, tensor in held.items() if tensor is not None}
        return replace(self, **changed)

    def check(self, wiring: Wiring) -> None:
        """Raise if this is not a prefix of the model as it is now. Reads the weights of the prefix once.

        Raises:
            ValueError: another model, other selection layers, or other weights up to the first of them.
        """
        if self.origin is None:
            return
        now = Origin.of(wiring)
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
        if now.merging != self.origin.merging:
            raise ValueError(
                "how many patches merge before the first selection depends on merge, sizes and its keep rate, and "
                f"these were {self.origin.merging or 'without merging'}; now they are "
                f"{now.merging or 'without merging'}: {again}"
            )
        if now.weights != self.origin.weights:
            raise ValueError(
                f"the weights before the first selection are not those that this prefix was made with: {again}"
            )
        if self.origin.answer is not None and now.answer is not None and not now.answer.fits(self.origin.answer):
            raise ValueError(
                "the blocks before the first selection do not compute what they did when this prefix was made, though "
                f"their weights are the same (an adapter was switched on or off, or a hook came or went): {again}"
            )
        prepare(wiring)

    def skips(self, layer: Layer) -> bool:
        """Return whether this block need not run: it comes before the first selection."""
        self._check_tower(layer)
        return layer.index < layer.plan.layers[0]

    def recall(self, layer: Layer, hidden: Tensor) -> Attended | None:
        """Return what the attention of the first selection layer gave; `None` for a later block."""
        self._check_tower(layer)
        if not layer.first:
            return None
        found = hidden if layer.tower.batch_first else hidden.transpose(0, 1)
        gone = 0 if self.within is None or self.sources is None else self.within.shape[1] - self.sources.shape[1]
        length = self.tokens.shape[1] + gone
        if found.shape != (len(self), length, self.tokens.shape[2]):
            raise ValueError(
                f"the prefix holds {len(self)} images of {length} tokens, the encoder was called with "
                f"{found.shape[0]} of {found.shape[1]}: call it with prefix.images, or with what the prefix was made of"
            )
        if found.device != self.tokens.device:
            raise ValueError(f"the prefix is on {self.tokens.device}, the model on {found.device}: use prefix.to(…)")
        journey = journey_of(layer) if self.within is not None and not in_backward() else None
        if journey is not None:
            journey.sizes, journey.sources, journey.within = self.sizes, self.sources, self.within
        if layer.tower.batch_first:
            return Attended(self.tokens, self.normed, self.rest)
        return Attended(self.tokens.transpose(0, 1), self.normed.transpose(0, 1), self.rest)

    def take(self, layer: Layer, attended: Attended) -> bool:
        """Return `False`: a prefix that is used takes nothing."""
        return False

    @staticmethod
    def _check_tower(layer: Layer) -> None:
        if layer.tower is not layer.wiring.towers[0]:
            raise ValueError(
                "a prefix holds the first vision tower alone, but this call runs another one too (a momentum encoder): "
                "use prefixes for inference, with model.eval()"
            )


allow_in_files(Prefix, Origin, Answer)


class _Taking:
    """Runs the blocks up to the first selection layer and takes what its attention gives."""

    def __init__(self) -> None:
        self.attended: Attended | None = None
        self.passed: dict[str, Tensor | None] = {}

    def skips(self, layer: Layer) -> bool:
        return layer.index > layer.plan.layers[0]

    def recall(self, layer: Layer, hidden: Tensor) -> None:
        return None

    def take(self, layer: Layer, attended: Attended) -> bool:
        self.attended = attended
        journey = journey_of(layer) if layer.plan.merge and layer.plan.selects else None
        if journey is not None:
            self.passed = {name: getattr(journey, name) for name in ("sizes", "sources", "within")}
        return True


def take_prefix(
    wiring: Wiring, images: Any, kwargs: dict[str, Any], shape: Sequence[int], origin: Origin | None = None
) -> Prefix:
    """Run images, each of `shape`, up to the attention of the first selection layer."""
    tower = wiring.towers[0]
    prepare(wiring)
    taking = _Taking()
    with scope(wiring, torch.zeros(0), "prefix", prefix=taking):
        tower.adapter.encode_images(wiring.model, tower, images, **kwargs)
    if taking.attended is None:
        raise ValueError(
            f"encoding an image did not run block {wiring.plan.layers[0]} of {type(tower.module).__name__}, the first "
            "that selects: its encoder runs in a way that the adapter does not know; encode the images with each text"
        )
    tokens, normed, rest = taking.attended[:3]
    if not tower.batch_first:
        tokens, normed = tokens.transpose(0, 1), normed.transpose(0, 1)
    rest = None if isinstance(rest, Tensor) else rest
    return Prefix(tokens, normed, tuple(shape), origin, rest, **taking.passed)


def prepare(wiring: Wiring) -> None:
    """Let the blocks that select nothing be skipped where a prefix is taken or used."""
    tower = wiring.towers[0]
    with _patching:
        for index, block in enumerate(tower.blocks):
            if STATE not in vars(block):
                wiring.patch(block, {"forward": pass_block}, Layer(wiring, tower, index, False, (1, 1)))


def pass_block(block: nn.Module, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a block that selects nothing, unless a prefix makes it needless."""
    layer: Layer = block._patchselect  # type: ignore[assignment]
    guidance: Guidance | None = kwargs.pop("_patchselect_guidance", None)
    if guidance is not None:
        args = args[:-1]
    else:
        guidance = current(layer.wiring)
    if guidance is None or guidance.prefix is None or not guidance.prefix.skips(layer):
        return original(*args, **kwargs)
    return layer.tower.adapter.as_output(layer.tower, args[0] if args else next(iter(kwargs.values())))


def _answer(wiring: Wiring) -> Answer:
    tower = wiring.towers[0]
    prepare(wiring)
    taking = _Taking()
    embedding = tower.adapter.patch_embedding(tower)
    with scope(wiring, torch.zeros(0), "prefix", prefix=taking):
        embedded = () if embedding is None else answer_of_embedding(tower.module, embedding)
        with travelling(tower):
            run_few_tokens(tower, tower.blocks[: wiring.plan.layers[0] + 1])
    tokens, normed, *_ = taking.attended or (torch.zeros(0),) * 2
    return Answer.of(tower, *embedded, tokens, normed)


def _until(tower: Tower, first: int) -> list[Tensor]:
    """Return what the prefix depends on: all of the tower but its later blocks."""
    later = {id(tensor) for block in tower.blocks[first + 1 :] for tensor in (*block.parameters(), *block.buffers())}
    tensors = (*tower.module.named_parameters(), *tower.module.named_buffers())
    found = (held(tower.module, name) for name, tensor in tensors if id(tensor) not in later)
    return [plain for tensor in found for plain in plain_tensors(tensor)]
