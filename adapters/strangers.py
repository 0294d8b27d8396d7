"""Vision towers of transformers that look plain and cannot be patched: refused, with the reason."""

from __future__ import annotations

from torch import nn

TUBELETS = "its tokens are cut from several frames of a video, and one frame has no grid of its own"
RELATIVE = (
    "its attention adds relative positions as one N × N map for all images; after a selection every image would need a "
    "map of its own, k × k for each head, which the model never had"
)
GROUPS = "its group tokens stand behind the patches, and after some blocks groups take the place of the patches"
REASONS = {
    "XCLIPModel": "it averages patch i over the frames of a video, whatever was removed from each of them",
    "XCLIPVision": (
        "in each of its blocks the class tokens of all frames of a video pass messages, so that a row of the batch is "
        "no image of its own: rows that are repeated for several texts, or scored in chunks, would mix other frames"
    ),
    "GroupViTModel": GROUPS,
    "GroupViTVision": GROUPS,
    "BridgeTower": "the states of several of its blocks are stacked or added, token by token, at one length",
    "Beit": RELATIVE,
    "Data2VecVision": RELATIVE,
    "Yolos": "its detection tokens stand behind the patches, and positions of one length are added between its blocks",
    "Vivit": TUBELETS,
    "VideoMAE": TUBELETS,
    "VJEPA2": TUBELETS,
    "Timesformer": "its blocks attend over time and over space in turns, at a fixed number of patches to a frame",
    "Sapiens2": "several of its query heads share one key head",
}
"""Why a tower and its heads cannot be patched, by the beginning of the name of their class."""


def refuse_strangers(model: nn.Module) -> None:
    """Raise a TypeError for a model, or one that holds such a part, that cannot be patched, with the reason."""
    for part in (model, *model.children()):
        name = type(part).__name__
        reason = next((why for start, why in REASONS.items() if name.startswith(start)), None)
        if reason is not None:
            raise TypeError(f"{name} cannot be patched: {reason}. Nothing was changed")
