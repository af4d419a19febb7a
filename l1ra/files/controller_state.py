"""The state of a ``RankController`` as plain values: its schema, and whether it fits the adapters of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from l1ra.files.schema import mismatch
from l1ra.layers.linear import L1RALinear

__all__ = ["GATES", "IN_TENSORS", "SCHEMA", "check_state"]

# Float32 ``(R,)``, R the sum of all ranks, adapter after adapter; see ``GateBank``. "skipped" is a scalar.
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
IN_TENSORS = ("gates", "generator", "probes")  # stored as tensors; all other values are written as JSON


def check_state(
    state: Mapping[str, Any], adapters: Mapping[str, L1RALinear], *, ranks: Mapping[str, int], budget: int, rule: str
) -> None:
    """Check that ``state`` belongs to a controller with these adapters and settings. Nothing is changed.

    Args:
        state: a ``RankController.state_dict()``.
        adapters: those of the model, by module name.
        ranks: the rank of each adapter that ``state`` must have.
        budget, rule: of the controller that is to take the state.

    Raises:
        ValueError: it does not; the message says what differs.
    """
    if wrong := mismatch(state, SCHEMA):
        raise ValueError(f"this is no state of a RankController: {wrong}.")
    names = list(adapters)
    parts = [state[part] for part in ("ranks", "initial_ranks", "scalings", "scale_with_rank")]
    if any(list(part) != names for part in (*parts, *(entry["ranks"] for entry in state["history"]))):
        raise ValueError("the state is of a model with other adapters: patch this one with the same target_modules.")
    for name, mine in (("budget", budget), ("rule", rule)):
        if state[name] != mine:
            raise ValueError(f"the state has {name} {state[name]!r}, this controller {mine!r}: construct it the same.")
    if state["ranks"] != ranks:
        raise ValueError("the state has other ranks than the model: load the model's state dict first.")
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
                "the same."
            )
    _check_probes(state["probes"], adapters)
    _check_tensors(state)


def _check_probes(probes: Mapping[str, Mapping[str, Tensor]], adapters: Mapping[str, L1RALinear]) -> None:
    for name, parts in probes.items():
        layer, shapes = adapters.get(name), {part: tuple(rows.shape) for part, rows in parts.items()}
        count = shapes.get("mix", ())[:1]
        if layer is None or shapes != {
            "mix": (*count, layer.out_features),
            "sketch": (*count, layer.in_features),
            "seen": (),
        }:
            raise ValueError(f"the state has a probe that does not fit {name}: patch the same model.")


def _check_tensors(state: Mapping[str, Any]) -> None:
    total = sum(state["ranks"].values())
    for name in GATES:
        shape = () if name == "skipped" else (total,)
        found = state["gates"].get(name)
        if found is None or found.shape != shape or not torch.isfinite(found).all():
            raise ValueError(f"the state of the gates has no finite {name!r} of shape {shape}.")
    try:
        torch.Generator().set_state(state["generator"])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the state has no generator: {error}.") from None
