"""One product of [x | H] and the weight with the adapter behind its columns."""

import pytest
import torch
from cases import DEVICE, HALF, SINGLE, case

from benchmarks.single_launch import write_behind
from l1ra_kernels.autograd import fused


def with_room(layer):
    """The layer, its weight stored with room that nobody has written yet."""
    rows, columns = layer.weight.shape
    memory = torch.full((rows, columns + 128), torch.nan, dtype=layer.weight.dtype, device=layer.weight.device)
    memory[:, :columns] = layer.weight
    return layer._replace(weight=memory[:, :columns], augmented=memory)


@pytest.mark.parametrize("ranks, which", [([5], [0]), ([3, 17], [0]), ([3, 17], [0, 1]), ([5, 16, 1], [0, 2])])
def test_augmented_layers_give_what_chained_ones_give(ranks, which):
    plain = case(ranks, [47, 90, 33][: len(ranks)], dtypes=(SINGLE, SINGLE))
    with torch.no_grad():
        plain.layers[0].gate[0] = 0.0
        plain.layers[0].a[0] = plain.layers[0].b[0] = torch.nan
    layers = [with_room(layer) if i in which else layer for i, layer in enumerate(plain.layers)]
    results = []
    for chosen in (plain.layers, layers):
        outputs = fused(plain.x, chosen)
        inputs = [plain.x, *(t for layer in plain.layers for t in (layer.a, layer.gate, layer.b))]
        grads = torch.autograd.grad([y.square().sum() for y in outputs], inputs)
        results.append([*outputs, *grads])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max()))


def test_without_enough_room_the_layer_is_chained():
    one = case([140], dtypes=(SINGLE, SINGLE))
    layer = with_room(one.layers[0])
    (mine,), (theirs,) = fused(one.x, [layer]), fused(one.x, one.layers)
    # On a GPU the frozen product may be summed in another order for another layout of the weight.
    tolerance = {} if DEVICE == "cpu" else {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(mine, theirs, **tolerance)
    assert layer.augmented[:, layer.weight.shape[1] :].isnan().all()


@pytest.mark.parametrize("dtype", [HALF, SINGLE])
def test_only_the_columns_of_the_adapter_are_not_zero_behind_the_weight(dtype):
    gate = torch.tensor([0.5, 0.0, 1.0], device=DEVICE)
    b = torch.randn(3, 70, device=DEVICE)
    b[1] = torch.nan
    memories = [torch.full((70, 60), torch.nan, dtype=dtype, device=DEVICE) for _ in range(3)]
    parts, wide = torch.randn(3, 90, 48, device=DEVICE), torch.full((90, 56), torch.nan, dtype=dtype, device=DEVICE)
    h = write_behind(parts, [gate] * 3, [b] * 3, [1.0, 2.0, 3.0], memories, wide)
    for i, memory in enumerate(memories):
        expected = torch.zeros(70, 48, dtype=dtype, device=DEVICE)
        expected[:, 16 * i] = ((i + 1) * 0.5 * b[0]).to(dtype)
        expected[:, 16 * i + 2] = ((i + 1) * b[2]).to(dtype)
        assert torch.equal(memory[:, 8:56], expected)
        assert memory[:, :8].isnan().all() and memory[:, 56:].isnan().all()
    assert torch.equal(wide[:, 8:], h) and wide[:, :8].isnan().all()
    torch.testing.assert_close(h, parts.sum(0).to(dtype))
