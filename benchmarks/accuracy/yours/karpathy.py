"""Images with several captions each, as the splits of Karpathy and the files of ALBEF list them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class Pool:
    """What is searched: images, captions, and whose each caption is."""

    paths: list[Path]
    captions: list[str]
    owner: list[int]
    """The image of each caption."""

    def open(self, place: int) -> Image.Image:
        with Image.open(self.paths[place]) as picture:
            return picture.convert("RGB")


def read_pool(
    file: Path, folder: Path | None = None, split: str = "test", captions: int = 5, limit: int | None = None
) -> Pool:
    """Read `dataset_flickr30k.json` or `dataset_coco.json` (Karpathy), or `flickr30k_test.json` of ALBEF and its like.

    Args:
        file: `{"images": [{"split", "filepath" (COCO), "filename", "sentences": [{"raw"}]}]}`, or
            `[{"image", "caption": [...]}]`, which is all of one split.
        folder: where the paths of the images start; `None`: the folder of `file`.
        split: of Karpathy's files.
        captions: so many of each image, the first ones; some images of COCO have more than 5.
        limit: so many images, the first ones.

    Raises:
        ValueError: another format, or nothing of this split.
        FileNotFoundError: an image is missing.
    """
    content, start = json.loads(file.read_text(encoding="utf-8")), folder or file.parent
    rows: list[tuple[Path, list[str]]] = []
    if isinstance(content, dict) and "images" in content:
        for entry in content["images"]:
            if entry["split"] == split:
                path = start / entry.get("filepath", "") / entry["filename"]
                rows.append((path, [sentence["raw"] for sentence in entry["sentences"]]))
    elif isinstance(content, list) and all("image" in entry and "caption" in entry for entry in content):
        rows = [(start / entry["image"], _listed(entry["caption"])) for entry in content]
    else:
        raise ValueError(
            f'{file} is neither a split of Karpathy ({{"images": [...]}}) nor a list of {{"image", "caption"}}'
        )
    rows = rows[:limit]
    if not rows:
        raise ValueError(f"{file} has no image in the split {split!r}")
    missing = [path for path, _ in rows if not path.exists()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(rows)} images are missing, the first is {missing[0]}")
    pairs = [(place, text.strip()) for place, (_, texts) in enumerate(rows) for text in texts[:captions]]
    return Pool([path for path, _ in rows], [text for _, text in pairs], [place for place, _ in pairs])


def _listed(caption: Any) -> list[str]:
    return [caption] if isinstance(caption, str) else list(caption)
