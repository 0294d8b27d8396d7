"""N images against M texts: the numbers of pair by pair, in chunks, from loaders, over processes."""

from __future__ import annotations

import functools
import socket
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hosts import HOSTS, Case, build, ids, take
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import patchselect

BARE = {"timm_class_token", "timm_registers", "timm_average", "albef_tower"}
FUSED = {"albef", "mplug", "blip"}  # scored by a fusion encoder that reads tokens, not features
SCORED = [name for name in HOSTS if name not in BARE | FUSED]


def texts(case: Case, count: int, seed: int = 3) -> Tensor:
    return torch.randn(count, case.text_width, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def pair_by_pair(case: Case, images, text: Tensor) -> Tensor:
    """The slow, obvious reference: one image, one text, one whole pass."""
    size = len(images["pixel_values"] if isinstance(images, dict) else images)
    scores = torch.empty(size, len(text))
    for i in range(size):
        for j in range(len(text)):
            with patchselect.guide(case.model, text[j : j + 1]):
                found = case.image_side(case.model, take(images, slice(i, i + 1)))
            scores[i, j] = torch.cosine_similarity(found, text[j : j + 1])
    return scores


def scored(model, images, text, **options) -> Tensor:
    return patchselect.score_pairs(model, images, text, progress=False, **options)


@functools.cache
def shared_case(name: str) -> Case:
    return build(name)


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(["clip", "siglip", "open_clip", "open_clip_normalised_keys"]),
    rate=st.floats(0.05, 1.0),
    layers=st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True).map(sorted),
    relevance=st.sampled_from(["keys", "features", "values", "joint"]),
    fusion=st.sampled_from(["mean", "sum", "none"]),
    images=st.integers(1, 2),
    count=st.integers(1, 3),
)
def test_all_pairs_are_the_pairs_one_by_one(name, rate, layers, relevance, fusion, images, count):
    case = shared_case(name)
    patchselect.apply(case.model, rate, layers, relevance=relevance, fusion=fusion)
    pixels, text = case.images(images), texts(case, count)
    with torch.no_grad():
        with patchselect.guide(case.model, text, "all"):
            found = case.image_side(case.model, pixels)
        pixels, text = pixels.repeat_interleave(count, dim=0), text.repeat(images, 1)
        for row in range(images * count):
            with patchselect.guide(case.model, text[row : row + 1]):
                alone = case.image_side(case.model, pixels[row : row + 1])
            torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SCORED)
def test_scores_on_every_host(name):
    case = build(name)
    images, text = case.images(3), texts(case, 4)
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    torch.testing.assert_close(scored(case.model, images, text), pair_by_pair(case, images, text), rtol=0, atol=1e-4)


def test_a_bare_timm_tower_is_scored_in_its_own_width():
    case = build("timm_average")
    case.model.reset_classifier(0)
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    images, text = case.images(2), texts(case, 3)
    torch.testing.assert_close(scored(case.model, images, text), pair_by_pair(case, images, text), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="has no text encoder that is known here"):
        scored(case.model, images, ids(3))


@pytest.mark.parametrize("name", [name for name in SCORED if not name.startswith("clip_vision")])
def test_raw_texts_go_through_the_text_encoder_of_the_host(name):
    case = build(name)
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    images, tokens = case.images(2), ids(5)
    with torch.no_grad():
        features = case.text_side(case.model, tokens)
    expected = pair_by_pair(case, images, features)
    torch.testing.assert_close(scored(case.model, images, tokens), expected, rtol=0, atol=1e-4)
    loader = [tokens[:2], (tokens[2:], "captions")]
    torch.testing.assert_close(scored(case.model, images, loader), expected, rtol=0, atol=1e-4)


def test_a_matching_head_scores_pairs_by_its_fusion_encoder():
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4)
    config = transformers.BlipConfig(
        text_config=dict(sizes, vocab_size=99, encoder_hidden_size=48, projection_dim=24, bos_token_id=97),
        vision_config=dict(sizes, image_size=64, patch_size=16),
    )
    torch.manual_seed(0)
    model = transformers.BlipForImageTextRetrieval(config).eval()
    images, tokens = torch.randn(3, 3, 64, 64), ids(4)
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    handle = patchselect.apply(model, 0.5, layers=[1, 2])
    expected = torch.empty(3, 4)
    with torch.no_grad():
        for i in range(3):
            for j in range(4):
                pair = dict(pixel_values=images[i : i + 1], input_ids=tokens[j : j + 1], attention_mask=mask[j : j + 1])
                expected[i, j] = model(**pair).itm_score.softmax(dim=-1)[0, 1]
    texts_of = {"input_ids": tokens, "attention_mask": mask}
    torch.testing.assert_close(scored(model, images, texts_of), expected, rtol=0, atol=1e-5)
    short = [{"input_ids": tokens[1:2, :5]}, {"input_ids": tokens[:1]}]
    torch.testing.assert_close(scored(model, images, short), expected[:, [1, 0]], rtol=0, atol=1e-5)
    torch.testing.assert_close(scored(model, images, texts_of, memory_limit=1e6), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="give score_pairs token ids"):
        scored(model, images, torch.randn(2, 48))
    handle.remove()
    patchselect.apply(model, 0.5, layers=[1, 2], guidance="image")
    with torch.no_grad():
        pair = dict(pixel_values=images, input_ids=tokens[:3], attention_mask=mask[:3])
        expected = model(**pair).itm_score.softmax(dim=-1)[:, 1]
    torch.testing.assert_close(scored(model, images, texts_of).diagonal(), expected, rtol=0, atol=1e-5)


