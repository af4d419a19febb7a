"""``save_pretrained`` of a patched transformers model: it writes a plain LoRA, as ``PeftModel.save_pretrained`` does.

The method of the model's class would write all weights under their names in the patched model. ``from_pretrained``
would not find the adapted layers under these names, and would initialise them randomly.
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
    """Replace ``model.save_pretrained`` by :class:`SavePretrained`, if ``model`` is a transformers model."""
    kinds = {(kind.__module__, kind.__name__) for kind in type(model).__mro__}
    if ("transformers.modeling_utils", "PreTrainedModel") in kinds:
        object.__setattr__(model, METHOD, SavePretrained(model))


def restore(model: nn.Module) -> None:
    """Undo :func:`override`."""
    if METHOD in vars(model):
        object.__delattr__(model, METHOD)


class SavePretrained:
    """``save_pretrained`` of one patched model.

    It is an object and not a closure, so that a copy of the model has a ``SavePretrained`` that refers to the copy.
    """

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
        """Write a plain LoRA with ``l1ra.export_peft``. ``from_pretrained`` of transformers and of PEFT can load it.

        If a Trainer is writing a checkpoint, the trained parameters are also written, under their names in the patched
        model, so that the Trainer can resume from them. Frozen weights are not written.

        If PEFT can't represent what is trained, no LoRA is written and a warning states the reason. Outside of a
        Trainer's checkpoint the controller is then saved instead, so that the result of a training is not lost.

        Args:
            save_directory: is created if it does not exist.
            is_main_process: if False, nothing is written.
            state_dict: used if adapters are sharded; then the method of the model's class saves the model.
            push_to_hub: must be False.
            kwargs: options of transformers' method. They have no effect here unless adapters are sharded.

        Raises:
            ValueError: ``push_to_hub`` is set; or PEFT can't represent what is trained and the model has no
                controller, because it is a copy of a patched model.
            OSError: the files can't be written.
        """
        if push_to_hub:
            raise ValueError("a patched model is not pushed while it is saved: call model.push_to_hub(repo_id).")
        model, folder = self.model, Path(save_directory)
        if any(_is_sharded(layer) for _, layer in find_adapters(model)):
            save_pretrained = getattr(type(model), METHOD)
            save_pretrained(model, save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
        elif is_main_process:
            in_checkpoint = trainer_in("_save_checkpoint") is not None
            if in_checkpoint:
                _write_trained_tensors(model, folder)
            self._export(folder, in_checkpoint)

    def _export(self, folder: Path, in_checkpoint: bool) -> None:
        try:
            export_peft(self.model, folder)
        except ValueError as error:
            controller = controller_of(self.model)
            if controller is None:  # a copy of a patched model has none
                raise
            if not in_checkpoint:  # in a checkpoint the callback saves the controller
                controller.save(folder / FOLDER)
            warnings.warn(
                f"no LoRA for PEFT is written: {error} Load {folder / FOLDER} with l1ra.load(model, folder).",
                stacklevel=3,
            )


def _is_sharded(layer: L1RALinear) -> bool:
    """Whether FSDP or DeepSpeed has sharded the adapter.

    Its parameters are then DTensors (FSDP 2), flat (FSDP 1) or empty (ZeRO 3).
    """
    a = layer.lora_A
    return type(a) is not nn.Parameter or a.dim() != 2 or a.shape[1] != layer.in_features


def _write_trained_tensors(model: nn.Module, folder: Path) -> None:
    from safetensors.torch import save as to_bytes

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: cpu_copy(value) for name, value in carried_tensors(model).items()}
    with atomic_write(folder / WEIGHTS) as (partial_file,):
        partial_file.write_bytes(to_bytes(tensors, metadata={"format": "pt"}))
