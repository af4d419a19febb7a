"""Devices without float64, of which no test machine has one: what would be computed there is computed without it."""

import sys

import pytest
import torch
from helpers import step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import l1ra
from l1ra.layers.precision import widest_float
from l1ra.reporting.self_check import FAST_SETTINGS

FEATURES, BUDGET = 16, 6


class NoFloat64(TorchDispatchMode):
    """Raises as a device without float64 does; the rotations, of one adapter's ranks, are computed on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            wide = isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64
            if wide and max(tensor.shape, default=0) >= BUDGET:
                raise TypeError(f"{func}: no float64 on this device, not even {tuple(tensor.shape)}")
        return found


@pytest.fixture
def without_float64(monkeypatch):
    for name, module in list(sys.modules.items()):
        if name.startswith("l1ra.") and hasattr(module, "widest_float"):
            monkeypatch.setattr(module, "widest_float", lambda device: torch.float32)
    return NoFloat64()


def test_float64_is_the_widest_where_it_is_to_be_had():
    assert widest_float(torch.device("cpu")) == widest_float(torch.device("cuda:1")) == torch.float64
    assert widest_float(torch.device("mps:0")) == widest_float(torch.device("xpu")) == torch.float32


def test_a_training_that_moves_ranks_does_without_float64(without_float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Tanh(), nn.Linear(FEATURES, FEATURES))
    x, target = torch.randn(32, FEATURES), torch.randn(32, FEATURES)
    controller = l1ra.patch(model, BUDGET, min_rank=1, **FAST_SETTINGS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with without_float64:
        for _ in range(20):
            step(model, optimizer, x, target)
        l1ra.merge(model)
    assert controller.moved and len(controller.history) > 2
