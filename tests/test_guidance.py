"""The right text and record under nesting, exceptions, generators, threads and tasks, and none of it afterwards."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import threading

import pytest
import torch
from hosts import build, ids
from since import since

import patchselect


def run(case, text, images):
    with torch.no_grad(), patchselect.guide(case.model, text):
        return case.image_side(case.model, images)


@pytest.fixture
def case():
    case = build("clip")
    patchselect.apply(case.model, 0.5)
    return case


def test_nested_blocks_and_exceptions(case):
    images = case.images(2)
    outer, inner = torch.randn(2, 24), torch.randn(2, 24)
    expected_outer, expected_inner = run(case, outer, images), run(case, inner, images)
    with torch.no_grad(), patchselect.guide(case.model, outer):
        with pytest.raises(RuntimeError, match="stop"), patchselect.guide(case.model, inner):
            assert torch.equal(case.image_side(case.model, images), expected_inner)
            raise RuntimeError("stop")
        assert torch.equal(case.image_side(case.model, images), expected_outer)
    with pytest.raises(ValueError, match="no text guides"):
        case.image_side(case.model, images)
    with pytest.raises(Exception, match="index out of range"):
        case.pair(case.model, images, ids(2) + 10**6)
    with pytest.raises(ValueError, match="no text guides"):
        case.image_side(case.model, images)


def test_blocks_of_generators_may_end_in_any_order(case):
    images, (one, two, three) = case.images(2), torch.randn(3, 2, 24)
    expected = run(case, two, images)

    def holding(text):
        with patchselect.guide(case.model, text):
            yield

    first, second = holding(one), holding(two)
    next(first), next(second)
    with torch.no_grad():
        assert next(first, "over") == "over"
        assert torch.equal(case.image_side(case.model, images), expected)
        assert next(second, "over") == "over"
        with pytest.raises(ValueError, match="no text guides"):
            case.image_side(case.model, images)
        abandoned = holding(three)
        next(abandoned)
        with patchselect.guide(case.model, two):
            del abandoned
            gc.collect()
            assert torch.equal(case.image_side(case.model, images), expected)
        with pytest.raises(ValueError, match="no text guides"):
            case.image_side(case.model, images)


def test_a_block_that_ends_in_another_context_changes_nothing_there(case):
    images, (text, other) = case.images(2), torch.randn(2, 2, 24)
    expected = run(case, text, images)
    elsewhere, opened = contextvars.copy_context(), patchselect.guide(case.model, other)
    elsewhere.run(opened.__enter__)
    with torch.no_grad(), patchselect.guide(case.model, text):
        opened.__exit__(None, None, None)
        assert torch.equal(case.image_side(case.model, images), expected)


def test_records_of_generators_may_end_in_any_order(case):
    handle = patchselect.handle_of(case.model)
    images, text = case.images(1), torch.randn(1, 24)

    def holding():
        with handle.record() as trace:
            yield trace

    first, second = holding(), holding()
    early, late = next(first), next(second)
    run(case, text, images)
    next(first, None)
    run(case, text, images)
    next(second, None)
    run(case, text, images)
    assert (len(early), len(late)) == (0, 4), "the innermost records"


def test_a_guide_whose_selection_is_gone_is_refused(case):
    for change in (patchselect.apply, patchselect.remove):
        guide = patchselect.guide(case.model, torch.randn(2, 24))
        change(case.model)
        with pytest.raises(ValueError, match="removed from the model, or replaced"), guide:
            pass


@since("function transforms")
def test_gradients_by_function_transforms():
    case = build("open_clip")
    patchselect.apply(case.model, 0.5)
    images, text = case.images(2), torch.randn(2, 24, requires_grad=True)

    def loss(text):
        with patchselect.guide(case.model, text):
            return case.image_side(case.model, images).square().sum()

    (expected,) = torch.autograd.grad(loss(text), text)
    torch.testing.assert_close(torch.func.grad(loss)(text.detach()), expected)


def test_a_text_given_by_guide_wins_over_that_of_the_call(case):
    images, text = case.images(2), torch.randn(3, 24)
    with torch.no_grad(), patchselect.guide(case.model, text, pairing="shared"):
        guided = case.pair(case.model, images, ids(5))
        alone = case.image_side(case.model, images)
        texts = case.text_side(case.model, ids(5))
    scale = case.model.logit_scale.exp()
    cosine = torch.nn.functional.normalize(alone, dim=-1) @ torch.nn.functional.normalize(texts, dim=-1).T
    torch.testing.assert_close(guided, scale * cosine)


def test_a_guide_is_for_its_model_alone():
    one, two = build("clip"), build("clip", seed=5)
    patchselect.apply(one.model, 0.5)
    patchselect.apply(two.model, 0.5)
    images, text, other = one.images(2), torch.randn(2, 24), torch.randn(2, 24)
    expected = run(one, text, images), run(two, other, images)
    with torch.no_grad(), patchselect.guide(one.model, text):
        with pytest.raises(ValueError, match="no text guides"):
            two.image_side(two.model, images)
        with patchselect.guide(two.model, other):
            assert torch.equal(one.image_side(one.model, images), expected[0])
            assert torch.equal(two.image_side(two.model, images), expected[1])


def test_threads_never_see_each_others_text(case):
    images = case.images(2)
    texts = [torch.randn(2, 24) for _ in range(4)]
    expected = [run(case, text, images) for text in texts]
    failures: list[str] = []
    start = threading.Barrier(len(texts))

    def work(index: int) -> None:
        start.wait()
        for _ in range(15):
            if not torch.equal(run(case, texts[index], images), expected[index]):
                failures.append(f"thread {index} saw another text")
        try:
            case.image_side(case.model, images)
            failures.append("text survived its block")
        except ValueError:
            pass

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(texts))]
    with patchselect.guide(case.model, torch.randn(2, 24)):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


def test_one_guide_object_may_be_entered_by_several_threads(case):
    images, text = case.images(2), torch.randn(2, 24)
    expected, shared = run(case, text, images), patchselect.guide(case.model, text)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(10):
            with torch.no_grad(), shared:
                if not torch.equal(case.image_side(case.model, images), expected):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_tasks_do_not_see_each_others_text(case):
    images = case.images(2)
    texts = [torch.randn(2, 24) for _ in range(3)]
    expected = [run(case, text, images) for text in texts]

    async def work(index: int) -> bool:
        with patchselect.guide(case.model, texts[index]):
            await asyncio.sleep(0.01)
            return torch.equal(case.image_side(case.model, images), expected[index])

    async def main() -> list[bool]:
        return await asyncio.gather(*(work(index) for index in range(3)))

    with torch.no_grad():
        assert all(asyncio.run(main()))


def test_nested_records_and_other_threads(case):
    handle = patchselect.handle_of(case.model)
    images, text = case.images(1), torch.randn(1, 24)
    with handle.record() as outer:
        run(case, text, images)
        with handle.record() as inner:
            run(case, text, images)
        thread = threading.Thread(target=run, args=(case, text, images))
        thread.start()
        thread.join()
    run(case, text, images)
    assert len(outer) == 2 and len(inner) == 2


def test_pooled_patches_are_differentiable(case):
    text = torch.randn(2, 24, requires_grad=True)
    handle = patchselect.apply(case.model, 0.5, relevance="keys")
    with handle.record() as trace, patchselect.guide(case.model, text):
        case.image_side(case.model, case.images(2))
    assert trace[0].pooled.shape == (2, 48)
    trace[0].pooled.sum().backward()
    assert text.grad is not None and text.grad.abs().sum() > 0
