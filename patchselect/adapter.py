"""Everything that the core asks of a host, on one page: where its parts are, what its blocks do, how its text arrives.

Subclass `Adapter`, without state or selection logic, for a new family of models (CONTRIBUTING.md has an example).
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, Tuple

from torch import Tensor, nn

from .attention import attention_branch
from .calls import bound, named, padded, patch_grid, pooled, refuse_extras  # noqa: F401 (adapters find them here)
from .compat import KEEPS_GRAPH
from .texts import TextCall, TextRun, Texts
from .tower import Attended, Images, Reader, Tower, Turn, Wrapper
from .weights import Projections, through_norm

Arguments = Tuple[Tuple[Any, ...], Mapping[str, Any]]
"""Positional and keyword arguments of a block."""

__all__ = [
    "Adapter",
    "Attended",
    "Images",
    "Reader",
    "TextCall",
    "TextRun",
    "Texts",
    "Tower",
    "Turn",
    "Wrapper",
    "bound",
    "named",
    "patch_grid",
    "pooled",
]


class Adapter:
    """One family of hosts: the questions that it must answer, and those that have a default.

    It must answer `towers`, `attend`, `finish`, `projections` and `grid`; all else has a default that is right for a
    bare pre-norm ViT. Adapters hold no state, so that models stay picklable: instances of one class are the same.
    """

    name: str = ""
    default_relevance: str = "keys"

    def relevance_for(self, tower: Tower) -> str:
        """Return the relevance by which this tower reads a text where none is asked for."""
        return self.default_relevance

    # Is this my model, and where are its parts?

    def towers(self, model: nn.Module) -> list[Tower]:
        """Return the vision towers of `model`, or `[]` if it is not of this family.

        Raises:
            TypeError: of this family, but something in it cannot be supported; says what. Other adapters are asked
                before anybody hears of it.
        """
        raise NotImplementedError

    def methods(self, model: nn.Module, towers: list[Tower]) -> list[tuple[nn.Module, Mapping[str, Wrapper]]]:
        """Return the methods outside of the blocks that must behave differently while selection is on."""
        return towers[0].reader.methods(model, towers)

    # The two halves of a block, and its weights.

    def attend(self, tower: Tower, block: nn.Module, *args: Any, **kwargs: Any) -> Attended:
        """Run the block up to the residual of its attention branch; called with the block's own arguments."""
        raise NotImplementedError

    def residual(self, tower: Tower, block: nn.Module, hidden: Tensor, branch: Tensor) -> Tensor:
        """Add to the block's input what its attention gave, through LayerScale and stochastic depth, if it has them."""
        return hidden + branch

    def attend_sized(self, tower: Tower, block: nn.Module, sizes: Tensor, *args: Any, **kwargs: Any) -> Attended:
        """Run the block up to the same point, with an attention that counts `sizes` `(B, N)`: a key of size s counts s.

        Called with the block's own arguments. The default computes with `qkv` and `out` of `projections`.
        """
        refuse_extras(args[1:], kwargs if args else dict(list(kwargs.items())[1:]))
        return self.with_sizes(tower, block, sizes, args[0] if args else next(iter(kwargs.values())))

    def with_sizes(
        self, tower: Tower, block: nn.Module, sizes: Tensor, hidden: Tensor, mask: Tensor | None = None,
        turn: Turn | None = None,
    ) -> Attended:  # fmt: skip
        """Run the block's input through norm, attention that counts sizes, and residual."""
        weights = self.projections(block)
        normed = weights.norm(hidden)
        first = normed if tower.batch_first else normed.transpose(0, 1)
        branch, keys = attention_branch(weights, first, sizes, block.training, mask, turn)
        branch = branch if tower.batch_first else branch.transpose(0, 1)
        return Attended(self.residual(tower, block, hidden, branch), normed, keys=keys)

    def finish(self, tower: Tower, block: nn.Module, tokens: Tensor, rest: Any) -> Any:
        """Run the MLP branch on `tokens` and return what the host's block returns."""
        raise NotImplementedError

    def run(self, tower: Tower, block: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block that neither selects nor counts; its arguments may be what `at_places` has made of its own."""
        return original(*args, **kwargs)

    def sample_call(self, tower: Tower, block: nn.Module, tokens: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments on which `apply` compares the two halves with `block.forward`; others it needs are None."""
        return (tokens,), {}

    # Rotary towers: places follow the tokens.

    def turn(self, tower: Tower, block: nn.Module, *args: Any, **kwargs: Any) -> Turn | None:
        """Return how the block turns queries and keys by the places of their tokens, given its own arguments."""
        return None

    def at_places(self, tower: Tower, block: nn.Module, places: Tensor, *args: Any, **kwargs: Any) -> Arguments:
        """Return a block's own arguments, made by the host for all patches of the image, for those that are left.

        Args:
            tower: the tower.
            block: one of its blocks, after the first that shortens the sequence.
            places: `(B, m)`: which patch of the image each patch token of now is, or the one that a merged token has
                its place from; -1 is a fused token, which has no place and is not turned, as prefix tokens are not.
            args: of the block, the tokens first.
            kwargs: of the block.
        """
        raise NotImplementedError

    # Padded towers: images of several sizes in one batch, the patches of each in front of its padding.

    def images(self, tower: Tower, *args: Any, **kwargs: Any) -> Images | None:
        """Return the sizes of the images that the tower is called with; `None` if all have one grid, without padding.

        Raises:
            ValueError: padding comes before a patch.
        """
        return None

    def fit_masks(self, tower: Tower, block: nn.Module, real: Tensor, *args: Any, **kwargs: Any) -> Arguments:
        """Return a block's own arguments with masks that show the tokens `real` `(B, N)` of now, and hide padding."""
        raise NotImplementedError

    # Packed towers: images one behind the other in one sequence `(N, D)`, of which each image is selected from alone.

    def order(self, tower: Tower, grid: tuple[int, int]) -> Tensor:
        """Return `(h * w,)`: the place in the grid of each token of an image, in the order of the sequence."""
        raise NotImplementedError

    def at_rows(
        self, tower: Tower, block: nn.Module, rows: Tensor, counts: list[int], *args: Any, **kwargs: Any
    ) -> Arguments:
        """Return a block's own arguments, made by the host for all patches of all images, for those that are left.

        Args:
            tower: the tower.
            block: one of its blocks, after the first that shortens the sequence.
            rows: `(N',)`: which token of the whole sequence each token of now is; -1 is a fused token, without a place.
            counts: how many tokens each image has now.
            args: of the block, the tokens first.
            kwargs: of the block.
        """
        raise NotImplementedError

    def turn_of_rows(self, tower: Tower, block: nn.Module, rows: Tensor, *args: Any, **kwargs: Any) -> Turn | None:
        """Return how the block turns the tokens `rows` `(R, n)` of its sequence, given its own arguments."""
        return None

    def projections(self, block: nn.Module) -> Projections:
        """Return the weights of the block's attention."""
        raise NotImplementedError

    def carry(self, tower: Tower) -> dict[str, Any]:
        """Return keyword arguments for `attend` that a block which checkpoints itself must find when it runs again."""
        return {}

    def instead_of_reentry(self, model: nn.Module, tower: Tower) -> str:
        """Return what to do, in the installed release, in place of reentrant checkpointing."""
        return KEEPS_GRAPH or "turn gradient checkpointing off"

    def as_output(self, tower: Tower, tokens: Tensor) -> Any:
        """Return tokens as a block of this host returns them: what a block that is skipped returns of its input."""
        return tokens

    # What the tower is called with, and who reads what it returns.

    def grid(self, tower: Tower, *args: Any, **kwargs: Any) -> tuple[int, int] | None:
        """Return height and width, in patches, of what the tower is called with; `None` where only the host knows."""
        raise NotImplementedError

    def own_patches(self, tower: Tower) -> int | None:
        """Return the number of patches of an image of the size that the model was built for, if it tells one."""
        embed = getattr(tower.module, "patch_embed", None)
        if getattr(embed, "num_patches", None):
            return int(embed.num_patches)  # type: ignore[union-attr, arg-type]
        for name, tensor in tower.module.named_parameters():
            if "pos" in name and "embed" in name and tensor.dim() > 1:
                return tensor.shape[-2] - tower.num_prefix_tokens
        return None

    def patch_embedding(self, tower: Tower) -> nn.Module | None:
        """Return the layer that makes tokens of pixels, whose weights each patch meets once."""
        inside = {id(part) for block in tower.blocks for part in block.modules()}
        outside = (part for part in tower.module.modules() if id(part) not in inside)
        return next((part for part in outside if isinstance(part, nn.Conv2d)), None)

    def takes_flat_patches(self, tower: Tower) -> bool:
        """Tell whether the tower is called with patches `(N, n, values)` that are cut out already."""
        return False

    def span(self, tower: Tower, index: int, tokens: int) -> int:
        """Return how many of the `tokens` of an image each attends to in block `index`, at most."""
        return tokens

    def pooling_cost(self, tower: Tower) -> tuple[int, int]:
        """Return the multiply-adds of an attentional pooler behind the tower: once an image, and per token."""
        return 0, 0

    def reads_patches(self, model: nn.Module, tower: Tower) -> str | None:
        """Say who reads the patch tokens that the tower returns; `None` if its prefix tokens alone are read."""
        return "they are what this tower returns"

    # From a text to the tower.

    def text_width(self, tower: Tower) -> int:
        """Return the width that text features must have."""
        return tower.reader.text_width(tower)

    def lift(self, tower: Tower, text: Tensor) -> Tensor:
        """Lift text features `(..., D_text)` to the width of the vision tower, without new parameters."""
        return text

    def read_back(self, tower: Tower, text: Tensor) -> Tensor:
        """Map text features `(..., D_text)` to the direction in the residual stream that the head reads them from.

        For `relevance="values"`: `g = gamma_post * (P t)`, minus its mean.
        """
        return through_norm(self.lift(tower, text), tower.final_norm)

    def project(self, tower: Tower, patches: Tensor) -> Tensor:
        """Map patches `(B, n, D)` through the final norm and projection into the joint space."""
        raise ValueError(f'relevance="joint" needs a joint image-text space, which {self.name} towers do not have')

    # Texts of calls, and pairs. The answers are those of the tower's reader.

    def text_of_call(
        self, model: nn.Module, tower: Tower, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> TextCall | None:
        """Return the text that came with this call of `model.method`: see `Reader.text_of_call`."""
        return tower.reader.text_of_call(model, tower, method, args, kwargs)

    def fuses(self, model: nn.Module, tower: Tower, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether this call reads each image beside the text of its row: see `Reader.fuses`."""
        return tower.reader.fuses(model, tower, method, args, kwargs)

    def encode_images(self, model: nn.Module, tower: Tower, images: Any, **kwargs: Any) -> Tensor:
        """Return what `score` reads of the images: see `Reader.encode_images`."""
        return tower.reader.encode_images(model, tower, images, **kwargs)

    def encode_texts(self, model: nn.Module, tower: Tower, texts: Any) -> Texts:
        """Encode a batch of texts: see `Reader.encode_texts`."""
        return tower.reader.encode_texts(model, tower, texts)

    def score(self, model: nn.Module, tower: Tower, rows: Tensor, texts: Texts) -> Tensor:
        """Return the score `(R,)` of row i of the images with text i: see `Reader.score`."""
        return tower.reader.score(model, tower, rows, texts)

    def __reduce__(self) -> tuple[type[Adapter], tuple[()]]:
        return type(self), ()
