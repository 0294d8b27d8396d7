"""The encoder of ViTMAE, which drops patches at random and hands on the others in random order, in training or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from patchselect.adapter import Tower, Wrapper, patch_grid
from patchselect.wiring.journey import note_grid

from .layouts import is_tower, patches_of
from .plain import TransformersPlain


def note_patches(embeddings: Any, name: str, original: Any, pixel_values: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `ViTMAEEmbeddings.forward`, and remember which patches it has kept and in which order."""
    result = original(pixel_values, *args, **kwargs)
    tokens, _, places = result
    order = places.argsort(dim=1)[:, : tokens.shape[1] - 1]
    note_grid(embeddings._patchselect.towers[0], patch_grid(pixel_values, patches_of(embeddings)), order)
    return result


class TransformersMae(TransformersPlain):
    """`ViTMAEModel`. The decoder of `ViTMAEForPreTraining` reads a fixed number of patches, and is refused."""

    name = "transformers-mae"

    def knows(self, module: Any) -> bool:
        return is_tower(module) and hasattr(module.embeddings, "random_masking")

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        embeddings: Any = towers[0].module.embeddings
        return [*super().methods(model, towers), (embeddings, {"forward": note_patches})]

    def own_patches(self, tower: Tower) -> int | None:
        """Return how many patches are left after the random masking."""
        count, embeddings = super().own_patches(tower), tower.module.embeddings
        return None if count is None else int(count * (1 - embeddings.config.mask_ratio))  # type: ignore[union-attr, operator, arg-type]

    def grid(self, tower: Tower, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        return None  # the embeddings alone know, and note it
