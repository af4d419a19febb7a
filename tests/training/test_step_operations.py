"""What the controller costs beside the optimizer: torch ops and reads of tensors, which must not grow with adapters."""

import pytest
import torch
from torch import nn

from benchmarks.step_operations import COUNTED, Operations, step_costs
from l1ra import L1RALinear
from l1ra.layers import tensor_lists
from l1ra.training.gate_bank import GateBank

LIMITS = {"plain": 40, "probing": 60, "middle": 300, "reallocation": 2000}
# Of each adapter: random numbers for its probe and for its new rows, and three Parameters that take other memory.
PER_ADAPTER = {"normal_", "uniform_", "set_"}


def named(operations):
    """Without the overloads: ``aten.set_.source_Tensor`` is ``set_``."""
    found = {}
    for name, count in operations.items():
        found[name.split(".")[1]] = found.get(name.split(".")[1], 0) + count
    return found


@pytest.mark.parametrize("settings", [{}, {"reserve": 32}, {"new_rows": "gradient"}], ids=str)
def test_224_adapters_take_few_operations_in_every_kind_of_step(settings):
    costs = step_costs(224, **settings)
    found = {kind: cost.operations.total() for kind, cost in costs.items()}
    assert found.keys() == LIMITS.keys() and all(found[kind] <= limit for kind, limit in LIMITS.items()), found
    operations = named(costs["reallocation"].operations)
    assert operations.get("set_", 0) > 300 or settings.get("reserve")  # most adapters have changed
    assert all(count < 130 or name in PER_ADAPTER for name, count in operations.items()), operations
    assert "_local_scalar_dense" not in operations


def test_nothing_but_random_numbers_and_parameters_grows_with_the_adapters():
    few, many = step_costs(56), step_costs(224)
    for kind in COUNTED:
        less, more = named(few[kind].operations), named(many[kind].operations)
        if kind != "reallocation":
            assert less == more and few[kind].reads == many[kind].reads, kind
        # Rotations take some operations for each number of rows, of which many adapters have more different ones.
        assert sum(more.values()) - sum(map(more.get, PER_ADAPTER & more.keys())) < 1000
    assert many["reallocation"].reads < 60


def test_a_reallocation_copies_to_the_host_a_few_times(monkeypatch):
    """Wherever tensors are moved to the host, all of them are moved by one call."""
    calls = []
    transferred = tensor_lists.transferred

    def counted(tensors, device, dtype=None):
        calls.append(device)
        return transferred(tensors, device, dtype)

    for module in ("layers.gradient_probe", "training.row_rotation", "training.interval", "training.optimizer_state"):
        monkeypatch.setattr(f"l1ra.{module}.transferred", counted)
    found = []
    for adapters in (10, 40):
        calls.clear()
        step_costs(adapters, new_rows="gradient")
        found.append(len(calls))
    assert found[0] == found[1]


def test_the_gates_of_many_adapters_are_read_at_once():
    layers = [L1RALinear(8, 8, rank=4) for _ in range(50)]
    with Operations() as operations:
        GateBank(layers)
    assert operations.count < 20 and "aten._local_scalar_dense.default" not in operations.found


def test_adapters_without_a_gradient_take_no_operation_each():
    layers = [L1RALinear(8, 8, rank=4) for _ in range(50)]
    bank = GateBank(layers)
    for layer in layers[::2]:
        layer.gate.grad = torch.ones(4)
    with Operations() as operations:
        grad, seen, _ = bank.flatten(bank.take_gradients(range(50)))
    assert operations.count < 20
    assert grad.tolist() == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0] * 25
    assert seen.tolist() == [gradient > 0 for gradient in grad.tolist()]


@pytest.mark.parametrize("changed", [None, 3])
def test_loaded_gates_are_compared_at_once(changed):
    model = nn.ModuleList(
        L1RALinear(8, 8, rank=4, adapter_dtype=dtype) for dtype in (torch.float32, torch.float64) for _ in range(20)
    )
    bank = GateBank(list(model))
    bank.age += 1
    state = model.state_dict()
    if changed is not None:
        state[f"{changed}.gate"] = state[f"{changed}.gate"] / 2
    model.load_state_dict(state)
    with Operations() as operations:
        bank.refresh()
    assert operations.count < 40
    assert bool(bank.age.any()) == (changed is None)  # other gates start anew
