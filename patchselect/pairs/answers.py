"""What layers make of a few tokens: tells what they compute where their weights alone do not."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapter import Tower
from ..reading import evaluating, place_of

PATCHES = 4
"""Patches of the tokens that are tried."""
NUMBERS = 64
"""Numbers that are kept of each tensor."""


@dataclass(frozen=True)
class Answer:
    """What came out, in a few numbers, and where it was computed."""

    device: str
    dtype: str
    numbers: tuple[float, ...]

    @classmethod
    def of(cls, tower: Tower, *tensors: Tensor) -> Answer:
        """Keep numbers from all over these tensors."""
        place = place_of(tower.blocks[0])
        flat = (tensor.detach().flatten().to("cpu", torch.float64) for tensor in tensors)
        kept = tuple(number for tensor in flat for number in tensor[:: max(1, len(tensor) // NUMBERS)].tolist())
        return cls(torch.device(place["device"]).type, str(place["dtype"]).rpartition(".")[2], kept)

    def fits(self, other: Answer) -> bool:
        """Tell whether both are of one computation, up to what rounding makes of it, here or on another device."""
        if len(self.numbers) != len(other.numbers) or self.dtype != other.dtype:
            return False
        rounding = torch.finfo(getattr(torch, self.dtype)).eps
        slack = max(1e-5, 4 * rounding) if self.device == other.device else max(1e-3, 16 * rounding)
        mine, theirs = (torch.tensor(answer.numbers, dtype=torch.float64) for answer in (self, other))
        return bool((mine - theirs).abs().max() <= slack * theirs.abs().max())


@torch.no_grad()
def run_few_tokens(tower: Tower, blocks: Sequence[nn.Module]) -> None:
    """Run blocks, as they are in evaluation, on `(1, prefix + 4, D)` tokens that are always the same."""
    place = place_of(blocks[0])
    tokens = _waves(1, tower.num_prefix_tokens + PATCHES, tower.width).to(**place)
    tokens = tokens if tower.batch_first else tokens.transpose(0, 1)
    kind = torch.device(place["device"]).type
    with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
        whole = tokens
        for block in blocks:
            more = tower.adapter.sample_call(tower, block, whole)[1] if tower.rotary else {}
            found = evaluating(block)(tokens, *_nothing_for(block), **more)
            tokens = found[0] if isinstance(found, tuple) else found


@torch.no_grad()
def answer_of_embedding(tower: nn.Module, embedding: nn.Module) -> tuple[Tensor, ...]:
    """Return what the layer that makes tokens of pixels, with what stands around it, makes of one patch."""
    path = next(path for path, part in tower.named_modules() if part is embedding)
    layer = tower.get_submodule(path.split(".base_layer")[0])  # LoRA
    size = (embedding.in_channels, *embedding.kernel_size) if isinstance(embedding, nn.Conv2d) else None
    width = getattr(embedding, "in_features", None)
    if size is None and width is None:
        return ()
    return (evaluating(layer)(_waves(1, *(size or (width,))).to(**place_of(layer))),)


def _waves(*shape: int) -> Tensor:
    count = int(torch.Size(shape).numel())
    return torch.sin(0.7 * torch.arange(count, dtype=torch.float64)).view(shape)


def _nothing_for(block: nn.Module) -> list[None]:
    """Return `None` for each mask and flag that a block asks for without a default (transformers 4)."""
    wanted = list(inspect.signature(block.forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [None for one in wanted if one.kind in kinds and one.default is inspect.Parameter.empty]
