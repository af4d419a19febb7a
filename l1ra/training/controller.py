"""The controller: listens to the optimizer, moves the gates, and from time to time the ranks."""

from __future__ import annotations

import dataclasses
import os
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from l1ra.allocation.costs import check_budget, rank_cost
from l1ra.allocation.plan import returned
from l1ra.config import LAYER_SETTINGS, L1RAConfig
from l1ra.files.checkpoint import save
from l1ra.files.controller_state import check_state
from l1ra.integrations.trainer import ResumeWithTrainer, join_trainer
from l1ra.layers.adapted_model import CONTROLLER, controller_of, find_adapters, listed, trained_tensors
from l1ra.layers.linear import L1RALinear
from l1ra.layers.shared_input import learn_groups, learned_groups
from l1ra.training.data_parallel import NotReplicas, join, processes, sharded
from l1ra.training.gate_bank import GateBank
from l1ra.training.gate_rules import Moment, make_rule
from l1ra.training.interval import Interval, Moves
from l1ra.training.optimizer_hooks import BackwardCounter, OptimizerListener
from l1ra.training.schedule import Schedule

__all__ = ["RankController"]


class RankController:
    """Moves the gates of all adapters of a model at each optimizer step, and ranks between adapters now and then.

    It needs no call: it hears the steps of every torch optimizer that holds the adapters' parameters. Before a
    step it takes the gates' gradients away, so that no optimizer moves or decays a gate; after the step it moves
    the gates by its rule, and every interval cuts the ranks whose gate is 0 and hands them out anew. A
    reallocation changes the model's function by no more than rounding.

    Attributes:
        model, config, budget: as given.
        initial_ranks: module name -> rank at construction.
        steps: optimizer steps seen.
        total_steps: optimizer steps of the whole training, None until it is known.
        spare: what of the budget is not given to any adapter, in the budget's unit.
        moved: ranks that have gone from one adapter (or from the spare) to another so far.
        history: one dict a reallocation, the start first: ``step``, ``ranks`` (name -> int), ``pruned``, ``moved``,
            ``spare``, ``gates`` (min, mean, share at zero, steps skipped), ``coherence`` (name -> how much the
            adapter's gradients agreed in the interval before, see ``Probe.coherence``; empty where nobody looked).
    """

    def __init__(
        self,
        model: nn.Module,
        budget: int,
        *,
        config: L1RAConfig | None = None,
        auto: bool = True,
        **overrides: Any,
    ) -> None:
        """Take charge of every ``L1RALinear`` in ``model``.

        Args:
            budget: what all adapters' ranks together may cost: ranks, or parameters (``config.budget_unit``).
            config: settings; the default preset if None. ``overrides`` replace single fields of it. What the layers
                alone have (``LAYER_SETTINGS``) is not read: it is as they were made.
            auto: listen to optimizers; False: call ``step(optimizer)`` yourself.

        Raises:
            ValueError: no adapter in the model, another controller on it, or adapters that already cost more
                than the budget.
            TypeError: a budget that is no int, or a setting of the layers among the ``overrides``.
        """
        check_budget(budget)
        if own := sorted(overrides.keys() & LAYER_SETTINGS):
            raise TypeError(
                f"{', '.join(own)}: the layers have that already. Pass it to L1RALinear when they are made, or to "
                "l1ra.patch, which makes them."
            )
        config = (config or L1RAConfig()).replace(**overrides)
        adapters = dict(find_adapters(model))
        if not adapters:
            raise ValueError("the model has no L1RALinear: use l1ra.patch(model, budget=...) to put them in.")
        if controller_of(model) is not None:
            raise ValueError("the model has a controller already: call its close() or l1ra.unpatch(model) first.")
        costs = [rank_cost(a.in_features, a.out_features, config) for a in adapters.values()]
        spent = sum(c * a.rank for c, a in zip(costs, adapters.values(), strict=True))
        if spent > budget:
            raise ValueError(
                f"the adapters already cost {spent} of a budget of {budget}: write budget={spent} or more."
            )

        self.model = model
        self.config = config
        self.budget = budget
        self.adapters: dict[str, L1RALinear] = adapters
        self.steps = 0
        self.moved = 0
        self.history: list[dict[str, Any]] = []
        self.total_steps = config.total_steps
        self._costs = costs
        self._rule = make_rule(config)
        self._bank = GateBank(self._layers)
        self._interval = Interval(adapters, self._bank, budget, costs, config)
        self._schedule: Schedule | None = None
        self._gradients: tuple[Tensor, Tensor | None] | None = None
        self._stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._met: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._resting = self._sharded = False
        self.initial_ranks = self.ranks
        self._record(Moves(0, 0, {}))

        self._listener = OptimizerListener(self._parameter_ids, self._collect, self._after) if auto else None
        self._auto_off: list[Optimizer] = []
        self._backwards = BackwardCounter(self._layers[0].gate)
        self._resuming = model.register_load_state_dict_post_hook(ResumeWithTrainer())
        setattr(model, CONTROLLER, self)

    def __reduce__(self) -> tuple:
        # A copy or a pickle of the model is a model of its own, which nobody drives.
        return (type(None), ())

    @property
    def _layers(self) -> list[L1RALinear]:
        return list(self.adapters.values())

    def _parameter_ids(self) -> set[int]:
        return {id(p) for layer in self._layers for p in (layer.lora_A, layer.gate, layer.lora_B)}

    @property
    def ranks(self) -> dict[str, int]:
        """Module name, as in ``named_modules()``, -> rank now."""
        return {name: layer.rank for name, layer in self.adapters.items()}

    @property
    def spare(self) -> int:
        """What of the budget is not given to any adapter, in the budget's unit."""
        return self.budget - sum(c * a.rank for c, a in zip(self._costs, self._layers, strict=True))

    @property
    def skipped_steps(self) -> int:
        """Steps at which the gates stood still because a gate's gradient was NaN or infinite, or its square was."""
        return int(self._bank.skipped.item())

    def gates(self) -> dict[str, list[float]]:
        """Module name -> the master gates, in row order."""
        self._bank.refresh()
        return dict(zip(self.adapters, self._bank.rows(self._bank.value), strict=True))

    def statistics(self) -> dict[str, float]:
        """A few numbers for a log."""
        self._bank.refresh()
        ranks = list(self.ranks.values())
        return {
            "l1ra/rank_min": min(ranks),
            "l1ra/rank_max": max(ranks),
            "l1ra/ranks": sum(ranks),
            "l1ra/spare": self.spare,
            "l1ra/moved": self.moved,
            "l1ra/gate_mean": self._bank.value.mean().item(),
        }

    def step(self, optimizer: Optimizer) -> None:
        """With ``auto=False``: call it after ``optimizer.step()`` and before the gradients are cleared.

        Raises:
            RuntimeError: the controller listens by itself; the step would count twice.
        """
        if self._listener is not None:
            raise RuntimeError("this controller hears the optimizer by itself: drop the call, or pass auto=False.")
        if not any(known is optimizer for known in self._auto_off):
            self._auto_off.append(optimizer)
        if all(layer.gate.grad is None for layer in self._layers):
            warnings.warn(
                "controller.step found no gradient on any gate, so no gate moves: call it before the gradients are "
                "cleared.",
                stacklevel=2,
            )
        self._after(optimizer)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A ``with`` block in which the model computes without its adapters, as it did before they were put in.

        For the reference of DPO and the like, and to compare: ``with torch.no_grad(), controller.disabled(): ...``.
        What is in ``modules_to_save`` has no old weights beside the trained ones: it stays as it has been trained. A
        backward of what was computed in the block reaches no adapter; with reentrant or nested gradient checkpointing
        it must run in the block too, for it computes once more. Blocks may be nested.

        Raises:
            RuntimeError: an adapter is merged; or, from its ``step()``, an optimizer that holds the adapters steps in
                the block. Nothing has changed then.
        """
        merged = next((name for name, layer in self.adapters.items() if layer.merged), None)
        if merged is not None:
            raise RuntimeError(
                f"{merged} is merged into its weight: call l1ra.unmerge(model) before controller.disabled(), and "
                "l1ra.merge(model) after it."
            )
        before = [(layer, layer.disabled) for layer in self._layers]
        try:
            for layer in self._layers:
                layer.disabled = True
            yield
        finally:
            for layer, disabled in before:
                layer.disabled = disabled

    def save(self, folder: str | os.PathLike) -> None:
        """Write the adapters, whatever else of the model is trained, and this controller: see :func:`l1ra.load`.

        The optimizer's state is not in it: save ``optimizer.state_dict()`` beside it to go on training bit for bit.

        Raises:
            OSError: it can't be written; an older checkpoint in the folder is still whole.
        """
        save(folder, self.config, self.adapters, trained_tensors(self.model), self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Everything but the adapters' own tensors, which the model's state dict holds."""
        self._bank.refresh()
        return {
            "ranks": self.ranks,
            "initial_ranks": dict(self.initial_ranks),
            "budget": self.budget,
            "rule": self.config.rule,
            "steps": self.steps,
            "total_steps": self.total_steps,
            "moved": self.moved,
            "history": [dict(entry) for entry in self.history],
            "scalings": {name: layer.scaling for name, layer in self.adapters.items()},
            "scale_with_rank": {name: layer.scale_with_rank for name, layer in self.adapters.items()},
            "sharing": learned_groups(self.adapters),
            "closing": self._interval.closing,
            "probes": self._interval.probing.state_dict(),
            "gates": self._bank.state_dict(),
            "generator": self._interval.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a ``state_dict()``, after the model's own state dict was loaded.

        Raises:
            ValueError: it belongs to other adapters, ranks or scalings, another budget or rule, or a part is missing;
                nothing is changed then.
        """
        check_state(state, self.adapters, ranks=self.ranks, budget=self.budget, rule=self.config.rule)
        self._bank.refresh()
        for name, layer in self.adapters.items():
            layer.initial_rank = state["initial_ranks"][name]
        self._bank.load_state_dict(state["gates"])
        self._interval.load(state["probes"], state["generator"], state["closing"])
        self.initial_ranks = dict(state["initial_ranks"])
        self.steps, self.moved = state["steps"], state["moved"]
        self.total_steps = self.total_steps or state["total_steps"]
        self.history = [dict(entry) for entry in state["history"]]
        learn_groups(self.adapters, state["sharing"])

    def close(self) -> None:
        """Stop driving: the adapters stay as they are."""
        if self._listener is not None:
            self._listener.close()
        self._backwards.close()
        self._resuming.remove()
        self._interval.probing.stop()
        if controller_of(self.model) is self:
            delattr(self.model, CONTROLLER)

    # --- around an optimizer's step

    def _collect(self, optimizer: Optimizer) -> None:
        if any(layer.disabled for layer in self._layers):
            raise RuntimeError(
                "an optimizer that holds the adapters steps within controller.disabled(), where none is trained: leave "
                "the block before optimizer.step()."
            )
        if self._schedule is None:
            self._sharded = sharded(self._layers)
        if self._sharded:
            for layer in self._layers:
                layer.gate.grad = None
            return
        self._bank.refresh()
        taken = self._bank.take_gradients()
        if taken is None:
            return
        grad, seen = taken
        # A fused optimizer unscales inside its step: GradScaler leaves the scale and its verdict on it.
        scale = getattr(optimizer, "grad_scale", None)
        if scale is not None:
            grad = grad / scale.to(grad)
        if getattr(optimizer, "found_inf", None) is not None:
            grad = torch.where(optimizer.found_inf.to(grad.device) > 0, torch.nan, grad)
        self._gradients = (grad, seen)

    @torch.no_grad()
    def _after(self, optimizer: Optimizer) -> None:
        if self._gradients is None:
            self._collect(optimizer)  # a closure computed them within the step
        # Several optimizers may share the adapters: a new training step begins when one of them comes round again.
        begins = not self._stepped or optimizer in self._stepped
        if begins:
            self._stepped.clear()
            if optimizer not in self._met:
                self._meet(optimizer)
            self.steps += 1
            if self.total_steps is not None and self.steps == self.total_steps + 1:
                warnings.warn(
                    f"the training goes on beyond its {self.total_steps} total_steps: no rank moves any more. Pass the "
                    "optimizer steps of all trainings together as total_steps to l1ra.patch or RankController.",
                    stacklevel=2,
                )
        self._stepped.add(optimizer)
        self._backwards.stepped()
        schedule = self._schedule
        if self._gradients is not None and not self._resting:
            grad, seen = self._gradients
            at = self._moment()
            self._bank.update(self._rule.step(self._bank, grad, at, seen), grad, seen)
        self._gradients = None
        if not self._sharded:
            self._bank.write()
        if self._resting or not begins:
            return
        if schedule.reallocates(self.steps):
            merged = [name for name, layer in self.adapters.items() if layer.merged]
            if merged:
                warnings.warn(
                    f"ranks wait for the next interval: {merged[0]} is merged. Call its unmerge() to train on.",
                    stacklevel=2,
                )
            else:
                self._reallocate()
        if self._interval.closing:
            return
        self._interval.probing.take_step()
        if schedule.closes(self.steps):
            self._interval.close(self._importance(), self._moment().progress, self._given_back())
        elif schedule.looks(self.steps):
            self._interval.look()

    def _moment(self) -> Moment:
        schedule = self._schedule
        at = self.steps
        return Moment(schedule.interval, schedule.progress(at), schedule.over(at), schedule.trial(at))

    def _meet(self, optimizer: Optimizer) -> None:
        self._met.add(optimizer)
        trainer_steps = join_trainer(self.statistics, self.save)
        if self._schedule is None:
            self._start(trainer_steps, optimizer)

    def _start(self, trainer_steps: int | None, optimizer: Optimizer) -> None:
        if self.total_steps is None:
            self.total_steps = trainer_steps
        # Beside a fresh head the first gradients tell about the head, not about the layers.
        mine = self._parameter_ids()
        alone = not any(p.requires_grad for p in self.model.parameters() if id(p) not in mine)
        self._schedule = Schedule.from_config(self.config, self.total_steps, early=alone)
        if processes() > 1:
            self._join_replicas(optimizer)
        if not self._resting:
            self._schedule.warn(self.config, self.total_steps)

    def _join_replicas(self, optimizer: Optimizer) -> None:
        settings = {name: value for name, value in dataclasses.asdict(self.config).items() if name != "seed"}
        numbers = {"total_steps": self.total_steps, "steps": self.steps, "budget": self.budget, "ranks": self.ranks}
        where = {"whether ranks fade": self._interval.closing, "whether probes look": bool(self._interval.probing)}
        try:
            self._interval.join(join(self._layers, optimizer, {**settings, **numbers, **where}))
        except NotReplicas as why:
            self._resting = True
            warnings.warn(f"no rank moves in this distributed training, as in plain LoRA: {why}.", stacklevel=2)

    # --- reallocation

    def _importance(self) -> list[list[float | None]] | None:
        return self._rule.importance(self._bank, self._moment())

    def _given_back(self) -> list[int]:
        return returned([list(entry["ranks"].values()) for entry in self.history])

    def _reallocate(self) -> None:
        if len(self.history) == 1:
            self._warn_of_unseen()
        moves = self._interval.end(self._importance(), self._given_back(), self._optimizers())
        self.moved += moves.moved
        self._record(moves)

    def _warn_of_unseen(self) -> None:
        seen = self._bank.rows(self._bank.age > 0)
        unseen = [name for name, row in zip(self.adapters, seen, strict=True) if not any(row)]
        if unseen and self.skipped_steps < self.steps:
            warnings.warn(
                f"no gradient has reached these adapters in {self.steps} steps, so that they learn nothing: "
                f"{listed(unseen)}. The model does not call these layers, or reads their weights without calling them: "
                "leave them out of target_modules.",
                stacklevel=2,
            )

    def _optimizers(self) -> list[Optimizer]:
        return list(self._listener.optimizers) if self._listener is not None else self._auto_off

    def _record(self, moves: Moves) -> None:
        now = {"step": self.steps, "ranks": self.ranks, "spare": self.spare, "gates": self._bank.summary()}
        self.history.append({**now, **moves._asdict()})
