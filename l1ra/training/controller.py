"""The controller: at each optimizer step it moves the gates, and at the end of each interval ranks."""

from __future__ import annotations

import dataclasses
import os
import uuid
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from l1ra.allocation.costs import check_budget, rank_cost
from l1ra.allocation.plan import ranks_given_back
from l1ra.config import LAYER_SETTINGS, L1RAConfig
from l1ra.files.checkpoint import save
from l1ra.files.controller_state import check_state
from l1ra.integrations.accelerator import ResumeWithAccelerator, SaveWithAccelerator
from l1ra.integrations.distributed_checkpoint import complete_states
from l1ra.integrations.trainer import TrainerHooks, join_trainer, make_callback
from l1ra.layers.adapted_model import (
    CONTROLLER,
    adapters_disabled,
    check_whole,
    controller_of,
    find_adapters,
    frozen_and_drawn_anew,
    trained_tensors,
    whole_for_saving,
)
from l1ra.layers.base_layers import is_partitioned
from l1ra.layers.gathered import adapter_parameters, gathered
from l1ra.layers.linear import L1RALinear
from l1ra.layers.pending_graphs import PendingGraphs
from l1ra.layers.recompute import in_backward
from l1ra.layers.shared_input import learned_groups, load_groups
from l1ra.layers.zero import ZeroOptimizer, find_zero_optimizer
from l1ra.processes.group import world_size
from l1ra.processes.joining import (
    CannotMoveRanks,
    adapters_are_flat,
    adapters_are_sharded,
    check_gates_apart,
    clear_unused_gradients,
    join,
)
from l1ra.processes.replicated_adapters import ReplicatedAdapters
from l1ra.processes.zero_steps import Callbacks, ZeroSteps
from l1ra.training.averages import Averages
from l1ra.training.gate_bank import GateBank, GateGradients
from l1ra.training.gate_rules import make_rule
from l1ra.training.interval import Interval
from l1ra.training.notices import warn_of_average, warn_of_graphs, warn_of_untrained
from l1ra.training.optimizer_hooks import (
    BackwardCounter,
    EndOfBackward,
    HeldAdapters,
    LoadedStates,
    OptimizerHooks,
    OtherOptimizers,
)
from l1ra.training.reallocation import Reallocation
from l1ra.training.schedule import Schedule, Stage, TrainedSteps
from l1ra.training.taken_gradients import TakenGradients

__all__ = ["RankController"]


