"""The state of a controller, to save and to go on from: all of it is checked before anything is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l1ra.controller import RankController

__all__ = ["load_state", "state_of"]


def state_of(controller: RankController) -> dict[str, Any]:
    """See ``RankController.state_dict``."""
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
        "closing": controller._closing,
        "probes": {name: p for name, layer in controller.adapters.items() if (p := layer.probe_state()) is not None},
        "gates": controller._bank.state_dict(),
        "generator": controller._generator.get_state(),
    }


def load_state(controller: RankController, state: dict[str, Any]) -> None:
    """See ``RankController.load_state_dict``."""
    _check(controller, state)
    if controller._bank.stale():
        controller._bank.read()
    for name, layer in controller.adapters.items():
        layer.initial_rank = state["initial_ranks"][name]
    controller._bank.load_state_dict(state["gates"])
    controller._generator.set_state(state["generator"])
    controller._closing = state["closing"]
    for name, layer in controller.adapters.items():
        layer.take_probe()
        if name in state["probes"]:
            layer.resume_probe(state["probes"][name])
    controller.initial_ranks = dict(state["initial_ranks"])
    controller.steps, controller.moved = state["steps"], state["moved"]
    controller.total_steps = controller.total_steps or state["total_steps"]
    controller.history = [dict(entry) for entry in state["history"]]


def _check(controller: RankController, state: dict[str, Any]) -> None:
    """That it is of a controller like this one; the model's own state has been loaded."""
    missing = set(state_of(controller)) - set(state)
    if missing:
        raise ValueError(f"this is no state of a RankController: {', '.join(sorted(missing))} missing.")
    if list(state["ranks"]) != list(controller.adapters):
        raise ValueError("the state is of a model with other adapters: patch this one with the same target_modules.")
    for name in ("budget", "rule"):
        mine = controller.budget if name == "budget" else controller.config.rule
        if state[name] != mine:
            raise ValueError(f"the state has {name} {state[name]!r}, this controller {mine!r}: construct it the same.")
    if state["ranks"] != controller.ranks:
        raise ValueError("the state has other ranks than the model: load the model's state dict first.")
    for name, layer in controller.adapters.items():
        scaling = state["scalings"][name]
        if scaling != layer.scaling:
            raise ValueError(
                f"the state has scaling {scaling:g} at {name}, this model {layer.scaling:g}: patch it with the same "
                "budget, alpha and rank_stabilized."
            )
    for name, probe in state["probes"].items():
        layer = controller.adapters[name]
        if {k: v.shape[1:] for k, v in probe.items()} != {
            "mix": (layer.out_features,),
            "sketch": (layer.in_features,),
        }:
            raise ValueError(f"the state has a probe that does not fit {name}: patch the same model.")
