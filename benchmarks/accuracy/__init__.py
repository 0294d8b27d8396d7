"""Accuracy against cost: `python -m benchmarks.accuracy --help`.

- `__main__` and `align` are the command lines.
- `albef/` and `clip/` train and ask two small models on scenes whose contents are known: the studies.
- `answering/` puts a tiny language model behind the tower of the first: what is there, how many, where.
- `leaks/` asks the same questions without the picture: what do texts, or the places of kept patches, give away?
- `world/` draws those scenes, writes their captions and the wrong candidates, and answers from texts alone.
- `yours/` is for your own weights and data: zero-shot accuracy and a short alignment under selection.
"""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS = Path(__file__).with_name("checkpoints")
"""Committed weights: state dicts in half precision, and what is known about each in a JSON beside it."""
