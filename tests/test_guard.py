"""`apply` compares the forward of each selecting block with the two halves that replace it."""

from __future__ import annotations

import pytest
import torch
from doubles.albef import Block, Vit
from doubles.lookalikes import Interleaved, ReturnsAttention, ScaledByParameters, Sharper, ShowsAttention, tower_of
from hosts import vision_transformer
from refusals import refused
from since import needs

import patchselect
from patchselect.adapters.albef import Albef


@pytest.mark.parametrize("merge", [0, 0.5])
@pytest.mark.parametrize("kind", [Interleaved, Sharper])
def test_weights_that_attention_uses_otherwise_are_not_read(kind, merge):
    """Attention is called as it is, so the tokens were right; the relevance read rows of other heads."""

    def model(index):
        found = Vit().eval()
        found.blocks[index].attn.__class__ = kind
        return found

    options = dict(layers=[1, 3], merge=merge, sizes=False)
    refused(
        model(3), "relevance='keys' cannot read the attention of block 3 of Vit.*computes something else", **options
    )
    patchselect.apply(model(4), 0.5, guidance="image", **options)
    with pytest.raises(
        TypeError, match="relevance='values' cannot read the attention of block 4 of Vit.*\"joint\" none"
    ):
        patchselect.apply(model(4), 0.5, relevance="values", **options)
    patchselect.apply(model(2), 0.5, relevance="values", **{**options, "layers": [3]})
    patchselect.apply(model(3), 0.5, guidance="random", **options)


def test_a_later_block_whose_weights_are_read_is_compared_too():
    model = Vit().eval()
    model.blocks[4] = ScaledByParameters(32, model.blocks[4].attn.num_heads).eval()
    patchselect.apply(model, 0.5, layers=[1, 3], relevance="keys")
    patchselect.remove(model)
    with pytest.raises(
        TypeError, match="relevance='values' cannot read.*block 4 of Vit.*ScaledByParameters gives other"
    ):
        patchselect.apply(model, 0.5, layers=[1, 3], relevance="values")


@pytest.mark.parametrize("scale", [0.1, 1e-6, 1.0, 0.0])
def test_a_scale_that_is_a_parameter_of_the_block(scale):
    """A scale of one changes nothing until it is trained, so the comparison does not read it as it is."""
    refused(tower_of(ScaledByParameters, scale=scale), r"the forward of .*ScaledByParameters gives other numbers")


@pytest.mark.parametrize("kind", [ShowsAttention, ReturnsAttention])
def test_real_code_that_looks_like_albef(kind):
    refused(tower_of(kind), rf"the forward of .*{kind.__name__} ran where they raised .*apply\(model, adapter=…\)")


def test_a_tower_that_lacks_what_an_adapter_looks_for_is_refused_in_words():
    """LAVIS `eva_vit`: blocks as of ALBEF, and no final norm; weights under other names; an attribute that is gone."""
    model = Vit().eval()
    del model.norm
    refused(model, "no adapter knows")
    model = Vit().eval()
    del model.blocks[1].attn.scale
    refused(model, "block 1 of Vit .*has no attribute 'scale'")

    class Lost(Albef):
        def towers(self, model):
            return model.nowhere

    with pytest.raises(TypeError, match="looks like a host of the adapter 'albef', which does not find.*'nowhere'"):
        patchselect.apply(Vit(), 0.5, adapter=Lost())


def test_a_forward_replaced_on_the_class(monkeypatch):
    model = Vit().eval()
    plain = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x, *args, **kwargs: 2 * plain(self, x, *args, **kwargs))
    refused(model, "Block gives other numbers")


def test_blocks_that_were_given_to_timm():
    needs("average pooling")  # block_fn
    from timm.models.vision_transformer import Block as Plain

    class Sandwich(Plain):
        def forward(self, x, **kwargs):
            return super().forward(x, **kwargs) * 0.5

    sizes = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=4, num_classes=0)
    refused(vision_transformer()(**sizes, block_fn=Sandwich), "Sandwich gives other numbers")

    class Same(Plain):
        pass

    patchselect.apply(vision_transformer()(**sizes, block_fn=Same), 0.5, guidance="image")


class Masked(Block):
    """A forward with an argument that it cannot do without."""

    def forward(self, x, lengths):
        return super().forward(x) * lengths.sum()


def test_a_forward_that_cannot_be_called_is_refused_and_an_adapter_can_say_how():
    model = tower_of(Masked)
    refused(model, "Masked cannot be compared with them, as it raised AttributeError.*sample_call")

    class Own(Albef):
        def sample_call(self, tower, block, tokens):
            return (tokens, torch.ones(1)), {}

        def attend(self, tower, block, x, lengths, **kwargs):
            return super().attend(tower, block, x)

    patchselect.apply(model, 0.5, guidance="image", adapter=Own())
