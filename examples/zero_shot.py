"""Zero-shot classification: one guided pass for all classes.

python examples/zero_shot.py    random weights, no download: the answers mean nothing
python examples/zero_shot.py --model ViT-B-16 --pretrained laion2b_s34b_b88k      (needs open_clip_torch, scikit-image)
"""

from __future__ import annotations

import argparse
import time

import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from skimage import data

import patchselect

PHOTOS = {"cat": data.chelsea, "cup of coffee": data.coffee, "rocket": data.rocket, "astronaut": data.astronaut}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-S-16", help="an open_clip model with a plain ViT")
    parser.add_argument("--pretrained", default=None, help="a tag of open_clip or a file; none: random weights")
    parser.add_argument("--keep-rate", type=float, default=0.5)
    options = parser.parse_args()
    model, _, preprocess = open_clip.create_model_and_transforms(options.model, pretrained=options.pretrained)
    model.eval()
    images = torch.stack([preprocess(Image.fromarray(photo())) for photo in PHOTOS.values()])
    prompts = open_clip.get_tokenizer(options.model)([f"a photo of a {name}" for name in PHOTOS])
    classes = F.normalize(model.encode_text(prompts), dim=-1)  # (classes, D)

    def classify() -> tuple[list[int], float]:
        began = time.perf_counter()
        features = F.normalize(model.encode_image(images), dim=-1)
        return (features @ classes.T).argmax(dim=1).tolist(), time.perf_counter() - began

    classify()  # the first call is slower
    before, slow = classify()
    patchselect.apply(model, options.keep_rate)
    with patchselect.guide(model, classes, pairing="shared"):  # one selection per image, for all classes
        classify()
        after, fast = classify()
    patchselect.remove(model)

    names = list(PHOTOS)
    for name, old, new in zip(names, before, after):
        print(f"{name:14} unpatched: {names[old]:14} with selection: {names[new]}")
    print(f"{slow * 1e3:.0f} ms unpatched, {fast * 1e3:.0f} ms at keep rate {options.keep_rate}")
    if options.pretrained is None:
        print("These weights are random, so the answers mean nothing: give --pretrained.")


if __name__ == "__main__":
    main()
