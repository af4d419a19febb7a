"""What several GPUs send and hold for adapters whose ranks move, counted from the shapes of a model.

Bytes are those of the tensors that ``torch.distributed`` is given; ``tests/benchmarks/test_scaling.py`` holds them, and
the memory, to those of two real processes. Times are modelled from the bandwidths and latencies below. Nothing here is
measured.

    python -m benchmarks.scaling
"""

from __future__ import annotations

import argparse
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from benchmarks.common.tables import markdown_table
from l1ra.allocation.plan import LayerPlan, Plan
from l1ra.config import L1RAConfig
from l1ra.training.probes import PROBE_RANKS

__all__ = [
    "BESIDE",
    "COLUMNS",
    "DDP",
    "ROWS",
    "WAYS",
    "Collective",
    "Training",
    "bytes_of_a_middle",
    "bytes_of_a_reallocation",
    "bytes_of_a_step",
    "bytes_of_gradients",
    "bytes_of_gradients_in_lora",
    "memory_of_adapters",
    "memory_of_lora",
    "memory_of_moved_rows",
    "memory_of_probes",
    "memory_of_the_gathered",
    "report",
    "rotations_size",
]

FLOAT, INT, DOUBLE = 4, 8, 8  # bytes: of adapters and their state, of a size or a count, of a rotation
MOMENTS = 2  # of AdamW
FINGERPRINT = len(pickle.dumps(bytes(32)))  # of replica_digests.fingerprint
RANK, RESERVE, INTERVAL = 16, 64, 100


class Network(NamedTuple):
    """``bandwidth`` at which a process sends, GB/s; ``latency`` of a collective, ms."""

    bandwidth: float
    latency: float


# Processes -> assumptions; none is measured. 8 GPUs in a node with NVLink; beyond, 400 Gbit/s for each GPU.
NETWORKS = {8: Network(300, 0.03), 64: Network(40, 0.06), 1024: Network(40, 0.15)}

Linears = tuple[tuple[int, int], ...]


def decoder(hidden: int, kv: int, mlp: int, blocks: int) -> Linears:
    """Inputs and outputs of the linears of all blocks: q, k, v, o, gate, up, down."""
    block = (
        (hidden, hidden),
        (hidden, kv),
        (hidden, kv),
        (hidden, hidden),
        (hidden, mlp),
        (hidden, mlp),
        (mlp, hidden),
    )
    return block * blocks


MODELS = {
    "8B": decoder(4096, 1024, 14336, 32),
    "70B": decoder(8192, 1024, 28672, 80),
    "405B": decoder(16384, 1024, 53248, 126),
}
# FSDP 2 as it is splits A and B along their ranks; l1ra.fsdp along their features; or it ignores the adapters.
DDP, ROWS, COLUMNS, BESIDE = "DDP", "FSDP 2", "l1ra.fsdp", "FSDP 2, beside"
WAYS = (DDP, ROWS, COLUMNS, BESIDE)
SHOWN = [(model, way) for model in MODELS for way in WAYS if (model, way) != ("405B", DDP)]


