"""transformers.Trainer and its subclasses, TRL's and sentence-transformers' among them.

A Trainer takes the number of its steps into the schedule and the rank statistics into its logs. A callback does both,
see ``RankController.callback``. A user need not pass it: then it is added to the Trainer at an optimizer's first step.

A Trainer's checkpoints contain the controller's state. It is written whenever a Trainer saves the weights of its model
for a checkpoint, for whatever reason and into whatever folder, and read when a Trainer reads them. Hooks of the model
do both. They find the Trainer on the call stack, see ``call_stack.py``.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from l1ra.files.checkpoint import Checkpoint, read
from l1ra.integrations.call_stack import calls, first_argument
from l1ra.layers.adapted_model import (
    CONTROLLER,
    carried_tensors,
    controller_of,
    has_sharded_adapters,
    has_unreadable_adapters,
)
from l1ra.layers.linear import L1RALinear
from l1ra.layers.zero import is_engine

__all__ = [
    "FOLDER",
    "WEIGHTS",
    "RankCallback",
    "TrainerHooks",
    "is_in_checkpoint",
    "join_trainer",
    "make_callback",
    "save_controllers",
]

FOLDER = "l1ra"  # inside a checkpoint
WEIGHTS = "model.safetensors"  # without it a Trainer does not accept a folder as a checkpoint
# Methods of a Trainer: those that write a checkpoint, and those that write weights into the folder that they are given.
CHECKPOINT_WRITERS = ("_save_checkpoint", "_tune_save_checkpoint")
WEIGHT_WRITERS = ("save_model", "_save")
CALLS_ON_SAVE = "_maybe_log_save_evaluate"


class Controller(Protocol):
    """The parts of ``RankController`` that a Trainer needs."""

    model: nn.Module
    adapters: dict[str, L1RALinear]

    def statistics(self) -> dict[str, float]: ...

    def expect_steps(self, total_steps: int, done: int) -> None: ...

    def step(self, optimizer: Optimizer) -> None: ...


class RankCallback:
    """Tells the controller a Trainer's number of steps, and adds the rank statistics to its training logs.

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

    def on_save(self, args, state, control, **kwargs):
        # A Trainer whose _save writes single parameters has asked no model for its state dict.
        save_controllers(afterwards=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.controller is None or logs is None:
            return
        if any(key.startswith(("loss", "train_loss")) for key in logs):
            numbers = self.controller.statistics()
            logs.update(numbers)
            if state.log_history:
                state.log_history[-1].update(numbers)


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
    found = next(_trainer_calls("train"), None)
    if found is None:
        return
    trainer, _ = found
    if not any(module is controller.model for module in trainer.model.modules()):
        warnings.warn(
            "the Trainer's model does not contain the patched model: its checkpoints hold no state of the ranks and "
            "can't be resumed. Pass the patched model to the Trainer, or patch the Trainer's model.",
            stacklevel=2,
        )
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


class TrainerHooks:
    """The hooks by which a controller's state gets into a Trainer's checkpoints and back.

    They have no reference to the controller, so that a copy of the model has hooks, but no controller.
    """

    def __init__(self, model: nn.Module, layer: L1RALinear) -> None:
        """Register the hooks.

        Args:
            model: the model of the controller.
            layer: one of its adapters. Whatever saves the model, or a model that contains it, or its parts one by one,
                asks this layer for its tensors.
        """
        reading = _Reading()
        self._handles = [
            layer.register_state_dict_pre_hook(_save_before_the_weights),
            model.register_load_state_dict_pre_hook(reading.before),
            model.register_load_state_dict_post_hook(reading.after),
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _save_before_the_weights(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    save_controllers()


def is_in_checkpoint() -> bool:
    """Whether a Trainer is writing a checkpoint right now."""
    return next(_trainer_calls(*CHECKPOINT_WRITERS), None) is not None


def save_controllers(folder: Path | None = None, *, afterwards: bool = False) -> bool:
    """If a Trainer is writing a checkpoint right now, write the state of its model's controllers into it.

    Args:
        folder: where the weights go, if the Trainer's methods don't tell.
        afterwards: the Trainer has just written one; leave the state alone if it is there.

    Returns:
        Whether a Trainer is writing a checkpoint.
    """
    for trainer, frame in _trainer_calls(*((CALLS_ON_SAVE,) if afterwards else (*WEIGHT_WRITERS, *CHECKPOINT_WRITERS))):
        if frame.f_code.co_name in WEIGHT_WRITERS:
            folder = first_argument(frame) or folder
            continue
        if folder is None:
            runs = trainer._get_output_dir(trial=frame.f_locals.get("trial"))
            folder = Path(runs) / f"checkpoint-{trainer.state.global_step}"
        for model, state_folder in _state_folders(trainer.model).items():
            into = Path(folder) / state_folder
            if has_sharded_adapters(model):
                saves = not afterwards  # in all processes; the first one writes
            elif has_unreadable_adapters(model):
                saves = _engine_is("save_checkpoint")  # DeepSpeed saves the model in all processes together
            else:
                saves = trainer.args.should_save and not (afterwards and into.is_dir())
            if saves:
                controller_of(model).save(into)
        return True
    return False


def _engine_is(calling: str) -> bool:
    """Whether a DeepSpeed engine's method of this name is being called."""
    return any(is_engine(frame.f_locals.get("self")) for frame in calls(calling))


def _state_folders(model: nn.Module) -> dict[nn.Module, Path]:
    """For each model with a controller in ``model`` the folder of its state in a checkpoint."""
    # Wrappers pass attributes of the model inside on as their own: those of the module itself are looked at.
    names = {part: name for name, part in model.named_modules() if CONTROLLER in vars(part)}
    return {part: Path(FOLDER, name if len(names) > 1 else "") for part, name in names.items()}


class _Reading:
    """Hooks of ``load_state_dict``, called before and after the model has taken its tensors.

    If a Trainer is reading a checkpoint right now, to resume or as the best one, the model takes all that was trained
    from the state that the controller has saved, and the controller takes over its own. The weights of the checkpoint
    may have been saved for another reader, with the adapters merged.
    """

    def __init__(self) -> None:
        self.found: Checkpoint | None = None
        self.prefix = ""

    def before(self, model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        self.found, self.prefix = _checkpoint_being_read(model), prefix
        if self.found is None or has_sharded_adapters(model):  # then the state dict is of the patched model, in parts
            return
        own = model.state_dict().keys()
        layers = tuple(f"{name}." if name else "" for name in self.found.adapters)
        for key in list(state_dict):
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name.startswith(layers) and name not in own:
                del state_dict[key]
        state_dict.update({prefix + name: tensor for name, tensor in self.found.tensors.items()})

    def after(self, model: nn.Module, incompatible_keys: Any) -> None:
        found, self.found = self.found, None
        if found is None:
            return
        controller_of(model).load_state_dict(found.controller)
        # A checkpoint need not have frozen weights.
        frozen = model.state_dict().keys() - carried_tensors(model).keys()
        frozen_keys = {self.prefix + name for name in frozen}
        incompatible_keys.missing_keys[:] = [key for key in incompatible_keys.missing_keys if key not in frozen_keys]


def _checkpoint_being_read(model: nn.Module) -> Checkpoint | None:
    """The state of ``model``'s controller in the checkpoint that a Trainer is reading right now."""
    resumes = _engine_is("load_checkpoint")
    if controller_of(model) is None or (has_unreadable_adapters(model) and not resumes):
        return None
    for trainer, frame in _trainer_calls("_load_from_checkpoint", "_load_best_model", "train"):
        method = frame.f_code.co_name
        resumes |= method == "_load_from_checkpoint"
        if method == "train" and not resumes:
            return None
        checkpoint = trainer.state.best_model_checkpoint if method == "_load_best_model" else first_argument(frame)
        if isinstance(checkpoint, str | os.PathLike):
            folder = Path(checkpoint) / _state_folders(trainer.model).get(model, FOLDER)
            try:
                return read(folder)
            except FileNotFoundError:
                raise FileNotFoundError(_why_no_state(Path(checkpoint), folder)) from None
    return None


def _why_no_state(checkpoint: Path, folder: Path) -> str:
    if folder.is_dir():
        return f"{folder} is incomplete: saving it was interrupted. Resume from another checkpoint."
    return (
        f"{checkpoint} holds no state of L1RA, a folder named {folder.relative_to(checkpoint)}: it was written by a "
        "training without L1RA, or copied without this folder. If it holds a LoRA, l1ra.from_peft(model, folder) "
        "starts a new training from it."
    )


def _trainer_calls(*methods: str) -> Iterator[tuple[Any, FrameType]]:
    """The calls of a Trainer's ``methods`` on the call stack, innermost first: the Trainer, and the frame."""
    module = sys.modules.get("transformers.trainer")
    if module is None:
        return
    for frame in calls(*methods):
        # Subclasses have a _save_checkpoint of their own; their train() calls the Trainer's.
        if frame.f_code.co_name == "train" and frame.f_globals.get("__name__") != module.__name__:
            continue
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, module.Trainer):
            yield trainer, frame
