"""Many pairs: chunks under a limit of memory, finished ones kept, shared out over processes."""

from __future__ import annotations

import functools
import socket
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hosts import build, texts
from processes import leave_group
from since import needs, slow
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

needs("dispatch modes", module=True)
from torch.utils._python_dispatch import TorchDispatchMode

import patchselect
from patchselect.compat import address_of, memory_of
from patchselect.pairs.checksums import checksums

scored = functools.partial(patchselect.score_pairs, progress=False)


class Live(TorchDispatchMode):
    """Bytes of the tensors that are alive besides the given ones, and the most there ever were."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known = {address_of(tensor) for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                address, memory = address_of(tensor), memory_of(tensor)
                held = memory.untyped_storage() if hasattr(memory, "untyped_storage") else memory  # a tensor up to 2.1
                size = held.nbytes() if hasattr(held, "nbytes") else memory.numel() * memory.element_size()
                if address not in self.known:
                    self.known.add(address)
                    self.now += size
                    weakref.finalize(memory, self._gone, address, size)
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


@pytest.mark.parametrize("changed", ["texts", "images", "candidates"])
def test_finished_chunks_of_another_order_are_refused(tmp_path, changed):
    case = build("clip")
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    given = {"images": case.images(3), "texts": texts(case, 4), "candidates": torch.tensor([[0, 3], [1, 2], [2, 0]])}

    def score():
        return scored(case.model, given["images"], given["texts"], candidates=given["candidates"], resume=tmp_path)

    expected = score()
    assert torch.equal(score(), expected)
    given[changed] = given[changed].flip(0)
    with pytest.raises(ValueError, match="scores of other images, texts, weights or settings"):
        score()


def test_checksums_tell_orders_types_and_shapes_apart():
    generator = torch.Generator().manual_seed(0)
    big = torch.randn(70_001, 2, generator=generator)
    one, two = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]])
    different = [big, big.flip(0), big.flip(1), one, two, one.T, one.half(), one.double()]
    different += [torch.stack(rows) for rows in ([one, two, two, one], [two, one, one, two])]
    different += [torch.zeros(3), torch.zeros(4), torch.zeros(0), torch.tensor(True), torch.tensor(False)]
    assert len(set(checksums(different))) == len(different)
    assert checksums([big[1:], big[2:, 1]]) == checksums([big[1:].clone(), big[2:, 1].clone()])
    assert checksums([]) == ()


def _one_process(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
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
    leave_group()


@pytest.mark.parametrize("shared", [(3, 4), pytest.param((1, 2, 2, 2), marks=slow)], ids=len)
def test_processes_share_the_images_and_all_get_the_matrix(shared, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    build("clip")
    mp.spawn(_one_process, (len(shared), port, str(tmp_path)), nprocs=len(shared))
    case = build("clip")
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    expected = scored(case.model, case.images(7), texts(case, 4))
    shares = []
    for rank in range(len(shared)):
        share, found = torch.load(tmp_path / f"{rank}.pt")
        shares.append(share)
        for name in ("tensor", "loader", "iterable"):
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["candidates"], expected[:, [0, 3]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found["alone"], expected[:2], rtol=1e-5, atol=1e-5)
    assert sorted(shares) == sorted(shared) and sum(shares) == 7


def test_progress_counts_images(monkeypatch):
    needs("tqdm")
    import tqdm

    seen = []
    monkeypatch.setattr(tqdm.auto.tqdm, "update", lambda bar, count: seen.append((bar.total, count)))
    case = build("clip")
    patchselect.apply(case.model, 0.5, layers=[1, 3])
    images, text = case.images(5), texts(case, 2)
    patchselect.score_pairs(case.model, DataLoader(TensorDataset(images), batch_size=2), text, progress=True)
    assert seen == [(5, 2), (5, 2), (5, 1)]
