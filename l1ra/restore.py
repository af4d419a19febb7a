"""A checkpoint put back into a model."""

from __future__ import annotations

import os
import re

from torch import nn

from l1ra.adapted import controller_of
from l1ra.base_layers import base_features
from l1ra.checkpoint import PARTS, Checkpoint, read
from l1ra.controller import RankController
from l1ra.linear import find_adapters
from l1ra.patch import patch, unpatch

__all__ = ["load"]


def load(model: nn.Module, folder: str | os.PathLike, *, auto: bool = True) -> RankController:
    """Give ``model`` the adapters of a checkpoint, and the controller that goes on where it was saved.

    An optimizer that shall go on too loads its own state afterwards: its tensors have the shapes of the saved ranks.

    Args:
        model: the model as it was before ``l1ra.patch``, one that is patched with the same budget and settings, or one
            that has been built with :class:`L1RALinear`.
        folder: where ``controller.save`` has written.
        auto: as in ``l1ra.patch``, for a model without a controller.

    Returns:
        The model's controller.

    Raises:
        FileNotFoundError: no checkpoint is there.
        ValueError: it is damaged, of a newer version, or of another model; the model is untouched.
        RuntimeError: an adapter of the model is merged; the model is untouched.
    """
    checkpoint = read(folder)
    adapted = next(find_adapters(model), None) is not None
    _check_model(model, checkpoint, adapted)
    there = controller = controller_of(model)
    if controller is None:
        budget, config = checkpoint.controller["budget"], checkpoint.config
        if adapted:
            controller = RankController(model, budget, config=config, auto=auto)
        else:
            names = "|".join(re.escape(name) for name in checkpoint.adapters)
            controller = patch(model, budget, target_modules=names, modules_to_save=[], config=config, auto=auto)
            for name, layer in controller.adapters.items():  # as from_peft may have given them other ranks than patch
                layer.start_at(checkpoint.controller["initial_ranks"][name], config.alpha, config.rank_stabilized)
    before = {name: value.clone() for name, value in model.state_dict().items() if _belongs(name, checkpoint)}
    try:
        model.load_state_dict(checkpoint.tensors, strict=False)
        controller.load_state_dict(checkpoint.controller)
    except BaseException:
        model.load_state_dict(before, strict=False)
        if not adapted:
            unpatch(model)
        elif there is None:
            controller.close()
        raise
    for name in checkpoint.trained:
        model.get_parameter(name).requires_grad_(True)
    return controller


def _check_model(model: nn.Module, checkpoint: Checkpoint, adapted: bool) -> None:
    for name, layer in find_adapters(model):
        if layer.merged:
            raise RuntimeError(f"{name} is merged: call l1ra.unmerge(model) before other adapters are loaded.")
    modules = dict(model.named_modules())
    if adapted and list(checkpoint.adapters) != [name for name, _ in find_adapters(model)]:
        raise ValueError("the checkpoint has other adapters than the model: patch it with the same target_modules.")
    for name, size in checkpoint.adapters.items():
        module = modules.get(name)
        found = (
            None if module is None else (module.in_features, module.out_features) if adapted else base_features(module)
        )
        if found is None or tuple(found) != size:
            there = "nothing that can be adapted" if found is None else f"{found[0]} -> {found[1]}"
            raise ValueError(
                f"the checkpoint is of another model: it has an adapter for a layer {size[0]} -> {size[1]} at {name}, "
                f"this model has {there} there."
            )
    parameters = dict(model.named_parameters())
    for name in checkpoint.trained:
        shape = checkpoint.tensors[name].shape
        if name not in parameters or parameters[name].shape != shape:
            raise ValueError(f"the checkpoint is of another model: it has a trained {name} of shape {tuple(shape)}.")


def _belongs(name: str, checkpoint: Checkpoint) -> bool:
    owner, _, part = name.rpartition(".")
    return name in checkpoint.trained or (owner in checkpoint.adapters and part in PARTS)
