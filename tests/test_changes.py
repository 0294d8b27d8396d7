"""Blocks and norms that are exchanged, deleted, wrapped or given another class after `apply`."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hosts import build, texts
from refusals import classes
from since import needs
from torch import nn

import patchselect
from patchselect.wiring.state import STATE

CHANGED = r"were changed after patchselect\.apply: {}.*patchselect\.remove\(model\), and patchselect\.apply again"


def patched(name="timm_class_token", **options):
    case = build(name)
    handle = patchselect.apply(case.model, 0.5, layers=[1, 3], guidance="image", **options)
    return case, handle


def refuses(case, what):
    with torch.no_grad(), pytest.raises(ValueError, match=CHANGED.format(what)):
        case.image_side(case.model, case.images(2))


@pytest.mark.parametrize("name", ["clip", "open_clip", "timm_class_token", "openai_clip", "albef", "mplug"])
@pytest.mark.parametrize("index", [3, 5])
def test_an_exchanged_block(name, index):
    """One that selects, and a later one, whose weights `values` reads."""
    case, handle = patched(name)
    tower = handle.towers[0]
    holder = next(part for part in tower.module.modules() if list(part.children()) == tower.blocks)
    if name == "mplug":
        needs("checkpoints that say their kind")
    old = holder[index]
    holder[index] = copy.deepcopy(old)
    refuses(case, rf"block {index} is another one \({type(old).__name__}\)")
    holder[index] = old
    with torch.no_grad():
        case.image_side(case.model, case.images(2))


@pytest.mark.parametrize("kept", [5, 2])
def test_deleted_blocks(kept):
    case, handle = patched()
    before = case.model.blocks
    case.model.blocks = case.model.blocks[:kept]
    refuses(case, f"there were 6, there are {kept}")
    with pytest.raises(ValueError, match="there were 6"), handle.record():
        case.model(case.images(1))
    del case.model.blocks
    refuses_without = pytest.raises(ValueError, match="its blocks is gone")
    with refuses_without:
        case.model(case.images(1))
    case.model.blocks = before
    case.model(case.images(1))


def test_intermediate_layers_pruned_by_timm():
    needs("intermediates")
    case, _ = patched()
    case.model.prune_intermediate_layers([3], prune_norm=True)
    refuses(case, "there were 6, there are 4")


class Wrap(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("name", ["clip", "open_clip", "timm_class_token"])
def test_wrappers_and_exchanged_parts_are_no_change(name):
    case, handle = patched(name)
    tower = handle.towers[0]
    with torch.no_grad():
        expected = case.image_side(case.model, case.images(2))
        holder = next(part for part in tower.module.modules() if list(part.children()) == tower.blocks)
        for index, block in enumerate(holder):
            holder[index] = Wrap(Wrap(block))
            block.mlp = Wrap(block.mlp)
        torch.testing.assert_close(case.image_side(case.model, case.images(2)), expected)


def like_tome(model):
    """Change classes as tome.patch.timm of facebookresearch/ToMe does."""

    class Merging(type(model)):
        def forward(self, *args, **kwargs):
            self._merging["r"] = [0] * len(self.blocks)
            return super().forward(*args, **kwargs)

    plain = next(kind for kind in type(model.blocks[1]).__mro__ if "_patchselect_base" not in vars(kind))

    class MergingBlock(plain):
        def forward(self, x, **kwargs):
            self._merging["r"].pop(0)
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))[0]))
            return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    class MergingAttention(type(model.blocks[0].attn)):
        def forward(self, x, **kwargs):
            return super().forward(x), None

    model.__class__, model._merging = Merging, {"r": 0}
    for block in model.blocks:
        block.__class__, block._merging = MergingBlock, model._merging
        block.attn.__class__ = MergingAttention


@pytest.fixture
def new_timm():
    needs("average pooling")


def test_another_library_that_swaps_classes_after_apply(new_timm):
    case, handle = patched()
    with torch.no_grad():
        twin = build("timm_class_token").model
        like_tome(twin)
        expected = twin(case.images(2))
    like_tome(case.model)
    refuses(case, "block 1 was given another class, .*MergingBlock")
    with pytest.warns(UserWarning, match="another library has given 3 of its modules classes of its own"):
        handle.remove()
    with torch.no_grad():
        assert torch.equal(case.model(case.images(2)), expected)
    assert not any(STATE in vars(part) for part in case.model.modules())
    with pytest.raises(TypeError, match="MergingBlock cannot be compared|Merging on top of an earlier selection"):
        patchselect.apply(case.model, 0.5, guidance="image")


@pytest.mark.parametrize("used", [False, True])
def test_another_library_that_swaps_classes_before_apply(new_timm, used):
    case = build("timm_class_token")
    like_tome(case.model)
    if used:
        case.model(case.images(1))
    before = classes(case.model)
    with pytest.raises(TypeError, match="MergingBlock cannot be compared with them, as it raised"):
        patchselect.apply(case.model, 0.5, guidance="image")
    assert classes(case.model) == before
    case.model(case.images(1))


def test_classes_of_others_without_super_are_taken_along():
    """As FSDP2 puts them on top."""
    case, handle = patched()
    block = case.model.blocks[1]
    plain = next(kind for kind in type(block).__mro__ if "_patchselect_base" not in vars(kind))
    on_top = type("FSDPBlock", (type(block),), {"shards": lambda self: 2})
    block.__class__ = on_top
    case.image_side(case.model, case.images(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.remove()
    assert block.shards() == 2 and type(block).__mro__[1] is plain


class Kept(nn.Module):
    """As peft wraps a module that is trained as a whole (`modules_to_save`): the old one is in it too."""

    def __init__(self, old, new):
        super().__init__()
        self.original_module, self.new = old, nn.ModuleDict({"default": new})

    @property
    def weight(self):
        return self.new["default"].weight

    @property
    def normalized_shape(self):
        return self.new["default"].normalized_shape

    def forward(self, x):
        return self.new["default"](x)


TOWERS_WITH_NORM = ["clip", "siglip", "open_clip", "timm_class_token", "openai_clip", "albef"]


@pytest.mark.parametrize("relevance", ["values", "joint"])
@pytest.mark.parametrize(
    "name, wrapped",
    [*((name, False) for name in TOWERS_WITH_NORM), *((name, True) for name in TOWERS_WITH_NORM if name != "albef")],
)
def test_an_exchanged_final_norm_is_the_one_that_is_read(name, wrapped, relevance):
    """Whether it is exchanged before `apply` or after it, both select alike, and not as before."""
    found = {}
    for order in ("never", "after", "before"):
        case = build(name)
        if relevance not in case.relevances:
            pytest.skip(f"{name} has no joint space")

        def exchange(tower):
            path = next(path for path, part in tower.module.named_modules() if part is tower.final_norm)
            holder = tower.module.get_submodule(path.rpartition(".")[0])
            old, new = tower.final_norm, copy.deepcopy(tower.final_norm)
            with torch.no_grad():
                new.weight.copy_(torch.randn(new.weight.shape, generator=torch.Generator().manual_seed(1)))
            setattr(holder, path.rpartition(".")[2], Kept(old, new) if wrapped else new)

        if order == "before":
            exchange(patchselect.wiring.towers.find_towers(case.model)[0])
        handle = patchselect.apply(case.model, 0.5, layers=[3], relevance=relevance)
        if order == "after":
            for tower in handle.towers:
                exchange(tower)
        with torch.no_grad(), handle.record() as trace, patchselect.guide(case.model, texts(case, 2)):
            case.image_side(case.model, case.images(2))
        found[order] = trace[0].relevance
    assert torch.equal(found["after"], found["before"])
    assert (found["after"] - found["never"]).abs().max() > 1e-3


def test_a_deleted_final_norm():
    case, _ = patched()
    del case.model.norm
    refuses(case, "its norm is gone")