def test_images_and_texts_may_come_from_loaders():
    case = build("clip")
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    images, text = case.images(7), texts(case, 5)
    expected = scored(case.model, images, text)
    loader = DataLoader(TensorDataset(images, torch.arange(7)), batch_size=3)
    named = ({"pixel_values": images[i : i + 2], "labels": torch.zeros(2)} for i in range(0, 7, 2))
    prefix = patchselect.encode_prefix(case.model, images)
    mask = torch.ones(5, 7, dtype=torch.long)
    for source in (loader, named, [images[:4], images[4:]], prefix, {"pixel_values": images}):
        torch.testing.assert_close(scored(case.model, source, text), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scored(case.model, images, DataLoader(text, batch_size=2)), expected)
    tokens = {"input_ids": ids(5), "attention_mask": mask}
    torch.testing.assert_close(scored(case.model, images, tokens), scored(case.model, images, ids(5)))
    with pytest.raises(ValueError, match="RandomSampler"):
        scored(case.model, DataLoader(TensorDataset(images), batch_size=3, shuffle=True), text)


def test_candidates_are_columns_of_the_whole_matrix():
    case = build("siglip")
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    images, text = case.images(5), texts(case, 6)
    candidates = torch.tensor([[0, 3], [5, 5], [1, 0], [2, 4], [3, 3]])
    expected = scored(case.model, images, text).gather(1, candidates)
    for limit in (2**30, 400_000):
        found = scored(case.model, images, text, candidates=candidates, memory_limit=limit)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="indices of the 6 texts"):
        scored(case.model, images, text, candidates=candidates + 2)
    with pytest.raises(ValueError, match=r"must be \(5, K\)"):
        scored(case.model, images, text, candidates=candidates[:3])


def test_a_guidance_without_text_encodes_each_image_once():
    case = build("clip")
    images, text = case.images(3), texts(case, 4)
    patchselect.apply(case.model, 0.5, layers=[1, 3], guidance="image")
    with torch.no_grad():
        features = case.image_side(case.model, images)
    expected = torch.cosine_similarity(features.unsqueeze(1), text, dim=-1)
    torch.testing.assert_close(scored(case.model, images, text), expected)


def test_dropout_is_off_for_the_call_alone():
    case = build("open_clip")
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    images, text = case.images(2), texts(case, 2)
    expected = scored(case.model, images, text)
    case.model.visual.patch_dropout = torch.nn.Dropout(0.5)
    case.model.train()
    case.model.visual.ln_post.eval()
    torch.testing.assert_close(scored(case.model, images, text), expected)
    assert case.model.visual.transformer.training and not case.model.visual.ln_post.training


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive besides the given ones, and the most there ever were."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("limit", [500_000, 1_500_000])
@pytest.mark.parametrize("name", ["clip", "siglip", "open_clip"])
def test_memory_stays_under_the_limit_whatever_n_and_m_are(name, limit):
    case = build(name)
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    images, text = case.images(12), texts(case, 12)
    with Live(images, text, *case.model.parameters(), *case.model.buffers()) as live:
        found = scored(case.model, images, text, memory_limit=limit)
    assert limit * 0.2 < live.most <= limit + 2 * found.numel() * 4
    torch.testing.assert_close(found, scored(case.model, images, text), rtol=1e-5, atol=1e-5)


def test_a_limit_that_nothing_fits_into_is_refused():
    case = build("clip")
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    with pytest.raises(ValueError, match=r"memory_limit is 0\.0 MiB, but one image with one text takes 0\.\d MiB"):
        scored(case.model, case.images(1), texts(case, 1), memory_limit=1000)


