"""What a patched transformers model writes when it is saved: a LoRA in PEFT's files, as a ``PeftModel`` does.

The class's own ``save_pretrained`` would write all weights under the names that they have while the model is patched,
and ``from_pretrained`` would find none of the adapted layers in them and draw fresh ones.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from l1ra.files.atomic_write import atomic_write, cpu_copy
from l1ra.files.peft_export import export_peft
from l1ra.integrations.trainer import FOLDER, WEIGHTS, trainer_in
from l1ra.layers.adapted_model import carried_tensors, controller_of, find_adapters
from l1ra.layers.linear import L1RALinear

__all__ = ["SavePretrained", "override", "restore"]

METHOD = "save_pretrained"


def override(model: nn.Module) -> None:
    """Let ``model`` write a LoRA when it is saved, if it is a transformers model."""
    kinds = {(kind.__module__, kind.__name__) for kind in type(model).__mro__}
    if ("transformers.modeling_utils", "PreTrainedModel") in kinds:
        object.__setattr__(model, METHOD, SavePretrained(model))


def restore(model: nn.Module) -> None:
    """Undo :func:`override`."""
    if METHOD in vars(model):
        object.__delattr__(model, METHOD)


class SavePretrained:
    """``save_pretrained`` of one patched model; an object and not a closure, so that a copy of it has its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write what ``l1ra.export_peft`` writes: ``from_pretrained`` of transformers and of PEFT read it.

        A checkpoint of a Trainer also gets the trained parameters under their names in the patched model, to resume
        from: frozen weights are not in it. If PEFT can't express what is trained, a warning says why, and everywhere
        but in a checkpoint the controller is saved instead: a training that has ended is never lost.

        Args:
            save_directory: made if it is not there.
            is_main_process: if False, nothing is written.
            state_dict: used where adapters are sharded; the model is then saved as transformers does it.
            push_to_hub: must be False.
            kwargs: of transformers' method, on files of whole models: without a meaning here.

        Raises:
            ValueError: ``push_to_hub`` is set; or PEFT can't express it and the model, a copy, has no controller.
            OSError: it can't be written.
        """
        if push_to_hub:
            raise ValueError("a patched model is not pushed while it is saved: call model.push_to_hub(repo_id).")
        model, folder = self.model, Path(save_directory)
        if not all(_whole(layer) for _, layer in find_adapters(model)):
            own = getattr(type(model), METHOD)
            own(model, save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
        elif is_main_process:
            in_checkpoint = trainer_in("_save_checkpoint") is not None
            if in_checkpoint:
                _write_trained(model, folder)
            self._export(folder, in_checkpoint)

    def _export(self, folder: Path, in_checkpoint: bool) -> None:
        try:
            export_peft(self.model, folder)
        except ValueError as error:
            controller = controller_of(self.model)
            if controller is None:  # a copy of a patched model has none
                raise
            if not in_checkpoint:  # there it is saved anyway
                controller.save(folder / FOLDER)
            warnings.warn(
                f"no LoRA for PEFT is written: {error} Load {folder / FOLDER} with l1ra.load(model, folder).",
                stacklevel=3,
            )


def _whole(layer: L1RALinear) -> bool:
    a = layer.lora_A  # DTensors (FSDP 2), flat pieces (FSDP 1) and empty ones (ZeRO 3) are parts of it
    return type(a) is nn.Parameter and a.dim() == 2 and a.shape[1] == layer.in_features


def _write_trained(model: nn.Module, folder: Path) -> None:
    from safetensors.torch import save as to_bytes

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: cpu_copy(value) for name, value in carried_tensors(model).items()}
    with atomic_write(folder / WEIGHTS) as (aside,):
        aside.write_bytes(to_bytes(tensors, metadata={"format": "pt"}))
