"""Photographs that Python packages ship, and captions written for them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Callable, NamedTuple, Tuple

import numpy as np
from PIL import Image


class Photo(NamedTuple):
    image: Image.Image
    caption: str


def from_skimage(name: str) -> np.ndarray:
    from skimage import data

    picture = getattr(data, name)()
    return picture[0] if isinstance(picture, tuple) else picture  # stereo pairs: the left one


def from_sklearn(name: str) -> np.ndarray:
    from sklearn.datasets import load_sample_image

    return load_sample_image(name)


Source = Tuple[Callable[[str], np.ndarray], str, str]

SOURCES: tuple[Source, ...] = (
    (
        from_skimage,
        "astronaut",
        "a smiling astronaut in an orange space suit in front of a flag and a model of a shuttle",
    ),
    (from_skimage, "chelsea", "the face of a ginger tabby cat with green eyes"),
    (from_skimage, "coffee", "a cup of espresso and a spoon on a red saucer on a wooden table"),
    (from_skimage, "rocket", "a white rocket on its launch pad at dusk, between tall lattice towers"),
    (from_sklearn, "china.jpg", "a tower with several curved roofs above the trees beside a lake"),
    (from_sklearn, "flower.jpg", "an orange flower with many petals in front of dark green leaves"),
    (from_skimage, "stereo_motorcycle", "a red motorcycle parked in a garage in front of shelves full of boxes"),
    (from_skimage, "camera", "a black and white photo of a man in a dark coat looking through a camera on a tripod"),
)
"""Who ships it, its name there, and what is to be seen on it."""


def load_photos(sources: Sequence[Source] = SOURCES) -> list[Photo]:
    """Return the photographs that are installed, as RGB, with their captions.

    Raises:
        ModuleNotFoundError: neither scikit-image nor scikit-learn is installed.
    """
    photos = []
    for read, name, caption in sources:
        try:
            pixels = read(name)
        except (ModuleNotFoundError, OSError, AttributeError):  # not installed, or not shipped by this release
            continue
        photos.append(Photo(Image.fromarray(pixels).convert("RGB"), caption))
    if not photos:
        raise ModuleNotFoundError(
            "the benchmark uses photographs that scikit-image and scikit-learn ship: pip install scikit-image"
        )
    return photos


def batch_of(photos: Sequence[Photo], size: int) -> list[Photo]:
    """Return a batch of any size: the photographs in turn, each with its own caption."""
    return list(islice(cycle(photos), size))
