"""What ``save_pretrained`` of a patched model writes, and of models that contain it or are parts of it.

The patched model, if it is one of transformers, writes a plain LoRA, as ``PeftModel.save_pretrained`` does: its reader
knows LoRA. Anything else that is saved for ``from_pretrained`` (a part, a model that contains the patched one, a
pipeline, a model of another library) writes plain weights into which the adapters are merged. Without that, the weights
would be written under their names in the patched model. ``from_pretrained`` would not find the adapted layers under
these names, and would initialise them randomly.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from l1ra.files.atomic_write import atomic_write, cpu_copy
from l1ra.files.peft_export import export_peft
from l1ra.integrations.call_stack import calls
from l1ra.integrations.trainer import FOLDER, WEIGHTS, is_in_checkpoint, save_controllers
from l1ra.layers.adapted_model import (
    carried_tensors,
    controller_of,
    find_adapters,
    has_sharded_adapters,
    has_unreadable_adapters,
    whole_for_saving,
)
from l1ra.layers.base_layers import is_partitioned
from l1ra.layers.linear import L1RALinear

__all__ = ["SavePretrained", "override", "restore"]

METHOD = "save_pretrained"


def override(model: nn.Module) -> None:
    """Make everything that is saved with adapters of ``model`` readable.

    ``model.save_pretrained`` becomes a :class:`SavePretrained` if it is that of transformers' models. A class or model
    with a ``save_pretrained`` of its own keeps it, with all that it writes besides.
    """
    kinds = {(kind.__module__, kind.__name__): kind for kind in type(model).__mro__}
    plain = kinds.get(("transformers.modeling_utils", "PreTrainedModel"))
    is_plain = plain is not None and getattr(type(model), METHOD) is getattr(plain, METHOD)
    if is_plain and METHOD not in vars(model):
        object.__setattr__(model, METHOD, SavePretrained(model))
    for _, layer in find_adapters(model):
        layer.register_state_dict_post_hook(_merge_for_readers)


def restore(model: nn.Module) -> None:
    """Undo :func:`override`, except for the hooks of adapters, which the model no longer has."""
    if isinstance(vars(model).get(METHOD), SavePretrained):
        object.__delattr__(model, METHOD)


def _merge_for_readers(layer: L1RALinear, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """A hook of ``state_dict()``: in a ``save_pretrained`` the tensors of ``layer`` become those of a plain layer.

    Raises:
        TypeError: the adapter can't be merged without loss.
        RuntimeError: the layer is sharded.
    """
    if not _is_saved_for_readers():
        return
    if has_sharded_adapters(layer) or has_unreadable_adapters(layer):
        raise RuntimeError(
            f"{prefix.rstrip('.') or 'the layer'} is sharded, and can't be saved as a plain weight: write a LoRA with "
            "l1ra.export_peft(model, directory), in all processes."
        )
    plain = {} if layer.merged else {"weight": _merged_weight(layer, prefix.rstrip("."))}
    for key in [key for key in state_dict if key.startswith(prefix)]:
        inside, base, name = key.removeprefix(prefix).partition("base_layer.")
        value = state_dict.pop(key)
        if base and not inside:
            value = plain.get(name, value)
            # Code of libraries assumes contiguous weights, and an augmented weight is not.
            state_dict[prefix + name] = value.contiguous() if isinstance(value, Tensor) else value


def _merged_weight(layer: L1RALinear, name: str) -> Tensor:
    """The weight with the adapter added, on the CPU: a GPU may have no room for a second set of weights."""
    try:
        return layer.merged_weight().cpu()
    except TypeError as error:
        raise TypeError(
            f"{name or 'the layer'} can't be saved as a plain weight: {error}. Write a LoRA instead, with "
            "l1ra.export_peft(model, directory) for the patched model; or patch the transformers model alone and not a "
            f"model that contains it: then its {METHOD} writes a LoRA."
        ) from None


def _is_saved_for_readers() -> bool:
    """Whether a ``save_pretrained`` of a class is running, or a ``save`` of sentence-transformers."""
    return any(
        frame.f_code.co_name == METHOD or str(frame.f_globals.get("__name__")).startswith("sentence_transformers.")
        for frame in calls(METHOD, "save")
    )


class SavePretrained:
    """``save_pretrained`` of one patched model.

    It is an object and not a closure, so that a copy of the model has a ``SavePretrained`` that refers to the copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        # Pipelines pass the options that they find in the signature.
        return inspect.signature(getattr(type(self.model), METHOD).__get__(self.model))

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

        Plain weights are written by the method of the model's class, with all its options, if the adapters are merged
        (:func:`l1ra.merge`), or if the model is saved as a part of something else, such as a pipeline or a
        SentenceTransformer, whose reader may not know LoRA. In the second case a quantised model writes a LoRA.

        Args:
            save_directory: is created if it does not exist.
            is_main_process: if False, nothing is written.
            state_dict: of the whole model, if adapters are sharded: without it all processes must call this. Otherwise
                used if the method of the model's class saves the model.
            push_to_hub: must be False if a LoRA is written.
            kwargs: options of transformers' method. They have no effect on a LoRA.

        Raises:
            ValueError: ``push_to_hub`` is set; or there is no ``state_dict`` and the parameters are partitioned by ZeRO
                stage 3; or PEFT can't represent what is trained and the model has no
                controller, because it is a copy of a patched model.
            OSError: the files can't be written.
        """
        model, folder = self.model, Path(save_directory)
        is_part, is_unreadable = _is_saved_for_readers(), has_unreadable_adapters(model)
        if is_main_process and state_dict is None and any(is_partitioned(param) for param in model.parameters()):
            raise ValueError(
                "ZeRO stage 3 has partitioned the parameters, which are empty here: in all processes call "
                "l1ra.export_peft(model, folder), or pass state_dict=accelerator.get_state_dict(model)."
            )
        if is_unreadable and is_main_process and not is_in_checkpoint():
            instead = "Load them into a patched model in one process, and save that."
            if any(is_partitioned(param) for param in model.parameters()):
                instead = "For a LoRA call l1ra.export_peft(model, folder) in all processes."
            warnings.warn(
                "the adapters are sharded, so the weights are saved under their names in the patched model, where "
                f"from_pretrained does not find them. {instead}",
                stacklevel=2,
            )
        if is_unreadable or self._is_plain(is_part):
            save_pretrained = getattr(type(model), METHOD)
            options = {**kwargs, "push_to_hub": push_to_hub}
            save_pretrained(model, save_directory, is_main_process=is_main_process, state_dict=state_dict, **options)
        elif push_to_hub:
            raise ValueError("a patched model is not pushed while it is saved: call model.push_to_hub(repo_id).")
        elif is_main_process or (state_dict is None and has_sharded_adapters(model)):
            with whole_for_saving(model, state_dict) as writes:
                if writes:
                    in_checkpoint = save_controllers(folder)
                    if in_checkpoint and not is_part:
                        _write_trained_tensors(model, folder)
                    self._export(folder, in_checkpoint)

    def _is_plain(self, is_part: bool) -> bool:
        """Whether plain weights are written."""
        layers = [layer for _, layer in find_adapters(self.model)]
        if is_part:
            return all(layer.merged or not layer.why_not_exactly_mergeable() for layer in layers)
        return any(layer.merged for layer in layers) and not is_in_checkpoint()

    def _export(self, folder: Path, in_checkpoint: bool) -> None:
        try:
            export_peft(self.model, folder)
        except ValueError as error:
            controller = controller_of(self.model)
            if controller is None:  # a copy of a patched model has none
                raise
            if not in_checkpoint:  # where it has been saved already
                controller.save(folder / FOLDER)
            warnings.warn(
                f"no LoRA for PEFT is written: {error} Load {folder / FOLDER} with l1ra.load(model, folder).",
                stacklevel=3,
            )


def _write_trained_tensors(model: nn.Module, folder: Path) -> None:
    from safetensors.torch import save as to_bytes

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: cpu_copy(value) for name, value in carried_tensors(model).items()}
    with atomic_write(folder / WEIGHTS) as (partial_file,):
        partial_file.write_bytes(to_bytes(tensors, metadata={"format": "pt"}))
