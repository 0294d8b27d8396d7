"""Patches of outlying norm, and whether a selection keeps them.

Large ViTs turn some background patches into registers: tokens of high norm that hold what the whole image is about
(Darcet et al., ICLR 2024, arXiv 2309.16588). A selection that drops them may hurt, one that keeps nothing else as well.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.host import Host
from patchselect.adapter import Tower
from patchselect.wiring.plan import check_layers
from patchselect.wiring.towers import find_towers


@dataclass
class Diagnosis:
    """Counts over images, by (block of the norms, block of the selection)."""

    counts: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    """Patches, outliers, kept patches, kept outliers."""

    def add(self, norms_in: int, selection_in: int, outlying: Tensor, kept: Tensor) -> None:
        """Count one batch.

        Args:
            norms_in: block whose input told the outliers.
            selection_in: block of the selection.
            outlying: `(B, n)` bool.
            kept: `(B, k)` places in the grid; -1, a fused token, does not count.
        """
        survived = kept_mask(kept, outlying.shape[1])
        new = (outlying.numel(), outlying.sum(), survived.sum(), (outlying & survived).sum())
        total = self.counts.setdefault((norms_in, selection_in), [0, 0, 0, 0])
        for place, value in enumerate(new):
            total[place] += int(value)

    def report(self) -> list[dict[str, Any]]:
        """Return shares in [0, 1], `None` where nothing was there to be counted."""
        return [
            {
                "norms_in": norms_in,
                "selection_in": selection_in,
                "share": outliers / patches,
                "share_of_kept": both / kept if kept else None,
                "kept_share": both / outliers if outliers else None,
                "chance": kept / patches,
            }
            for (norms_in, selection_in), (patches, outliers, kept, both) in sorted(self.counts.items())
        ]


def kept_mask(kept: Tensor, patches: int) -> Tensor:
    """Return `(B, patches)` bool of the places in `kept` `(B, k)`; -1 is nowhere."""
    board = torch.zeros(len(kept), patches + 1, dtype=torch.bool, device=kept.device)
    return board.scatter(1, torch.where(kept < 0, patches, kept), True)[:, :-1]


def outliers(patches: Tensor, multiple: float) -> Tensor:
    """Return `(B, n)` bool: whose norm is above `multiple` times the median of its image; patches `(B, n, D)`."""
    norms = patches.float().norm(dim=-1)
    return norms > multiple * norms.median(dim=1, keepdim=True).values


@contextmanager
def inputs_of_blocks(tower: Tower, indices: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the patches `(B, n, D)` that enter these blocks."""
    found: dict[int, Tensor] = {}

    def note(index: int) -> Callable[..., None]:
        def hook(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else next(iter(kwargs.values()))
            tokens = hidden if tower.batch_first else hidden.transpose(0, 1)
            found[index] = tokens[:, tower.num_prefix_tokens :].detach()

        return hook

    hooks = [tower.blocks[i].register_forward_pre_hook(note(i), with_kwargs=True) for i in indices]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def diagnose(
    host: Host,
    pixels: Tensor,
    diagnoses: Mapping[Any, Diagnosis],
    options: argparse.Namespace,
    classes: Tensor,
    selecting: Callable[..., AbstractContextManager[Any]],
) -> None:
    """Find which patches are outliers without selection, at each selection layer and at the end, and who keeps them.

    Args:
        host: the model, without selection.
        pixels: `(B, 3, H, W)`.
        diagnoses: to be filled in, by arm; the arm without selection is passed over.
        options: `layers`, `outlier` and `seed`.
        classes: `(classes, E)`.
        selecting: `selecting(host, arm, layers, classes)` patches the model and yields its handle.
    """
    (tower,) = find_towers(host.model)
    depth = len(tower.blocks)
    looked_at = sorted({*check_layers(options.layers, depth), depth - 1})
    with inputs_of_blocks(tower, looked_at) as inputs:
        host.encode_image(pixels)
    outlying = {index: outliers(patches, options.outlier) for index, patches in inputs.items()}
    for arm, diagnosis in diagnoses.items():
        if arm.guidance == "none":
            continue
        torch.manual_seed(options.seed)
        with selecting(host, arm, options.layers, classes) as handle, handle.record() as trace:
            host.encode_image(pixels)
        for entry in trace:
            for norms_in in {entry.layer, depth - 1}:
                diagnosis.add(norms_in, entry.layer, outlying[norms_in], entry.kept)
