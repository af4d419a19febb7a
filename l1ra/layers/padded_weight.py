"""A frozen weight with padding behind its columns, into which the kernels write the adapter: one product does both."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PaddedWeight", "padding_pays_off"]

COLUMNS = 128  # as many as the widest bundle of adapters has ranks


def padding_pays_off(in_features: int, out_features: int) -> bool:
    """Whether copying the input, which one product needs, moves clearly fewer bytes than writing the output twice."""
    return out_features >= 1.5 * in_features


class PaddedWeight:
    """Keeps the weight of a ``nn.Linear`` as the first columns of a wider memory; the Parameter is the same object.

    The memory is made when it is first asked for, and anew when the weight has been moved or cast since.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._hook: Any = None

    def __reduce__(self) -> tuple:
        # A copied weight is no longer a part of its memory.
        return (PaddedWeight, ())

    @torch.no_grad()
    def storage(self, base: nn.Linear) -> Tensor:
        """``(out_features, in_features + COLUMNS)``, whose first columns are ``base.weight``."""
        weight, memory = base.weight, self._memory
        if memory is None or (memory.data_ptr(), memory.dtype) != (weight.data_ptr(), weight.dtype):
            rows, columns = weight.shape
            memory = weight.new_empty(rows, columns + COLUMNS)
            memory[:, :columns] = weight
            # Its values are the same: a graph that holds the weight may go on.
            with torch.autograd._unsafe_preserve_version_counter(weight):
                weight.set_(memory[:, :columns])
            self._memory = memory
        if self._hook is None:
            self._hook = base.register_state_dict_post_hook(_save_plainly)
        return self._memory

    @torch.no_grad()
    def remove(self, base: nn.Linear) -> None:
        """Store the weight as it was, without room."""
        if self._memory is not None:
            base.weight.set_(base.weight.contiguous())
            self._memory = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _save_plainly(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    # Savers write the whole memory of a view, or refuse it.
    state_dict[prefix + "weight"] = state_dict[prefix + "weight"].contiguous()
