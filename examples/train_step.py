"""Training steps of a dual encoder under selection, without telling the label: one selection serves all captions.

    python examples/train_step.py    random weights, no download
    python examples/train_step.py --model ViT-B-16 --pretrained laion2b_s34b_b88k

Needs open_clip_torch and scikit-image.
"""

from __future__ import annotations

import argparse

import open_clip
import torch
from PIL import Image
from skimage import data

import patchselect
from patchselect.losses import itc_loss

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
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms(options.model, pretrained=options.pretrained)
    images = torch.stack([preprocess(Image.fromarray(photo())) for photo in PHOTOS.values()])
    tokens = open_clip.get_tokenizer(options.model)(list(PHOTOS))
    names = set(model.state_dict())
    patchselect.apply(model, options.keep_rate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    model.train()
    for step in range(options.steps):
        text = model.encode_text(tokens)
        # An image selected by its own caption alone would carry the answer: see docs/training.md.
        with patchselect.guide(model, text, pairing="shared"):
            image = model.encode_image(images)
        loss = itc_loss(image, text, 1 / model.logit_scale.exp())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.3f}")
    assert set(model.state_dict()) == names  # the checkpoint has the keys that it always had


if __name__ == "__main__":
    main()
