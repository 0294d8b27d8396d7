"""A folder of classes: its images, and the text features that prompts make of the names of its classes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.models.host import Host

TEMPLATES = ("a photo of a {}.", "a picture of the {}.", "{}")


def images_of(options: argparse.Namespace, host: Host) -> tuple[Any, list[str]]:
    """Return the data set and the names of its classes.

    Raises:
        ValueError: names that do not fit the folders.
        FileNotFoundError: no folder, or no image in a class.
    """
    from torchvision.datasets import ImageFolder

    data = ImageFolder(str(options.data), transform=lambda picture: host.preprocess(picture.convert("RGB")))
    names = [name.replace("_", " ").replace("-", " ") for name in data.classes]
    if options.classes is not None:
        names = [line.strip() for line in options.classes.read_text().splitlines() if line.strip()]
        if len(names) != len(data.classes):
            raise ValueError(
                f"{options.classes} names {len(names)} classes, {options.data} has {len(data.classes)} folders"
            )
    if options.limit is not None and options.limit < len(data):
        picked = torch.linspace(0, len(data) - 1, options.limit).round().long().tolist()
        return torch.utils.data.Subset(data, picked), names
    return data, names


def prompts(given: Sequence[str]) -> list[str]:
    """Return templates, given one by one or as a file with one a line.

    Raises:
        ValueError: a template without a place for the class.
    """
    if len(given) == 1 and Path(given[0]).is_file():
        given = [line for line in Path(given[0]).read_text().splitlines() if line.strip()]
    for template in given:
        if "{}" not in template:
            raise ValueError(f"a template needs {{}} where the class goes, got {template!r}")
    return list(given)


@torch.inference_mode()
def class_features(host: Host, names: Sequence[str], templates: Sequence[str], batch: int = 64) -> Tensor:
    """Return `(classes, E)`, normalised: the mean of the normalised prompts of each class (Radford et al., 2021)."""
    texts = [template.replace("{}", name) for name in names for template in templates]
    parts = [host.encode_text(host.tokens(texts[i : i + batch])) for i in range(0, len(texts), batch)]
    features = F.normalize(torch.cat(parts), dim=-1).unflatten(0, (len(names), -1))
    return F.normalize(features.mean(1), dim=-1)
