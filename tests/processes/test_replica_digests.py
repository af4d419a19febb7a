"""Checksums by which processes compare their adapters, and what is said of a difference."""

import pytest
import torch
from helpers import bits

from benchmarks.step_operations import Operations
from l1ra import L1RALinear
from l1ra.layers import tensor_lists
from l1ra.processes.digests import ReplicasDiffer, check_alike, digests, fingerprint


def adapters(count=3, dtype=torch.float32):
    torch.manual_seed(0)
    layers = {f"layers.{i}": L1RALinear(6 + i % 2, 8, rank=2, adapter_dtype=dtype, reserve=4) for i in range(count)}
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B)
    return layers, torch.rand(2 * count)


def flip_a_sign(a):
    a[1, 3] *= -1


def swap(a):
    a[0, 1:3] = a[0, 1:3].flip(0)


def to_the_next_number(a):
    bits(a)[-1, -1] += 1


@pytest.mark.parametrize("change", [flip_a_sign, swap, to_the_next_number])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("room", [None, 1])  # for one tensor in each batch
def test_every_changed_bit_is_seen_and_only_where_it_is(monkeypatch, part, dtype, change, room):
    if room:
        monkeypatch.setattr(tensor_lists, "ELEMENTS", room)
    layers, gates = adapters(dtype=dtype)
    before = digests(layers, gates)
    assert digests(layers, gates) == before
    with torch.no_grad():
        change(getattr(layers["layers.1"], part))
    after = digests(layers, gates)
    assert [[name for name in b if b[name] != a[name]] for b, a in zip(before, after, strict=True)] == [[], [part], []]
    assert fingerprint(before) == fingerprint(digests(*adapters(dtype=dtype))) != fingerprint(after)


def test_gates_and_master_gates_and_ranks_are_seen():
    layers, gates = adapters()
    before = digests(layers, gates)
    gates[3] += 1e-7
    assert [b["gate"] == a["gate"] for b, a in zip(before, digests(layers, gates), strict=True)] == [True, False, True]
    layers, gates = adapters()
    with torch.no_grad():
        layers["layers.2"].gate[0] = -0.0
    assert [b["gate"] == a["gate"] for b, a in zip(before, digests(layers, gates), strict=True)] == [True, True, False]
    assert [part["rank"] for part in before] == [2, 2, 2]


def test_numbers_that_are_none_are_equal_to_themselves():
    layers, gates = adapters()
    gates[0] = torch.nan
    assert digests(layers, gates) == digests(layers, gates)


def test_the_operations_do_not_grow_with_the_adapters():
    found = []
    for count in (8, 224):
        layers, gates = adapters(count)
        with Operations() as operations:
            digests(layers, gates)
        found.append(operations.count)
    assert found[0] == found[1] < 60


def digest(**changed):
    return {"rank": 2, "lora_A": 1, "gate": 2, "lora_B": 3, **changed}


def test_a_difference_is_told_by_adapter_part_and_process():
    names = ["q", "k", "v"]
    same = [digest(), digest(), digest()]
    check_alike(names, [same, same, same])
    odd = [digest(rank=3, gate=9), digest(), digest(lora_B=4)]
    with pytest.raises(ReplicasDiffer) as error:
        check_alike(names, [same, same, odd, [digest(), digest(), digest(lora_B=4, gate=1)]])
    text = str(error.value)
    assert "q (rank, gate in process 2), v (gate in process 3), v (lora_B in processes 2, 3). " in text
    assert "k (" not in text and isinstance(error.value, RuntimeError)


def test_a_hundred_differences_are_abbreviated():
    names = [f"layers.{i}" for i in range(100)]
    with pytest.raises(ReplicasDiffer, match=r"layers\.7 \(lora_A in process 1\) and 92 more"):
        check_alike(names, [[digest()] * 100, [digest(lora_A=0)] * 100])
