"""What the core asks of a host: the questions that every adapter answers, and nothing about selection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor, nn

from .compat import is_compiling, partial_average
from .scoring import Scoring


class Attended(NamedTuple):
    """A block half done: between its attention and its MLP."""

    tokens: Tensor
    """After attention and its residual, in the host's own layout."""
    normed: Tensor
    """The block's input after its pre-attention norm, in the host's own layout."""
    rest: Any = None
    """Whatever the adapter needs to finish the block the host's way (attention maps, flags)."""
    num_prefix_tokens: int | None = None
    """Where it differs from call to call (single stream: the text tokens and the image [CLS])."""


@dataclass
class Projections:
    """The weights of one self-attention, `(D, D)` as in `nn.Linear`: views of the host's own parameters.

    Where a wrapper (LoRA) stands around one of them, computed from it by `affine`.
    """

    query: Tensor
    query_bias: Tensor | None
    key: Tensor
    key_bias: Tensor | None
    value: Tensor
    output: Tensor
    num_heads: int
    scale: float
    norm: nn.Module
    """The pre-attention norm."""
    output_scale: Tensor | None = None
    """LayerScale of the attention branch, `(D,)`."""
    query_norm: Callable[[Tensor], Tensor] | None = None
    """Norm of the queries per head, `(..., H, E)`; with one, keys cannot be folded and are computed."""
    key_norm: Callable[[Tensor], Tensor] | None = None
    nonlinear_values: str | None = None
    """Why `relevance="values"` cannot read this attention backwards, if it cannot."""

    @classmethod
    def fused(cls, weight: Tensor, bias: Tensor | None, **rest: Any) -> Projections:
        """From one `(3D, D)` projection in the order q, k, v and its bias; `rest` are the other fields."""
        query, key, value = weight.chunk(3, dim=0)
        query_bias, key_bias, _ = (None, None, None) if bias is None else bias.chunk(3, dim=0)
        return cls(query=query, query_bias=query_bias, key=key, key_bias=key_bias, value=value, **rest)

    @classmethod
    def separate(cls, query: Any, key: Any, value: Any, output: Any, **rest: Any) -> Projections:
        """From four linear layers; `rest` are the other fields."""
        (query, query_bias), (key, key_bias) = affine(query), affine(key)
        (value, _), (output, _) = affine(value), affine(output)
        return cls(query, query_bias, key, key_bias, value, output, **rest)


