"""The methods that are compared: each puts its adapters into the same layers, under the same budget."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import l1ra
from benchmarks.quality import models
from l1ra.layers.base_layers import base_features
from l1ra.model.targets import saved_modules, select_targets

__all__ = ["FROZEN", "METHODS", "Adapted", "adapt", "budget_of"]

FROZEN = "frozen"
PEFTS, L1RAS = ("lora", "rslora", "adalora"), ("reference", "l1ra", "l1ra-params")
METHODS = (FROZEN, *PEFTS, *L1RAS)
# AdaLoRA: how many more ranks than the budget it begins with, and its phases as shares of the training. The paper's
# range from 5 to 12 % before the first cut, from 20 to 60 % after the last one.
ADALORA_START = 1.5
ADALORA_BEFORE, ADALORA_AFTER, ADALORA_INTERVAL = 0.1, 0.3, 0.01


def _nothing(step: int) -> None:
    pass


@dataclass
class Adapted:
    """A model that is ready to be trained.

    Attributes:
        trained: what the optimizer gets: adapters and head.
        head: the parameters of the task head, all of them in ``trained``; empty for a language model.
        budget: ranks, or parameters where the method counts these.
        initial_ranks: name -> rank.
        ranks: name -> rank now.
        sizes: name -> ``(in_features, out_features)``.
        forward: takes a batch with labels, returns an output with the ``loss`` to minimise. None: the model's forward.
        after_step: to be called after each optimizer step, counted from 1, with the gradients still there.
        controller: of L1RA.
    """

    model: nn.Module
    budget: int
    initial_ranks: dict[str, int]
    ranks: Callable[[], dict[str, int]]
    sizes: dict[str, tuple[int, int]]
    forward: Callable[..., Any] | None = None
    after_step: Callable[[int], None] = field(default=_nothing)
    controller: l1ra.RankController | None = None
    trained: list[nn.Parameter] = field(default_factory=list)
    head: list[nn.Parameter] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.forward is None:
            self.forward = self.model

    def parameters_of(self, ranks: dict[str, int]) -> int:
        """Elements of A and B at these ranks; gates and singular values, one a rank, are not counted."""
        return sum(rank * sum(self.sizes[name]) for name, rank in ranks.items())


def adapt(
    method: str,
    model: nn.Module,
    multiplier: float,
    *,
    alpha: float,
    seed: int,
    steps: int,
    settings: dict[str, Any] | None = None,
) -> Adapted:
    """Put the adapters of ``method`` into ``model``, and draw its head from ``seed``.

    Args:
        method: one of ``METHODS`` but frozen.
        multiplier: the budget in multiples of the number of adapted layers.
        alpha: of the scaling ``alpha / rank`` (rslora: ``sqrt(alpha / rank)``), the same at every budget, so that one
            learning rate suits all of them, as in LoRA's paper. With as many ranks in every layer the scaling is 1.
        steps: optimizer steps of the whole training.
        settings: of ``L1RAConfig``, for the methods of L1RA.

    Raises:
        ValueError: no such method, settings for a method without any, or a budget that it can't spend evenly.
        RuntimeError: it did not spend what it should, or the head that is trained is not the one that was drawn.
    """
    head = models.fresh_head(model, seed)
    heads = saved_modules(model, None)
    sizes = {name: base_features(layer) for name, layer in select_targets(model, "all-linear", heads).items()}
    budget = budget_of(method, multiplier, sizes)
    torch.manual_seed(seed)
    if method in PEFTS:
        if settings:
            raise ValueError(f"{method} takes no settings of L1RA.")
        if multiplier != int(multiplier):
            raise ValueError(
                f"{method} gives every layer the same rank: the multiplier must be whole, not {multiplier}."
            )
        adapted = (_adalora if method == "adalora" else _lora)(
            method, model, int(multiplier), alpha, budget, sizes, steps
        )
    elif method in L1RAS:
        adapted = _l1ra(method, model, alpha, budget, sizes, seed, steps, settings or {})
    else:
        raise ValueError(f"no method is called {method!r}: they are {', '.join(METHODS)}.")
    for parameter in head:
        parameter.requires_grad_(True)
    adapted.trained, adapted.head = [p for p in adapted.model.parameters() if p.requires_grad], head
    _check_head(adapted, {name: model.get_submodule(name) for name in heads})
    _check_spent(method, adapted)
    return adapted


def budget_of(method: str, multiplier: float, sizes: dict[str, tuple[int, int]]) -> int:
    """Ranks; for l1ra-params the parameters that LoRA has with as many ranks in every layer."""
    if method == "l1ra-params":
        return int(multiplier * sum(sum(size) for size in sizes.values()) + 1e-6)
    return int(multiplier * len(sizes) + 1e-6)


def _check_head(adapted: Adapted, heads: dict[str, nn.Module]) -> None:
    # A wrapper that trains a copy of the head would take it out of the optimizer's group of its own.
    drawn, there = set(map(id, adapted.head)), {id(p) for head in heads.values() for p in head.parameters()}
    if drawn != there or not drawn <= set(map(id, adapted.trained)):
        raise RuntimeError("the head that is trained is not the one that was drawn.")


def _check_spent(method: str, adapted: Adapted) -> None:
    ranks = adapted.initial_ranks
    start = adapted.parameters_of(ranks) if method == "l1ra-params" else sum(ranks.values())
    # AdaLoRA begins above its budget. Parameters come in steps of one rank.
    slack = max(map(sum, adapted.sizes.values())) if method == "l1ra-params" else 0
    if method != "adalora" and not adapted.budget - slack <= start <= adapted.budget:
        raise RuntimeError(f"{method} spends {start} of a budget of {adapted.budget}.")


def _l1ra(
    method: str,
    model: nn.Module,
    alpha: float,
    budget: int,
    sizes: dict[str, tuple[int, int]],
    seed: int,
    steps: int,
    settings: dict[str, Any],
) -> Adapted:
    given = {"alpha": alpha, "total_steps": steps, "seed": seed}
    if method == "l1ra-params":
        given["budget_unit"] = "params"
    preset = "reference" if method == "reference" else "default"
    controller = l1ra.patch(model, budget, preset=preset, **{**given, **settings})
    return Adapted(model, budget, controller.initial_ranks, lambda: controller.ranks, sizes, controller=controller)


def _lora(
    method: str, model: nn.Module, rank: int, alpha: float, budget: int, sizes: dict[str, tuple[int, int]], steps: int
) -> Adapted:
    import peft

    stabilized = method == "rslora"
    # rsLoRA divides by the root of the rank: the root of alpha makes its scaling 1 at the same rank.
    numerator = math.sqrt(alpha) if stabilized else alpha
    config = peft.LoraConfig(r=rank, lora_alpha=numerator, target_modules=list(sizes), use_rslora=stabilized)
    model = peft.get_peft_model(model, config)

    def ranks() -> dict[str, int]:
        layers = _peft_layers(model, sizes)
        return {name: layer.lora_A["default"].weight.shape[0] for name, layer in layers.items()}

    return Adapted(model, budget, ranks(), ranks, sizes)


def _adalora(
    method: str, model: nn.Module, rank: int, alpha: float, budget: int, sizes: dict[str, tuple[int, int]], steps: int
) -> Adapted:
    import peft

    start = math.ceil(ADALORA_START * rank)
    with warnings.catch_warnings():
        # It warns of r, which is not set here.
        warnings.simplefilter("ignore", UserWarning)
        config = peft.AdaLoraConfig(
            init_r=start,
            target_r=rank,
            # PEFT divides by the rank that it begins with, from the first step to the last; alpha / rank is wanted.
            lora_alpha=alpha * start / rank,
            target_modules=list(sizes),
            total_step=steps,
            tinit=int(ADALORA_BEFORE * steps),
            tfinal=int(ADALORA_AFTER * steps),
            deltaT=max(1, int(ADALORA_INTERVAL * steps)),
        )
        model = peft.get_peft_model(model, config)
    last = steps - config.tfinal

    def ranks() -> dict[str, int]:
        # A rank that is cut has a singular value of 0. Before the first step all of them are 0, and none is cut.
        if config.rank_pattern is None:
            return dict.fromkeys(sizes, start)
        layers = _peft_layers(model, sizes)
        return {name: int(layer.lora_E["default"].count_nonzero()) for name, layer in layers.items()}

    def after_step(step: int) -> None:
        model.base_model.update_and_allocate(step)
        # Its allocation silently does nothing if it is not called at just the right steps.
        if step == last and not 0 < sum(ranks().values()) <= budget:
            raise RuntimeError(f"AdaLoRA has {sum(ranks().values())} ranks after its last cut instead of {budget}.")

    # Its forward adds the orthogonality term to the loss; a PeftModel without a task type goes past it.
    return Adapted(model, budget, ranks(), ranks, sizes, model.base_model, after_step)


def _peft_layers(model: nn.Module, names: dict[str, Any]) -> dict[str, nn.Module]:
    base = model.base_model.model
    return {name: base.get_submodule(name) for name in names}
