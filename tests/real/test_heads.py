"""Every head of every real code base keeps the promises, in the environment that this code base asks for.

`ALBEF_DIR=… python -m pytest tests/real`; heads whose checkout or imports are missing skip with that reason.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from heads import changed, floats, ids_in, loss_of, pictures_in, rewound, texts_in
from torch import Tensor, nn

import patchselect
from patchselect.functional import num_kept

from . import albef, blip, lavis, llava, meter, mplug, openai_clip, perception
from .cases import Case

CODE_BASES = {
    "albef": albef,
    "mplug": mplug,
    "blip": blip,
    "lavis": lavis,
    "clip": openai_clip,
    "llava": llava,
    "pe": perception,
    "meter": meter,
}
TABLES = {family: code_base.CASES for family, code_base in CODE_BASES.items()}
NAMES = [f"{family}-{name}" for family, table in TABLES.items() for name in table]
VARIABLES = [code_base.VARIABLE for code_base in CODE_BASES.values()]
if not any(os.environ.get(variable) for variable in VARIABLES):
    pytest.skip(f"set one of {', '.join(VARIABLES)} to a checkout", allow_module_level=True)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture(scope="module", params=NAMES)
def built(request: Any, tmp_path_factory: Any) -> tuple[Case, Any]:
    """A head and what puts its weights and buffers back; built once, its tests run one after the other."""
    family, name = request.param.split("-", 1)
    case = TABLES[family][name](tmp_path_factory.mktemp(name))
    return case, rewound(case)


@pytest.fixture
def case(built: tuple[Case, Any]) -> Iterator[Case]:
    case, rewind = built
    rewind()
    yield case
    patchselect.remove(case.model)
    case.model.zero_grad(set_to_none=True)


def layers_of(case: Case) -> tuple[int, ...]:
    handle = patchselect.apply(case.model, 0.5, guidance="image")
    handle.remove()
    return handle.layers


def lengths(case: Case, rate: float) -> list[int]:
    found, patches = [], case.patches
    for _ in layers_of(case):
        patches = num_kept(patches, rate) + 1
        found.append(1 + patches)
    return found


def same(first: Any, second: Any) -> bool:
    """Bit-equal tensors in any nesting, or equal answers."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def test_a_step_of_training(case: Case) -> None:
    """It selects, learns through the selection, changes no key, and leaves the very model behind."""
    model = case.model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = lengths(case, 0.5)
    reference = case.call()
    kinds = {path: (part, type(part)) for path, part in model.named_modules()}  # some make parts in their first call
    model.load_state_dict(before)
    handle = patchselect.apply(model, 0.5, pairing=case.pairing)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with handle.record() as trace:
        output = case.call()
    assert [entry.num_tokens for entry in trace] == expected * len(handle.towers) * case.runs
    assert not same(floats(output), floats(reference))
    if case.trains:
        loss = loss_of(output)
        loss.backward()
        assert loss.isfinite()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        online = handle.towers[0]
        output_weight = online.adapter.projections(online.blocks[0]).output
        assert output_weight.grad is not None and output_weight.grad.abs().sum() > 0
    handle.remove()
    model.load_state_dict(before)
    assert {path: (part, type(part)) for path, part in model.named_modules()} == kinds
    assert not any("patchselect" in key for part in model.modules() for key in vars(part))
    assert floats(reference) and same(floats(case.call()), floats(reference))


@pytest.mark.parametrize("training", [False, True])
def test_keeping_everything_changes_nothing(case: Case, built: Any, training: bool) -> None:
    if training and not case.same_stream:
        pytest.skip("dropout is drawn in another order here: the text runs before the image")
    case.model.train(training)
    reference = case.call()
    built[1]()
    patchselect.apply(case.model, 1.0, pairing=case.pairing)
    assert floats(reference) and same(floats(case.call()), floats(reference))


def test_a_text_guides_its_own_image_alone(case: Case, built: Any) -> None:
    handle = patchselect.apply(case.model.eval(), 0.5, pairing=case.pairing)
    batch = case.batch(0)
    texts = case.images if case.captions else len(ids_in(texts_in(batch)))
    features = case.text_features()
    features[1] = torch.randn(features.shape[1], generator=torch.Generator().manual_seed(9))
    with torch.no_grad(), handle.record() as trace:
        case.call(batch)
    built[1]()
    with torch.no_grad(), handle.record() as other:
        case.call(batch if case.captions else changed(case.batch(0), 1), text=features)
    assert len(trace) == len(other) >= 2
    for one, two in zip(trace, other):
        moved = (one.relevance != two.relevance).any(dim=1)
        assert moved.tolist() == (torch.arange(case.images) % texts == 1).tolist()