@dataclass(frozen=True)
class Training:
    """A model that is trained by ``processes`` with AdamW and fp32 adapters.

    Attributes:
        linears: inputs and outputs of each adapted layer. All are in modules that FSDP 2 gathers in the forward and
            again in the backward, and nothing else is.
        ranks: of each adapter.
        reserve: rows of each adapter.
        way: one of ``WAYS``.
        frozen: bytes of an element of the frozen weights.
    """

    linears: Linears
    ranks: tuple[int, ...]
    reserve: int
    way: str
    processes: int
    frozen: int = 2

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of each adapter."""
        return self.way in (ROWS, COLUMNS)

    @property
    def gates(self) -> int:
        """Elements of all gates."""
        return self.reserve * len(self.linears)

    @property
    def matrices(self) -> int:
        """Elements of A and B of all adapters."""
        return self.reserve * sum(map(sum, self.linears))

    @property
    def matrices_by_columns(self) -> int:
        """Those of them that are split along their features: see :func:`l1ra.fsdp`."""
        features = [width for shape in self.linears for width in shape if width % self.processes == 0]
        return self.reserve * sum(features) if self.way == COLUMNS else 0

    def padded(self, rows: int) -> int:
        """The rows of a tensor that FSDP 2 splits by rows, as sent and stored: all parts are as large as the first."""
        return -(-rows // self.processes) * self.processes

    @property
    def padded_matrices(self) -> int:
        by_rows = (self.matrices - self.matrices_by_columns) // self.reserve
        return self.matrices_by_columns + self.padded(self.reserve) * by_rows

    @property
    def padded_gates(self) -> int:
        return self.padded(self.reserve) * len(self.linears)

    @property
    def frozen_bytes(self) -> int:
        """Of the frozen weights, padded."""
        return self.frozen * sum(self.padded(outputs) * inputs for inputs, outputs in self.linears)


class Collective(NamedTuple):
    """One call of ``torch.distributed``.

    Attributes:
        call: in this library, or the wrapper, by which it is made.
        operation: its name.
        bytes: of the tensor in each process: the whole that is gathered or scattered.
    """

    call: str
    operation: str
    bytes: int


# --- bytes


def bytes_of_gradients(t: Training) -> list[Collective]:
    """What forward and backward send, with plain LoRA too: the frozen weights, the adapters, their gradients."""
    if t.way == DDP:
        return [Collective("DistributedDataParallel", "all-reduce", FLOAT * (t.matrices + t.gates))]
    adapters = FLOAT * (t.padded_matrices + t.padded_gates) if t.is_sharded else 0
    times = ("forward", "backward")
    found = [Collective(f"fully_shard, {when}", "all-gather", t.frozen_bytes + adapters) for when in times]
    if t.is_sharded:
        return [*found, Collective("fully_shard", "reduce-scatter", adapters)]
    # One number more for each parameter: whether it had a gradient.
    averaged = FLOAT * (t.matrices + t.gates + 3 * len(t.linears))
    return [*found, Collective("ReplicatedAdapters._average", "all-reduce", averaged)]


def bytes_of_gradients_in_lora(t: Training) -> list[Collective]:
    """:func:`bytes_of_gradients` of PEFT's LoRA of the same ranks: no gate, no reserved row, B is stored transposed."""
    own = FLOAT * lora_elements(t)
    sizes = {"all-reduce": own, "reduce-scatter": own, "all-gather": t.frozen_bytes + (own if t.is_sharded else 0)}
    return [c._replace(bytes=sizes[c.operation]) for c in bytes_of_gradients(t)]


def lora_elements(t: Training) -> int:
    """Of A and B in PEFT's LoRA of the same ranks, padded where they are sharded."""
    pad = t.padded if t.is_sharded else int
    shapes = zip(t.ranks, t.linears, strict=True)
    return sum(pad(rank) * inputs + pad(outputs) * rank for rank, (inputs, outputs) in shapes)


def bytes_of_a_step(t: Training) -> list[Collective]:
    """What the controller sends in a step of the optimizer, with or without probes: the gates' gradients made whole."""
    return [Collective("GateBank.flatten: wholes", "all-reduce", FLOAT * t.gates)] if t.is_sharded else []


def gather_object(t: Training, call: str, size: int) -> list[Collective]:
    """``ReplicaGroup.gather`` of objects of ``size`` bytes when pickled: the sizes, then the objects."""
    return [Collective(call, "all-gather", t.processes * part) for part in (INT, size)]


def broadcast_object(call: str, size: int) -> list[Collective]:
    """``ReplicaGroup.broadcast``, as :func:`gather_object`."""
    return [Collective(call, "broadcast", part) for part in (INT, size)]


def bytes_of_a_middle(t: Training, chosen: int) -> list[Collective]:
    """What ``Interval.choose_ranks`` sends, beside :func:`bytes_of_a_step`.

    Args:
        chosen: bytes of the pickled decision.
    """
    sketches = FLOAT * sum(PROBE_RANKS * inputs + 1 for inputs, _ in t.linears)
    return [
        *gather_object(t, "ReplicaGroup.check_alike", FINGERPRINT),
        Collective("ProbeSet.sum_over_replicas", "all-reduce", sketches),
        *broadcast_object("Interval.choose_ranks", chosen),
    ]


def bytes_of_a_reallocation(t: Training, plan: int, rotations: int, rotated: Sequence[int]) -> list[Collective]:
    """What ``Interval.reallocate`` sends, beside :func:`bytes_of_a_step`, with ``new_rows="random"``.

    Args:
        plan: bytes of the pickled plan.
        rotations: bytes of the pickled rotations onto the principal axes.
        rotated: of each adapter, how many ranks are rotated.
    """
    found = [
        *gather_object(t, "ReplicaGroup.check_alike", FINGERPRINT),
        *broadcast_object("Interval.reallocate", plan),
        *(Collective(f"gathered, {what}: wholes", "all-reduce", size) for what, size in _gathered(t).items() if size),
    ]
    if t.matrices_by_columns:
        split = [sum(width % t.processes == 0 for width in shape) for shape in t.linears]
        products = DOUBLE * sum(count * ranks**2 for count, ranks in zip(split, rotated, strict=True))
        found.append(Collective("rotate_to_principal_axes: sum_over_columns", "all-reduce", products))
    return [*found, *broadcast_object("rotate_to_principal_axes", rotations)]


