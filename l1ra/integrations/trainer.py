"""transformers.Trainer and its subclasses (TRL's among them), used unmodified.

A Trainer can't be told of the controller, since the user passes it nothing; but it is on the call stack when its
optimizer steps. There it is found, at an optimizer's first step: it knows the number of steps, and gets a callback
that puts the rank statistics into its logs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

__all__ = ["join_trainer"]


def join_trainer(statistics: Callable[[], dict[str, float]]) -> int | None:
    """Put ``statistics()`` into the logs of the Trainer that is stepping an optimizer right now.

    Returns:
        The Trainer's total number of steps; None if no Trainer is at work.
    """
    trainer = _stepping_trainer()
    if trainer is None:
        return None
    # First, so that the integrations that report logs see what it adds.
    trainer.callback_handler.callbacks.insert(0, _log_callback(statistics))
    return trainer.state.max_steps


def _stepping_trainer() -> Any | None:
    module = sys.modules.get("transformers.trainer")
    if module is None:
        return None
    frame = sys._getframe(1)
    while frame is not None:
        # Only there are the locals read: before Python 3.13 a frame whose locals were read holds on to all of them,
        # also to a model that its function deletes later.
        if frame.f_code.co_name == "train" and frame.f_globals.get("__name__") == module.__name__:
            owner = frame.f_locals.get("self")
            if isinstance(owner, module.Trainer):
                return owner
        frame = frame.f_back
    return None


def _log_callback(statistics: Callable[[], dict[str, float]]) -> Any:
    from transformers import TrainerCallback

    class RankStatistics(TrainerCallback):
        """Adds the controller's statistics to what the Trainer logs of the training."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs is not None and any(key.startswith(("loss", "train_loss")) for key in logs):
                numbers = statistics()
                logs.update(numbers)
                if state.log_history:
                    state.log_history[-1].update(numbers)

    return RankStatistics()
