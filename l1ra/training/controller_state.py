"""The state of a controller, to save and to go on from: all of it is checked before anything is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from l1ra.files.schema import misfit
from l1ra.layers.shared_input import learn_groups, learned_groups

if TYPE_CHECKING:
    from l1ra.training.controller import RankController

__all__ = ["FORM", "check_state", "load_state", "state_of"]

FORM = {
    "ranks": {str: int},
    "initial_ranks": {str: int},
    "budget": int,
    "rule": str,
    "steps": int,
    "total_steps": int | None,
    "moved": int,
    "history": [
        {
            "step": int,
            "ranks": {str: int},
            "spare": int,
            "gates": {str: int | float},
            "pruned": int,
            "moved": int,
            "coherence": {str: int | float},
        }
    ],
    "scalings": {str: int | float},
    "scale_with_rank": {str: bool},
    "sharing": {str: [str]},
    "closing": bool,
    "probes": {str: {str: Tensor}},
    "gates": {str: Tensor},
    "generator": Tensor,
}


def state_of(controller: RankController) -> dict[str, Any]:
    """See ``RankController.state_dict``."""
    controller._bank.refresh()
    return {
        "ranks": controller.ranks,
        "initial_ranks": dict(controller.initial_ranks),
        "budget": controller.budget,
        "rule": controller.config.rule,
        "steps": controller.steps,
        "total_steps": controller.total_steps,
        "moved": controller.moved,
        "history": [dict(entry) for entry in controller.history],
        "scalings": {name: layer.scaling for name, layer in controller.adapters.items()},
        "scale_with_rank": {name: layer.scale_with_rank for name, layer in controller.adapters.items()},
        "sharing": learned_groups(controller.adapters),
        "closing": controller._interval.closing,
        "probes": controller._interval.probing.state_dict(),
        "gates": controller._bank.state_dict(),
        "generator": controller._interval.generator.get_state(),
    }


def load_state(controller: RankController, state: dict[str, Any]) -> None:
    """See ``RankController.load_state_dict``."""
    check_state(controller, state, controller.ranks)
    controller._bank.refresh()
    for name, layer in controller.adapters.items():
        layer.initial_rank = state["initial_ranks"][name]
    controller._bank.load_state_dict(state["gates"])
    controller._interval.load(state["probes"], state["generator"], state["closing"])
    controller.initial_ranks = dict(state["initial_ranks"])
    controller.steps, controller.moved = state["steps"], state["moved"]
    controller.total_steps = controller.total_steps or state["total_steps"]
    controller.history = [dict(entry) for entry in state["history"]]
    learn_groups(controller.adapters, state["sharing"])


def check_state(controller: RankController, state: dict[str, Any], ranks: dict[str, int]) -> None:
    """Raise a ValueError unless ``state`` is of a controller like this one, with adapters of these ranks."""
    wrong = misfit(state, FORM)
    if wrong:
        raise ValueError(f"this is no state of a RankController: {wrong}.")
    names = list(controller.adapters)
    parts = [state[part] for part in ("ranks", "initial_ranks", "scalings", "scale_with_rank")]
    if any(list(part) != names for part in (*parts, *(entry["ranks"] for entry in state["history"]))):
        raise ValueError("the state is of a model with other adapters: patch this one with the same target_modules.")
    for name in ("budget", "rule"):
        mine = controller.budget if name == "budget" else controller.config.rule
        if state[name] != mine:
            raise ValueError(f"the state has {name} {state[name]!r}, this controller {mine!r}: construct it the same.")
    if state["ranks"] != ranks:
        raise ValueError("the state has other ranks than the model: load the model's state dict first.")
    for name, layer in controller.adapters.items():
        scaling = state["scalings"][name]
        if scaling != layer.scaling:
            raise ValueError(
                f"the state has scaling {scaling:g} at {name}, this model {layer.scaling:g}: patch it with the same "
                "budget, alpha and rank_stabilized."
            )
        scaled = state["scale_with_rank"][name]
        if scaled != layer.scale_with_rank:
            raise ValueError(
                f"the state has scale_with_rank={scaled} at {name}, this model {layer.scale_with_rank}: patch it with "
                "the same."
            )
    controller._interval.probing.check(state["probes"])
    _check_tensors(controller, state)


def _check_tensors(controller: RankController, state: dict[str, Any]) -> None:
    rows = (sum(state["ranks"].values()),)
    for name, mine in controller._bank.state_dict().items():
        shape = rows if mine.dim() else ()
        found = state["gates"].get(name)
        if found is None or found.shape != shape or not torch.isfinite(found).all():
            raise ValueError(f"the state of the gates has no finite {name!r} of shape {shape}.")
    try:
        torch.Generator().set_state(state["generator"])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the state has no generator: {error}.") from None
