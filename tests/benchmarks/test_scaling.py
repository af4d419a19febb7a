"""What several processes send and hold: the modelled bytes are those of two real processes (gloo), the page is kept."""

import itertools
import pickle
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if not distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

from helpers import BRISK, task, trainable
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import l1ra
from benchmarks import scaling
from benchmarks.scaling import BESIDE, COLUMNS, DDP, ROWS, WAYS, Collective, Training
from l1ra.allocation.plan import Plan
from l1ra.layers import row_moves
from l1ra.processes.group import ReplicaGroup

WIDTHS = (13, 9, 8, 10)  # of odd ones the parts are uneven
LINEARS = tuple(itertools.pairwise(WIDTHS))
RANKS, RESERVE = (3, 3, 3), 5
PROBING, MIDDLE, PLAIN, REALLOCATION = 8, 9, 10, 12  # steps of the second interval
STEPS = REALLOCATION
# c10d's operations -> its name in the model, and which of its arguments is the whole.
OPERATIONS = {
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::allgather_": ("all-gather", 0),
    "c10d::_allgather_base_": ("all-gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
}


class Collectives(TorchDispatchMode):
    """Records the operations of torch.distributed in its context, whoever calls them, and their bytes."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "c10d" in func.namespace:
            name, whole = OPERATIONS[func._schema.name]
            tensors = [leaf for leaf in tree_leaves(args[whole]) if isinstance(leaf, torch.Tensor)]
            self.found.append((name, sum(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))


class Chain(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Lora(nn.Module):
    """One of PEFT's layout: A ``(r, inputs)``, B ``(outputs, r)``."""

    def __init__(self, inputs, outputs, rank):
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x))


def spread_out(model, way):
    """The model as it is called in a training of two processes."""
    if way == DDP:
        return DistributedDataParallel(model)
    mesh = distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("parts",))
    options = l1ra.fsdp(model) if way == COLUMNS else {}
    if way == BESIDE:
        options["ignored_params"] = set(trainable(model))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def train(number, way, record):
    """Each step of a training: ranks before it, collectives, pickled objects, bytes of moved rows, of tensors held."""
    torch.manual_seed(0)
    model = Chain(nn.Linear(*shape, bias=False) for shape in LINEARS)
    x, y = task(model)
    controller = l1ra.patch(model, sum(RANKS), reserve=RESERVE, **{**BRISK, "min_coherence": -1.0})
    replica = spread_out(model, way)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    found = []
    for _ in range(STEPS):
        ranks = tuple(controller.ranks.values())
        record.clear()
        optimizer.zero_grad()
        with Collectives() as own:
            nn.functional.mse_loss(replica(x[number::2]), y[number::2]).backward()
        held = memory(controller, optimizer)
        with Collectives() as controlled:
            optimizer.step()
        found.append({"ranks": ranks, "own": own.found, "held": held, "controller": controlled.found, **record})
        found[-1]["after"] = tuple(controller.ranks.values())
    return found


