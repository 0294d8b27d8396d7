"""Retrieval on a small stand-in of Karpathy's format, against an independent computation."""

from __future__ import annotations

import json

import pytest
import torch
from since import BENCHMARKS, needs
from stand_ins import albef

needs(*BENCHMARKS, module=True)
import numpy as np
from PIL import Image

import patchselect
from benchmarks.accuracy.yours import karpathy, rerank, retrieval
from benchmarks.accuracy.yours.albef import AlbefHost, load_albef
from benchmarks.accuracy.yours.signs import Opposite
from benchmarks.models.loading import load

IMAGES, CAPTIONS = 5, 5


def write_pool(root, nested):
    """Five images of the test split with five captions (the second six), and one of another split without a file."""
    random = np.random.default_rng(0)
    entries = []
    for place in range(IMAGES):
        path = root / ("val2014" if nested else "") / f"{place}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(path)
        words = [f" a thing {place} seen {number} times \n" for number in range(CAPTIONS + (place == 1))]
        sentences = [{"raw": raw, "tokens": raw.split(), "imgid": place, "sentid": 9 * place} for raw in words]
        entries.append({"filename": path.name, "split": "test", "imgid": place, "sentences": sentences})
    entries.insert(2, {"filename": "gone.jpg", "split": "train", "sentences": [{"raw": "not this"}]})
    if nested:
        entries = [{"filepath": "val2014", **entry} for entry in entries]
    file = root / "dataset.json"
    file.write_text(json.dumps({"images": entries, "dataset": "stand-in"}))
    return file


@pytest.fixture(scope="module", params=[False, True], ids=["flickr30k", "coco"])
def data(request, tmp_path_factory):
    return write_pool(tmp_path_factory.mktemp("karpathy"), request.param)


@pytest.fixture(scope="module")
def flickr(tmp_path_factory):
    return write_pool(tmp_path_factory.mktemp("flickr"), False)


def test_a_split_of_karpathy(data):
    pool = karpathy.read_pool(data)
    assert len(pool.paths) == IMAGES and len(pool.captions) == IMAGES * CAPTIONS
    assert pool.owner == [place for place in range(IMAGES) for _ in range(CAPTIONS)]
    assert pool.captions[:2] == ["a thing 0 seen 0 times", "a thing 0 seen 1 times"]
    assert len(karpathy.read_pool(data, captions=6).captions) == IMAGES * CAPTIONS + 1
    assert len(karpathy.read_pool(data, limit=2).paths) == 2 and pool.open(0).size == (90, 70)
    with pytest.raises(FileNotFoundError, match=r"1 of 1 images are missing.*gone\.jpg"):
        karpathy.read_pool(data, split="train")
    with pytest.raises(ValueError, match="no image in the split 'val'"):
        karpathy.read_pool(data, split="val")


def test_a_list_of_albef(data, tmp_path):
    pool = karpathy.read_pool(data)
    start = data.parent
    rows = [
        {"image": str(path.relative_to(start)), "caption": pool.captions[5 * i : 5 * i + 5]}
        for i, path in enumerate(pool.paths)
    ]
    (tmp_path / "flickr30k_test.json").write_text(json.dumps(rows))
    assert karpathy.read_pool(tmp_path / "flickr30k_test.json", start) == pool
    (tmp_path / "other.json").write_text('{"annotations": []}')
    with pytest.raises(ValueError, match="neither a split of Karpathy"):
        karpathy.read_pool(tmp_path / "other.json")


def slow_recalls(first, second, owner, best):
    """R@1, 5 and 10 in loops: the `best` of the first pass by the second one's scores, then the rest as they were."""
    images, texts = first.shape
    found = {"image_to_text": {}, "text_to_image": {}}
    for k in (1, 5, 10):
        hits = []
        for i in range(images):
            order = sorted(range(texts), key=lambda j: -first[i, j])
            order = sorted(order[:best], key=lambda j: -second(i, j)) + order[best:]
            hits.append(any(owner[j] == i for j in order[:k]))
        found["image_to_text"][k] = 100 * sum(hits) / images
        hits = []
        for j in range(texts):
            order = sorted(range(images), key=lambda i: -first[i, j])
            order = sorted(order[:best], key=lambda i: -second(i, j)) + order[best:]
            hits.append(owner[j] in order[:k])
        found["text_to_image"][k] = 100 * sum(hits) / texts
    return found