def test_finished_chunks_are_not_computed_again(tmp_path):
    case = build("clip")
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    images, text = case.images(6), texts(case, 3)
    expected = scored(case.model, images, text)
    loader = [images[:2], images[2:4], images[4:]]

    def interrupted():
        yield from loader[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored(case.model, interrupted(), text, resume=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    runs: list[int] = []
    case.tower(case.model).encoder.layers[5].mlp.register_forward_hook(lambda *_: runs.append(1))
    torch.testing.assert_close(scored(case.model, loader, text, resume=tmp_path), expected)
    assert len(runs) == 1
    for changed in ([images[:2] + 1, *loader[1:]], loader):
        with pytest.raises(ValueError, match="scores of other images, texts, weights or settings"):
            scored(case.model, changed, text if changed is not loader else text + 1, resume=tmp_path)

    case.model.vision_model.encoder.layers[5].mlp.fc1.weight.data.mul_(2)
    with pytest.raises(ValueError, match="other images, texts, weights"):
        scored(case.model, loader, text, resume=tmp_path)


def _one_process(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    case = build("clip")
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    images, text = case.images(7), texts(case, 4)
    encoded: list[int] = []
    patch_embedding = case.tower(case.model).embeddings.patch_embedding
    patch_embedding.register_forward_hook(lambda module, args, out: encoded.append(len(out)))
    found = {"tensor": scored(case.model, images, text)}
    share = sum(encoded) // 2  # once for the prefix, once for the stand-in
    candidates = torch.tensor([[0, 3]] * 7)
    found["candidates"] = scored(case.model, images, text, candidates=candidates)
    found["loader"] = scored(case.model, DataLoader(TensorDataset(images), batch_size=2), text)
    found["iterable"] = scored(case.model, iter([images[:3], images[3:4], images[4:]]), text)
    found["alone"] = scored(case.model, images[:2], text, distributed=False)
    torch.save((share, found), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_the_images_and_both_get_the_matrix(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_one_process, (port, str(tmp_path)), nprocs=2)
    case = build("clip")
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    expected = scored(case.model, case.images(7), texts(case, 4))
    shares = []
    for rank in range(2):
        share, found = torch.load(tmp_path / f"{rank}.pt")
        shares.append(share)
        for name in ("tensor", "loader", "iterable"):
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["candidates"], expected[:, [0, 3]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["alone"], expected[:2], rtol=1e-5, atol=1e-5)
    assert shares == [3, 4]


def test_what_cannot_be_scored_is_said():
    case = build("clip")
    with pytest.raises(ValueError, match="not patched"):
        scored(case.model, case.images(1), texts(case, 1))
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    with pytest.raises(TypeError, match="tokenizer first"):
        scored(case.model, case.images(1), ["a cat"])
    with pytest.raises(TypeError, match="image processor first"):
        scored(case.model, ["cat.jpg"], texts(case, 1))
    with pytest.raises(ValueError, match=r"\(texts, 24\)"):
        scored(case.model, case.images(1), torch.randn(2, 23))
    with pytest.raises(ValueError, match="got no text"):
        scored(case.model, case.images(1), [])


def test_progress_counts_images(monkeypatch):
    tqdm = pytest.importorskip("tqdm")
    seen = []
    monkeypatch.setattr(tqdm.auto.tqdm, "update", lambda bar, count: seen.append((bar.total, count)))
    case = build("clip")
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    images, text = case.images(5), texts(case, 2)
    patchselect.score_pairs(case.model, DataLoader(TensorDataset(images), batch_size=2), text, progress=True)
    assert seen == [(5, 2), (5, 2), (5, 1)]


def test_a_matching_head_of_the_albef_family_scores_pairs_by_its_fusion_half():
    case = build("albef")
    model, images, tokens = case.model, case.images(2), ids(3)
    patchselect.apply(model, 0.5)
    expected = torch.empty(2, 3)
    with torch.no_grad():
        read = dict(attention_mask=torch.ones_like(tokens), return_dict=True)
        states = model.words(tokens, **read, mode="text").last_hidden_state
        for i in range(2):
            for j in range(3):
                with patchselect.guide(model, states[j : j + 1, 0]):
                    rows = model.eyes(images[i : i + 1])
                fused = model.words(
                    encoder_embeds=states[j : j + 1],
                    attention_mask=torch.ones_like(tokens[:1]),
                    encoder_hidden_states=rows,
                    encoder_attention_mask=torch.ones(rows.shape[:2], dtype=torch.long),
                    return_dict=True,
                    mode="fusion",
                ).last_hidden_state
                expected[i, j] = model.score(fused[:, 0]).softmax(dim=-1)[0, 1]
    torch.testing.assert_close(scored(model, images, {"input_ids": tokens}), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="give score_pairs token ids"):
        scored(model, images, torch.randn(3, 32))
