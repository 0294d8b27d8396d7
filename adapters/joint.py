"""Ways between a tower and the joint space that several families have: a parameter `proj`, and a pool by attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patchselect.weights import gathered, held


def joint_width(tower: Any, width: int) -> int:
    """Return the width of the joint space behind `tower.proj`; `width` where there is none."""
    proj = getattr(tower, "proj", None)
    return width if proj is None else int(proj.shape[1])


def out_of_joint(tower: Any, text: Tensor) -> Tensor:
    """Lead texts `(..., E)` to the width of a tower, through its `proj`, transposed; as they are without one."""
    if getattr(tower, "proj", None) is None:
        return text
    proj = gathered(held(tower, "proj"))
    return text.to(proj.dtype) @ proj.T


def into_joint(tower: Any, normed: Tensor) -> Tensor:
    """Lead tokens `(..., D)` behind the final norm into the joint space, through `proj`; as they are without one."""
    if getattr(tower, "proj", None) is None:
        return normed
    proj = gathered(held(tower, "proj"))
    return normed.to(proj.dtype) @ proj


def through_pool(attention: Any, text: Tensor) -> Tensor:
    """Lead a direction backwards through the values and the output of an `nn.MultiheadAttention` that pools."""
    value, output = (gathered(held(attention, name)) for name in ("in_proj_weight", "out_proj.weight"))
    return text.to(value.dtype) @ output @ value.chunk(3)[2]


def pooled_alone(pool: Any, patches: Tensor) -> Tensor:
    """Pool each of the patches `(B, n, D)` as if it were the only one: `(B, n, E)`."""
    return pool(patches.flatten(0, 1).unsqueeze(1)).unflatten(0, patches.shape[:2])  # type: ignore[no-any-return]
