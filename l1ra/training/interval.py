"""The decisions of an interval: probes observe, ranks are chosen and fade, at the end all ranks are reallocated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from l1ra.allocation.costs import rank_cap
from l1ra.allocation.new_rows import leading_rows
from l1ra.allocation.plan import Plan, allocate, ranks_to_prune
from l1ra.config import L1RAConfig
from l1ra.layers.gathered import adapter_parameters, gathered
from l1ra.layers.gradient_probe import least_coherence
from l1ra.layers.linear import L1RALinear
from l1ra.layers.row_moves import row_runs
from l1ra.layers.sharding import wholes
from l1ra.layers.tensor_lists import transferred, views
from l1ra.processes.group import ReplicaGroup
from l1ra.training.averages import Averages
from l1ra.training.gate_bank import GateBank
from l1ra.training.principal_axes import rotate_to_principal_axes
from l1ra.training.probes import ProbeSet
from l1ra.training.reallocation import Reallocation, move_ranks

__all__ = ["Interval"]

Importance = Sequence[Sequence[float | None]]  # of each rank of each adapter; None: the rank is too young


# The importance of an adapter's weakest rank says something about the next few ranks, but not about the hundredth.
MAX_GROWTH = 4  # factor by which an adapter's rank may grow in one reallocation
SEED_OFFSET = 0x9E3779B9  # keeps new rows from repeating the rows that were drawn at the start


class Interval:
    """Takes the decisions of one interval after another. The caller knows when each is due.

    Attributes:
        probes: of all adapters.
        fading: whether the interval is in its second half, in which the gates of the chosen ranks fade.
        generator: of all random rows, for probes and for new ranks.
    """

    def __init__(
        self,
        adapters: Mapping[str, L1RALinear],
        bank: GateBank,
        budget: int,
        costs: Sequence[int],
        config: L1RAConfig,
        *,
        uses_importance: bool,
    ) -> None:
        """
        Args:
            adapters: by name.
            bank: the gates of these adapters, in the same order.
            budget: what all ranks together may cost.
            costs: of one rank of each adapter, in the unit of ``budget``.
            uses_importance: of the gate rule, see ``Rule``.
        """
        self.probes = ProbeSet(adapters)
        self.fading = False
        self.generator = torch.Generator("cpu").manual_seed(config.seed + SEED_OFFSET)
        self._adapters = adapters
        self._layers = list(adapters.values())
        self._bank = bank
        self._budget = budget
        self._costs = costs
        self._config = config
        self._uses_importance = uses_importance
        caps = [rank_cap(a.in_features, a.out_features, config) for a in self._layers]
        self._caps = [min(cap, a.reserve or cap) for cap, a in zip(caps, self._layers, strict=True)]
        self._replicas = ReplicaGroup()

    def synchronise(self, replicas: ReplicaGroup) -> None:
        """From now on take the same decisions in all of these processes."""
        self._replicas = replicas
        self.generator.set_state(replicas.broadcast(self.generator.get_state()))
        self._reset_copied_probes()

    def start_probes(self) -> None:
        """First half: let probes observe the gradients, if a decision needs them and there are none yet."""
        if not self.probes and (self._uses_importance or self._config.new_rows == "gradient"):
            self.probes.start(self.generator)

    def choose_ranks(
        self, importance: Importance | None, progress: float, given_back: Sequence[int], periods: Sequence[int]
    ) -> None:
        """Middle: stop the probes, choose the ranks to be pruned, and penalise their gates from now on.

        Args:
            importance: by the gate rule; None if the rule has none.
            progress: share of the way to the last reallocation, 0 to 1.
            given_back: the number of ranks that each adapter has received and lost again.
            periods: in how many steps each adapter is trained once.

        Raises:
            ReplicasDiffer: other processes hold other adapters. All of them raise it, and decide nothing.
        """
        self._check_replicas()
        self.fading = True
        self.probes.stop()
        self.probes.sum_over_replicas(self._replicas)
        if importance is not None:
            chosen = ranks_to_prune(
                importance,
                self._costs,
                margin=self._config.margin**progress,
                max_count=int(self._config.turnover * len(self._bank.value)),
                min_rank=self._config.min_rank,
                caps=self._growth_caps(),
                given_back=given_back,
                learning=self._learning(self.probes.coherence()),
            )
            self._bank.penalise(*self._replicas.broadcast((chosen, periods)))

    def reallocate(
        self,
        importance: Importance | None,
        given_back: Sequence[int],
        optimizers: Sequence[Optimizer],
        averages: Averages,
    ) -> Reallocation:
        """End: prune the ranks whose gate is 0, give as many to the adapters in need, rotate to principal axes.

        Args:
            importance, given_back: as in :meth:`choose_ranks`.
            optimizers: their state moves along.
            averages: of the adapters; they move along.

        Raises:
            ReplicasDiffer: as in :meth:`choose_ranks`.
        """
        self._check_replicas()
        coherence = self.probes.coherence()
        plan = self._replicas.broadcast(self._plan(importance, given_back, self._learning(coherence)))
        new_rows = self._new_rows(plan)
        with averages.gathered(), gathered(adapter_parameters(self._layers), optimizers):
            done = move_ranks(self._layers, plan, self._bank, optimizers, new_rows, averages)
            self._bank.penalise_none()
            if self._config.principal_axes and self._uses_importance:
                rows = self._bank.rows_at_one()
                layers = zip(self._layers, rows, strict=True)
                rotations = rotate_to_principal_axes(layers, optimizers, self._replicas.broadcast)
                self._bank.rotate(rows, rotations)
                averages.rotate(rows, rotations)
        self.fading = False
        self.probes.discard()
        return done._replace(coherence=coherence)

    def abandon(self) -> None:
        """Drop what the interval has begun: the fading gates return to 1, and probes have observed nothing."""
        self.fading = False
        self.probes.discard()
        self._bank.penalise_none()

    def load(self, probes: dict[str, dict[str, Tensor]], generator: Tensor, fading: bool) -> None:
        """Take over a saved state: of :attr:`probes`, of :attr:`generator`, and :attr:`fading`."""
        self.generator.set_state(generator)
        self.fading = fading
        self.probes.load_state_dict(probes, observing=not fading)
        self._reset_copied_probes()

    def _check_replicas(self) -> None:
        self._replicas.check_alike(self._adapters, self._bank.value)

    def _reset_copied_probes(self) -> None:
        # A checkpoint has the sketches of one process. Loaded into all of them, they must count once in their sum.
        if self._replicas.number and not self.fading:
            self.probes.reset()

    def _learning(self, coherence: dict[str, float]) -> list[bool]:
        least = least_coherence(coherence.values(), self._config.min_coherence)
        return [coherence.get(name, math.inf) >= least for name in self._adapters]

    def _plan(self, importance: Importance | None, given_back: Sequence[int], learning: list[bool]) -> Plan:
        return allocate(
            self._bank.by_adapter(self._bank.value),
            importance,
            self._costs,
            self._budget,
            min_rank=self._config.min_rank,
            caps=self._caps if importance is None else self._growth_caps(),
            prune_threshold=self._config.prune_threshold,
            exclude_pruned=self._config.exclude_pruned,
            given_back=given_back,
            learning=learning,
        )

    def _growth_caps(self) -> list[int]:
        """The largest rank that each adapter may have after the next reallocation."""
        return [min(cap, MAX_GROWTH * layer.rank) for cap, layer in zip(self._caps, self._layers, strict=True)]

    def _new_rows(self, plan: Plan) -> list[Tensor | None]:
        """For each adapter A of its new ranks, ``(grow, in_features)`` float32 on the CPU; None if it grows by none."""
        shapes = [(grow, layer.in_features) for layer, grow in zip(self._layers, plan.grow, strict=True)]
        parts = views(torch.empty(sum(map(math.prod, shapes)), dtype=torch.float32, device="cpu"), shapes)
        rows = [
            layer.initial_rows(grow, self.generator, out=part) if grow else None
            for layer, grow, part in zip(self._layers, plan.grow, parts, strict=True)
        ]
        if self._config.new_rows == "gradient":
            sketches = [self.probes.sketch(name) for name in self._adapters]
            chosen = [i for i, sketch in enumerate(sketches) if sketch is not None and rows[i] is not None]
            present = wholes([self._layers[i].lora_A for i in chosen])
            some = [(sketches[i], a, plan.layers[i].keep, rows[i]) for i, a in zip(chosen, present, strict=True)]
            for i, new in zip(chosen, self._replicas.broadcast(_along_the_gradient(some)), strict=True):
                rows[i] = new
        return rows


def _along_the_gradient(adapters: Sequence[tuple[Tensor, Tensor, Sequence[int], Tensor]]) -> list[Tensor]:
    """:func:`leading_rows` for the sketch, A and its kept rows, and the random rows of each adapter.

    They are computed on the CPU after one transfer from each device: singular vectors of wide matrices take a GPU
    longer.
    """
    kept = [[a[run] for run in row_runs(keep) or [slice(0)]] for _, a, keep, _ in adapters]
    sketches = [sketch for sketch, *_ in adapters]
    there = iter(transferred([*sketches, *itertools.chain(*kept)], torch.device("cpu"), torch.float32))
    sketches = list(itertools.islice(there, len(adapters)))
    present = [next(there) if len(runs) == 1 else torch.cat([next(there) for _ in runs]) for runs in kept]
    return leading_rows(sketches, present, [random for *_, random in adapters])
