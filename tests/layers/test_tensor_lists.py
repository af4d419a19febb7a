"""Many tensors at once, of several devices and dtypes. The meta device stands for a second one."""

import pytest
import torch

from l1ra.layers import tensor_lists
from l1ra.layers.row_moves import row_runs
from l1ra.layers.tensor_lists import batches, copy_all_, divide_all_, grouped, multiply_all_, transferred

CPU, META = torch.device("cpu"), torch.device("meta")


def mixed():
    shapes = [((2, 3), torch.float32), ((), torch.float64), ((4,), torch.bfloat16), ((2, 3), torch.bfloat16)]
    return [torch.randn(shape).to(dtype) for shape, dtype in [*shapes, ((0, 3), torch.float32)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, None])
def test_what_is_transferred_has_the_values_of_each_alone(dtype):
    tensors = mixed()
    for tensor, there in zip(tensors, transferred(tensors, CPU, dtype), strict=True):
        wanted = tensor.dtype if dtype is None else dtype
        assert torch.equal(there, tensor.to(wanted)) and there.dtype == wanted
        assert there.numel() == 0 or (there.data_ptr() == tensor.data_ptr()) == (tensor.dtype == wanted)
    there = transferred(tensors, META, dtype)
    assert all(t.is_meta and t.shape == tensor.shape for t, tensor in zip(there, tensors, strict=True))
    assert transferred([], CPU, dtype) == []


def test_what_requires_a_gradient_is_transferred_without_a_graph():
    (there,) = transferred([torch.randn(3, requires_grad=True)], CPU, torch.float64)
    assert not there.requires_grad


def test_each_target_gets_its_own_source_whatever_the_dtypes():
    sources, targets = mixed(), [torch.zeros_like(tensor).double() for tensor in mixed()]
    copy_all_(targets, sources)
    assert all(torch.equal(target, source.double()) for target, source in zip(targets, sources, strict=True))
    copy_all_([torch.empty(2, device=META)], [torch.ones(2)])
    copy_all_([], [])


@pytest.mark.parametrize("change, change_all_", [("mul_", multiply_all_), ("div_", divide_all_)])
def test_factors_are_not_rounded_to_the_dtype_of_the_tensors(change, change_all_):
    tensors = [torch.randn(500).to(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.bfloat16)]
    factors = [0.8164965809277261, 1.2247448713915890, 0.5773502691896258, 1.5]
    expected = [getattr(tensor.clone(), change)(factor) for tensor, factor in zip(tensors, factors, strict=True)]
    change_all_(tensors, factors)
    assert all(torch.equal(tensor, right) for tensor, right in zip(tensors, expected, strict=True))


def test_groups_keep_the_order_and_batches_hold_everything_once(monkeypatch):
    assert grouped([3, 1, 3, 2], lambda n: n % 2) == {1: [0, 1, 2], 0: [3]}
    monkeypatch.setattr(tensor_lists, "ELEMENTS", 10)
    assert [list(part) for part in batches([5, 6, 7, 8, 9], 4)] == [[5, 6], [7, 8], [9]]
    assert [list(part) for part in batches([5, 6], 100)] == [[5], [6]]
    assert [list(part) for part in batches([5, 6], 0)] == [[5, 6]]


def test_row_numbers_become_slices_that_meet_nowhere():
    assert row_runs([]) == []
    assert row_runs([0, 1, 2]) == [slice(0, 3)]
    assert row_runs([1, 3, 4, 7]) == [slice(1, 2), slice(3, 5), slice(7, 8)]
