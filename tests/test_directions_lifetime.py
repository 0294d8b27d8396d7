"""What `values` reads the patches with lives as long as its `guide` block, in its thread, and in no graph."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from kept_directions import WIDTH, block_of, clip_that_selects, counted, fresh, one_text, relevances, same
from since import since, slow
from stand_ins import images
from torch import nn

import patchselect
from patchselect.relevance import directions
from patchselect.wiring.guidance import current
from patchselect.wiring.state import wiring_of

model = pytest.fixture(clip_that_selects)
text = pytest.fixture(one_text)
made = pytest.fixture(counted)


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


@slow
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
