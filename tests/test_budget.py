"""A budget in place of a rate: the arithmetic against counted FLOPs, and what cannot be reached."""

from __future__ import annotations

import functools

import pytest
import torch
from hosts import HOSTS, Case, build
from hypothesis import given, settings
from hypothesis import strategies as st
from since import missing, needs, since

import patchselect
from patchselect.budget import Cost, own_patches
from patchselect.functional import as_ratio
from patchselect.wiring.towers import find_towers

if missing("counting") is None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

REAL = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)


def counted(call) -> float:
    """Multiply-adds, with kernels that the counter knows."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 2


def resizing(tower, images) -> float:
    """Multiply-adds of fitting positions to the grids of images: a product in SigLIP 2 of transformers 5.24."""
    if not hasattr(tower.module, "embeddings") or not hasattr(tower.module.embeddings, "resize_positional_embeddings"):
        return 0
    embeddings, shapes = tower.module.embeddings, images["spatial_shapes"]
    side = embeddings.position_embedding_size
    grid = embeddings.position_embedding.weight.reshape(side, side, -1)
    return counted(lambda: embeddings.resize_positional_embeddings(grid, shapes, images["pixel_values"].shape[1]))


def guided(case: Case, images) -> None:
    with patchselect.guide(case.model, torch.randn(1, case.text_width)):
        case.image_side(case.model, images)


@functools.lru_cache(maxsize=None)
def real_clip():
    needs("projected tower")
    import transformers

    config = transformers.CLIPVisionConfig(**REAL, patch_size=16, image_size=224, projection_dim=512)
    return transformers.CLIPVisionModelWithProjection(config).eval()


def tower_cost(model, size: int, rates=None) -> float:
    """Counted FLOPs of one image of `size` pixels, on tensors that hold nothing."""
    patchselect.remove(model)
    if rates is not None:
        patchselect.apply(model, rates)
    with FakeTensorMode(allow_non_fake_inputs=True):
        images, flags = torch.zeros(1, 3, size, size), {"interpolate_pos_encoding": True}
        if rates is None:
            return counted(lambda: model(images, **flags))
        with patchselect.guide(model, torch.zeros(1, 512)):
            return counted(lambda: model(images, **flags))


def no_positions(positions, shapes, max_length):
    """Stand in for SigLIP 2's resampling of positions, which transformers does by a product since 5.24.

    A counter sees the product and did not see the interpolation before it; neither grows with what is kept.
    """
    return positions.new_zeros(len(shapes), max_length, positions.shape[-1])


@since("counting")
@pytest.mark.parametrize("name", list(HOSTS))
def test_the_arithmetic_is_what_a_counter_counts(name, monkeypatch):
    case = build(name)
    if name == "siglip2":
        embeddings = type(find_towers(case.model)[0].module.embeddings)
        monkeypatch.setattr(embeddings, "resize_positional_embeddings", staticmethod(no_positions))
    case.model.requires_grad_(False)  # the counter would look for a graph, which a pooler's expanded query has not
    tower = find_towers(case.model)[0]
    images = case.images(1)
    assert own_patches(tower) == (16 if name == "siglip2" else case.patches)
    whole, left_out = Cost.of(tower).of_encoder(case.patches), resizing(tower, images)
    assert whole == pytest.approx(counted(lambda: case.image_side(case.model, images)) - left_out, rel=0.003)
    for rate in (0.3, 0.5, 0.9):
        handle = patchselect.apply(case.model, rate, [1, 3])
        expected = counted(lambda: guided(case, images)) - left_out
        found = Cost.of(tower, handle.plan).of_encoder(case.patches, [1, 3], [as_ratio(rate)] * 2)
        assert found == pytest.approx(expected, rel=0.01)


@since("counting")
@pytest.mark.parametrize("relevance", ["keys", "features", "values", "joint"])
def test_the_arithmetic_is_exact_for_a_clip(relevance):
    model = real_clip()
    tower, own = find_towers(model)[0], tower_cost(model, 224)
    assert Cost.of(tower).of_encoder(196) == own
    for rates in ([0.5, 0.5], [0.7, 0.3]):
        handle = patchselect.apply(model, rates, relevance=relevance)
        with FakeTensorMode(allow_non_fake_inputs=True), patchselect.guide(model, torch.zeros(1, 512)):
            expected = counted(lambda: model(torch.zeros(1, 3, 224, 224)))
        found = Cost.of(tower, handle.plan).of_encoder(196, handle.layers, [as_ratio(rate) for rate in rates])
        assert found == expected
    patchselect.remove(model)


@since("counting")
def test_a_thousand_classes_cost_less_than_the_unpatched_pass_of_one_image():
    model = real_clip()
    own = tower_cost(model, 224)
    patchselect.apply(model, 0.5)
    with FakeTensorMode(allow_non_fake_inputs=True), patchselect.guide(model, torch.zeros(1000, 512), "shared"):
        assert counted(lambda: model(torch.zeros(1, 3, 224, 224))) < 0.83 * own
    patchselect.remove(model)


@since("counting")
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize(("budget", "size"), [(0.5, 224), (0.6, 224), (0.8, 224), (0.97, 224), (1.0, 256), (1.3, 288)])
def test_measured_flops_land_within_two_percent_of_the_budget(budget, size, per_layer):
    model = real_clip()
    own = tower_cost(model, 224)
    rates = patchselect.keep_rate_for_budget(model, budget, image_size=size, per_layer=per_layer)
    measured = tower_cost(model, size, rates) / own
    assert budget * 0.98 <= measured <= budget * (1 + 1e-9), "does not exceed"
    patchselect.remove(model)


@settings(max_examples=200, deadline=None)
@given(
    budget=st.floats(0.05, 3.0),
    layers=st.lists(st.integers(0, 11), min_size=1, max_size=4, unique=True).map(sorted),
    size=st.sampled_from([None, 160, 224, (224, 320), 448]),
    per_layer=st.booleans(),
)
def test_the_rate_is_the_largest_that_fits_or_the_range_is_told(budget, layers, size, per_layer):
    model = real_clip()
    tower = find_towers(model)[0]
    cost, whole = Cost.of(tower), Cost.of(tower).of_encoder(196)
    height, width = (224, 224) if size is None else (size, size) if isinstance(size, int) else size
    patches = (height // 16) * (width // 16)

    def share(rates) -> float:
        return cost.of_encoder(patches, layers, [as_ratio(rate) for rate in rates]) / whole

    try:
        found = patchselect.keep_rate_for_budget(model, budget, layers, size, per_layer)
    except ValueError as error:
        low, high = (float(x) for x in str(error).split("[")[1].split("]")[0].split(", "))
        assert not low <= budget <= high or min(abs(budget - low), abs(budget - high)) < 1e-3
        return
    rates = found if per_layer else (found,) * len(layers)
    assert all(0 < rate <= 1 for rate in rates) and list(rates) == sorted(rates, reverse=True)
    assert share(rates) <= budget * (1 + 1e-6)
    one_patch_more = [min(1.0, rate + 1.1 / min(patches, 50) if per_layer else rate + 1 / patches) for rate in rates]
    assert min(rates) == 1.0 or share(one_patch_more) > budget * (1 - 1e-6)


def test_a_budget_of_one_keeps_all_and_impossible_ones_are_refused():
    model = real_clip()
    assert patchselect.keep_rate_for_budget(model, 1.0) == 1.0
    assert patchselect.keep_rate_for_budget(model, 1.0, per_layer=True) == (1.0, 1.0)
    with pytest.raises(ValueError, match=r"budget must be in \[0\.3\d\d, 1\.000\].*got 0\.2"):
        patchselect.keep_rate_for_budget(model, 0.2)
    with pytest.raises(ValueError, match=r"got 1\.5\. That is more than these images can cost: use larger ones, or no"):
        patchselect.keep_rate_for_budget(model, 1.5)
    with pytest.raises(ValueError, match="earlier layers or use smaller images"):
        patchselect.keep_rate_for_budget(model, 1.0, image_size=640)
    for wrong in (0, -1, float("nan"), float("inf"), "half", True):
        with pytest.raises(ValueError, match="budget must be"):
            patchselect.keep_rate_for_budget(model, wrong)
    with pytest.raises(ValueError, match="image_size must be positive"):
        patchselect.keep_rate_for_budget(model, 0.6, image_size=0)


def test_a_patched_model_answers_for_its_own_layers():
    case = build("clip")
    unpatched = patchselect.keep_rate_for_budget(case.model, 0.7, layers=[0, 1])
    patchselect.apply(case.model, 0.9, layers=[0, 1])
    assert patchselect.keep_rate_for_budget(case.model, 0.7) == unpatched
    assert patchselect.keep_rate_for_budget(case.model, 0.7, layers=[0, 1]) == unpatched


def test_a_pool_that_is_given_a_parameter_is_counted():
    """Torch's counter by module fails there while no gradients are taken, as long as the weights can be trained."""
    needs("registers")
    from timm.models.vision_transformer import VisionTransformer

    sizes = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=0)
    tower = VisionTransformer(**sizes, global_pool="map")
    found = patchselect.keep_rate_for_budget(tower, 0.7, layers=[1])
    assert 0 < found < 1 and found == patchselect.keep_rate_for_budget(tower.requires_grad_(False), 0.7, layers=[1])
