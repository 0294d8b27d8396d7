"""OpenAI CLIP (`clip.model.CLIP`) with a ViT, and its vision tower alone; blocks take sequence-first tokens.

LAVIS' `clip_vit` has the same blocks in a tower that returns all tokens, without norm and projection behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from patchselect.adapter import (
    Adapter,
    Attended,
    Reader,
    TextCall,
    TextRun,
    Texts,
    Tower,
    Wrapper,
    bound,
    patch_grid,
)
from patchselect.weights import Projections, held, output_of, rate
from patchselect.wiring.text_calls import call_with_text, recall_text
from patchselect.wiring.wording import refuse_masks

from .joint import into_joint, joint_width, out_of_joint

BLOCK_PARTS = {"attn", "ln_1", "mlp", "ln_2"}
TOWER_PARTS = ("conv1", "class_embedding", "positional_embedding", "ln_pre")


def is_tower(module: Any, held_in: Any = nn.Sequential) -> bool:
    """Tell whether this is OpenAI CLIP's ViT: blocks of four parts around an `nn.MultiheadAttention`."""
    blocks: Any = getattr(getattr(module, "transformer", None), "resblocks", None)
    if not isinstance(blocks, held_in) or not all(hasattr(module, part) for part in TOWER_PARTS):
        return False
    return len(blocks) > 0 and all(
        {name for name, _ in block.named_children()} == BLOCK_PARTS
        and isinstance(block.attn, nn.MultiheadAttention)
        and block.attn.in_proj_weight is not None
        for block in blocks
    )


class ClipReader(Reader):
    """OpenAI's `CLIP` around its tower, or nobody around a tower alone."""

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        if not hasattr(model, "encode_text"):
            return []
        return [(model, {"forward": call_with_text, "encode_text": recall_text})]

    def text_width(self, tower: Tower) -> int:
        return joint_width(tower.module, tower.width)

    def text_of_call(
        self, model: Any, tower: Tower, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TextCall | None:
        text = bound(("image", "text"), args, kwargs).get("text")
        if text is None:
            return None
        result = model.encode_text(text)
        return TextCall(result, (TextRun(model, "encode_text", (text,), {}, result),), compares_all=True)

    def encode_images(self, model: Any, tower: Tower, images: Any, **kwargs: Any) -> Tensor:
        return (model.encode_image if hasattr(model, "encode_image") else model)(images, **kwargs)

    def encode_texts(self, model: Any, tower: Tower, texts: Any) -> Texts:
        if not hasattr(model, "encode_text"):
            return super().encode_texts(model, tower, texts)
        return Texts(model.encode_text(texts))


class OpenAiClip(Adapter):
    """`model(image, text)`, `model.encode_image(image)` under `guide`, or the bare `VisionTransformer`.

    Text features are what `encode_text` gives, in the joint space; a tower without `proj` takes its own width. Tokens
    are `(N, B, D)` inside of `transformer`.
    """

    name = "openai-clip"
    default_relevance = "values"

    def towers(self, model: nn.Module) -> list[Tower]:
        visual: Any = getattr(model, "visual", model)
        if hasattr(visual, "attnpool") and hasattr(visual, "layer4") and hasattr(model, "token_embedding"):
            raise TypeError(f"{type(visual).__name__} cannot be patched: it has no sequence of patches")
        return [self.sequence_first_tower(visual, ClipReader())] if is_tower(visual) else []

    def sequence_first_tower(self, module: Any, reader: Reader) -> Tower:
        """Return a ViT of OpenAI's code taken apart."""
        return Tower(
            adapter=self,
            module=module,
            blocks=list(module.transformer.resblocks),
            num_prefix_tokens=1,
            has_class_token=True,
            width=module.class_embedding.shape[-1],
            batch_first=False,
            final_norm=getattr(module, "ln_post", None),
            reader=reader,
        )

    def attend(self, tower: Tower, block: Any, x: Tensor, text_mask: Tensor | None = None) -> Attended:
        refuse_masks(tower, {"text_mask": text_mask})
        normed = block.ln_1(x)
        return Attended(x + block.attention(normed), normed)

    def finish(self, tower: Tower, block: Any, tokens: Tensor, rest: Any) -> Tensor:
        return tokens + block.mlp(block.ln_2(tokens))

    def projections(self, block: Any) -> Projections:
        attention = block.attn
        return Projections.fused(
            held(attention, "in_proj_weight"),
            held(attention, "in_proj_bias"),
            output=output_of(attention),
            num_heads=attention.num_heads,
            scale=attention.head_dim**-0.5,
            norm=block.ln_1,
            out=attention.out_proj,
            dropout=rate(attention.dropout),
        )

    def grid(self, tower: Tower, x: Tensor, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return patch_grid(x, tower.module.get_submodule("conv1"))

    def lift(self, tower: Tower, text: Tensor) -> Tensor:
        return out_of_joint(tower.module, text)

    def project(self, tower: Tower, patches: Tensor) -> Tensor:
        return into_joint(tower.module, patches if tower.final_norm is None else tower.final_norm(patches))
