"""A recompute under activation checkpointing is its forward once more: what was decided in the forward is repeated."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

__all__ = ["active_saved_tensor_hooks", "in_backward", "repeat_decision"]

T = TypeVar("T")

# Since torch 2.8. Without it nothing is repeated, and regions that are checkpointed apart can't be told apart.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None)
# Of each region that is checkpointed: torch's record of it, and what was decided in it.
_decided: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()


def in_backward() -> bool:
    """Whether this thread carries out a backward: what is a forward there is a recompute."""
    return torch._C._current_graph_task_id() != -1


def active_saved_tensor_hooks() -> Any:
    """Who takes what is saved for the backward now, such as a checkpointed region: an object of its own for each, or
    None where autograd keeps it."""
    hooks = _top_hooks(False)
    return None if hooks is None else hooks[0]


def repeat_decision(what: Hashable, decide: Callable[[], T], otherwise: Callable[[], T] | None = None) -> T:
    """``decide()``; in the recompute of a checkpointed region what it was in the forward of the region.

    Whatever else has been decided since for ``what``, in other regions or outside of any, does not matter.

    Args:
        otherwise: what a recompute takes where the forward has decided nothing; None: ``decide()``.
    """
    if torch.compiler.is_compiling():
        return decide()
    region, again = _region()
    if region is None:
        return decide()
    decided = _decided.setdefault(region, {})
    if not again:
        decided[what] = decide()
    elif what not in decided:
        return (otherwise or decide)()
    return decided[what]


def _region() -> tuple[Any, bool]:
    """The checkpointed region that is computed here, the same object in forward and recompute, and whether this is the
    recompute; None where there is none, or a reentrant one, whose recompute need not save the same tensors.

    torch tells nobody; its hooks know it as a variable of theirs.
    """
    hooks = active_saved_tensor_hooks()
    if getattr(hooks, "__module__", "") == "torch.utils.checkpoint":
        hooks = inspect.unwrap(hooks)
        variables = dict(zip(hooks.__code__.co_freevars, hooks.__closure__ or (), strict=True))
        if "frame" in variables:
            return variables["frame"].cell_contents, False
        if "target_frame_ref" in variables:
            return variables["target_frame_ref"].cell_contents(), True
    return None, False
