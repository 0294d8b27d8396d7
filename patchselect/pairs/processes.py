"""Work shared out over the processes of a `torch.distributed` group, and one matrix out of its parts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

AT_ONCE = 2**26
"""Bytes of the matrix that travel together."""


def share(distributed: bool) -> tuple[int, int]:
    """Return rank and number of processes; `(0, 1)` where there is no group, or none is wanted."""
    if not distributed or not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather(rows: dict[int, Tensor], columns: int, device: torch.device, world: int) -> Tensor:
    """Collect rows by the place of their first one, from every process, in one `(N, columns)` matrix on the CPU."""
    total = max((start + len(part) for start, part in rows.items()), default=0)
    if world > 1:
        device = device if dist.get_backend() == "nccl" else torch.device("cpu")
        end = torch.tensor(total, device=device)
        dist.all_reduce(end, dist.ReduceOp.MAX)
        total = int(end)
    matrix = torch.zeros(total, columns)
    for start, part in rows.items():
        matrix[start : start + len(part)] = part
    if world > 1:
        step = max(1, AT_ONCE // (4 * columns))
        for low in range(0, total, step):
            block = matrix[low : low + step].to(device)
            dist.all_reduce(block)
            matrix[low : low + step] = block.cpu()
    return matrix
