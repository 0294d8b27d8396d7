"""The speed benchmark counts right: FLOPs are those of the tokens, and methods are compared at the same FLOPs."""

import pytest
from since import BENCHMARKS, needs, slow

needs(*BENCHMARKS, module=True)

from benchmarks.common.photographs import SOURCES, load_photos
from benchmarks.common.tome import matching_flops
from benchmarks.models.loading import load
from benchmarks.speed import counting
from benchmarks.speed.cases import MERGED, Case, Selection
from benchmarks.speed.counting import FlopBook
from benchmarks.speed.run import inputs_of
from patchselect.functional import as_ratio, merge_schedule, num_kept

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def base():
    """ViT-B/16 at 224 pixels, with one image and one text."""
    host = load("ViT-B-16")
    return FlopBook(host, Selection(), inputs_of(host, load_photos(SOURCES[:1]), 1))


def vit_base_flops(lengths):
    """ViT-B/16, 2 per multiply-add: patches, attention and MLP at the (attention, MLP) lengths of each block, head."""
    width = 768
    blocks = sum(8 * n * width**2 + 4 * n**2 * width + 16 * m * width**2 for n, m in lengths)
    return 2 * 196 * 768 * width + blocks + 2 * width * 512


def test_flops_of_the_unpatched_model(base):
    assert base.of(Case("unpatched")) == vit_base_flops([(197, 197)] * 12)
    assert base.of(Case("unpatched")) / 1e9 == pytest.approx(35.1, abs=0.05)
    assert base.of(Case("unpatched"), "pair") / 1e9 == pytest.approx(41.1, abs=0.05)


@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
def test_flops_of_selection_are_those_of_its_tokens(base, rate):
    first = num_kept(196, rate) + 1
    second = num_kept(first, rate) + 1
    lengths = [197] * 5 + [first + 1] * 5 + [second + 1] * 2
    tokens = vit_base_flops([(n, lengths[min(i + 1, 11)] if i in (4, 9) else n) for i, n in enumerate(lengths)])
    fusion = 2 * 768 * (196 + first)
    assert base.of(Case("random", rate)) == tokens + fusion
    for guidance in ("text", "image"):
        scoring = base.of(Case(guidance, rate)) - tokens - fusion
        assert 0 < scoring < 0.002 * tokens


def test_flops_do_not_depend_on_the_batch(base):
    host, photos = base.host, load_photos(SOURCES[:2])
    assert FlopBook(host, Selection(), inputs_of(host, photos, 2)).of(Case("text", 0.5)) == base.of(Case("text", 0.5))


def test_counts_of_a_real_pass_are_those_of_fake_tensors(tiny, monkeypatch):
    """Which of them is made depends on the size of the model."""
    host, counted = load(tiny), {}
    cases = [Case("text", 0.5), Case("random", 0.5), Case(MERGED, 0.5, own_rate=0.4), Case("tome front", 0.5, 2)]
    original = counting.count_flops
    for limit in (0, 1e11):
        ways = []
        monkeypatch.setattr(counting, "LARGE", limit)
        monkeypatch.setattr(
            counting, "count_flops", lambda call, fake, ways=ways: ways.append(fake) or original(call, fake)
        )
        book = FlopBook(host, Selection(), inputs_of(host, load_photos(SOURCES[:1]), 1))
        counted[limit] = [book.of(case) for case in (Case("unpatched"), *cases)]
        assert ways == [True] + [limit == 0] * len(cases)
    assert counted[0] == counted[1e11]


def test_tome_meets_the_flops_of_selection(base):
    removed = base.tome_removals(Case("text", 0.5))
    assert base.of(Case("tome", 0.5, removed)) == pytest.approx(base.of(Case("text", 0.5)), rel=0.005)


@pytest.mark.parametrize("rate", [pytest.param(0.3, marks=slow), 0.7])
def test_merging_early_meets_the_flops_of_selection(base, rate):
    """At every rate; and what merging, ranking and fusing cost by themselves is a small share of it."""
    text = Case("text", rate)
    front = Case("tome front", rate, base.tome_removals(text, "tome front"))
    assert base.of(front) == pytest.approx(base.of(text), rel=0.005)
    own = base.merged_rate(text)
    found = base.of(Case(MERGED, rate, own_rate=own))
    assert found == pytest.approx(base.of(text), rel=0.005)
    patches, lengths = 196, []
    for merged in merge_schedule(196, as_ratio(own), 0.5, 4):
        lengths.append((1 + patches, 1 + patches - merged))
        patches -= merged
    left = num_kept(196, own) + 2
    tokens = vit_base_flops([*lengths, (1 + patches, left), *[(left, left)] * 7])
    assert 0 < found - tokens < 0.005 * tokens


def test_matching_flops_finds_the_closest():
    for target in (1000.0, 996.0, 333.3, 5.0, 0.0, 2000.0):
        best = min(range(101), key=lambda removed: abs(1000 - 9.9 * removed - target))
        for guess in (None, 0, best, best + 1, best - 1, best + 50, 100, 1000, -3):
            assert matching_flops(target, lambda removed: 1000 - 9.9 * removed, 100, guess) == best


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_a_good_guess_saves_counts(off):
    asked = []
    found = matching_flops(333.3, lambda removed: asked.append(removed) or 1000 - 9.9 * removed, 100, 67 + off)
    assert found == 67 and len(asked) <= 4 and len(set(asked)) == len(asked)
