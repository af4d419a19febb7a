"""transformers.Trainer and its subclasses, TRL's among them.

A Trainer takes the number of its steps into the schedule, the rank statistics into its logs and the controller's state
into its checkpoints. A callback does all of it, see ``RankController.callback``. A user need not pass it: then it is
added to the Trainer at an optimizer's first step.

The Trainer has to be found for that, and again when it reads a checkpoint, for which it has no callback. Nothing that
the user passes to ``l1ra.patch`` refers to a Trainer, and neither do the model and the optimizer, but its method is on
the call stack at these moments. :func:`trainer_in` looks there; it is the only place of the library that does so.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from l1ra.files.checkpoint import read
from l1ra.layers.adapted_model import carried_tensors, controller_of
from l1ra.layers.linear import L1RALinear

__all__ = ["FOLDER", "WEIGHTS", "RankCallback", "ResumeWithTrainer", "join_trainer", "make_callback", "trainer_in"]

FOLDER = "l1ra"  # inside a checkpoint
WEIGHTS = "model.safetensors"  # without it a Trainer does not accept a folder as a checkpoint


class Controller(Protocol):
    """The part of ``RankController`` that is used here."""

    adapters: dict[str, L1RALinear]

    def statistics(self) -> dict[str, float]: ...

    def save(self, folder: Path) -> None: ...

    def expect_steps(self, total_steps: int, done: int) -> None: ...

    def step(self, optimizer: Optimizer) -> None: ...


class RankCallback:
    """Adds the rank statistics to a Trainer's training logs and the controller's state to its checkpoints.

    Args:
        controller: None in a copy: copies of a controller do not exist, and the callback then does nothing.
        makes_steps: call ``controller.step`` after each step of the optimizer.
    """

    def __init__(self, controller: Controller | None, makes_steps: bool) -> None:
        self.controller = controller
        self.makes_steps = makes_steps

    def on_train_begin(self, args, state, control, **kwargs):
        if self.controller is not None:
            self.controller.expect_steps(state.max_steps, state.global_step)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        # Accelerate wraps the optimizer, and skips its step if a gradient in float16 has overflowed.
        if self.controller is not None and self.makes_steps and not getattr(optimizer, "step_was_skipped", False):
            self.controller.step(getattr(optimizer, "optimizer", optimizer))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.controller is None or logs is None:
            return
        if any(key.startswith(("loss", "train_loss")) for key in logs):
            numbers = self.controller.statistics()
            logs.update(numbers)
            if state.log_history:
                state.log_history[-1].update(numbers)

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.controller is not None and args.should_save and os.path.isdir(folder):
            self.controller.save(folder / FOLDER)


def make_callback(controller: Controller, *, makes_steps: bool) -> Any:
    """A ``transformers.TrainerCallback`` that is a :class:`RankCallback`.

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers import TrainerCallback

    return type("RankCallback", (RankCallback, TrainerCallback), {})(controller, makes_steps)


def join_trainer(controller: Controller) -> None:
    """Put a callback of ``controller`` first in the Trainer that is stepping an optimizer right now, if there is one.

    The controller is told how long the Trainer's training is, which began before it had the callback.
    """
    found = trainer_in("train")
    if found is None:
        return
    trainer, _ = found
    handler = trainer.callback_handler
    ours = [c for c in handler.callbacks if isinstance(c, RankCallback) and c.controller is controller]
    others = [callback for callback in handler.callbacks if callback not in ours]
    # First, so that the integrations that report logs see the statistics. A new list, because the Trainer may be
    # iterating over the old one. A user who has passed no callback with auto=False makes the steps himself.
    handler.callbacks = [*(ours or [make_callback(controller, makes_steps=False)]), *others]
    _check_reference(trainer, controller)
    if not ours:
        controller.expect_steps(trainer.state.max_steps, trainer.state.global_step)


def _check_reference(trainer: Any, controller: Controller) -> None:
    """Check the reference model of one of TRL's trainers, which makes it without taking notice of adapters.

    Raises:
        ValueError: it would be synchronised with the trained model, or it has not the adapters with which the training
            began.
    """
    if getattr(trainer.args, "sync_ref_model", False):
        raise ValueError(
            "sync_ref_model=True copies parameters by their positions, which mixes up adapters and weights: pass "
            "sync_ref_model=False."
        )
    reference = getattr(trainer, "ref_model", None)
    if not isinstance(reference, nn.Module):
        return
    weights = dict(reference.named_parameters())
    for name, layer in controller.adapters.items():
        bare = weights.get(f"{name}.weight")
        if layer.has_reference and bare is not None and _equal(bare, layer.base_layer.weight):
            raise ValueError(
                f"the reference model of {type(trainer).__name__} has not the adapters with which this training began. "
                "With DPO pass precompute_ref_log_probs=True and create the trainer within controller.disabled(); "
                "otherwise merge these adapters, save the merged model, and load and patch that one."
            )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.detach().to(b.device, b.dtype), b.detach())


class ResumeWithTrainer:
    """A hook of the model's ``load_state_dict``.

    If a Trainer is reading a checkpoint right now, to resume or as the best one, the model's controller takes over the
    state that was saved with it. The hook has no reference to the controller, so that a copy of the model has none.
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
                f"{checkpoint} holds no state of L1RA: saving it was interrupted, or it was written by a training "
                "without L1RA. Resume from an older checkpoint."
            ) from None
        controller.load_state_dict(found.controller)
        # A checkpoint has no frozen weights, and the Trainer would list them in a warning.
        carried = carried_tensors(model)
        incompatible_keys.missing_keys[:] = [name for name in incompatible_keys.missing_keys if name in carried]


def _checkpoint_being_read() -> Path | None:
    if (found := trainer_in("_load_from_checkpoint")) is not None:
        return Path(found[1]["resume_from_checkpoint"])
    if (found := trainer_in("_load_best_model")) is not None:
        return Path(found[0].state.best_model_checkpoint)
    return None


def trainer_in(method: str) -> tuple[Any, dict[str, Any]] | None:
    """The Trainer whose ``method`` is on the call stack, and the local variables of that call."""
    module = sys.modules.get("transformers.trainer")
    if module is None:
        return None
    frame = sys._getframe(1)
    while frame is not None:
        # Local variables are read in this frame alone: before Python 3.13 reading them keeps them alive as long as the
        # frame, also a model that its function deletes.
        if frame.f_code.co_name == method and frame.f_globals.get("__name__") == module.__name__:
            owner = frame.f_locals.get("self")
            if isinstance(owner, module.Trainer):
                return owner, frame.f_locals
        frame = frame.f_back
    return None
