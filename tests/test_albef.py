"""What is particular to ALBEF: pairs of images, Grad-CAM hooks, recipes for negatives and retrieval."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from doubles import albef
from doubles.text import Output, pictures, sentences
from heads import build
from torch import nn

import patchselect

LAYERS = [1, 3]
REAL_OR_DOUBLE = pytest.mark.parametrize("name", ["albef-retrieval", "real-albef-retrieval"])
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def retrieval():
    torch.manual_seed(0)
    model = albef.Retrieval().eval()
    patchselect.apply(model, 0.5, LAYERS)
    return model


def recipe(page: str, name: str) -> dict:
    """The code of a page that defines `name`, run as it stands there."""
    text = (Path(__file__).parent.parent / "docs" / page).read_text()
    code = next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if f"def {name}(" in code)
    space: dict = {}
    exec(code, space)
    return space


def test_the_bare_vision_transformer_takes_vectors_of_its_width():
    torch.manual_seed(0)
    tower = albef.Vit()
    reference = tower(pictures(2))
    handle = patchselect.apply(tower, 0.5, LAYERS)
    assert [type(found.adapter).__name__ for found in handle.towers] == ["Albef"]
    with patchselect.guide(tower, torch.randn(2, 32)):
        assert tower(pictures(2)).shape == (2, 7, 32)
    with pytest.raises(ValueError, match="no text guides this call"):
        tower(pictures(2))
    handle.remove()
    assert torch.equal(tower(pictures(2)), reference)


def test_a_head_inside_of_another_module_is_found():
    torch.manual_seed(0)
    wrapped = nn.ModuleDict({"albef": albef.Retrieval()})
    handle = patchselect.apply(wrapped, 0.5, LAYERS)
    with handle.record() as trace:
        wrapped["albef"](pictures(3), sentences(3))
    assert [entry.num_tokens for entry in trace] == [10, 7, 10, 7]


def test_an_unknown_reader_of_the_tower_is_refused():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower, self.head = albef.Vit(), nn.Linear(32, 5)

    with pytest.raises(TypeError, match="may need a fixed number"):
        patchselect.apply(Classifier())


def test_towers_of_different_shapes_are_refused():
    model = albef.Retrieval()
    model.eyes_slow = albef.Vit(depth=4)
    with pytest.raises(TypeError, match=r"vision towers of different shapes \(eyes, eyes_slow\)"):
        patchselect.apply(model)


def test_two_widths_without_a_joint_space_are_refused():
    model = albef.Retrieval(width=48)
    model.text_proj = nn.Identity()
    with pytest.raises(TypeError, match=r"width 48 and has no text_proj.*call patchselect\.apply on"):
        patchselect.apply(model)


def test_values_read_the_text_through_the_joint_space(retrieval):
    handle = patchselect.apply(retrieval, 0.5, LAYERS, relevance="values")
    with handle.record() as trace:
        retrieval(pictures(3), sentences(3))
    assert len(trace) == 4
    retrieval.text_proj = nn.Identity()
    with pytest.raises(ValueError, match="needs a joint space"):
        patchselect.apply(retrieval, relevance="values")


def test_image_j_of_both_halves_is_guided_by_sentence_j():
    torch.manual_seed(0)
    model = albef.Pairs(twins=False).eval()
    handle = patchselect.apply(model, 0.5, LAYERS)
    images, text, targets = pictures(6), sentences(3), torch.tensor([0, 1, 1])
    with handle.record() as trace:
        model(images, text, targets)
    features = model.words(text.input_ids, attention_mask=text.attention_mask, mode="text").last_hidden_state[:, 0]
    with handle.record() as expected, patchselect.guide(model, features.repeat(2, 1)):
        model.eyes(images)
    assert torch.equal(trace[-1].kept, expected[-1].kept)


@pytest.mark.parametrize("images", [3, 9])
def test_a_wrong_number_of_images_is_an_error(images):
    model = albef.Pairs(twins=False).eval()
    patchselect.apply(model, 0.5, LAYERS)
    with pytest.raises(ValueError, match=f"3 texts for {images} images"):
        model(pictures(images), sentences(3), torch.tensor([0, 1, 1]))


def test_as_many_images_as_texts_elsewhere(retrieval):
    with pytest.raises(ValueError, match="3 texts for 6 images"):
        retrieval(pictures(6), sentences(3))


@pytest.mark.parametrize("block", [0, 1, 3, 4])
def test_grad_cam_hooks_see_the_attention_of_their_block(retrieval, block):
    """`register_blk` reaches every block, the selecting ones included, whose attention still sees all tokens."""
    features = torch.randn(3, 32)
    with patchselect.guide(retrieval, features):
        retrieval.eyes(pictures(3), register_blk=block)
    tokens = [17, 17, 10, 10, 7, 7][block]
    assert retrieval.eyes.blocks[block].attn.shown.shape == (3, 4, tokens, tokens)
    assert all(other.attn.shown is None for index, other in enumerate(retrieval.eyes.blocks) if index != block)


def test_a_map_over_shortened_tokens_goes_back_on_the_grid():
    torch.manual_seed(0)
    model = albef.Retrieval().eval()
    handle = patchselect.apply(model, 0.5, LAYERS)
    with handle.record() as trace, patchselect.guide(model, torch.randn(3, 32)):
        model.eyes(pictures(3), register_blk=5)
    cam = model.eyes.blocks[5].attn.shown[:, :, 0].transpose(1, 2)
    board = patchselect.restore(cam, trace)
    assert board.shape == (3, 4, 4, 4)
    for image in range(3):
        kept = trace[-1].kept[image]
        at = int((kept >= 0).nonzero()[0])
        assert torch.equal(board[image].flatten(0, 1)[kept[at]], cam[image, 1 + at])


@REAL_OR_DOUBLE
def test_evaluation_without_a_text_says_what_to_do(name):
    head = build(name)
    tower = head.towers()[0].module
    patchselect.apply(head.model.eval(), 0.5, LAYERS)
    head.call()
    with pytest.raises(ValueError, match=r"patchselect\.guide"):
        tower(head.batch(0)[0][0])


def names_of_albef(model):
    """The double under the names that the recipes for ALBEF's scripts use; the real one has them."""
    if isinstance(model, albef.Head):
        names = {"visual_encoder": "eyes", "text_encoder": "words", "itm_head": "score"}
        for name, own in names.items():
            model.__dict__[name] = getattr(model, own)
    return model


