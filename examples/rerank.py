"""Retrieval in two passes: every image once without a text, then the best texts of each image with selection by them.

    python examples/rerank.py    random weights, no download: the ranks mean nothing
    python examples/rerank.py --model ViT-B-16 --pretrained laion2b_s34b_b88k

Needs open_clip_torch and scikit-image.
"""

from __future__ import annotations

import argparse

import open_clip
import torch
from PIL import Image
from skimage import data

import patchselect

PHOTOS = {
    "the face of a ginger tabby cat": data.chelsea,
    "a cup of espresso on a red saucer": data.coffee,
    "a white rocket on its launch pad": data.rocket,
    "a smiling astronaut in an orange suit": data.astronaut,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-S-32", help="an open_clip model with a plain ViT")
    parser.add_argument("--pretrained", default=None, help="a tag of open_clip or a file; none: random weights")
    parser.add_argument("--keep-rate", type=float, default=0.5)
    parser.add_argument("--best", type=int, default=2, help="texts that each image is compared with again")
    options = parser.parse_args()
    model, _, preprocess = open_clip.create_model_and_transforms(options.model, pretrained=options.pretrained)
    model.eval()
    images = torch.stack([preprocess(Image.fromarray(photo())) for photo in PHOTOS.values()])
    texts = open_clip.get_tokenizer(options.model)(list(PHOTOS))

    patchselect.apply(model, options.keep_rate, guidance="image")  # (EViT) one encoding per image serves all texts
    first = patchselect.score_pairs(model, images, texts, progress=False)  # (images, texts)
    candidates = first.topk(options.best, dim=1).indices

    patchselect.apply(model, options.keep_rate)  # now by the text of each pair
    second = patchselect.score_pairs(model, images, texts, candidates=candidates, progress=False)  # (images, best)

    for row, caption in enumerate(PHOTOS):
        order = second[row].argsort(descending=True)
        print(f"{caption!r}:")
        for place in order.tolist():
            print(f"    {second[row, place]:+.3f}  {list(PHOTOS)[candidates[row, place]]}")
    if options.pretrained is None:
        print("These weights are random, so the ranks mean nothing: give --pretrained.")


if __name__ == "__main__":
    main()
