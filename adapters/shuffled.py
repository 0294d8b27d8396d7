"""Language models of transformers that join squares of patches into one token: Idefics3, SmolVLM, InternVL.

Whole squares stay or go. Idefics3 and SmolVLM have a SigLIP tower of their own, InternVL a ViT with LayerScale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Sequence

from torch import Tensor, nn

from patchselect.adapter import Adapter, Attended, Tower, Wrapper, patch_grid
from patchselect.calls import bound
from patchselect.compat import is_compiling
from patchselect.prompts.encoded import features_in_call
from patchselect.prompts.layers import check_read
from patchselect.prompts.squares import call_tower_in_squares, laying_out, squares_of
from patchselect.weights import Projections, is_linear, rate
from patchselect.wiring.journey import followed

from .llava import Llava
from .siglip import TransformersSiglip
from .switches import advice_of_transformers

INTERNVL_BLOCK = {"attention", "mlp", "layernorm_before", "layernorm_after", "dropout"}


def call_features(module: Any, name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
    """Encode images: the squares that stayed are joined as those of a smaller image, and the empty ones cut off."""
    encoded = features_in_call(module, args, kwargs)
    if encoded is not None:
        return encoded
    wiring = module._patchselect
    host, tower = wiring.towers[0].adapter, wiring.towers[0]
    if not wiring.plan.selects:
        return original(*args, **kwargs)
    given = bound(("pixel_values",), args, kwargs)
    host.extra(module, given)
    asked = host.layers_read(module, given)
    if asked is not None:
        if not isinstance(asked, int):
            raise ValueError(f"vision_feature_layer={asked!r}: tokens of one layer can be joined in squares")
        check_read(wiring.plan.layers, len(tower.blocks), asked)
    with laying_out(host.side(module)), followed(wiring) as journeys:
        output = original(*args, **kwargs)
    squares = squares_of(journeys[-1], host.side(module))
    if squares is None:
        return output
    if isinstance(output, Tensor):  # up to transformers 4.57
        return output[:, : squares.shape[1]]
    output.pooler_output = host.cut(output.pooler_output, squares.shape[1])
    return output


class Shuffled(Llava):
    """What the models of this family share."""

    call_tower = staticmethod(call_tower_in_squares)
    call_features = staticmethod(call_features)

    def cut(self, features: Any, squares: int) -> Any:
        """Cut the tokens of each image, as the host returns them, to those of the first `squares` squares."""
        raise NotImplementedError

    def takes_flat_patches(self, tower: Tower) -> bool:
        return False

    def count(self, tower: Tower, core: Any, pixels: Tensor) -> int:
        """Return how many placeholders an image of pixels `(…, H, W)` has."""
        height, width = self.grid(tower, pixels)  # type: ignore[misc]
        return height * width // self.side(core) ** 2


def call_encoder(module: Any, name: str, original: Any, *args: Any, **kwargs: Any) -> Any:
    """Leave out a mask that hides nothing, which transformers up to 4.57 gives to all blocks."""
    mask = kwargs.get("attention_mask")
    if module._patchselect.plan.selects and mask is not None and not is_compiling() and not bool(mask.any()):
        kwargs["attention_mask"] = None
    return original(*args, **kwargs)


class Idefics3(Shuffled, TransformersSiglip):
    """`Idefics3Model`, `SmolVLMModel` and their heads; each tile of an image is an image of its own."""

    name = "transformers-idefics3"
    reads = ("Idefics3Model", "SmolVLMModel")
    image_arguments = ("pixel_values", "pixel_attention_mask")

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        return [*super().methods(model, towers), (towers[0].module.encoder, {"forward": call_encoder})]  # type: ignore[list-item]

    def tower_of(self, core: Any) -> nn.Module:
        return core.vision_model

    def projector_of(self, core: Any) -> nn.Module:
        return core.connector.modality_projection

    def language(self, core: Any) -> Any:
        return core.text_model

    def side(self, core: Any) -> int:
        return int(core.connector.scale_factor)

    def sizes(self, tower: Tower, core: Any, given: Mapping[str, Any]) -> list[int]:
        real = self._real(given["pixel_values"])
        count = self.count(tower, core, given["pixel_values"])
        held = self.placeholders(core, given).sum(dim=1).tolist()
        if len(real) != len(held):
            raise ValueError(f"pixel_values has {len(real)} rows, and the prompts {len(held)}")
        for row, (images, placeholders) in enumerate(zip(real, held)):
            if images * count != placeholders:
                raise ValueError(
                    f"row {row} of the prompts has {placeholders} image placeholders, and its {images} images (tiles) "
                    f"need {count} each: give prompts and images as the processor makes them"
                )
        return [count] * sum(real)

    def _real(self, pixels: Tensor) -> list[int]:
        """Return how many images each row has; those that are 0 everywhere are padding."""
        if pixels.dim() != 5:
            raise ValueError(f"pixel_values must be (rows, images, channels, height, width), got {tuple(pixels.shape)}")
        return [int(row) for row in (pixels != 0).flatten(2).any(dim=2).sum(dim=1)]

    def tokens_of(self, encoded: Any) -> Sequence[Tensor]:
        if isinstance(encoded, Tensor):
            return list(encoded)
        return [image for row in encoded.pooler_output if len(row) for image in row.split(self._each(encoded))]

    def _each(self, encoded: Any) -> int:
        return sum(map(len, encoded.pooler_output)) // len(encoded.last_hidden_state)

    def cut(self, features: Any, squares: int) -> Any:
        edge = math.isqrt(squares - 1) + 1
        return [row.view(-1, edge * edge, row.shape[-1])[:, :squares].flatten(0, 1) for row in features]

    def layers_read(self, core: Any, given: Mapping[str, Any]) -> Any:
        return None

    def extra(self, core: Any, given: Mapping[str, Any]) -> int:
        return 0


class InternVlTower(Adapter):
    """The ViT of InternVL: a [CLS] in front, LayerScale, and in large ones a norm of all queries and keys."""

    def towers(self, model: nn.Module) -> list[Tower]:
        blocks: Any = getattr(getattr(model, "encoder", None), "layer", None)
        if not isinstance(blocks, nn.ModuleList) or not hasattr(getattr(model, "embeddings", None), "cls_token"):
            return []
        if any({name for name, _ in block.named_children()} != INTERNVL_BLOCK for block in blocks):
            return []
        first: Any = blocks[0]
        norm = model.get_submodule("layernorm")
        if not hasattr(first, "lambda_1") or not is_linear(getattr(first.attention, "projection_layer", None)):
            return []
        width = first.attention.projection_layer.in_features
        return [Tower(self, model, list(blocks), 1, True, width, final_norm=norm)]

    def attend(self, tower: Tower, block: Any, hidden_states: Tensor) -> Attended:
        normed = block.layernorm_before(hidden_states)
        return Attended(self.residual(tower, block, hidden_states, block.attention(normed)[0]), normed)

    def residual(self, tower: Tower, block: Any, hidden: Tensor, branch: Tensor) -> Tensor:
        return block.lambda_1 * branch + hidden

    def finish(self, tower: Tower, block: Any, tokens: Tensor, rest: Any) -> Tensor:
        added = block.dropout(block.mlp(block.layernorm_after(tokens)))
        return (added if block.lambda_2 is None else block.lambda_2 * added) + tokens

    def instead_of_reentry(self, model: nn.Module, tower: Tower) -> str:
        return advice_of_transformers(model, tower.module) or super().instead_of_reentry(model, tower)

    def projections(self, block: Any) -> Projections:
        attention, heads = block.attention, block.attention.num_heads
        normalised = not isinstance(attention.k_norm, nn.Identity)

        def per_head(norm: nn.Module) -> Any:
            return lambda heads_of: norm(heads_of.flatten(-2)).unflatten(-1, (heads, -1))

        return Projections.separate(
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.projection_layer,
            num_heads=heads,
            scale=attention.scale,
            norm=block.layernorm_before,
            output_scale=block.lambda_1,
            query_norm=per_head(attention.q_norm) if normalised else None,
            key_norm=per_head(attention.k_norm) if normalised else None,
            dropout=rate(attention.attention_dropout),
        )

    def grid(self, tower: Tower, pixel_values: Tensor, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return patch_grid(pixel_values, tower.module.get_submodule("embeddings.patch_embeddings.projection"))

    def own_patches(self, tower: Tower) -> int | None:
        return int(tower.module.embeddings.patch_embeddings.num_patches)  # type: ignore[union-attr, arg-type]


class InternVl(Shuffled, InternVlTower):
    """`InternVLModel` and its head."""

    name = "transformers-internvl"
    reads = ("InternVLModel",)
    default_relevance = "keys"

    def side(self, core: Any) -> int:
        return round(1 / core.config.downsample_ratio)

    def sizes(self, tower: Tower, core: Any, given: Mapping[str, Any]) -> list[int]:
        pixels: Tensor = given["pixel_values"]
        if pixels.dim() != 4:
            raise ValueError(f"pixel_values must be (tiles, channels, height, width), got {tuple(pixels.shape)}")
        return [self.count(tower, core, pixels)] * len(pixels)

    def cut(self, features: Tensor, squares: int) -> Tensor:
        return features[:, :squares]

    def layers_read(self, core: Any, given: Mapping[str, Any]) -> Any:
        asked = given.get("vision_feature_layer")
        return core.config.vision_feature_layer if asked is None else asked

    def extra(self, core: Any, given: Mapping[str, Any]) -> int:
        name = "vision_feature_select_strategy"
        strategy = given.get(name) or getattr(core.config, name)
        if strategy != "default":
            raise ValueError(f'{name}={strategy!r} puts the [CLS] among the patches of a square: use "default"')
        return 0
