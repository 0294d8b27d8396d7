"""Features of all processes of a group, as candidates."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_features(features: Tensor) -> Tensor:
    """Gather the rows of all processes of the initialised `torch.distributed` group, those of this one in front.

    Candidates for `itc_loss` and `srcl_loss` in distributed training: with a mean loss per process and the averaging of
    `DistributedDataParallel`, the gradients are those of one process with the whole batch (they flow back to the
    processes that the rows came from). Every process must have the same number of rows. Without a group the features
    come back as they are.

    Args:
        features: `(N, D)`.

    Returns:
        `(N * processes, D)`.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return features
    rows, rank = _AllRows.apply(features), dist.get_rank()
    return torch.cat([rows[rank], *rows[:rank], *rows[rank + 1 :]])


class _AllRows(torch.autograd.Function):
    """`(N, D)` of this process to `(processes, N, D)`; backward sums what all processes want of these rows.

    In place of `torch.distributed.nn.functional.all_gather`, whose backward over gloo, a scatter per process, now and
    then takes the process down with it.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        rows = [torch.empty_like(features, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, features.contiguous())
        return torch.stack(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]
