"""A picture of what two sentences keep of one photograph.

    python examples/what_was_kept.py    random weights, no download: the choice means nothing
    python examples/what_was_kept.py --model ViT-B-16 --pretrained laion2b_s34b_b88k --photo yours.jpg

writes what_was_kept.png. Needs open_clip_torch, scikit-image and matplotlib.
"""

from __future__ import annotations

import argparse

import open_clip
import torch
from PIL import Image
from skimage import data

import patchselect

SENTENCES = ["a cup of espresso", "a silver spoon"]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-S-16", help="an open_clip model with a plain ViT")
    parser.add_argument("--pretrained", default=None, help="a tag of open_clip or a file; none: random weights")
    parser.add_argument("--photo", default=None, help="an image file; none: the cup of coffee of scikit-image")
    parser.add_argument("--sentences", nargs="+", default=SENTENCES)
    parser.add_argument("--keep-rate", type=float, default=0.3)
    parser.add_argument("--output", default="what_was_kept.png")
    options = parser.parse_args()
    model, _, preprocess = open_clip.create_model_and_transforms(options.model, pretrained=options.pretrained)
    model.eval()
    photo = Image.fromarray(data.coffee()) if options.photo is None else Image.open(options.photo)
    pixels = preprocess(photo).unsqueeze(0)
    texts = model.encode_text(open_clip.get_tokenizer(options.model)(options.sentences))

    handle = patchselect.apply(model, options.keep_rate)
    with handle.record() as trace, patchselect.guide(model, texts, pairing="all"):  # each sentence its own selection
        model.encode_image(pixels)

    for row, sentence in enumerate(options.sentences):
        left = [int((layer.kept[row] >= 0).sum()) for layer in trace]
        print(f"{sentence!r}: {left} patches left after blocks {list(handle.layers)}")
    seen = patchselect.visualization.denormalise(pixels)  # the crop that the model saw
    patchselect.visualization.draw_selection(seen, trace, options.sentences, path=options.output)
    print(f"{options.output} written")
    if options.pretrained is None:
        print("These weights are random, so what is kept means nothing: give --pretrained.")


if __name__ == "__main__":
    main()
