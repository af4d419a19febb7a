"""Padded storage of a frozen weight: with the adapter in the padding, a single product computes the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PaddedWeight", "padding_pays_off"]

PADDING = 128  # columns; the largest sum of ranks that the kernels compute together


def padding_pays_off(in_features: int, out_features: int) -> bool:
    """Whether a padded weight saves memory traffic, that is, whether the output is clearly larger than the input.

    With padding a single product suffices, but it needs a copy of the input. Without it the output is written twice.
    """
    return out_features >= 1.5 * in_features


class PaddedWeight:
    """Keeps the weight of an ``nn.Linear`` as the first columns of a wider tensor. The Parameter is the same object.

    The tensor is allocated at the first call of :meth:`storage`, and again after the weight was moved or cast.
    """

    def __init__(self) -> None:
        self._storage: Tensor | None = None
        self._hook: Any = None

    def __reduce__(self) -> tuple:
        # A copied or unpickled weight is no longer a view of the padded tensor.
        return (PaddedWeight, ())

    @torch.no_grad()
    def storage(self, base: nn.Linear) -> Tensor:
        """The padded tensor ``(out_features, in_features + PADDING)``, whose first columns are ``base.weight``."""
        weight, storage = base.weight, self._storage
        if storage is None or (storage.data_ptr(), storage.dtype) != (weight.data_ptr(), weight.dtype):
            rows, columns = weight.shape
            storage = weight.new_empty(rows, columns + PADDING)
            storage[:, :columns] = weight
            # The values don't change, so a graph that has saved the weight remains valid.
            with torch.autograd._unsafe_preserve_version_counter(weight):
                weight.set_(storage[:, :columns])
            self._storage = storage
        if self._hook is None:
            self._hook = base.register_state_dict_post_hook(_make_weight_contiguous)
        return self._storage

    @torch.no_grad()
    def remove(self, base: nn.Linear) -> None:
        """Store the weight of ``base`` without padding again."""
        if self._storage is not None:
            base.weight.set_(base.weight.contiguous())
            self._storage = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _make_weight_contiguous(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    # torch.save writes the whole storage of a view, and safetensors refuses a view.
    state_dict[prefix + "weight"] = state_dict[prefix + "weight"].contiguous()