class TextRun(NamedTuple):
    """One run of a text encoder: what was called, with what, and what came out."""

    module: nn.Module
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any

    def matches(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call is this one: the same tensors, equal flags; flags that are off or absent are the same."""
        names = {name for name in (*self.kwargs, *kwargs) if name != "return_dict"}
        pairs = [(self.kwargs.get(name), kwargs.get(name)) for name in names]
        return len(args) == len(self.args) and all(_same(a, b) for a, b in (*zip(self.args, args), *pairs))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b
    return bool(a == b) or (a in (None, False) and b in (None, False))


class TextCall(NamedTuple):
    """The text of one call of the whole model, already encoded, and what the host need not compute again."""

    features: Tensor
    """`(B, D_text)`, what `guide` would be given."""
    remembered: tuple[TextRun, ...]
    images_per_text: int = 1
    """How many images come with each text (NLVR2: 2, all first images before all second ones)."""


@dataclass
class Tower:
    """One vision tower, taken apart."""

    adapter: Adapter
    module: nn.Module
    """What is called with pixels."""
    blocks: list[nn.Module]
    """The transformer blocks, in order."""
    num_prefix_tokens: int
    has_class_token: bool
    """Whether token 0 is an image [CLS]."""
    width: int
    batch_first: bool = True
    single_stream: bool = False
    """Whether text and image share one sequence: token 0 is the text [CLS], the last prefix token the image [CLS]."""
    head: nn.Module | None = None
    """What holds the way into the joint space, if anything does."""
    final_norm: nn.Module | None = None
    parts: dict[str, Any] = field(default_factory=dict)
    """Adapter-specific modules."""


Wrapper = Callable[..., Any]
"""`wrapper(module, name, original, *args, **kwargs)`: a module-level function that stands in for method `name`."""


class Adapter(Scoring):
    """One family of hosts. Subclass it in one file of `adapters/` and name it in the registry there.

    Adapters hold no state, so that models stay picklable: two instances of one class are the same adapter.
    """

    name: str = ""
    default_relevance: str = "keys"

    # Is this my model, and where are its parts?

    def towers(self, model: nn.Module) -> list[Tower]:
        """The vision towers of `model`, or `[]` if it is not of this family.

        Raises:
            TypeError: of this family, but something in it cannot be supported; says what.
        """
        raise NotImplementedError

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        """Methods outside of the blocks that must behave differently while selection is on."""
        return []

    # The two halves of a block, and its weights.

    def attend(self, tower: Tower, block: nn.Module, *args: Any, **kwargs: Any) -> Attended:
        """The block up to and with the residual of its attention branch; called with the block's own arguments."""
        raise NotImplementedError

    def finish(self, tower: Tower, block: nn.Module, tokens: Tensor, rest: Any) -> Any:
        """The MLP branch on `tokens`, returned as the host's block returns it."""
        raise NotImplementedError

    def carry(self, tower: Tower) -> dict[str, Any]:
        """Keyword arguments for `attend` that a block which checkpoints itself must find again when it runs anew."""
        return {}

    def projections(self, block: nn.Module) -> Projections:
        """Return the weights of this block's self-attention."""
        raise NotImplementedError

    def reads_patches(self, model: nn.Module, tower: Tower) -> str | None:
        """Who reads the patch tokens that the tower returns, in words; `None` if its prefix tokens alone are read."""
        return "they are what this tower returns"

    def as_output(self, tower: Tower, tokens: Tensor) -> Any:
        """Tokens as a block of this host returns them: what a block that is skipped returns of its input."""
        return tokens

    # The way between text and image.

    def text_width(self, tower: Tower) -> int:
        """The width that text features must have."""
        return tower.width

    def lift(self, tower: Tower, text: Tensor) -> Tensor:
        """Text features `(..., D_text)` to the width of the vision tower, without new parameters."""
        return text

    def read_back(self, tower: Tower, text: Tensor) -> Tensor:
        """Text features `(..., D_text)` to the direction in the residual stream that the host's head reads them from.

        For `relevance="values"`: `g = gamma_post * (P t)`, minus its mean.
        """
        return through_norm(self.lift(tower, text), tower.final_norm)

    def project(self, tower: Tower, patches: Tensor) -> Tensor:
        """Patches `(B, n, D)` through the final norm and projection into the joint space (`relevance="joint"`)."""
        raise ValueError(f'relevance="joint" needs a joint image-text space, which {self.name} towers do not have')

    # The text of a call.

    def text_of_call(
        self, model: nn.Module, tower: Tower, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TextCall | None:
        """The text that came with this call of `model.method`, encoded by the model's own text encoder."""
        return None

    def grid(self, tower: Tower, *args: Any, **kwargs: Any) -> tuple[int, int] | None:
        """Height and width, in patches, of what the tower is called with; `None` where only the host's code knows."""
        raise NotImplementedError

    def __reduce__(self) -> tuple[type[Adapter], tuple[()]]:
        return type(self), ()


def affine(linear: Any) -> tuple[Tensor, Tensor | None]:
    """Weight `(out, in)` and bias `(out,)` of a linear layer; with what a wrapper around it (LoRA) adds.

    What a wrapper does is read off from the unit vectors, which costs a product of the size of its weight with itself.
    """
    if all(name == "parametrizations" for name, _ in linear.named_children()):
        return linear.weight, linear.bias
    weight = linear.weight
    device = "cpu" if weight.is_meta else weight.device.type
    units = torch.eye(linear.in_features, device=weight.device, dtype=weight.dtype)
    with torch.autocast(device, enabled=False):
        bias = linear(torch.zeros_like(units[:1]))
        return (linear(units) - bias).T, bias[0]


def present(module: nn.Module | None) -> bool:
    """Whether an optional part of a host is there and does something."""
    return module is not None and not isinstance(module, nn.Identity)


def patch_grid(pixels: Tensor, embedding: Any) -> tuple[int, int]:
    """Height and width, in patches, of images `(B, 3, H, W)` that this convolution cuts into patches."""
    height, width = embedding.stride
    return pixels.shape[-2] // height, pixels.shape[-1] // width


def norm_eps(norm: nn.Module) -> float:
    return float(getattr(norm, "eps", 1e-5) or 1e-5)


def through_norm(direction: Tensor, norm: nn.Module | None) -> Tensor:
    """A direction after a LayerNorm to the direction before it: times the norm's scale, minus its mean."""
    if norm is None or not present(norm):
        return direction
    weight = getattr(norm, "weight", None)
    scaled = direction if weight is None else direction * gathered(weight)
    return scaled - scaled.mean(dim=-1, keepdim=True)


def gathered(weight: Tensor) -> Tensor:
    """A parameter that FSDP2 holds in shards, whole; every other tensor as it is.

    Only weights of modules that are not running need this. The gradient of each rank's share is averaged over the
    ranks, as FSDP2 does with every other gradient.
    """
    if is_compiling() or not hasattr(weight, "full_tensor"):
        return weight
    sharded: Any = weight
    return sharded.full_tensor(grad_placements=[partial_average()] * sharded.device_mesh.ndim)
