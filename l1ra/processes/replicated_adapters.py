"""Adapters beside the shards of FSDP 2: every process holds them whole, and nobody else averages their gradients.

They are among the ``ignored_params`` of ``fully_shard``, or were put in after it.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from l1ra.layers.linear import L1RALinear
from l1ra.layers.low_rank import ADAPTER_PARAMETERS
from l1ra.layers.recompute import in_backward
from l1ra.layers.sharding import group_of, is_sharded
from l1ra.layers.tensor_lists import grouped
from l1ra.processes.group import ReplicaGroup, world_size

__all__ = ["ReplicatedAdapters"]


class ReplicatedAdapters:
    """Averages the gradients of such adapters at the end of each backward, over all processes.

    The mean of sums of gradients is the sum of their means, so that it does no harm to average gradients that are
    accumulated, or that a user has averaged himself.
    """

    def __init__(self, model: nn.Module, layers: Sequence[L1RALinear]) -> None:
        self.replicas: ReplicaGroup | None = None
        self._model = model
        self._layers = layers
        self._backward = -1  # at whose end the gradients will be averaged
        hook = partial(_call, weakref.WeakMethod(self._at_gradient))
        self._handles = [layer.gate.register_post_accumulate_grad_hook(hook) for layer in layers]

    def find(self) -> ReplicaGroup | None:
        """The processes that hold the adapters, None if they do not lie beside shards.

        At the first call that finds them, all processes take over the adapters of the first one.
        """
        if self.replicas is None and world_size() > 1 and not any(is_sharded(layer.gate) for layer in self._layers):
            from torch.distributed.fsdp import FSDPModule

            mesh = next((param.device_mesh for param in self._model.parameters() if is_sharded(param)), None)
            if mesh is not None or any(isinstance(module, FSDPModule) for module in self._model.modules()):
                group = torch.distributed.group.WORLD if mesh is None else group_of(mesh)
                self.replicas = ReplicaGroup(group, self._layers[0].lora_A.device)
                self.replicas.broadcast_tensors([param.data for param in self._parameters()])
        return self.replicas

    def before_step(self) -> None:
        """Before a step of an optimizer that holds them.

        Raises:
            RuntimeError: it steps within the backward, at whose end the gradients will be averaged.
        """
        if in_backward() and self.find() is not None:
            raise RuntimeError(
                "an optimizer steps within the backward, and the gradients of adapters beside the shards of "
                "fully_shard are averaged at its end: step after the backward, or call fully_shard after l1ra.patch "
                "and without ignored_params."
            )

    def settle(self) -> None:
        """At the first step: listen no more if there are no such adapters."""
        if self.find() is None:
            self.close()

    def close(self) -> None:
        """Average no gradients any more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _parameters(self) -> list[nn.Parameter]:
        return [getattr(layer, name) for layer in self._layers for name in ADAPTER_PARAMETERS]

    def _at_gradient(self) -> None:
        current = torch._C._current_graph_task_id()
        if self._backward != current:
            self._backward = current
            torch.autograd.Variable._execution_engine.queue_callback(self._at_the_end)

    def _at_the_end(self) -> None:
        self._backward = -1
        if self.find() is not None and _synchronises(self._model):
            self._average()

    @torch.no_grad()
    def _average(self) -> None:
        params = [param for param in self._parameters() if param.requires_grad]
        grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in params]
        had = torch.tensor([float(param.grad is not None) for param in params], device="cpu").to(grads[0].device)
        for alike in grouped(grads, lambda grad: grad.dtype).values():
            some: list[Tensor] = [grads[i] for i in alike]
            self.replicas.sum_over_replicas([*some, had] if 0 in alike else some)
            torch._foreach_div_(some, float(self.replicas.size))
        if any(param.grad is None for param in params):
            for param, grad, count in zip(params, grads, had.tolist(), strict=True):
                if param.grad is None and count:
                    param.grad = grad


def _call(method: weakref.WeakMethod, _: Tensor) -> None:
    if (found := method()) is not None:
        found()


def _synchronises(model: nn.Module) -> bool:
    """Whether this backward ends an accumulation, see ``FSDPModule.set_requires_gradient_sync``."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            if groups[0] is not None:
                return groups[0].reduce_grads
    return True