def test_recalls_are_those_of_an_independent_computation(flickr, tiny, tmp_path, capsys):
    """Pair by pair with `guide`, ranked in loops, both signs of two relevances."""
    arguments = (
        f"--data {flickr} --model {tiny} --random-weights --relevance values keys --against image random".split()
    )
    arguments += f"--keep-rate 0.5 --best 3 --batch 2 --device cpu --output {tmp_path}".split()
    torch.manual_seed(0)
    report = retrieval.main(retrieval.parse(arguments))
    assert [r["arm"] for r in report["results"]] == [
        "no selection", "text, values", "text, -values", "text, keys", "text, -keys", "image", "random",
    ]  # fmt: skip
    assert json.loads((tmp_path / "retrieval.json").read_text())["captions"] == IMAGES * CAPTIONS
    assert "I→T R@1" in capsys.readouterr().out

    torch.manual_seed(0)
    host, pool = load(tiny), karpathy.read_pool(flickr)
    pixels = host.images([pool.open(place) for place in range(IMAGES)])
    normal = torch.nn.functional.normalize
    with torch.no_grad():
        texts = host.encode_text(host.tokens(pool.captions))
        first = (normal(host.encode_image(pixels), dim=-1) @ normal(texts, dim=-1).T).tolist()
    first = np.array(first)
    seen = set()
    for record, relevance in zip(report["results"], (None, "values", Opposite("values"), "keys", Opposite("keys"))):

        def second(i, j, relevance=relevance):
            if relevance is None:
                return first[i, j]
            with torch.no_grad(), patchselect.guide(host.model, texts[j : j + 1]):
                feature = host.encode_image(pixels[i : i + 1])
            return float(normal(feature, dim=-1) @ normal(texts[j], dim=-1))

        if relevance is not None:
            patchselect.apply(host.model, 0.5, relevance=relevance)
        wanted = slow_recalls(first, second, pool.owner, 3)
        assert record["recall"] == {way: pytest.approx(found) for way, found in wanted.items()}
        seen.add(json.dumps(wanted))
    assert len(seen) > 1, "or this test could not fail"


def test_rivals_have_the_flops_of_text_guidance(flickr, tiny, tmp_path):
    arguments = f"--data {flickr} --model {tiny} --random-weights --relevance values --one-sign --limit 2".split()
    arguments += f"--keep-rate 0.5 --best 2 --device cpu --output {tmp_path}".split()
    report = retrieval.main(retrieval.parse(arguments))
    shares = {r["arm"]: r["flop_share"] for r in report["results"]}
    assert shares["text, values"] < 1 == shares["no selection"]
    assert shares["merging"] == pytest.approx(shares["text, values"], abs=0.05)
    assert shares["random"] == pytest.approx(shares["text, values"], abs=0.05)
    by_arm = {r["arm"]: r for r in report["results"]}
    assert by_arm["merging"]["removed"] > 0 and by_arm["smaller"]["image_size"] < 64


def test_random_weights_are_refused(flickr, tmp_path):
    with pytest.raises(ValueError, match="random weights"):
        retrieval.main(retrieval.parse(["--data", str(flickr), "--model", "ViT-S-32-alt", "--output", str(tmp_path)]))


def test_the_opposite_keeps_what_the_relevance_would_drop(tiny):
    host = load(tiny)
    kept = []
    for relevance in ("values", Opposite("values")):
        handle = patchselect.apply(host.model, 0.5, [2], relevance=relevance)
        with handle.record() as trace, torch.no_grad(), patchselect.guide(host.model, torch.ones(1, 32)):
            host.encode_image(torch.linspace(-1, 1, 3 * 64 * 64).sin().view(1, 3, 64, 64))
        kept.append(set(trace[0].kept[0].tolist()) - {-1})
    assert not kept[0] & kept[1] and len(kept[0] | kept[1]) == 16


