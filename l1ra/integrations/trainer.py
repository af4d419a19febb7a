"""transformers.Trainer and its subclasses (TRL's among them), used unmodified.

A Trainer can't be told of the controller, since the user passes it nothing; but it is on the call stack when its
optimizer steps. There it is found, at an optimizer's first step: it knows the number of steps, and gets callbacks that
put the rank statistics into its logs and the controller into its checkpoints. When it reads one, to resume or because
it was the best, it is found once more, on the call stack of the model's ``load_state_dict``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from l1ra.files.checkpoint import read
from l1ra.layers.adapted_model import carried_tensors, controller_of

__all__ = ["FOLDER", "WEIGHTS", "ResumeWithTrainer", "join_trainer", "trainer_in"]

FOLDER = "l1ra"  # inside a checkpoint
WEIGHTS = "model.safetensors"  # without it a Trainer takes no folder for a checkpoint


def join_trainer(statistics: Callable[[], dict[str, float]], save: Callable[[Path], None]) -> int | None:
    """Put ``statistics()`` into the logs of the Trainer that is stepping an optimizer right now, and have it call
    ``save`` with a folder inside each checkpoint that it writes.

    Returns:
        The Trainer's total number of steps; None if no Trainer is at work.
    """
    trainer = trainer_in("train")
    if trainer is None:
        return None
    # First, so that the integrations that report logs see what it adds.
    trainer[0].callback_handler.callbacks.insert(0, _callback(statistics, save))
    return trainer[0].state.max_steps


class ResumeWithTrainer:
    """A hook of the model's ``load_state_dict``: if a Trainer is reading a checkpoint right now, to resume or as the
    best one, the model's controller goes back to where it was saved. It holds no controller: so that a copy of the
    model has none.
    """

    def __call__(self, model: nn.Module, incompatible_keys: Any) -> None:
        controller = controller_of(model)
        checkpoint = _checkpoint_being_read()
        if controller is None or checkpoint is None:
            return
        try:
            found = read(checkpoint / FOLDER)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{checkpoint} holds no state of L1RA: it was broken off while it was saved, or written by a training "
                "without L1RA. Resume from an older checkpoint."
            ) from None
        controller.load_state_dict(found.controller)
        # Frozen weights are not in a checkpoint, and the Trainer would list them in a warning.
        carried = carried_tensors(model)
        incompatible_keys.missing_keys[:] = [name for name in incompatible_keys.missing_keys if name in carried]


def _checkpoint_being_read() -> Path | None:
    if (found := trainer_in("_load_from_checkpoint")) is not None:
        return Path(found[1]["resume_from_checkpoint"])
    if (found := trainer_in("_load_best_model")) is not None:
        return Path(found[0].state.best_model_checkpoint)
    return None


def trainer_in(method: str) -> tuple[Any, dict[str, Any]] | None:
    """The Trainer that is in ``method``, and the locals of that call."""
    module = sys.modules.get("transformers.trainer")
    if module is None:
        return None
    frame = sys._getframe(1)
    while frame is not None:
        # Only there are the locals read: before Python 3.13 a frame whose locals were read holds on to all of them,
        # also to a model that its function deletes later.
        if frame.f_code.co_name == method and frame.f_globals.get("__name__") == module.__name__:
            owner = frame.f_locals.get("self")
            if isinstance(owner, module.Trainer):
                return owner, frame.f_locals
        frame = frame.f_back
    return None


def _callback(statistics: Callable[[], dict[str, float]], save: Callable[[Path], None]) -> Any:
    from transformers import TrainerCallback

    class Ranks(TrainerCallback):
        """Adds the controller's statistics to what the Trainer logs of the training, and its state to checkpoints."""

        def on_log(self, args, state, control, logs=None, **kwargs):
            if logs is not None and any(key.startswith(("loss", "train_loss")) for key in logs):
                numbers = statistics()
                logs.update(numbers)
                if state.log_history:
                    state.log_history[-1].update(numbers)

        def on_save(self, args, state, control, **kwargs):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if args.should_save and os.path.isdir(folder):
                save(folder / FOLDER)

    return Ranks()
