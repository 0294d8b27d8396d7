"""open_clip: its own `VisionTransformer` (3.x with `nn.MultiheadAttention`, newer with its own `Attention`) and the
timm towers that are plain ViTs, in `CLIP`, `CustomTextCLIP` and `CoCa`, or bare."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from patchselect.adapter import Adapter, Attended, TextCall, TextRun, Texts, Tower, Wrapper, bound, patch_grid, pooled
from patchselect.weights import (
    Projections,
    gathered,
    held,
    is_linear,
    matrix,
    output_of,
    place_of,
    pool_cost,
    present,
    rate,
    through_norm,
)
from patchselect.wiring.text_calls import call_with_text, recall_text
from patchselect.wiring.wording import refuse_masks

from .joint import into_joint, out_of_joint
from .switches import advice_of_set_grad_checkpointing
from .timm import TimmViT, partial_methods

BLOCK_PARTS = {"ln_1", "attn", "ls_1", "ln_2", "mlp", "ls_2"}


def _unit(heads: Tensor) -> Tensor:
    """Scale queries or keys `(..., H, E)` to length 1, for attention by scaled cosine."""
    return F.normalize(heads, dim=-1)


def _out(block: Any, heads: Tensor) -> Tensor:
    """Return the output of the attention of `block`, from what its heads read, `(B, N, D)`."""
    attention = block.attn
    scale = getattr(attention, "head_scale", None)
    if scale is not None:
        heads = (heads.unflatten(-1, (len(scale), -1)) * scale.squeeze(-1)).flatten(-2)
    branch = attention.out_proj(attention.ln_inner(heads) if hasattr(attention, "ln_inner") else heads)
    branch = attention.out_drop(branch) if hasattr(attention, "out_drop") else branch
    return block.ln_attn(branch) if hasattr(block, "ln_attn") else branch


def pool_of(visual: Any) -> Any:
    """Return the attentional pooler; releases before 2.16 have none."""
    return getattr(visual, "attn_pool", None)


class Paired(Adapter):
    """What every open_clip model shares: `model(image, text)`."""

    default_relevance = "values"

    def methods(self, model: Any, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        wrapped: list[tuple[nn.Module, Mapping[str, Wrapper]]] = [
            (tower.module, partial_methods(tower.module)) for tower in towers
        ]
        if hasattr(model, "encode_text"):
            methods: dict[str, Wrapper] = {"forward": call_with_text, self.text_method(model): recall_text}
            if hasattr(model, "get_logits"):
                methods["get_logits"] = call_with_text
            wrapped.append((model, methods))
        return wrapped

    @staticmethod
    def text_method(model: nn.Module) -> str:
        return "_encode_text" if hasattr(model, "_encode_text") else "encode_text"

    def text_of_call(
        self, model: Any, tower: Tower, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TextCall | None:
        given = bound(("image", "text", "image_latent", "image_embs"), args, kwargs)
        if given.get("text") is None or given.get("image") is None:
            return None
        name = self.text_method(model)
        captions = hasattr(model, "text_decoder")
        flags = {} if captions else {"normalize": True}
        result = getattr(model, name)(given["text"], **flags)
        run = TextRun(model, name, (given["text"],), flags, result)
        return TextCall(result[0] if captions else result, (run,), compares_all=True)

    def encode_images(self, model: Any, tower: Tower, images: Any, **kwargs: Any) -> Tensor:
        return pooled((model.encode_image if hasattr(model, "encode_image") else model)(images, **kwargs))

    def encode_texts(self, model: Any, tower: Tower, texts: Any) -> Texts:
        if not hasattr(model, "encode_text"):
            return super().encode_texts(model, tower, texts)
        return Texts(model.encode_text(texts))


class OpenClip(Paired):
    """Models whose vision tower is open_clip's own `VisionTransformer`, and that tower alone."""

    name = "open_clip"

    def towers(self, model: nn.Module) -> list[Tower]:
        visual: Any = getattr(model, "visual", model)
        blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
        if not isinstance(blocks, nn.ModuleList) or not hasattr(visual, "class_embedding"):
            return self._refuse(model, visual)
        for block in blocks:
            parts = {name for name, _ in block.named_children()} - {"ln_attn"}
            if parts - {"ls_1", "ls_2"} != BLOCK_PARTS - {"ls_1", "ls_2"} or not hasattr(block.attn, "in_proj_weight"):
                return []
        attention: Any = blocks[0].attn
        return [
            Tower(
                adapter=self,
                module=visual,
                blocks=list(blocks),
                num_prefix_tokens=1,
                has_class_token=True,
                width=attention.out_proj.out_features,
                batch_first=getattr(attention, "batch_first", True),
                final_norm=visual.ln_post,
            )
        ]

    def _refuse(self, model: nn.Module, visual: nn.Module) -> list[Tower]:
        package = type(visual).__module__.split(".")[0]
        if package == "open_clip" and not hasattr(visual, "trunk"):
            raise TypeError(f"{type(visual).__name__} of open_clip cannot be patched: it has no sequence of patches")
        return []

    def attend(
        self, tower: Tower, block: Any, x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Attended:  # fmt: skip
        if k_x is not None or v_x is not None:
            raise ValueError(
                f"{type(tower.module).__name__} was called with keys or values of its own (k_x, v_x), and selection "
                "needs plain self-attention over the image: call its blocks with x alone"
            )
        refuse_masks(tower, {"attn_mask": attn_mask})
        normed = block.ln_1(x)
        branch = block.ln_attn(block.attn(normed)) if hasattr(block, "ln_attn") else block.attention(normed)
        return Attended(self.residual(tower, block, x, branch), normed)

    def residual(self, tower: Tower, block: Any, hidden: Tensor, branch: Tensor) -> Tensor:
        return hidden + (block.ls_1(branch) if hasattr(block, "ls_1") else branch)

    def finish(self, tower: Tower, block: Any, tokens: Tensor, rest: Any) -> Tensor:
        branch = block.mlp(block.ln_2(tokens))
        return tokens + (block.ls_2(branch) if hasattr(block, "ls_2") else branch)

    def pooling_cost(self, tower: Tower) -> tuple[int, int]:
        return pool_cost(pool_of(tower.module))

    def reads_patches(self, model: nn.Module, tower: Tower) -> str | None:
        visual: Any = tower.module
        if pool_of(visual) is not None:
            return "an attention pools over all patches"
        average = getattr(visual, "global_average_pool", False)  # before 2.21
        if getattr(visual, "output_tokens", False) or getattr(visual, "pool_type", "tok") != "tok" or average:
            return "this model pools or returns all tokens"
        return None

    def instead_of_reentry(self, model: nn.Module, tower: Tower) -> str:
        return advice_of_set_grad_checkpointing(tower.module) or super().instead_of_reentry(model, tower)

    def projections(self, block: Any) -> Projections:
        attention = block.attn
        if hasattr(attention, "base_layer"):
            raise TypeError(
                f"the {type(attention).__name__} around the attention of this block hides its weights, which the "
                "relevance is computed from: merge the adapter into the model first"
            )
        num_heads = attention.num_heads
        scale: Any = (attention.out_proj.in_features // num_heads) ** -0.5
        query_norm = key_norm = nonlinear = None
        if present(getattr(attention, "ln_k", None)):
            query_norm, key_norm = attention.ln_q, attention.ln_k
        if getattr(attention, "logit_scale", None) is not None:
            query_norm = key_norm = _unit
            scale = attention.logit_scale.clamp(max=attention.logit_scale_max).exp()
        if getattr(attention, "head_scale", None) is not None:
            nonlinear = "its heads are scaled"
        elif present(getattr(attention, "ln_inner", None)) or present(getattr(block, "ln_attn", None)):
            nonlinear = "its attention output is normalised"
        return Projections.fused(
            held(attention, "in_proj_weight"),
            None if attention.in_proj_bias is None else held(attention, "in_proj_bias"),
            output=output_of(attention),
            num_heads=num_heads,
            scale=scale,
            norm=block.ln_1,
            output_scale=held(block.ls_1, "gamma") if hasattr(getattr(block, "ls_1", None), "gamma") else None,
            query_norm=query_norm,
            key_norm=key_norm,
            nonlinear_values=nonlinear,
            out=functools.partial(_out, block),
            dropout=rate(getattr(attention, "attn_drop", getattr(attention, "dropout", None))),
        )

    def text_width(self, tower: Tower) -> int:
        visual: Any = tower.module
        if visual.proj is not None:
            return visual.proj.shape[1]
        return tower.width if pool_of(visual) is None else visual.attn_pool.query.shape[1]

    def lift(self, tower: Tower, text: Tensor) -> Tensor:
        pooled = self._to_pooled(tower, text)
        return pooled if pool_of(tower.module) is None else self._through_pool(tower, pooled)

    def read_back(self, tower: Tower, text: Tensor) -> Tensor:
        visual: Any = tower.module
        goal = through_norm(self._to_pooled(tower, text), visual.ln_post)
        if pool_of(visual) is None:
            return goal
        return through_norm(self._through_pool(tower, goal), visual.attn_pool.ln_k)

    def _to_pooled(self, tower: Tower, text: Tensor) -> Tensor:
        """Lead from the joint space to where the tower pools: through the projection, transposed."""
        return out_of_joint(tower.module, text)

    def _through_pool(self, tower: Tower, direction: Tensor) -> Tensor:
        """Lead back through the value-output path of the attentional pooler."""
        visual: Any = tower.module
        if getattr(visual, "attn_pool_contrastive", None) is not None:
            raise ValueError('text cannot be read back through two attentional poolers: use guidance="image"')
        attention = visual.attn_pool.attn
        if attention.v_proj_weight is None:
            value = gathered(held(attention, "in_proj_weight")).chunk(3)[2]
        else:
            value = gathered(held(attention, "v_proj_weight"))
        output = gathered(output_of(attention))
        return direction.to(output.dtype) @ output @ value

    def project(self, tower: Tower, patches: Tensor) -> Tensor:
        visual: Any = tower.module
        if pool_of(visual) is not None:
            raise ValueError('relevance="joint" is not offered for attentional pooling: use "values" or "keys"')
        return into_joint(visual, visual.ln_post(patches))

    def grid(self, tower: Tower, x: Tensor, *args: Any, **kwargs: Any) -> tuple[int, int]:
        return patch_grid(x, tower.module.get_submodule("conv1"))


class OpenClipTimm(Paired, TimmViT):
    """open_clip models on a plain ViT of timm (the SigLIP family, `gap` and hybrid-stem towers)."""

    name = "open_clip-timm"

    def towers(self, model: nn.Module) -> list[Tower]:
        visual: Any = getattr(model, "visual", model)
        trunk = getattr(visual, "trunk", None)
        if not isinstance(trunk, nn.Module) or not isinstance(getattr(visual, "head", None), nn.Module):
            return []
        reason = self.why_not(trunk)
        if reason is not None:
            raise TypeError(f"the {type(trunk).__name__} of this {type(model).__name__} cannot be patched: {reason}")
        tower = self.tower(trunk)
        tower.head = visual
        return [tower]

    def _projection(self, tower: Tower) -> Any:
        """Return the linear map from the pooled image to the joint space, if there is one."""
        visual: Any = tower.head
        if is_linear(getattr(visual.head, "proj", None)):
            return visual.head.proj
        if len(visual.head):
            kinds = ", ".join(type(part).__name__ for part in visual.head)
            raise ValueError(f'text cannot be read back through a head of {kinds}: use guidance="image"')
        return visual.trunk.head if is_linear(visual.trunk.head) else None

    def text_width(self, tower: Tower) -> int:
        projection = self._projection(tower)
        return tower.width if projection is None else projection.out_features

    def lift(self, tower: Tower, text: Tensor) -> Tensor:
        projection = self._projection(tower)
        if projection is None:
            return text
        weight = matrix(projection)
        return text.to(weight.dtype) @ weight

    def read_back(self, tower: Tower, text: Tensor) -> Tensor:
        return super().read_back(tower, self.lift(tower, text))

    def project(self, tower: Tower, patches: Tensor) -> Tensor:
        projection = self._projection(tower)
        pooled = super().project(tower, patches)
        return pooled if projection is None else projection(pooled.to(place_of(projection)["dtype"]))
