"""Images as they come (a tensor, a prefix, a loader) in batches of known place, shared out over processes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

from ..adapter import Tower
from .prefix import Prefix

PIXELS = ("pixel_values", "images", "image", "pixels", "x", "patches")


@dataclass(frozen=True)
class Batch:
    """Some images that follow each other."""

    start: int
    """Place of the first one among all."""
    images: Tensor | Prefix
    options: dict[str, Tensor] = field(default_factory=dict)
    """Further arguments of the vision tower, one row an image (SigLIP 2: `spatial_shapes`)."""

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, low: int, high: int) -> Batch:
        options = {name: value[low:high] for name, value in self.options.items()}
        return Batch(self.start + low, self.images[low:high], options)

    def split(self, size: int) -> Iterator[Batch]:
        for low in range(0, len(self), size):
            yield self.rows(low, min(low + size, len(self)))

    def to(self, like: Tensor) -> Batch:
        """Move the batch to the device of the tower and, for pixels, to its dtype."""
        if isinstance(self.images, Prefix):
            return Batch(self.start, self.images.to(like.device), self.options)
        dtype = like.dtype if self.images.is_floating_point() else self.images.dtype
        options = {name: value.to(like.device) for name, value in self.options.items()}
        return Batch(self.start, self.images.to(like.device, dtype), options)


def batches(images: Any, tower: Tower, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Yield the share of process `rank` of `world`: rows in a run of a tensor, every `world`-th batch of a loader."""
    images = stacked(images, tower)
    if isinstance(images, (Tensor, Prefix, Mapping)):
        whole = as_batch(images, 0, tower)
        low, high = len(whole) * rank // world, len(whole) * (rank + 1) // world
        if high > low:
            yield whole.rows(low, high)
        return
    if isinstance(images, (str, bytes)) or not isinstance(images, Iterable):
        raise TypeError(
            f"images must be a tensor of pixels, a Prefix or a loader of batches of them, got {type(images).__name__}"
        )
    if isinstance(images, DataLoader):
        yield from _loaded(images, tower, rank, world)
        return
    start = 0
    for number, item in enumerate(images):
        batch = as_batch(item, start, tower)
        start += len(batch)
        if number % world == rank:
            yield batch


def _loaded(loader: DataLoader, tower: Tower, rank: int, world: int) -> Iterator[Batch]:  # type: ignore[type-arg]
    """Yield batches of a `DataLoader`; each process loads its own share alone."""
    sampler, sizes = getattr(loader, "sampler", None), None
    if loader.batch_sampler is not None and isinstance(sampler, SequentialSampler):
        indices = list(loader.batch_sampler)
        sizes = [len(batch) for batch in indices]
        if world > 1:
            loader = DataLoader(
                loader.dataset,
                batch_sampler=indices[rank::world],
                num_workers=loader.num_workers,
                collate_fn=loader.collate_fn,
                pin_memory=loader.pin_memory,
            )
    elif type(sampler).__name__ in ("RandomSampler", "DistributedSampler"):
        raise ValueError(
            f"the loader of images has a {type(sampler).__name__}, but row i of the scores must be image i: use "
            "shuffle=False and no DistributedSampler (score_pairs shares the batches out itself)"
        )
    start, mine = 0, rank
    for number, item in enumerate(loader):
        if sizes is not None:
            yield as_batch(item, sum(sizes[:mine]), tower)
            mine += world
            continue
        batch = as_batch(item, start, tower)
        start += len(batch)
        if number % world == rank:
            yield batch


def as_batch(item: Any, start: int, tower: Tower) -> Batch:
    """Make a batch of pixels, of a tuple that begins with them, or of a mapping; one image is a batch of one."""
    if isinstance(item, (tuple, list)) and item:
        return as_batch(item[0], start, tower)
    if isinstance(item, Mapping):
        name = next((name for name in PIXELS if name in item), None)
        if name is None:
            raise TypeError(f"a batch of images must name its pixels as one of {PIXELS}, got {list(item)}")
        pixels = item[name] if name == "patches" else _pixels(item[name], tower)  # patches are cut already
        return Batch(start, pixels, _options(item, name, tower))
    if not isinstance(item, (Tensor, Prefix)):
        raise TypeError(
            f"a batch of images must be a tensor, a Prefix or a mapping with pixel_values, got {type(item).__name__}: "
            "run the host's own image processor first"
        )
    return Batch(start, item if isinstance(item, Prefix) else _pixels(item, tower))


def _pixels(found: Any, tower: Tower) -> Tensor:
    """Return `(N, 3, H, W)`, or `(N, n, D)` for towers of flat patches; a single image gets its `N = 1`."""
    flat = tower.adapter.takes_flat_patches(tower)
    wanted = 3 if flat else 4
    if isinstance(found, Tensor) and found.dim() == wanted - 1 and not flat:
        return found.unsqueeze(0)
    if not isinstance(found, Tensor) or found.dim() != wanted:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"images must be pixels {'(N, patches, values)' if flat else '(N, 3, H, W)'}, or a loader of batches of "
            f"them; one of these is {shape}. Of a pair (images, labels), give the images alone"
        )
    return found


def stacked(images: Any, tower: Tower) -> Any:
    """Stack one image, or a list of images of one size, to a batch; return everything else as it is."""
    if tower.adapter.takes_flat_patches(tower):
        return images
    if _is_tensor(images) and images.dim() == 3:
        return images.unsqueeze(0)
    listed = isinstance(images, (list, tuple)) and bool(images)
    if listed and all(_is_tensor(image) and image.dim() == 3 for image in images):
        if len({image.shape for image in images}) > 1:
            raise ValueError(
                f"the images of a list must be of one size, got {sorted({tuple(image.shape) for image in images})}: "
                "run the host's own image processor first"
            )
        return torch.stack(list(images))
    return images


def _options(item: Mapping[str, Any], pixels: str, tower: Tower) -> dict[str, Tensor]:
    """Return what of a batch goes to the image side besides its pixels.

    Raises:
        ValueError: a mask hides something, and the tower would not see it.
    """
    known = set(inspect.signature(tower.module.forward).parameters)
    if "attention_mask" in known:
        known.add("pixel_attention_mask")  # what SigLIP 2 is called with, where its inner tower has the shorter name
    options = {}
    for key, value in item.items():
        if key == pixels or not _is_tensor(value) or (key == "attention_mask" and "input_ids" in item):
            continue
        if key in known:
            options[key] = value
        elif key.endswith("_mask") and not bool(value.all()):
            raise ValueError(
                f"a batch of images brings {key}, which {type(tower.module).__name__} does not read: what it hides "
                "would count as image. Batch images of one size; leave the mask out if it is not about the images"
            )
    return options


def count(images: Any) -> int | None:
    """Return how many images there are, if that is known without reading them."""
    if isinstance(images, Mapping):
        images = next((images[name] for name in PIXELS if name in images), ())
    if isinstance(images, (Tensor, Prefix)):
        return len(images)
    try:
        return len(images.dataset)
    except (AttributeError, TypeError):
        return None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
