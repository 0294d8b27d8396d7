"""How tests call a host whose images a text guides: its image side, as a function and as one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import patchselect

from . import Case, build, take, texts


def encode(case: Case, images, text: Tensor | None = None, pairing: str = "paired", model=None) -> Tensor:
    """Return image features, made without gradients; `text` guides them if it is given."""
    model = case.model if model is None else model
    with torch.no_grad():
        if text is None:
            return case.image_side(model, images)
        with patchselect.guide(model, text, pairing=pairing):
            return case.image_side(model, images)


def tokens_of(tower, output) -> Tensor:
    """`(B, N, D)` from what a block returned."""
    tokens = output[0] if isinstance(output, tuple) else output
    return tokens if tower.batch_first else tokens.transpose(0, 1)


def check_rows_are_their_own(case: Case, guidance: str) -> None:
    """Encode four rows of a patched host, in another order and one by one: each comes out as it was."""
    images, text = case.images(4), texts(case, 4)

    def rows(order) -> Tensor:
        return encode(case, take(images, order), text[order] if guidance == "text" else None)

    whole, order = rows(torch.arange(4)), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(rows(order), whole[order], rtol=1e-4, atol=1e-5)
    for row in range(4):
        torch.testing.assert_close(rows(torch.tensor([row])), whole[row : row + 1], rtol=1e-4, atol=1e-5)


class Guided(nn.Module):
    """A whole program: pixels and text features in, image features out."""

    def __init__(self, case):
        super().__init__()
        self.model, self.image_side = case.model, case.image_side

    def forward(self, images, text):
        with patchselect.guide(self.model, text):
            return self.image_side(self.model, images)


def ready(name, **options):
    """Return a host that selects and has nothing to train, for what compiles or exports it."""
    case = build(name)
    case.model.requires_grad_(False)
    patchselect.apply(case.model, 0.5, **options)
    return case
