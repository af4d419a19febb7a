"""accelerate's ``Accelerator.save_state`` and ``load_state``.

They write and read the state dict of the model, and the state of objects that were registered with
``register_for_checkpointing``. For a controller that was not, hooks of the model's ``state_dict`` and
``load_state_dict`` write and read its state beside the model's.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from l1ra.files.checkpoint import read
from l1ra.integrations.call_stack import calls
from l1ra.layers.adapted_model import CONTROLLER, controller_of, has_sharded_adapters, has_unreadable_adapters

__all__ = ["ResumeWithAccelerator", "SaveWithAccelerator"]

FOLDER = "l1ra"  # inside the folder of save_state


class SaveWithAccelerator:
    """A hook of the model's ``state_dict``: within ``Accelerator.save_state`` it writes the controller's state.

    The hook has no reference to the controller, so that a copy of the model has none.
    """

    def __call__(self, model: nn.Module, *args: Any) -> None:
        controller = controller_of(model)
        found = None if controller is None else _accelerator_in("save_state", controller)
        if found is not None:
            accelerator, variables = found
            if accelerator.is_main_process or has_sharded_adapters(model):  # then all processes gather, and one writes
                controller.save(Path(variables["output_dir"]) / _state_folder(accelerator, model))


class ResumeWithAccelerator:
    """A hook of the model's ``load_state_dict``: within ``Accelerator.load_state`` the controller takes over the state
    that was saved with the model's."""

    def __call__(self, model: nn.Module, incompatible_keys: Any) -> None:
        controller = controller_of(model)
        found = None if controller is None else _accelerator_in("load_state", controller)
        if found is None:
            return
        accelerator, variables = found
        folder = Path(variables["input_dir"])
        try:
            checkpoint = read(folder / _state_folder(accelerator, model))
        except FileNotFoundError:
            warnings.warn(
                f"{folder} holds no state of L1RA: the ranks are those that were saved, but the controller begins "
                "anew, at step 0. If it was saved with accelerator.register_for_checkpointing(controller), call this "
                "before load_state.",
                stacklevel=2,
            )
        else:
            controller.load_state_dict(checkpoint.controller)


def _state_folder(accelerator: Any, model: nn.Module) -> Path:
    """Where the state of the controller of ``model`` is: below the number of the prepared model that contains it, and
    its name in that, if the Accelerator has several models with controllers."""
    # Wrappers pass attributes of the model inside on as their own: those of the module itself are looked at.
    places = {
        part: Path(str(i), name)
        for i, prepared in enumerate(accelerator._models)
        for name, part in prepared.named_modules()
        if CONTROLLER in vars(part)
    }
    return Path(FOLDER) if len(places) < 2 or model not in places else Path(FOLDER) / places[model]


def _accelerator_in(method: str, controller: Any) -> tuple[Any, dict[str, Any]] | None:
    """The Accelerator whose ``method`` is being called, and the local variables of that call.

    None if there is none, if ``controller`` is registered with it, so that the Accelerator has its state, or if the
    adapters can't be read, so that no rank moves.
    """
    module = sys.modules.get("accelerate.accelerator")
    frames = () if module is None else calls(method)
    frame = next((frame for frame in frames if frame.f_globals.get("__name__") == module.__name__), None)
    if frame is None:
        return None
    variables = frame.f_locals
    accelerator = variables["self"]
    registered = any(known is controller for known in accelerator._custom_objects)
    return None if registered or has_unreadable_adapters(controller.model) else (accelerator, variables)
