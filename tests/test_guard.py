"""`apply` compares the forward of each selecting block with the two halves that replace it."""

from __future__ import annotations

import pytest
import torch
from doubles.albef import Attention, Block, Vit
from hosts import HOSTS, build, vision_transformer
from since import needs
from test_errors import classes
from torch import nn

import patchselect
from patchselect.adapters.albef import Albef
from patchselect.wiring import guard


def refused(model, message, **options):
    before = classes(model)
    with pytest.raises(TypeError, match=message):
        patchselect.apply(model, 0.5, guidance="image", **options)
    assert classes(model) == before


class ScaledByParameters(Block):
    """LayerScale as a parameter of the block, which no list of children shows."""

    def __init__(self, width, num_heads, scale=0.1):
        super().__init__(width, num_heads)
        self.gamma = nn.Parameter(scale * torch.ones(width))

    def forward(self, x, register_hook=False):
        x = x + self.gamma * self.attn(self.norm1(x), register_hook=register_hook)
        return x + self.gamma * self.mlp(self.norm2(x))


class ShowsAttention(Block):
    """facebookresearch/dino: the attention returns its map too."""

    def forward(self, x, return_attention=False):
        y, attn = self.attn(self.norm1(x)), None
        if return_attention:
            return attn
        x = x + self.drop_path(y[0])
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ReturnsAttention(Block):
    """dandelin/ViLT: the block returns the map too, and takes a mask."""

    def forward(self, x, mask=None):
        y, attn = self.attn(self.norm1(x))
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x))), attn


def tower_of(kind, **options):
    model = Vit()
    for index, block in enumerate(model.blocks):
        own = kind(32, block.attn.num_heads, **options)
        own.load_state_dict(block.state_dict(), strict=False)
        if kind in (ShowsAttention, ReturnsAttention):
            plain = type(own.attn)
            shown = lambda self, x, plain=plain: (plain.forward(self, x), None)  # noqa: E731
            own.attn.__class__ = type("Attention", (plain,), {"forward": shown})
        model.blocks[index] = own
    return model.eval()


class Interleaved(Attention):
    """Queries, keys and values of a head beside each other, as other code bases pack them."""

    def forward(self, x, register_hook=False):
        query, key, value = self.qkv(x).unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        weights = (query @ key.transpose(-1, -2) * self.scale).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


class Sharper(Attention):
    """Scores that its scale does not tell of."""

    def forward(self, x, register_hook=False):
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) * 3 * self.scale).softmax(dim=-1)
        return self.proj((weights @ value).transpose(1, 2).flatten(2))


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


@pytest.mark.parametrize("layers", [[0, 2], [3]])
def test_only_blocks_that_select_are_asked(layers):
    model = Vit().eval()
    model.blocks[1] = ScaledByParameters(32, model.blocks[1].attn.num_heads).eval()
    patchselect.apply(model, 0.5, layers=layers, guidance="image")
    refused(model, "block 1 of Vit cannot select.*Leave this block out of layers", layers=[1, 3])


@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("options", [{}, {"sizes": False}])
def test_blocks_that_merge_are_asked_too(index, options):
    model = Vit().eval()
    model.blocks[index] = ScaledByParameters(32, model.blocks[index].attn.num_heads).eval()
    patchselect.apply(model, 0.5, layers=[3], guidance="image")
    refused(model, f"block {index} of Vit .*gives other numbers.*without merge", layers=[3], merge=0.5, **options)


