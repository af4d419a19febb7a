"""The schema of a ``RankController``'s state dict, and the check that a state dict fits the adapters of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from l1ra.files.schema import mismatch
from l1ra.layers.linear import L1RALinear

__all__ = ["GATES", "IN_TENSORS", "SCHEMA", "check_state"]

# Tensors of ``GateBank``: float32 ``(R,)``, R the sum of all ranks, adapter after adapter. "skipped" is a scalar.
GATES = ("value", "exp_avg", "exp_avg_sq", "importance_sq", "age", "weight", "skipped")
SCHEMA = {
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
IN_TENSORS = ("gates", "generator", "probes")  # stored in a safetensors file; all other values are stored as JSON


def check_state(
    state: Mapping[str, Any], adapters: Mapping[str, L1RALinear], *, ranks: Mapping[str, int], budget: int, rule: str
) -> None:
    """Check that a controller with these adapters and settings can load ``state``. Nothing is changed.

    Args:
        state: a ``RankController.state_dict()``.
        adapters: the adapters of the model, by module name.
        ranks: the ranks that ``state`` must have, by module name.
        budget, rule: of the controller that is to load the state.

    Raises:
        ValueError: the state does not fit; the message says what differs.
    """
    if wrong := mismatch(state, SCHEMA):
        raise ValueError(f"this is no state of a RankController: {wrong}.")
    names = list(adapters)
    parts = [state[part] for part in ("ranks", "initial_ranks", "scalings", "scale_with_rank")]
    if any(list(part) != names for part in (*parts, *(entry["ranks"] for entry in state["history"]))):
        raise ValueError("the state is of a model with other adapters: patch this one with the same target_modules.")
    for name, own in (("budget", budget), ("rule", rule)):
        if state[name] != own:
            raise ValueError(
                f"the state has {name} {state[name]!r}, this controller {own!r}: create the controller with the same "
                f"{name}."
            )
    if state["ranks"] != ranks:
        raise ValueError("the state has other ranks than the model: load the model's state dict first.")
    _check_scalings(state, adapters)
    _check_probes(state["probes"], adapters)
    _check_gates_and_generator(state)


def _check_scalings(state: Mapping[str, Any], adapters: Mapping[str, L1RALinear]) -> None:
    for name, layer in adapters.items():
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
                "the same scale_with_rank."
            )


def _check_probes(probes: Mapping[str, Mapping[str, Tensor]], adapters: Mapping[str, L1RALinear]) -> None:
    for name, parts in probes.items():
        layer, shapes = adapters.get(name), {part: tuple(rows.shape) for part, rows in parts.items()}
        count = shapes.get("mix", ())[:1]
        if layer is None or shapes != {
            "mix": (*count, layer.out_features),
            "sketch": (*count, layer.in_features),
            "seen": (),
        }:
            raise ValueError(f"the state has a probe that does not fit {name}: load it into the same model.")


def _check_gates_and_generator(state: Mapping[str, Any]) -> None:
    total = sum(state["ranks"].values())
    for name in GATES:
        shape = () if name == "skipped" else (total,)
        found = state["gates"].get(name)
        if found is None or found.shape != shape or not torch.isfinite(found).all():
            raise ValueError(f"the state of the gates has no finite {name!r} of shape {shape}.")
    try:
        torch.Generator("cpu").set_state(state["generator"])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the state has no generator: {error}.") from None