def _gathered(t: Training) -> dict[str, int]:
    """Bytes that ``gathered`` makes whole. AdamW has no state of gates, and their gradients have been taken."""
    if not t.is_sharded:
        return {}
    own = FLOAT * (t.matrices - t.matrices_by_columns)
    return {"parameters": own + FLOAT * t.gates, "moments": MOMENTS * own, "gradients": own}


def rotations_size(rotated: Iterable[int]) -> int:
    """About the bytes of the rotations of adapters of which so many ranks are rotated."""
    return DOUBLE * sum(ranks**2 for ranks in rotated)


def typical_chosen(t: Training) -> int:
    """Bytes of the decision in the middle if each adapter is to lose the share ``turnover`` of its ranks."""
    return _pickled(([tuple(range(count)) for count in _lost(t)], [1] * len(t.linears)))


def typical_move(t: Training) -> tuple[int, int, list[int]]:
    """The arguments of :func:`bytes_of_a_reallocation` if each adapter loses these ranks and receives as many."""
    lost = _lost(t)
    layers = [LayerPlan(tuple(range(count, rank)), count) for count, rank in zip(lost, t.ranks, strict=True)]
    rotated = [len(layer.keep) for layer in layers]
    return _pickled(Plan(tuple(layers), 0)), rotations_size(rotated), rotated


def _lost(t: Training) -> list[int]:
    return [int(L1RAConfig().turnover * rank) for rank in t.ranks]


def _pickled(value: Any) -> int:
    return len(pickle.dumps(value, protocol=4))


# --- memory of each process


def memory_of_lora(t: Training) -> int:
    """As :func:`memory_of_adapters`, of PEFT's LoRA of the same ranks."""
    return FLOAT * (2 + MOMENTS) * lora_elements(t) // (t.processes if t.is_sharded else 1)


def memory_of_adapters(t: Training) -> int:
    """Bytes of A, gate and B, of their gradients, and of AdamW's moments of A and B. If sharded: the largest part."""
    matrices, gates = (t.padded_matrices, t.padded_gates) if t.is_sharded else (t.matrices, t.gates)
    return FLOAT * ((2 + MOMENTS) * matrices + 2 * gates) // (t.processes if t.is_sharded else 1)


def memory_of_probes(t: Training) -> int:
    """Bytes of ``Probe``: mix; sketch, A and its gradient; seen. They are whole in each process.

    Where FSDP 2 does not take the gradients of the adapter, these keep the memory of those of the probe's ranks, which
    autograd computes together with them.
    """
    probes = sum(PROBE_RANKS * (outputs + 3 * inputs) + 1 for inputs, outputs in t.linears)
    beyond = 0 if t.is_sharded else PROBE_RANKS * sum(inputs + 1 + outputs for inputs, outputs in t.linears)
    return FLOAT * (probes + beyond)


def memory_of_the_gathered(t: Training) -> int:
    """Bytes that ``gathered`` adds in each process during a reallocation."""
    return sum(_gathered(t).values())


def memory_of_moved_rows(t: Training) -> int:
    """Bytes of the copies of A and B, their gradients and moments that ``RowMoves.run`` makes during a reallocation, if
    the ranks of all adapters change; those whose rows stay are not copied."""
    whole, part = t.matrices - t.matrices_by_columns, t.matrices_by_columns // t.processes
    return FLOAT * (2 + MOMENTS) * (whole + part)


# --- times


def sent(t: Training, found: Sequence[Collective]) -> float:
    """Bytes that each process sends in rings: in an all-reduce twice all but its own part, otherwise once."""
    others = (t.processes - 1) / t.processes
    factors = {"all-reduce": 2 * others, "all-gather": others, "reduce-scatter": others, "broadcast": 1.0}
    return sum(factors[c.operation] * c.bytes for c in found)


def milliseconds(t: Training, found: Sequence[Collective]) -> float:
    """One after the other."""
    network = NETWORKS[t.processes]
    return sent(t, found) / network.bandwidth / 1e6 + network.latency * len(found)


