"""Activation checkpointing: a recompute repeats the decisions of its forward, instead of deciding anew."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch

__all__ = ["active_saved_tensor_hooks", "in_backward", "may_be_recomputed", "repeat_decision"]

T = TypeVar("T")

# Available since torch 2.8. In older versions no checkpointed region is recognised, and no decision is repeated.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None)
# torch's record of a checkpointed region -> the decisions of its forward.
_decisions: WeakKeyDictionary[Any, dict[Hashable, Any]] = WeakKeyDictionary()


def in_backward() -> bool:
    """Whether this thread is running a backward. A forward within a backward is a recompute."""
    return torch._C._current_graph_task_id() != -1


def active_saved_tensor_hooks() -> Any:
    """The pack hook that currently receives the tensors saved for the backward, or None if there is none.

    Each checkpointed region has its own hook object.
    """
    hooks = _top_hooks(False)
    return None if hooks is None else hooks[0]


def may_be_recomputed() -> bool:
    """Whether a checkpointed region may be running. If not, :func:`repeat_decision` only decides."""
    return not torch.compiler.is_compiling() and _top_hooks(False) is not None


def repeat_decision(key: Hashable, decide: Callable[[], T], default: Callable[[], T] | None = None) -> T:
    """Return ``decide()``, or in the recompute of a checkpointed region the result that it had in the forward.

    The result does not depend on decisions made for ``key`` in other regions or outside of any region.

    Args:
        key: identifies the decision within the region.
        decide: makes the decision.
        default: called instead of ``decide`` in a recompute whose forward has made no decision for ``key``. None:
            ``decide`` itself.
    """
    if not may_be_recomputed():
        return decide()
    region, is_recompute = _region()
    if region is None:
        return decide()
    decisions = _decisions.setdefault(region, {})
    if not is_recompute:
        decisions[key] = decide()
    elif key not in decisions:
        return (default or decide)()
    return decisions[key]


def _region() -> tuple[Any, bool]:
    """The innermost checkpointed region that is running, and whether it is being recomputed.

    The region is represented by the same object in the forward and in the recompute. It is None outside of checkpointed
    regions, and in regions with ``use_reentrant=True``, whose recompute may save other tensors than their forward.

    torch has no public API for this: the object is found among the variables of the region's hooks.
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