def test_its_own_evaluation(case: Case, built: Any) -> None:
    """Unchanged with every patch kept; with half of them it selects, and gives an answer of the same kind."""
    if not case.evaluations:
        pytest.skip("its code base evaluates it by its training call alone")
    model = case.model.eval()
    expected = lengths(case, 0.5)
    for evaluation in case.evaluations.values():
        patchselect.remove(model)
        built[1]()
        with torch.no_grad():
            torch.manual_seed(3)
            reference = evaluation.run(model)
            patchselect.apply(model, 1.0, guidance=evaluation.guidance, pairing=case.pairing)
            torch.manual_seed(3)
            assert same(evaluation.run(model), reference)
            handle = patchselect.apply(model, 0.5, guidance=evaluation.guidance, pairing=case.pairing)
            with handle.record() as trace:
                found = evaluation.run(model)
        assert [entry.num_tokens for entry in trace[: len(expected)]] == expected
        assert all(part.isfinite().all() for part in floats(found) if isinstance(found, Tensor))
        if evaluation.guidance == "image":
            patchselect.apply(model, 0.5, pairing=case.pairing)
            with pytest.raises(ValueError, match=r"patchselect\.guide.*guidance=\"image\""):
                evaluation.run(model)


def test_no_layer_of_a_text_encoder_runs_more_often(case: Case, built: Any) -> None:
    """Where the head repeats the run that guides, it is answered from memory; elsewhere it is the only new one."""
    layers = [part for path, part in case.model.named_modules() if path.rpartition(".")[0].endswith("encoder.layer")]
    if not layers or case.captions:
        pytest.skip("no BERT encodes a text here")
    calls: list[int] = []
    parts = [layer.attention for layer in layers]  # METER's layers are answered from memory one by one
    hooks = [part.register_forward_hook(lambda module, args, output: calls.append(id(module))) for part in parts]
    case.call()
    before = sorted(calls)
    calls.clear()
    built[1]()
    patchselect.apply(case.model, 0.5, pairing=case.pairing)
    case.call()
    for hook in hooks:
        hook.remove()
    assert before and len(calls) == len(before) + case.extra_text_layers


@torch.no_grad()
def pair_by_pair(case: Case) -> Tensor:
    """The probabilities of a match in the head's own forward, which puts the pairs of its batch first."""
    batch = case.batch(0)
    images, texts = len(pictures_in(batch)), len(ids_in(texts_in(batch)))
    matching = next(part for part in case.model.children() if isinstance(part, nn.Linear) and part.out_features == 2)
    given: list[Tensor] = []
    hook = matching.register_forward_hook(lambda module, args, output: given.append(output))
    scores = torch.empty(images, texts)
    for i in range(images):
        for j in range(texts):
            given.clear()
            torch.manual_seed(0)
            args, kwargs = case.pairs([i, i - 1], [j, j - 1])  # the second draws the negatives
            case.model(*args, **kwargs)
            scores[i, j] = given[0][0].softmax(dim=-1)[1]
    hook.remove()
    return scores


@torch.no_grad()
def cosines(case: Case) -> Tensor:
    return torch.tensor([[float(case.cosine(i, j)) for j in range(3)] for i in range(3)])


def test_score_pairs_gives_what_its_own_forward_gives(case: Case, built: Any) -> None:
    if case.pairs is None and case.cosine is None:
        pytest.skip("it scores no pairs: it has no image-text matching head, and is no dual encoder")
    model = case.model.eval()
    patchselect.apply(model, 0.5, pairing=case.pairing)
    expected = pair_by_pair(case) if case.cosine is None else cosines(case)
    assert expected.std() > 1e-4
    built[1]()
    batch = case.batch(0)
    images, text = pictures_in(batch), case.tokens(batch)
    found = patchselect.score_pairs(model, images, text, progress=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    prefix = patchselect.encode_prefix(model, images)
    found = patchselect.score_pairs(model, prefix, text, progress=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
