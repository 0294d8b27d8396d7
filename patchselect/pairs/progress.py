"""A progress bar where tqdm is installed, for work that takes long."""

from __future__ import annotations

from types import TracebackType
from typing import Any

PATIENCE = 5.0
"""Seconds before a bar appears that nobody asked for."""


class Bar:
    """`with Bar(wanted, total) as bar: bar.update(n)`; images per second.

    Args:
        wanted: `True` shows it at once and needs tqdm, `False` never, `None` after some seconds where tqdm is.
        total: number of images, if it is known.
    """

    def __init__(self, wanted: bool | None, total: int | None) -> None:
        self.bar: Any = None
        if wanted is False:
            return
        try:
            from tqdm.auto import tqdm
        except ImportError:
            if wanted:
                raise ImportError("progress=True needs tqdm: pip install tqdm, or use progress=False") from None
            return
        delay = 0.0 if wanted else PATIENCE
        self.bar = tqdm(total=total, unit="image", desc="score_pairs", delay=delay)

    def update(self, images: int) -> None:
        if self.bar is not None:
            self.bar.update(images)

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.close()
