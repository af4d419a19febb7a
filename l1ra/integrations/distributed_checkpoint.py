"""torch.distributed.checkpoint: ``get_state_dict`` and ``set_state_dict`` of models and optimizers.

They expect state of every parameter that an optimizer holds, and step an optimizer without state by zero gradients so
that it has some. The gates are moved by the controller, so that the optimizer has no state of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from l1ra.integrations.call_stack import runs

__all__ = ["complete_states", "initialises_state"]

MODULE = "torch.distributed.checkpoint.state_dict"


def initialises_state(optimizer: Optimizer) -> bool:
    """Whether this is no step of a training: the rate is 0 then."""
    rate = optimizer.param_groups[0].get("lr", 0.0) if optimizer.param_groups else 0.0
    if isinstance(rate, torch.Tensor) and rate.device.type != "cpu":
        return False
    return rate == 0 and runs(MODULE, "_init_optim_state")


def complete_states(optimizer: Optimizer, layers: Iterable[Any]) -> None:
    """From now on the state dict of ``optimizer`` that is made there has zeros for each gate, as A would have.

    Args:
        layers: the adapters, of type ``L1RALinear``.
    """
    layers = [weakref.ref(layer) for layer in layers]
    optimizer.register_state_dict_post_hook(lambda optimizer, state: _add_gates(optimizer, state, layers))


def _add_gates(optimizer: Optimizer, state_dict: dict[str, Any], layers: list[weakref.ref]) -> None:
    if not runs(MODULE, "_get_optim_state_dict"):
        return
    params = [param for group in optimizer.param_groups for param in group["params"]]
    numbers = {id(param): i for i, param in enumerate(params)}
    for layer in filter(None, (layer() for layer in layers)):
        gate, a = numbers.get(id(layer.gate)), numbers.get(id(layer.lora_A))
        if gate is not None and gate not in state_dict["state"] and a in state_dict["state"]:
            state_dict["state"][gate] = {
                name: torch.zeros_like(layer.gate) if _is_like(value, layer.lora_A) else value
                for name, value in state_dict["state"][a].items()
            }


def _is_like(value: Any, param: nn.Parameter) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == param.shape