def test_blocks_that_are_alike_are_compared_once(monkeypatch):
    asked, check = [], guard.check_halves
    monkeypatch.setattr(
        guard, "check_halves", lambda tower, index, *rest: asked.append(index) or check(tower, index, *rest)
    )

    def asked_of(model):
        asked.clear()
        patchselect.apply(model, 0.5, layers=[3], guidance="image", merge=0.5, sizes=False)
        return asked

    assert asked_of(Vit().eval()) == [0]
    for index, change in {
        1: lambda block: setattr(block.mlp, "shift", 1.0),
        2: lambda block: setattr(block.attn, "__class__", type("Attention", (type(block.attn),), {})),
        3: lambda block: setattr(block.norm1, "eps", 1e-3),
    }.items():
        model = Vit().eval()
        change(model.blocks[index])
        assert asked_of(model) == [0, index]
    model = Vit().eval()
    for index, block in enumerate(model.blocks):
        block.drop_path = nn.Dropout(0.1 + 0.01 * index)
    assert asked_of(model) == [0]


class Counted(nn.Module):
    """A hook of a user: an object that counts its calls."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, module, inputs, output):
        self.calls += 1


@pytest.mark.parametrize("name", HOSTS)
def test_nothing_is_touched(name):
    case = build(name)
    case.model.train()
    counted = Counted()
    for module in list(case.model.modules()):
        module.register_forward_hook(counted.forward)
    blocks = [case.model.get_submodule(path) for path, _ in case.model.named_modules()]
    before = torch.get_rng_state(), {key: value.clone() for key, value in case.model.state_dict().items()}
    flags, attributes = [block.training for block in blocks], [set(vars(block)) for block in blocks]
    grad = torch.is_grad_enabled()
    patchselect.apply(case.model, 0.5)
    patchselect.apply(case.model, 0.5)
    patchselect.remove(case.model)
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.is_grad_enabled() is grad
    assert [block.training for block in blocks] == flags and [set(vars(block)) for block in blocks] == attributes
    state = case.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before[1].items())
    assert counted.calls == 0 and all(weight.grad is None for weight in case.model.parameters())


def test_dropout_and_stochastic_depth_are_off_for_the_comparison_alone():
    needs("average pooling")
    sizes = dict(img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=4, num_classes=0)
    model = vision_transformer()(**sizes, drop_rate=0.5, drop_path_rate=0.5).train()
    patchselect.apply(model, 0.5, guidance="image")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["clip", "open_clip", "openai_clip", "albef"])
def test_it_compares_in_the_dtype_of_the_block(name, dtype):
    if dtype is torch.float16:
        needs("half products on CPU")
    case = build(name)
    case.model.to(dtype)
    patchselect.apply(case.model, 0.5)


def test_weights_in_half_precision_beside_norms_in_full():
    """As OpenAI's `convert_weights` leaves them: tokens are in half precision, norms cast and cast back."""

    class Wide(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x.float()).to(x.dtype)

    case = build("openai_clip")
    for block in case.model.visual.transformer.resblocks:
        block.bfloat16()
        for name in ("ln_1", "ln_2"):
            norm = Wide(block.attn.embed_dim)
            norm.load_state_dict(getattr(block, name).float().state_dict())
            setattr(block, name, norm)
    patchselect.apply(case.model, 0.5)


def test_on_the_meta_device_shapes_are_compared():
    needs("operators on meta")
    patchselect.apply(build("clip").model.to("meta"), 0.5)
    refused(tower_of(ShowsAttention).to("meta"), "ran where they raised")
    patchselect.apply(tower_of(ScaledByParameters).to("meta"), 0.5, guidance="image")


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


def test_weights_that_are_elsewhere_are_not_read():
    """ZeRO-3 leaves empty parameters behind until a layer runs, accelerate those of the meta device and a hook."""
    model = Vit().eval()
    for weight in model.blocks[1].mlp.parameters():
        weight.data = torch.empty(0)
    patchselect.apply(model, 0.5, guidance="image", layers=[1])


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_hooks_that_make_weights_run_in_the_copy(kind):
    model = Vit().eval()
    for block in model.blocks:
        getattr(nn.utils, kind)(block.mlp.up)
        block.mlp.up.weight = torch.empty(0)  # what the hook makes anew
    patchselect.apply(model, 0.5, guidance="image")
