"""`guide`: give the text that guides a call which brings none of its own."""

from __future__ import annotations

from torch import Tensor, nn

from .pairs.prefix import Prefix
from .wiring.guidance import check_text, scope
from .wiring.plan import PAIRINGS, check_choice
from .wiring.state import wiring_of


class guide(scope):
    """Give the text that guides the vision towers of `model` until the end of the `with` block.

        with patchselect.guide(model, text_features):
            image_features = model.get_image_features(pixel_values)

    Blocks nest: the innermost wins, and it wins over the text that comes with a call. Threads and asyncio tasks do
    not see each other's text.

    Args:
        model: a model that `patchselect.apply` patched, or one of its towers.
        text_features: what the model's own text side gives (CLIP: text embeddings in the joint space), or vectors of
            the vision width for a bare tower. `(B, D)` for `"paired"`, `(T, D)` for `"shared"` and `"all"`; floating
            point, on the device of the images, normalised or not.
        pairing: `"paired"`: text i guides image i; a batch that is a whole multiple of the texts is paired in tiles
            (`torch.cat([image0, image1])`). `"shared"`: all texts guide every image in one pass, each patch gets its
            highest score over all texts. `"all"`: every image with every text, the encoder returns `B * T` rows,
            image-major. With texts `(B, T, D)` both give every image its own T texts (the candidates of a ranking).
        prefix: what `patchselect.encode_prefix` kept of some images: the blocks before the first selection are
            skipped, and what the encoder is called with counts by its shape alone (`prefix.images` is a stand-in).

    Raises:
        ValueError: the model is not patched or not guided by text, a wrong shape, width or pairing; the model, its
            selection layers or its weights are not those that the prefix was made with.
        TypeError: `text_features` is not a floating-point tensor.

    Entering it raises a `ValueError` if the selection has been removed or replaced in the meantime.
    """

    def __init__(
        self, model: nn.Module, text_features: Tensor, pairing: str = "paired", prefix: Prefix | None = None
    ) -> None:
        owner = wiring_of(model)
        check_choice("pairing", pairing, PAIRINGS)
        check_text(owner, text_features, per_image=pairing != "paired")
        if prefix is not None:
            prefix.check(owner)
        super().__init__(owner, text_features, pairing, prefix=prefix)
