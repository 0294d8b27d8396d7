"""Generic prompts, as a relevance wants them that asks what sets a text apart: names of everyday things.

The list is public and fixed, the 80 object categories of COCO (Lin et al., ECCV 2014), and has nothing to do with the
questions; a small model whose vocabulary has few of them gets those that it knows.
"""

from __future__ import annotations

from collections.abc import Sequence

NAMES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, "
    "mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, "
    "teddy bear, hair drier, toothbrush"
)
COCO = frozenset(NAMES.split(", "))


def known(vocabulary: Sequence[str]) -> list[int]:
    """Return which words of a vocabulary are among them, as places in it."""
    return [place for place, word in enumerate(vocabulary) if word in COCO]