# --- tables


def training(model: str, way: str, processes: int) -> Training:
    linears = MODELS[model]
    return Training(linears, (RANK,) * len(linears), RESERVE, way, processes)


PARTS: dict[str, Callable[[Training], list[Collective]]] = {
    "plain LoRA": bytes_of_gradients_in_lora,
    "with reserved rows": bytes_of_gradients,
    "controller, a step": bytes_of_a_step,
    "middle": lambda t: bytes_of_a_middle(t, typical_chosen(t)),
    "reallocation": lambda t: bytes_of_a_reallocation(t, *typical_move(t)),
}


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}" if abs(value) >= 0.001 else "0"


def _cells(model: str, way: str, columns: Iterable[Callable[[Training], float]]) -> list[str]:
    """In each column one number, or one for each number of processes if they differ."""
    found = [[_number(column(training(model, way, n))) for n in NETWORKS] for column in columns]
    return [numbers[0] if len(set(numbers)) == 1 else " / ".join(numbers) for numbers in found]


def _table(unit: str, columns: dict[str, Callable[[Training], float]]) -> str:
    rows = [[f"{model}, {way}", *_cells(model, way, columns.values())] for model, way in SHOWN]
    return markdown_table([unit, *columns], rows)


def model_table() -> str:
    rows = []
    for name, linears in MODELS.items():
        t = training(name, DDP, 8)
        numbers = (
            f"{len(linears):,}",
            f"{sum(t.ranks):,}",
            f"{sum(a * b for a, b in linears) * t.frozen / 1e9:,.0f}",
            *(f"{FLOAT * elements / 1e9:.2f}" for elements in (lora_elements(t), t.matrices)),
        )
        rows.append([name, *numbers])
    return markdown_table(["Llama 3", "adapters", "ranks", "frozen, GB", "A and B, GB", "with reserved rows, GB"], rows)


def bytes_tables() -> tuple[str, str]:
    """GB of forward and backward; MB of the controller."""
    sizes = {name: partial(lambda part, t: sent(t, part(t)), part) for name, part in PARTS.items()}
    own, controller = list(PARTS)[:2], list(PARTS)[2:]
    return (
        _table("GB", {name: lambda t, name=name: sizes[name](t) / 1e9 for name in own}),
        _table("MB", {name: lambda t, name=name: sizes[name](t) / 1e6 for name in controller}),
    )


def time_table() -> str:
    times = {name: partial(lambda part, t: milliseconds(t, part(t)), part) for name, part in PARTS.items()}
    plain, reserved, step, *rare = times.values()
    columns = {
        "plain LoRA": plain,
        "more for reserved rows": lambda t: reserved(t) - plain(t),
        **{name: times[name] for name in list(times)[2:]},
        "controller, mean": lambda t: step(t) + sum(part(t) for part in rare) / INTERVAL,
    }
    return _table("ms", columns)


def memory_table() -> str:
    columns = {
        "plain LoRA": memory_of_lora,
        "with reserved rows": memory_of_adapters,
        "probes": memory_of_probes,
        "gathered": memory_of_the_gathered,
        "moved rows, at most": memory_of_moved_rows,
    }
    return _table("GB", {name: lambda t, count=count: count(t) / 1e9 for name, count in columns.items()})


def report() -> str:
    """The modelled part of ``docs/scaling.md``."""
    networks = "; ".join(f"{n:,} processes {x.bandwidth} GB/s and {x.latency} ms" for n, x in NETWORKS.items())
    own, controller = bytes_tables()
    return f"""{model_table()}

Where 8, 64 and 1,024 processes differ, a cell has three numbers.

**Sent by each process in forward and backward**, with plain LoRA (PEFT) and with these adapters:

{own}

**Sent by each process for the controller**, in each step, in the middle of an interval and at its end:

{controller}

**Time**, modelled from assumptions, bandwidth of a process and latency of a collective:
{networks}.
Nothing overlaps with anything, and all blocks are gathered by one collective. *More for reserved rows*: what forward
and backward take beyond plain LoRA; less than nothing where PEFT's A is padded. *Controller, mean*: of a step, in an
interval of {INTERVAL} steps.

{time_table()}

**Memory of each process**: adapters with gradients and moments, with plain LoRA and here; probes; and for the time of a
reallocation what is gathered, and copies of the rows that move.

{memory_table()}
"""


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(report(), end="")


if __name__ == "__main__":
    main()
