"""What `values` reads the patches with is kept while a `guide` block lasts, and is never stale."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from since import needs, since
from stand_ins import images, open_clip
from torch import nn

import patchselect
from patchselect.relevance import directions
from patchselect.wiring.guidance import current
from patchselect.wiring.state import wiring_of

WIDTH, FIRST = 24, 4


@pytest.fixture
def model():
    found = open_clip()
    patchselect.apply(found, 0.5)
    return found


@pytest.fixture
def text():
    return torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def made(monkeypatch):
    """Count how often a text is pulled back."""
    calls = []
    original = directions._pulled_back

    def counted(*args):
        calls.append(args[1])
        return original(*args)

    monkeypatch.setattr(directions, "_pulled_back", counted)
    return calls


def relevances(model, image):
    """The relevance of each selection layer."""
    with patchselect.handle_of(model).record() as trace, torch.no_grad():
        model.encode_image(image)
    return [entry.relevance for entry in trace]


def fresh(model, text, image, pairing="paired"):
    with patchselect.guide(model, text.clone(), pairing):
        return relevances(model, image)


def same(found, wanted):
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("pairing, texts", [("paired", 1), ("shared", 1), ("shared", 3), ("all", 3)])
@pytest.mark.parametrize("inference", [False, True])
def test_once_per_block(model, made, pairing, texts, inference):
    text = torch.randn(texts, WIDTH)
    wanted = fresh(model, text, images(2), pairing), fresh(model, text, images(4)[2:], pairing)
    made.clear()
    with patchselect.guide(model, text, pairing), torch.inference_mode(inference):
        found = relevances(model, images(2)), relevances(model, images(4)[2:])
        assert made == [FIRST]
    assert all(map(same, found, wanted))
    with patchselect.guide(model, text, pairing):
        relevances(model, images(2))
    assert made == [FIRST] * 2


def test_all_images_after_those_of_another_mode(model, text, made):
    with patchselect.guide(model, text):
        with torch.inference_mode():
            model.encode_image(images(2))
        found = relevances(model, images(2))
        with torch.autocast("cpu", torch.bfloat16):
            model.encode_image(images(2).bfloat16().float())
        image = images(2).requires_grad_()
        model.encode_image(image).sum().backward()
    assert same(found, fresh(model, text, images(2)))
    assert image.grad.abs().sum() > 0
    assert made[:1] == [FIRST] and len(made) > 2, "with gradients it is computed anew"


def block_of(model):
    return model.visual.transformer.resblocks[FIRST + 2]


def add_in_place(model):
    with torch.no_grad():
        block_of(model).attn.out_proj.weight[3, 5] += 9


def add_in_inference_mode(model):
    with torch.inference_mode():
        block_of(model).attn.in_proj_weight[-1, 0] += 9


def scale_past_autograd(model):
    block_of(model).attn.in_proj_weight.data.mul_(-2)


def zero_a_row_past_autograd(model):
    block_of(model).attn.out_proj.weight.data[:, 7] = 5


def write_by_numpy(model):
    weight = block_of(model).attn.out_proj.weight.detach().numpy()
    weight *= -3


def other_memory(model):
    weight = block_of(model).attn.out_proj.weight
    weight.data = weight.data.flip(0).clone()


def other_parameter(model):
    attention = block_of(model).attn
    attention.in_proj_weight = nn.Parameter(attention.in_proj_weight.detach().flip(0))


def other_layer(model):
    attention = block_of(model).attn
    attention.out_proj = nn.modules.linear.NonDynamicallyQuantizableLinear(*attention.out_proj.weight.shape)


def load_weights(model):
    state = {
        name: value.flip(0) if name.endswith("out_proj.weight") else value for name, value in model.state_dict().items()
    }
    model.load_state_dict(state)


def step_of_an_optimiser(model):
    weight = block_of(model).attn.out_proj.weight
    weight.grad = torch.randn_like(weight)
    torch.optim.SGD([weight], lr=1.0).step()


def scale_a_norm(model):
    with torch.no_grad():
        block_of(model).ln_1.weight[3] *= 20


def weights_in_double(model):
    model.double()


CHANGES = [
    add_in_place, add_in_inference_mode, scale_past_autograd, zero_a_row_past_autograd, write_by_numpy, other_memory,
    other_parameter, other_layer, load_weights, step_of_an_optimiser, scale_a_norm, weights_in_double,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_weights_that_change_inside_of_the_block(model, text, change):
    image = images(2)
    with patchselect.guide(model, text):
        before = relevances(model, image)
        change(model)
        image = image.to(next(model.parameters()).dtype)
        after = relevances(model, image)
    assert not same(before, after), "or this test could not fail"
    assert same(after, fresh(model, text, image))


def test_weights_behind_the_joint_space(model, text):
    with patchselect.guide(model, text):
        before = relevances(model, images(2))
        model.visual.proj.data.mul_(torch.linspace(-1, 1, WIDTH))
        after = relevances(model, images(2))
    assert not same(before, after)
    assert same(after, fresh(model, text, images(2)))


def test_a_text_that_changes_inside_of_the_block(model, text):
    with patchselect.guide(model, text):
        before = relevances(model, images(2))
        text.detach().numpy()[:] = text.flip(1).numpy().copy()
        after = relevances(model, images(2))
    assert not same(before, after)
    assert same(after, fresh(model, text, images(2)))


def test_weights_that_are_made_anew_for_each_call_are_not_kept(model, text, made):
    """A product of parameters may get the memory of the last one, and count its versions from 0."""
    torch.nn.utils.prune.random_unstructured(block_of(model).attn.out_proj, "weight", 0.5)
    with patchselect.guide(model, text):
        first = relevances(model, images(2))
        again = relevances(model, images(2))
        block_of(model).attn.out_proj.weight_orig.data.neg_()
        changed = relevances(model, images(2))
    assert len(made) == 3
    assert same(first, again) and not same(first, changed)
    assert same(changed, fresh(model, text, images(2)))


def small_clip():
    """A tower of transformers, whose layers are modules of their own."""
    needs("projected tower")
    import transformers

    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2)
    config = transformers.CLIPVisionConfig(**small, image_size=32, patch_size=8, projection_dim=WIDTH)
    torch.manual_seed(0)
    return transformers.CLIPVisionModelWithProjection(config).eval()


def seen_by(model, image):
    with patchselect.handle_of(model).record() as trace, torch.no_grad():
        model(pixel_values=image)
    return [entry.relevance for entry in trace]


def hooked(layer, name):
    getattr(layer, name).register_forward_hook(lambda _, args, out: out * torch.linspace(-2, 2, out.shape[-1]))


def forward_of_its_own(layer, name):
    own = getattr(layer, name)
    own.forward = lambda x: torch.nn.functional.linear(x, own.weight.flip(0), own.bias)


def wrapped(layer, name):
    class Turned(nn.Linear):
        def forward(self, x):
            return super().forward(x).flip(-1)

    own = getattr(layer, name)
    turned = Turned(own.in_features, own.out_features)
    turned.load_state_dict(own.state_dict())
    setattr(layer, name, turned)


@pytest.mark.parametrize("name", ["v_proj", "out_proj"])
@pytest.mark.parametrize("change", [hooked, forward_of_its_own, wrapped], ids=lambda change: change.__name__)
def test_layers_that_change_inside_of_the_block(change, name, made):
    model = small_clip()
    patchselect.apply(model, 0.5)
    text, image = torch.randn(1, WIDTH), torch.randn(2, 3, 32, 32)
    layer = next(module for module in reversed(list(model.modules())) if hasattr(module, "v_proj"))
    with patchselect.guide(model, text):
        before = seen_by(model, image)
        assert same(before, seen_by(model, image)) and len(made) == 1, "or nothing is kept"
        change(layer, name)
        after = seen_by(model, image)
    assert not same(before, after), "or this test could not fail"
    with patchselect.guide(model, text):
        assert same(after, seen_by(model, image))


def test_lora_on_and_off(made):
    needs("peft")
    import peft

    lora = peft.LoraConfig(r=4, target_modules=["v_proj", "out_proj"], init_lora_weights=False)
    model = peft.get_peft_model(small_clip(), lora).eval()
    patchselect.apply(model, 0.5)
    text, image = torch.randn(1, WIDTH), torch.randn(2, 3, 32, 32)

    def seen():
        return seen_by(model, image)

    with patchselect.guide(model, text):
        on = seen()
        with model.disable_adapter():
            off = seen()
        again = seen()
        model.merge_adapter()
        merged = seen()
    assert same(on, again) and not same(on, off)
    for one, other in zip(on, merged):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_nothing_outlives_the_block(model, text):
    before = {name: id(value) for module in model.modules() for name, value in vars(module).items()}
    inside = patchselect.guide(model, text)
    with inside:
        relevances(model, images(2))
        guidance = current(wiring_of(model))
        (memory,) = guidance.memories.values()
        kept = weakref.ref(memory[directions.NAME])
        copied = copy.deepcopy(model)
        torch.save(model.state_dict(), io.BytesIO())
    assert set(before) == {name for module in model.modules() for name in vars(module)}
    del guidance, memory
    gc.collect()
    assert kept() is None
    assert vars(inside).keys() == vars(patchselect.guide(model, text)).keys()
    assert same(fresh(copied, text, images(2)), fresh(model, text, images(2)))


def test_weights_that_were_replaced_are_let_go(model, text):
    attention = block_of(model).attn
    with patchselect.guide(model, text):
        relevances(model, images(2))
        old = weakref.ref(attention.out_proj.weight)
        attention.out_proj.weight = nn.Parameter(attention.out_proj.weight.detach().flip(0))
        relevances(model, images(2))
        gc.collect()
        assert old() is None


def test_threads_have_their_own(model):
    texts = [torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    wanted = [fresh(model, text, images(2)) for text in texts]
    with torch.no_grad():
        features = []
        for text in texts:
            with patchselect.guide(model, text):
                features.append(model.encode_image(images(2)))
    wrong = []

    def work(text, feature):
        with patchselect.guide(model, text), torch.no_grad():
            for _ in range(5):
                if not torch.equal(model.encode_image(images(2)), feature):
                    wrong.append(text)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(texts, features)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not same(wanted[0], wanted[1])


@since("tracing")
@pytest.mark.filterwarnings("ignore")
def test_a_trace_bakes_nothing_in(model, text):
    """What an eager call has kept must not become a constant of a graph."""

    def call(image, text):
        with patchselect.guide(model, text):
            model.encode_image(image)
            return model.encode_image(image)

    model.requires_grad_(False)
    with torch.no_grad():
        traced = torch.jit.trace(call, (images(2), text), check_trace=False)
        other = text.flip(1)
        torch.testing.assert_close(traced(images(2), other), call(images(2), other))
        assert not torch.allclose(call(images(2), other), call(images(2), text))


@since("fullgraph")
def test_a_compiled_call_keeps_nothing(model, text, made):
    def call(image, text):
        with patchselect.guide(model, text):
            model.encode_image(image)
            return model.encode_image(image)

    other = text.flip(1)
    with torch.no_grad():
        compiled = torch.compile(call, fullgraph=True, backend="eager")
        for given in (text, other):
            torch.testing.assert_close(compiled(images(2), given), call(images(2), given))


@since("counting")
def test_what_is_counted_is_computed(model, text):
    from torch.utils.flop_counter import FlopCounterMode

    with patchselect.guide(model, text), torch.no_grad():
        model.encode_image(images(1))
        counts = []
        for _ in range(2):
            with FlopCounterMode(display=False) as counter:
                model.encode_image(images(1))
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    with FlopCounterMode(display=False) as counter, torch.no_grad(), patchselect.guide(model, text):
        model.encode_image(images(1))
    assert counter.get_total_flops() == counts[0]
