"""One image-text model as the benchmark sees it, whichever library it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict

import torch
from PIL import Image
from torch import Tensor, nn

RANDOM = "random weights: the speed does not depend on them, but which patches stay means nothing"

Tokens = Dict[str, Tensor]
"""What the tokenizer gives: names of arguments and `(B, L)` each."""


@dataclass
class Host:
    """A loaded model with its own preprocessing and tokenizer."""

    model: nn.Module
    name: str
    library: str
    image_size: int
    """Side of the square images that the model is fed, in pixels."""
    weights: str
    """Where the weights come from, in words."""
    random_weights: bool
    preprocess: Callable[[Image.Image], Tensor]
    """A photograph to `(3, H, W)`."""
    tokenize: Callable[[list[str]], Tokens]
    notes: tuple[str, ...] = ()
    """What a reader of the figures must know."""
    own_words: bool = True
    """Whether the tokenizer is the model's, not another in its place."""
    reads_tokens: bool = False
    """Whether its head reads the tokens of a text beside those of the image, and scores a pair itself."""

    def check_accuracy(self) -> None:
        """Raise a ValueError where figures of accuracy would mean nothing."""
        if self.random_weights or not self.own_words:
            wrong = "random weights" if self.random_weights else "another model's tokenizer"
            raise ValueError(
                f"{self.name} has {wrong}, with which accuracy means nothing"
                + "".join(f"; {note}" for note in self.notes)
                + ". Give other --model or --pretrained, or --random-weights for a dry run"
            )

    def save(self, folder: Path) -> None:
        """Write all that `--model FOLDER` needs."""
        raise NotImplementedError

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return `(B, 3, H, W)` on the model's device, in the dtype of its weights."""
        weight = next(self.model.parameters())
        return torch.stack([self.preprocess(picture) for picture in pictures]).to(weight.device, weight.dtype)

    def tokens(self, captions: list[str]) -> Tokens:
        device = next(self.model.parameters()).device
        return {name: ids.to(device) for name, ids in self.tokenize(captions).items()}

    def encode_image(self, images: Tensor) -> Tensor:
        """Run the vision tower and its projection, `(B, E)`."""
        raise NotImplementedError

    def encode_text(self, tokens: Tokens) -> Tensor:
        """Run the text tower and its projection, `(B, E)`."""
        raise NotImplementedError

    def both(self, images: Tensor, tokens: Tokens) -> Any:
        """Call the whole model: the text of this call guides its vision tower."""
        raise NotImplementedError

    def checkpoint(self, on: bool) -> None:
        """Turn the host's own gradient checkpointing on or off."""
        raise NotImplementedError


@dataclass
class OpenClipHost(Host):
    """`open_clip.CLIP`, `CustomTextCLIP`, …"""

    config: dict[str, Any] = field(default_factory=dict)
    """What open_clip builds the model from."""
    tokenizer: Any = None

    def save(self, folder: Path) -> None:
        from open_clip.push_to_hf_hub import save_config_for_hf

        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), folder / "open_clip_pytorch_model.bin")
        save_config_for_hf(self.model, folder / "open_clip_config.json", self.config)
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(folder)

    def encode_image(self, images: Tensor) -> Tensor:
        return self.model.encode_image(images)  # type: ignore[operator, no-any-return]

    def encode_text(self, tokens: Tokens) -> Tensor:
        return self.model.encode_text(tokens["text"])  # type: ignore[operator, no-any-return]

    def both(self, images: Tensor, tokens: Tokens) -> Any:
        return self.model(images, tokens["text"])

    def checkpoint(self, on: bool) -> None:
        self.model.set_grad_checkpointing(on)  # type: ignore[operator]


@dataclass
class TransformersHost(Host):
    """`transformers.CLIPModel` and its relatives, `SiglipModel`, …"""

    loaded: tuple[Any, ...] = ()
    """The model's own image processor and tokenizer, where they were there."""

    def save(self, folder: Path) -> None:
        for part in (self.model, *self.loaded):
            part.save_pretrained(folder)  # type: ignore[operator]

    def encode_image(self, images: Tensor) -> Tensor:
        return _features(self.model.get_image_features(pixel_values=images, **self._other_size()))  # type: ignore

    def encode_text(self, tokens: Tokens) -> Tensor:
        return _features(self.model.get_text_features(**tokens))  # type: ignore[operator]

    def both(self, images: Tensor, tokens: Tokens) -> Any:
        return self.model(pixel_values=images, **tokens, **self._other_size())

    def checkpoint(self, on: bool) -> None:
        switch = self.model.gradient_checkpointing_enable if on else self.model.gradient_checkpointing_disable
        switch()  # type: ignore[operator]

    def _other_size(self) -> dict[str, bool]:
        own = self.model.config.vision_config.image_size  # type: ignore[union-attr]
        return {} if own == self.image_size else {"interpolate_pos_encoding": True}


def _features(output: Any) -> Tensor:
    """Return the features: transformers 4 gives them, transformers 5 an output that holds them."""
    return output if isinstance(output, Tensor) else output.pooler_output


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return `amp`: fp32 weights under bf16 autocast. Otherwise nothing: the weights have the precision."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "amp" else nullcontext()


def first_line(error: BaseException) -> str:
    """Say what went wrong, short enough for a note."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
