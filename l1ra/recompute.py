"""What tells a forward from its recompute under activation checkpointing: a layer must do the same in both."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["in_backward", "saving_hooks"]

# Since torch 2.8. Before, regions that are checkpointed apart from each other can't be told apart.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None)


def in_backward() -> bool:
    """Whether this thread carries out a backward: what is a forward there is a recompute."""
    return torch._C._current_graph_task_id() != -1


def saving_hooks() -> Any:
    """Who takes what is saved for the backward now, such as a checkpointed region: an object of its own for each, or
    None where autograd keeps it."""
    hooks = _top_hooks(False)
    return None if hooks is None else hooks[0]