@REAL_OR_DOUBLE
def test_the_recipe_for_negatives_knows_no_other_caption(name):
    """Image tokens of a pair that does not match depend on its own text, and on no other one of the batch."""
    encode_negatives = recipe("training.md", "encode_negatives")["encode_negatives"]
    head = build(name)
    model = names_of_albef(head.model.eval())
    patchselect.apply(model, 0.5, LAYERS)
    image = head.batch(0)[0][0]
    size = len(image)
    text = head.text_features()
    of_text, of_image = torch.arange(size).roll(1), torch.arange(size).roll(-1)
    found = encode_negatives(model, model.visual_encoder, image, text, of_text, of_image)
    for b in range(size):
        for tokens, picture, sentence in ((found[0], of_text[b], b), (found[1], b, of_image[b])):
            with patchselect.guide(model, text[sentence].unsqueeze(0)):
                alone = model.visual_encoder(image[picture : picture + 1])
            torch.testing.assert_close(tokens[b : b + 1], alone)
    sum(tokens.sum() for tokens in found).backward()


@REAL_OR_DOUBLE
def test_the_recipe_for_retrieval_scores_each_pair_with_its_text(name):
    evaluate = recipe("training.md", "evaluate_retrieval")["evaluate_retrieval"]
    head = build(name)
    model = names_of_albef(head.model.eval())
    images, text = head.batch(0)[0]
    if not isinstance(text, dict):
        text = Output(input_ids=text.input_ids, attention_mask=text.attention_mask)
    i2t, t2i = evaluate(model, images, text, k_test=2, keep_rate=0.5, layers=LAYERS)
    assert (i2t > -100).sum(dim=1).tolist() == (t2i > -100).sum(dim=1).tolist() == [2] * len(images)
    both = (i2t > -100) & (t2i.t() > -100)
    assert both.any()
    torch.testing.assert_close(i2t[both], t2i.t()[both])


def test_the_recipe_for_maps_of_cross_attention_restores_the_grid():
    """As in docs/albef.md: cross-attention maps over N' image tokens become maps over the grid."""
    torch.manual_seed(0)
    tower = albef.Vit()
    handle = patchselect.apply(tower, 0.5, LAYERS)
    with handle.record() as trace, patchselect.guide(tower, torch.randn(2, 32)):
        tokens = tower(pictures(2))
    cams = torch.randn(2, 3, 5, tokens.shape[1])
    flat = cams.permute(0, 3, 1, 2).flatten(2)
    board = patchselect.restore(flat, trace[:2]).unflatten(-1, (3, -1)).permute(0, 3, 4, 1, 2)
    assert board.shape == (2, 3, 5, 4, 4)
    kept = trace[-1].kept[1]
    place = int((kept >= 0).nonzero()[0])
    assert torch.equal(board[1].flatten(-2)[..., kept[place]], cams[1, ..., 1 + place])