def memory(controller, optimizer):
    """Bytes of the memory in this process of all tensors of adapters and of probes."""
    params = [getattr(a, name) for a in controller.adapters.values() for name in ("lora_A", "gate", "lora_B")]
    tensors = [t for p in params for t in (p, p.grad, *optimizer.state.get(p, {}).values()) if t.dim()]
    for probe in controller._interval.probes._probes.values():
        tensors += [probe.mix, probe.sketch, probe.gradient, probe._a, probe.seen]
    storages = [getattr(t, "_local_tensor", t).untyped_storage() for t in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def watch(record, patch):
    """Let ``record`` have the objects that are broadcast, and the bytes of the matrices that are moved."""
    broadcast, move = ReplicaGroup.broadcast, row_moves.dispatch.move_rows_many

    def broadcast_and_record(self, value):
        found = broadcast(self, value)
        record.setdefault("objects", []).append(len(pickle.dumps(value)))
        if isinstance(found, Plan):
            record["plan"] = found
        elif isinstance(found, list):
            sizes = {i: len(matrix) for chosen, some in found for i, matrix in zip(chosen, some, strict=True)}
            record["rotated"] = [sizes.get(i, 0) for i in range(len(LINEARS))]
        return found

    def move_and_record(tensors, *args):
        moved = move(tensors, *args)
        record["moved"] = sum(t.nbytes for t in moved if t.dim() == 2)
        return moved

    patch.setattr(ReplicaGroup, "broadcast", broadcast_and_record)
    patch.setattr(row_moves.dispatch, "move_rows_many", move_and_record)


def train_lora(number, way):
    torch.manual_seed(0)
    replica = spread_out(Chain(Lora(*shape, rank) for shape, rank in zip(LINEARS, RANKS, strict=True)), way)
    with Collectives() as own:
        replica(torch.ones(2, WIDTHS[0])).sum().backward()
    return own.found


def work(number, folder):
    torch.set_num_threads(1)
    meeting = {"init_method": f"file://{folder}/meeting", "rank": number, "world_size": 2}
    distributed.init_process_group("gloo", **meeting, timeout=timedelta(seconds=60))
    record = {}
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        watch(record, patch)
        found = {way: train(number, way, record) for way in WAYS}
        found |= {f"LoRA, {way}": train_lora(number, way) for way in (DDP, ROWS)}
    torch.save(found, folder / f"{number}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of the first process, whose objects are those that are sent; the second one has sent as much."""
    folder = tmp_path_factory.mktemp("scaling")
    multiprocessing.spawn(work, (folder,), nprocs=2)
    first, second = (torch.load(folder / f"{number}.pt", weights_only=False) for number in range(2))
    for way in WAYS:
        assert [part["controller"] for part in first[way]] == [part["controller"] for part in second[way]]
    return first


def modelled(way, part, linears=LINEARS):
    return Training(linears, part["ranks"], RESERVE, way, processes=2, frozen=4)


def sizes(found):
    """As they were counted."""
    return [(collective.operation, collective.bytes) for collective in found]


def summed(found):
    """Operation -> bytes. DDP divides its own into buckets, FSDP 2 into modules."""
    return {name: sum(size for other, size in found if other == name) for name, _ in found}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("number", [PROBING, PLAIN])
def test_a_step_sends_what_is_modelled(found, way, number):
    part = found[way][number - 1]
    t = modelled(way, part)
    assert part["controller"] == sizes(scaling.bytes_of_a_step(t))
    assert summed(part["own"]) == summed(sizes(scaling.bytes_of_gradients(t)))


@pytest.mark.parametrize("way", [DDP, ROWS])
def test_plain_lora_sends_what_is_modelled(found, way):
    t = modelled(way, {"ranks": RANKS})
    assert summed(found[f"LoRA, {way}"]) == summed(sizes(scaling.bytes_of_gradients_in_lora(t)))


@pytest.mark.parametrize("way", WAYS)
def test_the_middle_of_an_interval_sends_what_is_modelled(found, way):
    part = found[way][MIDDLE - 1]
    t = modelled(way, part)
    sent = scaling.bytes_of_a_step(t) + scaling.bytes_of_a_middle(t, *part["objects"])
    assert part["controller"] == sizes(sent)


@pytest.mark.parametrize("way", WAYS)
def test_a_reallocation_sends_what_is_modelled(found, way):
    part = found[way][REALLOCATION - 1]
    assert part["after"] != part["ranks"]
    t = modelled(way, part)
    sent = scaling.bytes_of_a_step(t) + scaling.bytes_of_a_reallocation(t, *part["objects"], part["rotated"])
    assert part["controller"] == sizes(sent)


@pytest.mark.parametrize("way", WAYS)
def test_a_reallocation_copies_what_is_modelled(found, way):
    part = found[way][REALLOCATION - 1]
    changed = [
        change.grow > 0 or len(change.keep) < r for change, r in zip(part["plan"].layers, part["ranks"], strict=True)
    ]
    linears = tuple(shape for shape, yes in zip(LINEARS, changed, strict=True) if yes)
    assert linears and part["moved"] == scaling.memory_of_moved_rows(modelled(way, part, linears))


@pytest.mark.parametrize("way", WAYS)
def test_each_process_holds_what_is_modelled(found, way):
    part = found[way][PROBING - 1]
    t = modelled(way, part)
    assert part["held"] == scaling.memory_of_adapters(t) + scaling.memory_of_probes(t)


def test_what_is_gathered_is_held(found):
    for way in WAYS:
        t = modelled(way, found[way][REALLOCATION - 1])
        reduced = [c.bytes for c in scaling.bytes_of_a_reallocation(t, 0, 0, RANKS) if c.call.startswith("gathered")]
        assert scaling.memory_of_the_gathered(t) == sum(reduced)
    # A and B of 9 features each, and A of 13, are not split along them, and have a gradient and two moments each.
    assert scaling.memory_of_the_gathered(modelled(COLUMNS, {"ranks": RANKS})) == 4 * RESERVE * (4 * (13 + 9 + 9) + 3)


def test_rotations_are_little_more_than_their_numbers(found):
    rotations = [(found[way][REALLOCATION - 1]["objects"][1], found[way][REALLOCATION - 1]["rotated"]) for way in WAYS]
    assert all(0 < size - scaling.rotations_size(ranks) < 2000 and ranks for size, ranks in rotations)


def test_sums_by_hand():
    t = Training(((4, 6),), (2,), 6, ROWS, 4, frozen=2)
    assert (t.matrices, t.padded_matrices, t.padded_gates, t.frozen_bytes) == (60, 80, 8, 2 * 4 * 8)
    ring = [Collective("", "all-reduce", 100), Collective("", "all-gather", 100), Collective("", "broadcast", 7)]
    assert scaling.sent(t, ring) == 150 + 75 + 7
    # Each of 4 processes has 2 of 8 rows: A and B with gradients and two moments, the gate with gradients.
    assert scaling.memory_of_adapters(t) == 4 * 2 * (4 * 10 + 2)
    # A is split along its features, all rows of which each process has.
    by_columns = replace(t, way=COLUMNS)
    assert scaling.memory_of_adapters(by_columns) == 4 * (4 * (6 * 1 + 2 * 6) + 2 * 2)
    whole = replace(t, way=DDP, processes=8)
    assert scaling.memory_of_adapters(whole) == 4 * 6 * (4 * 10 + 2)
    network = scaling.NETWORKS[8]
    assert scaling.milliseconds(whole, ring[2:]) == pytest.approx(7 / network.bandwidth / 1e6 + network.latency)


def test_the_kept_page_has_what_the_program_prints():
    page = Path(scaling.__file__).parents[1] / "docs" / "scaling.md"
    assert scaling.report() in page.read_text(encoding="utf-8"), "run benchmarks.scaling again"
