"""Pictures of what was kept: the photo, what each text finds relevant, and what is left layer by layer.

Needs matplotlib, which is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..recording import Selected

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEANS = {"clip": (0.4815, 0.4578, 0.4082), "half": (0.5, 0.5, 0.5), "imagenet": (0.485, 0.456, 0.406)}
DEVIATIONS = {"clip": (0.2686, 0.2613, 0.2758), "half": (0.5, 0.5, 0.5), "imagenet": (0.229, 0.224, 0.225)}
FADED = 0.84
"""How much of the colour of a removed patch goes to the background."""
INK, PALE, PAPER = "#1b1f24", "#6a737d", "#ffffff"
ROW_HEIGHT = 2.5
"""Of a photo in the figure, in inches."""


def draw_selection(
    images: Any,
    trace: Sequence[Selected] | Selected,
    texts: Sequence[str] | None = None,
    *,
    titles: Sequence[str] | None = None,
    path: str | Path | None = None,
    dpi: int = 160,
) -> Figure:
    """Draw one row per recorded row: the photo with the relevance over it, and what is left after each selection layer.

        with handle.record() as trace, patchselect.guide(model, text_features, pairing="all"):
            model.get_image_features(pixel_values)
        figure = patchselect.visualization.draw_selection(photo, trace, ["a cat", "a sofa"], path="kept.png")

    Kept patches stand in colour, patches that went into the fused token fade into the paper. Under each layer stand
    the number of patches in the sequence and the fused share: how much of the relevance went into the fused token.

    Args:
        images: what the model saw of the photos: `(3, H, W)` or `(B, 3, H, W)` in [0, 1], uint8 or normalised pixels
            (any range is stretched to [0, 1]; `denormalise` gives the true colours), a NumPy array of one of these
            or with the colours last, or a PIL image. The B images belong to the rows of the trace in its order; with
            `pairing="all"`, each image has several rows.
        trace: what `handle.record()` gave for one call, or one entry of it.
        texts: one per row, or one per text of `pairing="all"`, written at the left.
        titles: one per column, in place of the ones that name the layers.
        path: also write the figure there (PNG, PDF, SVG, by its suffix).
        dpi: of that file, if it is one of pixels.

    Returns:
        A matplotlib figure; nothing is shown, and it is not registered with pyplot.

    Raises:
        ValueError: an empty trace, one without a grid, or images and texts that do not fit its rows.
        TypeError: images of a kind that cannot be read.
        ImportError: there is no matplotlib.
    """
    layers = _one_call(trace)
    rows, grid = layers[0].kept.shape[0], layers[0].grid
    if grid is None:
        raise ValueError("the trace does not know its grid: record a call of the whole tower, not of its blocks")
    photos = _photos(images, rows)
    labels = _labels(texts, rows)
    figure, axes = _canvas(rows, len(layers) + 2, photos.shape[-1] / photos.shape[-2])
    small = min(9.0, 4.4 * ROW_HEIGHT * photos.shape[-1] / photos.shape[-2])
    names = list(titles or ["image", f"relevance, block {layers[0].layer}"])
    names += [f"left after block {entry.layer}" for entry in layers] if titles is None else []
    for row in range(rows):
        photo = photos[row].permute(1, 2, 0).numpy()
        axes[row][0].imshow(photo)
        _heat(axes[row][1], photo, relevance_map(layers[0], row))
        for axis, entry, share in zip(axes[row][2:], layers, fused_shares(layers, row)):
            mask = kept_map(entry, row)
            axis.imshow(_faded(photo, mask))
            _outline(axis, mask, photo.shape)
            left = int(mask.sum())
            note = f"{left} of {mask.numel()} patches" + (f" · {share:.0%} fused" if entry.fused else "")
            axis.text(0.5, -0.035, note, transform=axis.transAxes, ha="center", va="top", fontsize=small, color=PALE)
        if labels is not None:
            axes[row][0].text(
                -0.06, 0.5, labels[row], transform=axes[row][0].transAxes, ha="right", va="center", fontsize=12,
                color=INK, wrap=False,
            )  # fmt: skip
    for axis, name in zip(axes[0], names):
        axis.set_title(name, fontsize=10.5, color=INK, pad=7)
    if path is not None:
        figure.savefig(path, dpi=dpi, bbox_inches="tight", facecolor=PAPER, pad_inches=0.18)
    return figure


def denormalise(pixels: Tensor, statistics: str = "clip") -> Tensor:
    """Map normalised pixels `(…, 3, H, W)` back to colours in [0, 1].

    Args:
        statistics: `"clip"`, `"imagenet"` or `"half"` (mean and deviation 0.5: SigLIP, most timm ViTs).
    """
    if statistics not in MEANS:
        raise ValueError(f"statistics must be one of {', '.join(map(repr, MEANS))}; got {statistics!r}")
    mean, deviation = (torch.tensor(table[statistics]).view(3, 1, 1) for table in (MEANS, DEVIATIONS))
    return (pixels.detach().float().cpu() * deviation + mean).clamp(0, 1)


def kept_map(entry: Selected, row: int = 0) -> Tensor:
    """Return `(H, W)` booleans on the patch grid: what is still in a kept token of its own after this layer.

    A kept token that similar patches have merged into shows all of them.
    """
    if entry.grid is None or entry.holders is None:
        raise ValueError("the trace does not know its grid: record a call of the whole tower, not of its blocks")
    holders, kept = entry.holders[row].cpu(), entry.kept[row].cpu()
    own = (holders >= 0) & (holders < len(kept))
    return (own & (kept[holders.clamp(0, len(kept) - 1)] >= 0)).view(entry.grid)


def relevance_map(entry: Selected, row: int = 0) -> Tensor:
    """Return `(H, W)` relevance on the patch grid, of the first selection layer of a call (it sees every patch).

    Patches that have merged before it share the relevance of their token.
    """
    members = None if entry.members is None else entry.members[row].cpu()
    if entry.grid is None or members is None or bool((entry.places[row] < 0).any()) or bool((members < 0).any()):
        raise ValueError("only the first selection layer of a call weighs every patch of the grid: pass trace[0]")
    return entry.relevance[row].detach().float().cpu()[members].view(entry.grid)


def fused_shares(layers: Sequence[Selected], row: int = 0) -> list[float]:
    """Return how much of its relevance each layer of one call fused or dropped, in [0, 1]."""
    return [float(entry.removed_share[row]) for entry in layers]


def _one_call(trace: Sequence[Selected] | Selected) -> list[Selected]:
    if isinstance(trace, Selected):
        return [trace]
    if not trace:
        raise ValueError("the trace is empty: run the model inside of `with handle.record() as trace:`")
    layers = [trace[0]]
    for entry in trace[1:]:
        if entry.layer <= layers[-1].layer:
            raise ValueError(
                f"the trace holds several calls (layer {entry.layer} comes after layer {layers[-1].layer}): pass the "
                "entries of one, as trace[:2] for two selection layers"
            )
        layers.append(entry)
    return layers


def _as_tensor(images: Any) -> Tensor:
    """Turn a tensor, a NumPy array or a PIL image into a tensor with its colours before its height and width."""
    if isinstance(images, Tensor):
        return images.detach().cpu()
    if callable(getattr(images, "convert", None)):
        images = images.convert("RGB")
    if not hasattr(images, "__array_interface__"):
        raise TypeError(
            f"images must be a tensor (3, H, W) or (B, 3, H, W), a NumPy array or a PIL image, got "
            f"{type(images).__name__}"
        )
    import numpy

    found = torch.from_numpy(numpy.array(images))
    last = found.dim() in (3, 4) and found.shape[-1] == 3 and found.shape[-3] != 3
    return found.movedim(-1, -3) if last else found


def _photos(images: Any, rows: int) -> Tensor:
    photos = _as_tensor(images)
    shape = tuple(photos.shape)
    photos = photos / 255 if photos.dtype == torch.uint8 else photos.float()
    photos = photos.unsqueeze(0) if photos.dim() == 3 else photos
    if photos.dim() != 4 or photos.shape[1] != 3 or rows % photos.shape[0]:
        raise ValueError(
            f"images must be (3, H, W), or (B, 3, H, W) with B a divisor of the {rows} rows of the trace; got {shape}"
        )
    if photos.min() < -1e-3 or photos.max() > 1 + 1e-3:
        low, high = photos.amin(), photos.amax()
        photos = (photos - low) / (high - low)
    return photos.clamp(0, 1).repeat_interleave(rows // photos.shape[0], dim=0)


def _labels(texts: Sequence[str] | None, rows: int) -> list[str] | None:
    if texts is None:
        return None
    if isinstance(texts, str) or not len(texts) or rows % len(texts):
        raise ValueError(f"texts must be a sequence of as many texts as the trace has rows ({rows}), or a divisor")
    return [_wrapped(text) for text in texts] * (rows // len(texts))


def _wrapped(text: str, width: int = 18) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(text, width)) or text


def _canvas(rows: int, columns: int, aspect: float) -> tuple[Figure, list[list[Any]]]:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("patchselect.visualization needs matplotlib: pip install matplotlib") from None
    height = ROW_HEIGHT
    figure = Figure(figsize=(height * aspect * columns * 1.04 + 0.4, height * rows * 1.12 + 0.4), facecolor=PAPER)
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"wspace": 0.04, "hspace": 0.15})
    for axis in grid.flat:
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_visible(False)
    return figure, [list(line) for line in grid]


def _heat(axis: Any, photo: Any, weights: Tensor) -> None:
    """Lay the relevance over a pale photo, smooth between the patches, from its 30th to its 99th percentile."""
    height, width = photo.shape[:2]
    low, high = weights.flatten().quantile(0.3), weights.flatten().quantile(0.99)
    level = ((weights - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    smooth = F.interpolate(level[None, None], (height, width), mode="bicubic", align_corners=False)[0, 0].clamp(0, 1)
    grey = photo @ torch.tensor([0.299, 0.587, 0.114]).numpy()
    axis.imshow(0.45 + 0.55 * grey, cmap="gray", vmin=0, vmax=1)
    axis.imshow(smooth.numpy(), cmap="inferno", alpha=(0.15 + 0.7 * smooth).numpy(), vmin=0, vmax=1)


def _faded(photo: Any, mask: Tensor) -> Any:
    """Return the photo with removed patches paled to the paper."""
    sharp = _to_pixels(mask, photo.shape).unsqueeze(-1).numpy()
    grey = (photo @ torch.tensor([0.299, 0.587, 0.114]).numpy())[..., None]
    return sharp * photo + (1 - sharp) * (FADED + (1 - FADED) * grey)


def _to_pixels(mask: Tensor, shape: Sequence[int]) -> Tensor:
    return F.interpolate(mask[None, None].float(), (shape[0], shape[1]), mode="nearest")[0, 0]


def _outline(axis: Any, mask: Tensor, shape: Sequence[int]) -> None:
    """Draw a line between what is kept and what is not."""
    from matplotlib.collections import LineCollection

    height, width = shape[0] / mask.shape[0], shape[1] / mask.shape[1]
    framed = F.pad(mask, (1, 1, 1, 1))
    below = (framed[1:, 1:-1] != framed[:-1, 1:-1]).nonzero().tolist()
    beside = (framed[1:-1, 1:] != framed[1:-1, :-1]).nonzero().tolist()
    lines = [[(x * width - 0.5, y * height - 0.5), ((x + 1) * width - 0.5, y * height - 0.5)] for y, x in below]
    lines += [[(x * width - 0.5, y * height - 0.5), (x * width - 0.5, (y + 1) * height - 0.5)] for y, x in beside]
    for colour, thickness in ((PAPER, 2.4), (INK, 0.9)):
        axis.add_collection(LineCollection(lines, colors=colour, linewidths=thickness, capstyle="projecting"))
