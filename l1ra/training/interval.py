"""What becomes of the ranks in an interval: who looks, which ones fade from its middle on, who gets them at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from l1ra.allocation.costs import rank_cap
from l1ra.allocation.new_rows import leading_rows
from l1ra.allocation.plan import LayerPlan, Plan, allocate, surplus
from l1ra.config import L1RAConfig
from l1ra.layers.gradient_probe import least_coherence
from l1ra.layers.linear import L1RALinear
from l1ra.training.data_parallel import Replicas
from l1ra.training.gate_bank import GateBank
from l1ra.training.principal_axes import turn_adapters
from l1ra.training.probes import Probing
from l1ra.training.reallocation import move_ranks

__all__ = ["Interval", "Moves"]

Importance = Sequence[Sequence[float | None]]  # of each rank of each adapter; None where a rank is too young


class Moves(NamedTuple):
    """Of a reallocation: how many ranks were cut, by how many the growing adapters grew, and each one's coherence."""

    pruned: int
    moved: int
    coherence: dict[str, float]


# An adapter's rank grows by this factor at most in one reallocation: how much its weakest rank matters says something
# of the next few, and nothing of the hundredth.
REACH = 4
AFRESH = 0x9E3779B9  # new rows from the stream of the first ones would be the same rows again


class Interval:
    """The decisions of one interval after the other; when they are due, its caller knows.

    Attributes:
        probing: the probes of all adapters.
        closing: whether it is in its second half, in which the gates of chosen ranks fade.
        generator: of all random rows, those of probes and those of new ranks.
    """

    def __init__(
        self,
        adapters: Mapping[str, L1RALinear],
        bank: GateBank,
        budget: int,
        costs: Sequence[int],
        config: L1RAConfig,
    ) -> None:
        """
        Args:
            adapters: by name.
            bank: of these adapters, in the same order; ``costs`` of a rank too, in the unit of ``budget``.
        """
        self.probing = Probing(adapters)
        self.closing = False
        self.generator = torch.Generator().manual_seed(config.seed + AFRESH)
        self._adapters = adapters
        self._layers = list(adapters.values())
        self._bank = bank
        self._budget = budget
        self._costs = costs
        self._config = config
        caps = [rank_cap(a.in_features, a.out_features, config) for a in self._layers]
        self._caps = [min(cap, a.reserve or cap) for cap, a in zip(caps, self._layers, strict=True)]
        self._replicas = Replicas()

    def join(self, replicas: Replicas) -> None:
        """From now on decide alike in all of these processes."""
        self._replicas = replicas
        self.generator.set_state(replicas.agreed(self.generator.get_state()))
        self._drop_copied_probes()

    def look(self) -> None:
        """Let probes ride along, if any decision asks them and they don't yet."""
        if not self.probing and (self._config.rule == "adaptive-l1" or self._config.new_rows == "gradient"):
            self.probing.begin(self.generator)

    def close(self, importance: Importance | None, progress: float, given_back: Sequence[int]) -> None:
        """Its middle: the probes have seen enough; choose the ranks that shall go, and let their gates fade.

        Args:
            importance: by the rule; None if it knows none.
            progress: share, from 0 to 1, of the way to the last reallocation.
            given_back: ranks that each adapter was dealt before and has given back.
        """
        self.closing = True
        self.probing.stop()
        self.probing.add_up(self._replicas)
        if importance is not None:
            chosen = surplus(
                importance,
                self._costs,
                margin=self._config.margin**progress,
                most=int(self._config.turnover * len(self._bank.value)),
                min_rank=self._config.min_rank,
                caps=self._within_reach(),
                given_back=given_back,
                learning=self._learning(self.probing.coherence()),
            )
            self._bank.press(self._replicas.agreed(chosen))

    def end(self, importance: Importance | None, given_back: Sequence[int], optimizers: Sequence[Optimizer]) -> Moves:
        """Cut the ranks that have faded, deal them to the adapters in need, and turn what is left to principal axes.

        Args:
            importance, given_back: as in :meth:`close`.
            optimizers: whose state moves along.
        """
        coherence = self.probing.coherence()
        plan = self._replicas.agreed(self._plan(importance, given_back, self._learning(coherence)))
        pruned, moved = move_ranks(self._adapters, plan, self._bank, optimizers, self._new_rows)
        self._bank.press([()] * len(self._layers))
        if self._config.principal_axes and self._config.rule == "adaptive-l1":
            settled = self._bank.settled()
            turned = turn_adapters(zip(self._layers, settled, strict=True), optimizers, self._replicas.agreed)
            self._bank.turn(settled, turned)
        self.closing = False
        self.probing.forget()
        return Moves(pruned, moved, coherence)

    def load(self, probes: dict[str, dict[str, Tensor]], generator: Tensor, closing: bool) -> None:
        """Go on from what was saved: the state of ``probing`` and of ``generator``, and ``closing``."""
        self.generator.set_state(generator)
        self.closing = closing
        self.probing.load_state_dict(probes, looking=not closing)
        self._drop_copied_probes()

    def _drop_copied_probes(self) -> None:
        # A checkpoint holds what one process has seen: loaded into all of them, it must not count for each.
        if self._replicas.number and not self.closing:
            self.probing.empty()

    def _learning(self, coherence: dict[str, float]) -> list[bool]:
        least = least_coherence(coherence.values(), self._config.min_coherence)
        return [coherence.get(name, math.inf) >= least for name in self._adapters]

    def _plan(self, importance: Importance | None, given_back: Sequence[int], learning: list[bool]) -> Plan:
        return allocate(
            self._bank.rows(self._bank.value),
            importance,
            self._costs,
            self._budget,
            min_rank=self._config.min_rank,
            caps=self._caps if importance is None else self._within_reach(),
            prune_threshold=self._config.prune_threshold,
            exclude_pruned=self._config.exclude_pruned,
            given_back=given_back,
            learning=learning,
        )

    def _within_reach(self) -> list[int]:
        """The largest rank that each adapter may have after the next reallocation."""
        return [min(cap, REACH * layer.rank) for cap, layer in zip(self._caps, self._layers, strict=True)]

    def _new_rows(self, name: str, change: LayerPlan) -> Tensor:
        layer = self._adapters[name]
        rows = layer.initial_rows(change.grow, self.generator)
        if change.grow and self._config.new_rows == "gradient":
            rows = leading_rows(self.probing.sketch(name), layer.lora_A.detach()[list(change.keep)], rows)
            rows = self._replicas.agreed(rows)
        return rows
