"""The op as a module, for people who write their own ViT."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .compat import in_functorch, is_compiling
from .functional import as_ratio, num_kept
from .reduction import Reduction, reduction_of
from .wiring.plan import check_rate


class PatchSelection(nn.Module):
    """Text-relevant patch selection as a layer without parameters or buffers (TRIPS, EMNLP 2022, §3.2).

    Put it between the attention and the MLP of a block:

        x = x + attention(norm1(x))
        x, kept = selection(x, relevance)
        x = x + mlp(norm2(x))

    Args:
        keep_rate: share of the patches that stay, in (0, 1]; 1 returns the very tokens that came.
        fusion: what becomes of the others: `"mean"`, `"sum"`, `"none"` or a `patchselect.Reduction`.
        num_prefix_tokens: tokens in front of the patches that take no part ([CLS], registers).

    Raises:
        ValueError: a rate, fusion or prefix outside of these ranges; tokens and relevance that do not fit; on the
            CPU and outside of compiled or exported programs also a relevance below 0 (elsewhere reading it would make
            the device wait).
    """

    def __init__(self, keep_rate: float = 0.7, fusion: str | Reduction = "mean", num_prefix_tokens: int = 1) -> None:
        super().__init__()
        self.keep_rate = check_rate(keep_rate)
        self.ratio = as_ratio(self.keep_rate)
        self.reduction = reduction_of(fusion)
        if self.reduction.reads_places:
            raise ValueError(
                f"fusion={self.reduction!r} reads the place of each patch in the image, which a layer alone does not "
                "know: use patchselect.apply on the whole tower"
            )
        if num_prefix_tokens < 0:
            raise ValueError(f"num_prefix_tokens must be 0 or more, got {num_prefix_tokens}")
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, tokens: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
        """Shorten tokens `(B, P + n, D)` by relevance `(B, n)`, >= 0; return them and the kept patches `(B, k)`."""
        if tokens.dim() != 3:
            raise ValueError(f"tokens must be (B, prefix tokens + patches, D), got {tuple(tokens.shape)}")
        patches = tokens.shape[1] - self.num_prefix_tokens
        if patches < 1 or relevance.shape != (tokens.shape[0], patches):
            raise ValueError(
                f"relevance must have one weight for each of the patches: tokens {tuple(tokens.shape)} with "
                f"{self.num_prefix_tokens} prefix tokens need ({tokens.shape[0]}, {patches}), "
                f"got {tuple(relevance.shape)}"
            )
        if _readable(relevance) and bool((relevance < 0).any()):
            raise ValueError(
                f"relevance must be weights of 0 or more, got {float(relevance.detach().min()):.3g}: pass scores "
                "through a softmax over the patches first"
            )
        keep = num_kept(patches, self.ratio)
        if keep == patches:
            return tokens, torch.arange(patches, device=tokens.device).expand(tokens.shape[0], -1)
        found = self.reduction.reduce(tokens, relevance, keep, self.num_prefix_tokens)
        return found.tokens, found.kept

    def extra_repr(self) -> str:
        return f"keep_rate={self.keep_rate}, fusion={self.reduction.name!r}, num_prefix_tokens={self.num_prefix_tokens}"


def _readable(x: Tensor) -> bool:
    """Tell whether reading a value costs nothing: it is a plain tensor on the CPU, and nothing traces the program."""
    if is_compiling() or type(x) is not Tensor or x.device.type != "cpu":
        return False
    return not in_functorch()