def test_what_is_not_ranked_again_stays_behind_in_its_order():
    first = torch.tensor([[0.9, 0.1, 0.5, 0.3]])
    of_images, _ = rerank.candidates_of(first, 2)
    assert of_images.tolist() == [[True, False, True, False]]
    order = rerank.ranked(first, torch.tensor([[-0.5, float("nan"), 0.2, float("nan")]]), of_images).argsort(
        descending=True
    )
    assert order.tolist() == [[2, 0, 3, 1]]


def test_a_matching_head_ranks_again_by_itself():
    """ALBEF: the probability of a match of each wanted pair, each with the image tokens that its text chose."""
    model, image, text = albef()
    texts = {"input_ids": text.input_ids, "attention_mask": text.attention_mask}
    patchselect.apply(model, 0.5)
    whole = patchselect.score_pairs(model, image, texts, progress=False)
    wanted = torch.rand(whole.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    wanted[0] = False
    assert 0 < wanted.sum() < wanted.numel()

    def some(chosen):
        return {name: ids[chosen] for name, ids in texts.items()}

    found = rerank.rescored(model, lambda places: image[places], some, wanted, 2, "test")
    assert torch.equal(found.isnan(), ~wanted)
    torch.testing.assert_close(found[wanted], whole[wanted], atol=1e-5, rtol=1e-4)


def test_an_interrupted_pass_goes_on(tiny, tmp_path, monkeypatch):
    host = load(tiny)
    patchselect.apply(host.model, 0.5)
    pixels, texts = torch.randn(4, 3, 64, 64), torch.randn(6, 32)
    wanted = torch.ones(4, 6, dtype=torch.bool)
    read = []

    def images(places):
        read.append(places)
        return pixels[places]

    first = rerank.rescored(host.model, images, lambda chosen: texts[chosen], wanted, 2, "test", tmp_path)
    scored = []
    monkeypatch.setattr(patchselect.pairs.score, "_score_chunk", lambda *_: scored.append(1))
    again = rerank.rescored(host.model, images, lambda chosen: texts[chosen], wanted, 2, "test", tmp_path)
    assert not scored and torch.equal(first, again)


def test_albef_ranks_by_its_own_head(flickr, tmp_path, monkeypatch, capsys):
    """The whole command on a double of ALBEF's structure, against `score_pairs` on all pairs and loops."""
    model, _, _ = albef()
    words = albef_words()

    def prepare(picture):
        return torch.from_numpy(np.asarray(picture.resize((32, 32))).copy()).permute(2, 0, 1) / 255

    host = AlbefHost(model.float(), "ALBEF", "double", 32, "random weights", True, prepare, words)
    monkeypatch.setattr(retrieval, "load_albef", lambda config, checkpoint, size: host)
    arguments = f"--data {flickr} --albef config.yaml --random-weights --relevance keys --against random".split()
    arguments += f"--keep-rate 0.5 --best 3 --batch 2 --device cpu --output {tmp_path}".split()
    report = retrieval.main(retrieval.parse(arguments))
    arms = {r["arm"]: r["recall"] for r in report["results"]}
    assert list(arms) == ["first pass alone", "no selection", "text, keys", "text, -keys", "random"]

    pool = karpathy.read_pool(flickr)
    pixels, tokens = host.images([pool.open(place) for place in range(IMAGES)]), host.tokens(pool.captions)
    normal = torch.nn.functional.normalize
    with torch.no_grad():
        first = (normal(host.encode_image(pixels), dim=-1) @ normal(host.encode_text(tokens), dim=-1).T).numpy()
    for name, options in (("no selection", (1.0, None, "random")), ("text, keys", (0.5, None, "text", "keys"))):
        patchselect.apply(model, *options)
        second = patchselect.score_pairs(model, pixels, tokens, progress=False)
        wanted = slow_recalls(first, lambda i, j, second=second: float(second[i, j]), pool.owner, 3)
        assert arms[name] == {way: pytest.approx(found) for way, found in wanted.items()}


def albef_words():
    def tokenize(captions):
        ids = torch.tensor([[1] + [3 + sum(map(ord, word)) % 20 for word in caption.split()] for caption in captions])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return tokenize


def test_albef_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.delenv("ALBEF_DIR", raising=False)
    with pytest.raises(ValueError, match="ALBEF_DIR"):
        load_albef(tmp_path / "config.yaml", None)
