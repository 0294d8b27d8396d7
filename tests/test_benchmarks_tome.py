"""The rival of the speed benchmark, ToMe, is what the paper says."""

import pytest
import torch
from since import BENCHMARKS, needs

needs(*BENCHMARKS, module=True)
import transformers

from benchmarks.common.tome import attend, front, match, merge, schedule, token_merging
from benchmarks.models.loading import load

pytestmark = pytest.mark.usefixtures("one_thread")


def test_merging_against_a_slow_reference():
    """Each of A to its most similar of B, the `r` best merged, as loops over float64."""
    torch.manual_seed(0)
    tokens, sizes = torch.randn(2, 12, 5).double(), torch.randint(1, 4, (2, 12, 1)).double()
    keys, removed, prefix = torch.randn(2, 12, 3).double(), 4, 1
    merged, grown = merge(tokens, sizes, keys, removed, prefix)
    for row in range(2):
        a, b = list(range(prefix, 12, 2)), list(range(prefix + 1, 12, 2))
        alike = {i: {j: torch.cosine_similarity(keys[row, i], keys[row, j], dim=0).item() for j in b} for i in a}
        edges = sorted(((max(alike[i].values()), i, max(alike[i], key=alike[i].get)) for i in a), reverse=True)
        groups = {j: [j] for j in b}
        for _, i, j in edges[:removed]:
            groups[j].append(i)
        gone = {i for _, i, _ in edges[:removed]}
        members = [[0], *([i] for i in a if i not in gone), *groups.values()]
        for place, group in enumerate(members):
            weights = sizes[row, group]
            torch.testing.assert_close(grown[row, place], weights.sum(dim=0))
            torch.testing.assert_close(merged[row, place], (weights * tokens[row, group]).sum(dim=0) / weights.sum())


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_merging_conserves(prefix):
    tokens, keys, sizes = torch.randn(2, prefix + 15, 8), torch.randn(2, prefix + 15, 4), torch.ones(2, prefix + 15, 1)
    merged, grown = merge(tokens, sizes, keys, 5, prefix)
    assert merged.shape == (2, prefix + 10, 8) and grown.shape == (2, prefix + 10, 1)
    assert torch.equal(merged[:, :prefix], tokens[:, :prefix])
    torch.testing.assert_close(grown.sum(dim=1), sizes.sum(dim=1))
    torch.testing.assert_close((merged * grown).sum(dim=1), tokens.sum(dim=1))
    assert merge(tokens, sizes, keys, 99, prefix)[0].shape[1] == prefix + 8  # half of the patches can go
    assert merge(tokens, sizes, keys, 0, prefix)[0] is tokens


def test_matching_is_a_partition():
    found = match(torch.randn(3, 11, 4), 4)
    for stay, go in zip(found.stay, found.go):
        assert sorted([*stay.tolist(), *go.tolist()]) == list(range(6))
    assert found.into.min() >= 0 and found.into.max() < 5


def test_schedule_is_even_and_complete():
    for total in (0, 5, 12, 141):
        steps = schedule(total, 12)
        assert sum(steps) == total and max(steps) - min(steps) <= 1
        early = schedule(total, 12, front(12))
        assert sum(early) == total and len(early) == 12 and early[4:] == [0] * 8
        assert max(early[:4]) - min(early[:4]) <= 1


def first(out):
    """Return what a layer gives the next one: layers of transformers 4 return tuples."""
    return out[0] if isinstance(out, tuple) else out


def features(out):
    """Return features of images, which transformers 4 gives bare."""
    return out if isinstance(out, torch.Tensor) else out.pooler_output


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
@pytest.mark.parametrize("fused", [False, True])
def test_tome_in_a_model(tiny, library, fused):
    if library == "open_clip":
        host = load(tiny)
        blocks, lengths = host.model.visual.transformer.resblocks, [17, 14, 11, 8, 5]
    else:
        small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2)
        config = transformers.CLIPConfig(
            vision_config={**small, **dict(image_size=32, patch_size=8)}, text_config=small, projection_dim=16
        )
        model = transformers.CLIPModel(config).eval()
        host = type("Host", (), {"model": model, "encode_image": lambda _, x: features(model.get_image_features(x))})()
        blocks, lengths = model.vision_model.encoder.layers, [17, 14, 11, 8, 5]
    images = torch.randn(2, 3, 64, 64) if library == "open_clip" else torch.randn(2, 3, 32, 32)
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, args, out: seen.append((args[0].shape[1], first(out).shape[1])))
        for block in blocks
    ]
    with torch.no_grad():
        before = host.encode_image(images)
        seen.clear()
        with token_merging(host.model, 0, fused):
            torch.testing.assert_close(host.encode_image(images), before, atol=1e-5, rtol=1e-4)
        seen.clear()
        with token_merging(host.model, 12, fused):
            host.encode_image(images)
        assert seen == list(zip(lengths, lengths[1:]))
        seen.clear()
        with token_merging(host.model, 8, fused, first=1):
            host.encode_image(images)
        assert seen == [(17, 9)] + [(9, 9)] * 3
        assert torch.equal(host.encode_image(images), before)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("kind", ["Dinov2", "ViT"])
def test_tome_in_a_plain_vit_of_transformers(kind):
    """Without a removal it is the model itself."""
    needs("plain layers")
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)
    config = getattr(transformers, f"{kind}Config")(**sizes, image_size=32, patch_size=8)
    model, images = getattr(transformers, f"{kind}Model")(config).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(images).last_hidden_state
        with token_merging(model, 0):
            torch.testing.assert_close(model(images).last_hidden_state, plain, atol=1e-5, rtol=1e-4)
        with token_merging(model, 6):
            assert model(images).last_hidden_state.shape[1] == 17 - 6


def test_proportional_attention_counts_copies():
    """A token of size 3 is attended to as three equal tokens are."""
    query, key, value = torch.randn(3, 2, 4, 6, 8).double().unbind(0)
    sizes = torch.tensor([1, 3, 1, 2, 1, 1]).double()
    copied = [x.repeat_interleave(sizes.long(), dim=2) for x in (key, value)]
    for fused in (False, True):
        expected = attend(query, *copied, 0.3, None, fused)
        torch.testing.assert_close(
            attend(query, key, value, 0.3, sizes.view(1, 6, 1).expand(2, -1, -1), fused), expected
        )