class RankController:
    """Moves the gates of all adapters of a model at each optimizer step, and ranks at the end of each interval.

    Nothing needs to be called: the controller is called back at each step of every torch optimizer that holds
    parameters of the adapters. Before the step it takes the gradients of the gates away, so that no optimizer moves or
    decays a gate. After the step it moves the gates by its rule. At the end of an interval it prunes the ranks whose
    gate is 0 and gives as many ranks to the adapters in need, which changes the model's function by no more than
    rounding.

    Example::

        controller = RankController(model, budget=64, total_steps=1000)  # model: with L1RALinear layers
        print(controller.ranks)

    Attributes:
        model, config, budget: as given.
        adapters: module name -> :class:`L1RALinear`.
        initial_ranks: module name -> rank at construction.
        steps: optimizer steps so far.
        total_steps: optimizer steps of the whole training, None until the number is known.
        moved: the number of ranks by which adapters grew so far.
        history: one dict for the start and one for each reallocation: ``step``, ``ranks`` (name -> int), ``pruned``,
            ``moved``, ``spare``, ``gates`` (a dict with ``min``, ``mean``, ``zero``, the share of gates at 0, and
            ``skipped``, the number of skipped steps), ``coherence`` (name -> agreement
            of the adapter's gradients in the interval before, see ``gradient_probe.coherence``; empty without probes).
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        budget: int,
        *,
        config: L1RAConfig | None = None,
        auto: bool = True,
        **overrides: Any,
    ) -> None:
        """A controller of every ``L1RALinear`` in ``model``.

        Args:
            budget: what all adapters' ranks together may cost: ranks, or parameters (``config.budget_unit``).
            config: settings; None means the default preset. Settings of single layers (``LAYER_SETTINGS``) are not
                read: the layers exist already.
            auto: register hooks on optimizers; with False call ``step(optimizer)`` after each step.
            overrides: replace single fields of ``config``.

        Raises:
            ValueError: the model has no adapter or has a controller; or the adapters cost more than the budget, or are
                partitioned by ZeRO stage 3.
            TypeError: the budget is no int, or ``overrides`` has a setting of single layers.
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
        if any(is_partitioned(layer.lora_A) for layer in adapters.values()):
            raise ValueError("DeepSpeed has partitioned the adapters: make the controller before deepspeed.initialize.")
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
        uses_importance = self._rule.uses_importance
        self._interval = Interval(adapters, self._bank, budget, costs, config, uses_importance=uses_importance)
        self._schedule: Schedule | None = None
        self._taken = TakenGradients(self._bank)
        self._pending_graphs = PendingGraphs(self._layers)
        self._stepped_here = False  # since a state was loaded
        self._advanced_to = 0  # the last step after which the interval has advanced
        self._known: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        self._stepped: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # in the current training step
        self._ranks_fixed = False
        self.initial_ranks = self.ranks
        self._record(Reallocation(0, 0, {}))

        self._trained = TrainedSteps(len(adapters))
        self._averages = Averages(model, adapters)
        family = uuid.uuid4().int
        for layer in adapters.values():
            layer.family = family
        self._held = HeldAdapters(self._layers)
        self._states = LoadedStates()
        self._others = OtherOptimizers(model)
        self._end = EndOfBackward(self._end_step)
        hooks = (self._held, self._before_step, self._after_step, self._other_step)
        self._hooks = OptimizerHooks(*hooks) if auto else None
        self._passed: list[Optimizer] = []  # to step(), with auto=False
        self._beside_shards = ReplicatedAdapters(model, self._layers)
        self._zero_steps = ZeroSteps(
            self._layers,
            Callbacks(
                found=self._find_zero,
                write_gates=self._bank.write_to_layers,
                check=self._check_not_disabled,
                register=self._register_zero,
                rest=self._fix_ranks,
                end=self._end_zero_step,
            ),
            auto=auto,
        )
        self._backwards = BackwardCounter(self._layers[0].gate, self._zero_steps.in_first_backward)
        self._checkpoints = TrainerHooks(model, self._layers[0])
        self._state_hooks = [
            model.register_load_state_dict_post_hook(ResumeWithAccelerator()),
            model.register_state_dict_post_hook(SaveWithAccelerator()),
        ]
        setattr(model, CONTROLLER, self)

    def __reduce__(self) -> tuple:
        # A copy or a pickle of the model has no controller: this one drives the original.
        return (type(None), ())

    @property
    def _layers(self) -> list[L1RALinear]:
        return list(self.adapters.values())

    def _parameter_ids(self) -> set[int]:
        return {id(p) for layer in self._layers for p in (layer.lora_A, layer.gate, layer.lora_B)}

    @property
    def auto(self) -> bool:
        """Whether the controller is called back by the optimizers."""
        return self._hooks is not None

    @property
    def ranks(self) -> dict[str, int]:
        """Module name, as in ``named_modules()``, -> current rank."""
        return {name: layer.rank for name, layer in self.adapters.items()}

    @property
    def spare(self) -> int:
        """The part of the budget that no adapter has, in the budget's unit."""
        return self.budget - sum(c * a.rank for c, a in zip(self._costs, self._layers, strict=True))

    @property
    def skipped_steps(self) -> int:
        """The number of steps at which no gate moved because a gate's gradient, or its square, was not finite."""
        return int(self._bank.skipped.item())

    def gates(self) -> dict[str, list[float]]:
        """Module name -> the gates of its ranks, in row order."""
        self._bank.refresh()
        return dict(zip(self.adapters, self._bank.by_adapter(self._bank.value), strict=True))

    def statistics(self) -> dict[str, float]:
        """Numbers for a log: smallest and largest rank, ranks in all, spare, moved ranks, mean gate."""
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
        """With ``auto=False``: call this after ``optimizer.step()`` and before the gradients are cleared.

        Raises:
            RuntimeError: the controller was made with ``auto=True``, and the step would count twice; or FSDP 1 holds
                the adapters as parts of flat tensors, in which gates that the optimizer has moved can't be put back.
        """
        if self.auto:
            raise RuntimeError("this controller is called by the optimizer itself: drop the call, or pass auto=False.")
        if adapters_are_flat(self._layers):
            raise RuntimeError(
                "under FullyShardedDataParallel (FSDP 1) gates can't be put back after a step: pass auto=True and drop "
                "the call, or take torch.distributed.fsdp.fully_shard in its place."
            )
        if not any(known is optimizer for known in self._passed):
            self._passed.append(optimizer)
        if not in_backward() and all(layer.gate.grad is None for layer in self._layers):
            if find_zero_optimizer(self._layers) is not None:
                raise RuntimeError(
                    "DeepSpeed's optimizer clears the gradients within its step: make the controller with auto=True, "
                    "and drop the call of controller.step."
                )
            warnings.warn(
                "controller.step found no gradient on any gate, so no gate moves: call it before the gradients are "
                "cleared.",
                stacklevel=2,
            )
        if not self._held.by(optimizer):
            self._other_step(optimizer)
        self._before_step(optimizer)
        self._after_step(optimizer)

    def callback(self) -> Any:
        """A ``transformers.TrainerCallback`` that connects this controller to a Trainer explicitly.

        A Trainer does not need it: the controller finds a Trainer by itself at the first optimizer step. The callback
        does the same: it takes the number of steps from the Trainer and adds :meth:`statistics` to its logs. With
        ``auto=False`` it also calls :meth:`step`. A Trainer's checkpoints contain the state of the ranks either way.

        Example::

            controller = l1ra.patch(model, budget=224)
            trainer = Trainer(model, args, train_dataset=data, callbacks=[controller.callback()])

        Raises:
            ImportError: transformers is not installed.
        """
        return make_callback(self, makes_steps=not self.auto)

    def expect_steps(self, total_steps: int, done: int = 0) -> None:
        """Take the number of optimizer steps from a Trainer, unless ``total_steps`` was passed by the user.

        Called by :meth:`callback` when a Trainer begins to train. A Trainer that begins at an earlier step trains anew,
        e.g. with smaller batches after it ran out of memory: steps and history begin there too, with the ranks as they
        are.

        Args:
            total_steps: of the training, those that were done before it was resumed included.
            done: of these, the steps done so far.
        """
        if self.config.total_steps is not None:
            return
        begins_anew = self.steps > done and (done == 0 or self._stepped_here)
        if begins_anew:
            self.steps = self._advanced_to = done
            self._trained = TrainedSteps(len(self.adapters), since=done)
            self._stepped.clear()
            self.history[:] = [entry for entry in self.history if 0 < entry["step"] < done]
            self._record(Reallocation(0, 0, {}))
        if begins_anew or total_steps != self.total_steps:
            if self.total_steps is not None:
                self._interval.abandon()
            self.total_steps = total_steps
            if self._schedule is not None:
                self._make_schedule()

    def disabled(self) -> AbstractContextManager[None]:
        """A context in which the model computes as before the training: as before :func:`l1ra.patch`, or with the
        adapters of :meth:`set_reference`, those that :func:`l1ra.from_peft` has loaded.

        It gives the reference model of DPO and similar methods. Modules in ``modules_to_save`` have no weights from
        before the training: they stay as trained. The backward of a forward in the context reaches no adapter; with
        reentrant or nested gradient checkpointing it must run in the context too, since it recomputes the forward.
        Contexts may be nested.

        Example::

            with torch.no_grad(), controller.disabled():
                reference = model(**batch).logits

        Raises:
            RuntimeError: an adapter is merged; or an optimizer that holds the adapters steps in the context (raised by
                its ``step()``). Nothing has changed then.
        """
        return adapters_disabled(self.adapters)

    def set_reference(self) -> None:
        """Make the adapters as they are now the reference of :meth:`disabled`, instead of the model without adapters.

        For preference training that goes on from adapters which have been trained already. The reference needs as much
        memory as A and B of the adapters, and is part of all checkpoints. Of adapters that ``fully_shard`` has sharded
        each process keeps the whole: all must call this together.

        Example::

            controller = l1ra.load(model, "out/sft")
            controller.set_reference()  # DPO is to stay near to the result of the SFT
            with controller.disabled():
                trainer = DPOTrainer(model, args=DPOConfig(precompute_ref_log_probs=True), train_dataset=data)

        Raises:
            RuntimeError: an adapter is merged, or partitioned by ZeRO stage 3; or FSDP 1 holds the adapters as parts of
                flat tensors.
        """
        check_whole(self.adapters)
        merged = next((name for name, layer in self.adapters.items() if layer.merged), None)
        if merged is not None:
            raise RuntimeError(f"{merged} is merged into its weight: call l1ra.unmerge(model) before set_reference().")
        if any(is_partitioned(layer.lora_A) for layer in self._layers):
            raise RuntimeError("ZeRO stage 3 has partitioned the adapters: call set_reference() before it does.")
        with gathered(adapter_parameters(self._layers)):
            for layer in self._layers:
                layer.set_reference()

    def follow(self, average: Any, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """Let the rows of an average of the weights (EMA, SWA) move with the ranks.

        torch's ``AveragedModel`` is followed without this call. Call it once for any other average, when it has been
        made from the patched model, and again if it was replaced. The average is moved at the same step as the model:
        update it after the optimizer's step, as usual.

        Example::

            ema = EMAModel([p for p in model.parameters() if p.requires_grad], decay=0.999)  # of diffusers
            controller.follow(ema)

        Args:
            average: a copy of the model; or the averages of its parameters, ``{name: tensor}`` or a list, or an object
                with such a list in ``.shadow_params``, which is read anew at each move. The tensors remain the same
                objects.
            parameters: to which the averages of a list belong, in order. None: all parameters of the model, or those
                that require a gradient.

        Raises:
            TypeError: it is no average that can be followed.
            ValueError: it does not fit the model: it was made before ``l1ra.patch``, or has other ranks.
        """
        self._averages.follow(average, parameters)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the adapters, all other trained tensors of the model and the controller's state, for :func:`l1ra.load`.

        The optimizer's state is not included: save ``optimizer.state_dict()`` beside it to resume bit for bit.

        Example::

            controller.save("out/adapter")
            controller = l1ra.load(fresh_model, "out/adapter")

        With ``fully_shard`` and ZeRO stage 3 all processes must call this together, not the first one alone, which
        writes: it waits for the parts of the others.

        Raises:
            RuntimeError: FSDP 1 holds the adapters as parts of flat tensors. Nothing is written.
            OSError: the folder can't be written; an older checkpoint in it is still whole.
        """
        with whole_for_saving(self.model) as writes:
            if writes:
                frozen = frozen_and_drawn_anew(self.model)
                save(folder, self.config, self.adapters, trained_tensors(self.model), frozen, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """The state without the adapters' own tensors, which are in the model's state dict.

        Raises:
            RuntimeError: FSDP 1 holds the adapters as parts of flat tensors.
        """
        check_whole(self.adapters)
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
            "closing": self._interval.fading,
            "probes": self._interval.probes.state_dict(),
            "gates": self._bank.state_dict(),
            "generator": self._interval.generator.get_state(),
        }

    @torch.inference_mode(False)
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a ``state_dict()``. The model's own state dict must have been loaded before, with DeepSpeed by
        ``engine.load_checkpoint``.

        Raises:
            ValueError: the state belongs to other adapters, ranks, scalings, budget or rule, or a part is missing;
                nothing is changed then.
            RuntimeError: FSDP 1 holds the adapters as parts of flat tensors.
        """
        check_whole(self.adapters)
        partitioned = [name for name, layer in self.adapters.items() if is_partitioned(layer.lora_A)]
        adopted = {name: state.get("ranks", {}).get(name) for name in partitioned}
        check_state(state, self.adapters, ranks={**self.ranks, **adopted}, budget=self.budget, rule=self.config.rule)
        for name, rank in adopted.items():  # DeepSpeed has loaded their rows, and nothing else tells the rank
            self.adapters[name].adopt_rank(rank)
        self._zero_steps.find()
        if not partitioned:
            self._bank.refresh()
        for name, layer in self.adapters.items():
            layer.initial_rank = state["initial_ranks"][name]
        self._bank.load_state_dict(state["gates"])
        self._interval.load(state["probes"], state["generator"], state["closing"])
        self.initial_ranks = dict(state["initial_ranks"])
        self.steps = self._advanced_to = state["steps"]
        self.moved = state["moved"]
        self._trained = TrainedSteps(len(self.adapters), since=self.steps)
        self.total_steps = self.config.total_steps or state["total_steps"] or self.total_steps
        self._stepped_here = False
        self.history = [dict(entry) for entry in state["history"]]
        load_groups(self.adapters, state["sharing"])

    def close(self) -> None:
        """Remove all hooks. The adapters stay as they are."""
        if self._hooks is not None:
            self._hooks.close()
        self._zero_steps.close()
        self._backwards.close()
        self._beside_shards.close()
        self._checkpoints.remove()
        for handle in self._state_hooks:
            handle.remove()
        self._pending_graphs.stop()
        self._interval.probes.stop()
        if controller_of(self.model) is self:
            delattr(self.model, CONTROLLER)

    # --- one training step

    def _held_by(self, optimizer: Optimizer) -> Sequence[int]:
        # An optimizer that is passed to step() may hold copies of its own.
        return self._held.by(optimizer) or (() if self.auto else range(len(self.adapters)))

    def _check_not_disabled(self, held: Iterable[int] | None = None) -> None:
        """
        Args:
            held: the numbers of the adapters that an optimizer steps; None: all.
        """
        if any(self._layers[i].disabled for i in (range(len(self.adapters)) if held is None else held)):
            raise RuntimeError(
                "an optimizer that holds the adapters steps within controller.disabled(), where none is trained: leave "
                "the block before optimizer.step()."
            )

    def _before_step(self, optimizer: Optimizer) -> None:
        """Take the gates' gradients away, so that no optimizer moves or decays a gate."""
        layers, held = self._layers, self._held_by(optimizer)
        self._check_not_disabled(held)
        if held and layers[held[0]].lora_A.is_meta:
            raise RuntimeError(
                "the adapters are on the meta device and get no gradient, as accelerate offloads the model: train it "
                'without cpu_offload, disk_offload or a device_map with "cpu" or "disk".'
            )
        if adapters_are_flat(layers):
            for layer in layers:
                layer.gate.grad = None
            return
        self._states.check(optimizer, [layers[i] for i in held])
        clear_unused_gradients(layers[i] for i in held)
        self._beside_shards.before_step()
        self._taken.take(optimizer, held)

    def _after_step(self, optimizer: Optimizer) -> None:
        """Move the gates, and ranks if they are due: now, or at the end of the backward that is running."""
        self._end.step(optimizer)

    def _other_step(self, optimizer: Optimizer) -> None:
        """An optimizer that holds no adapter has stepped."""
        self._zero_steps.heard(optimizer)
        if self._zero_steps.zero is None and not any(self._held.by(known) for known in self._known):
            check_gates_apart(self.model, self._layers, optimizer)
            self._others.step(optimizer)

    @torch.no_grad()
    def _end_step(self, optimizers: Sequence[Optimizer]) -> None:
        """Move the gates of the adapters whose optimizers have stepped, and ranks if they are due."""
        if adapters_are_flat(self._layers):
            self._count_step(optimizers)
            return
        held = sorted({i for optimizer in optimizers for i in self._held_by(optimizer)})
        found = self._taken.collect(held)
        self._count_step(optimizers)
        moved = ()
        if found is not None:
            moved = found.layers
            self._move_gates(found)
            self._pending_graphs.after_step(trains_all=len(moved) == len(self.adapters))
        self._bank.write_to_layers(held, moved)
        if not self._ranks_fixed and self._advanced_to < self.steps:
            self._advance()

    def _move_gates(self, found: GateGradients) -> None:
        if not self._ranks_fixed:
            self._bank.update(self._rule.step(self._bank, found.flat, self._stage(), found.seen), *found[:2])
        self._trained.add(found.layers)

    def _count_step(self, optimizers: Sequence[Optimizer]) -> None:
        """Count a new training step: if several optimizers hold adapters, when one of them steps again."""
        for optimizer in optimizers:
            if optimizer not in self._known:
                self._register(optimizer)
        if not self._stepped or any(optimizer in self._stepped for optimizer in optimizers):
            self._stepped.clear()
            self._stepped_here = True
            self.steps += 1
            if self.total_steps is not None and self.steps == self.total_steps + 1:
                warnings.warn(
                    f"the training goes on beyond its {self.total_steps} total_steps: no rank moves any more. Pass the "
                    "optimizer steps of all trainings together as total_steps to l1ra.patch or RankController.",
                    stacklevel=3,
                )
        self._stepped.update(optimizers)
        self._backwards.reset()

    # --- one step of DeepSpeed's optimizer, see ZeroSteps

    def _find_zero(self, zero: ZeroOptimizer) -> None:
        self._bank.zero = zero
        self._known.discard(zero.optimizer)
        self._hooks.optimizers.setdefault(zero.optimizer)

    def _register_zero(self, optimizer: Optimizer) -> bool:
        self._register(optimizer)
        return not self._ranks_fixed

    def _end_zero_step(self, optimizer: Optimizer, taken: Mapping[int, Tensor] | None) -> None:
        self._count_step([optimizer])
        if taken is not None:
            self._move_gates(self._bank.flatten(taken))
            self._bank.write_to_layers()
            self._advance()

    # --- the interval

    def _advance(self) -> None:
        """After an optimizer has stepped: do what is due, once no backward needs the adapters as they are."""
        if self._pending_graphs:
            if self.steps == self._advanced_to + self._schedule.interval + 1:
                warn_of_graphs(self._advanced_to)
            return
        for step in range(self._advanced_to + 1, self.steps + 1):
            self._advance_interval(step)
        self._advanced_to = self.steps

    def _advance_interval(self, step: int) -> None:
        """After a training step: end the interval with a reallocation, choose ranks in its middle, or start probes."""
        interval, schedule = self._interval, self._schedule
        if schedule.reallocates_after(step):
            self._reallocate()
        if interval.fading:
            return
        interval.probes.take_step()
        if schedule.in_second_half(step):
            progress, periods = self._stage().progress, self._trained.periods(self.steps)
            interval.choose_ranks(self._importance(), progress, self._given_back(), periods)
        elif schedule.in_first_half(step):
            interval.start_probes()

    def _stage(self) -> Stage:
        return self._schedule.stage(self.steps)

    def _importance(self) -> list[list[float | None]] | None:
        return self._rule.importance(self._bank, self._stage())

    def _given_back(self) -> list[int]:
        return ranks_given_back([list(entry["ranks"].values()) for entry in self.history])

    # --- the reallocation

    def _reallocate(self) -> None:
        """Prune the ranks whose gate is 0, and give as many to the adapters in need."""
        merged = next((name for name, layer in self.adapters.items() if layer.merged), None)
        if merged is not None:
            warnings.warn(
                f"ranks wait for the next interval: {merged} is merged. Call its unmerge() to train on.", stacklevel=4
            )
            return
        if len(self.history) == 1:
            self._warn_at_first()
        with self._zero_steps.gathered():
            done = self._interval.reallocate(self._importance(), self._given_back(), self._optimizers(), self._averages)
        self.moved += done.moved
        self._record(done)

    def _warn_at_first(self) -> None:
        if self.skipped_steps < self.steps:
            rows = self._bank.by_adapter(self._bank.age > 0)
            held = {i for optimizer in self._optimizers() for i in self._held_by(optimizer)}
            warn_of_untrained(dict(zip(self.adapters, rows, strict=True)), held, self.steps)
        if (average := self._averages.not_followed()) is not None:
            warn_of_average(average)

    def _optimizers(self) -> list[Optimizer]:
        return list(self._hooks.optimizers) if self._hooks is not None else self._passed

    def _record(self, done: Reallocation) -> None:
        now = {"step": self.steps, "ranks": self.ranks, "spare": self.spare, "gates": self._bank.summary()}
        self.history.append({**now, **done._asdict()})

    # --- the first step of an optimizer

    def _register(self, optimizer: Optimizer) -> None:
        """At its first step: find out who trains with whom, and how long."""
        self._known.add(optimizer)
        complete_states(optimizer, self._layers)
        join_trainer(self)
        zero = self._zero_steps.zero
        by_zero = zero is not None and optimizer is zero.optimizer
        if by_zero or (self._schedule is None and (world_size() > 1 or adapters_are_sharded(self._layers))):
            self._join(zero)
        if self._schedule is None:
            self._beside_shards.settle()
            self._make_schedule()

    def _make_schedule(self) -> None:
        # Beside a new head the first gradients tell about the head, not about the layers.
        adapter_ids = self._parameter_ids()
        only_adapters = not any(p.requires_grad for p in self.model.parameters() if id(p) not in adapter_ids)
        self._schedule = Schedule.from_config(self.config, self.total_steps, judge_early=only_adapters)
        if not self._ranks_fixed:
            self._schedule.warn(self.config, self.total_steps, uses_importance=self._rule.uses_importance)

    def _fix_ranks(self, why: object) -> None:
        """From now on no rank moves. ``why``: the end of a sentence."""
        self._ranks_fixed = True
        warnings.warn(f"no rank moves in this distributed training, as in plain LoRA: {why}.", stacklevel=3)

    def _join(self, zero: ZeroOptimizer | None) -> None:
        settings = {name: value for name, value in dataclasses.asdict(self.config).items() if name != "seed"}
        numbers = {"total_steps": self.total_steps, "steps": self.steps, "budget": self.budget}
        where = {"whether ranks fade": self._interval.fading, "whether probes observe": bool(self._interval.probes)}
        same, beside_shards = {**settings, **numbers, **where}, self._beside_shards.find()
        try:
            replicas = join(self.adapters, self._bank.value, self._optimizers(), same, beside_shards, zero)
        except CannotMoveRanks as why:
            self._fix_ranks(why)
        else:
            self._interval.synchronise(replicas)
            if zero is not None and not self._bank.is_written(zero.gates()):
                raise RuntimeError(
                    "DeepSpeed's optimizer holds other gates than the controller, as after engine.load_checkpoint: put "
                    "controller.state_dict() into its client_state, and call controller.load_state_dict after it."
                )
