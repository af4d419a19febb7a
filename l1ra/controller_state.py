"""Whether a saved state belongs to a controller: all of it is checked before anything is changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from l1ra.controller import RankController

__all__ = ["check_state"]


def check_state(controller: RankController, state: dict[str, Any]) -> None:
    """Compare a ``state_dict()`` with the controller that shall take it; the model's own state has been loaded.

    Raises:
        ValueError: it is none of a controller like this one; the message says what to do.
    """
    missing = set(controller.state_dict()) - set(state)
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
