"""A checkpoint put back into a model."""

from __future__ import annotations

import os
import re

from torch import nn

from l1ra.files.checkpoint import Checkpoint, read
from l1ra.files.controller_state import check_state
from l1ra.layers.adapted_model import controller_of, find_adapters
from l1ra.layers.base_layers import base_features
from l1ra.layers.low_rank import ADAPTER_PARAMETERS
from l1ra.model.patch import patch, unpatch
from l1ra.training.controller import RankController

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
        RuntimeError: an adapter of the model is merged, or ``strict`` was set in the training and an adapter would run
            as plain PyTorch here; the model is untouched.
    """
    checkpoint = read(folder)
    adapted = next(find_adapters(model), None) is not None
    _check_model(model, checkpoint, adapted)
    there, state = controller_of(model), checkpoint.controller
    controller = there or _put_in(model, checkpoint, adapted, auto)
    before = {name: value.clone() for name, value in model.state_dict().items() if _belongs(name, checkpoint)}
    kept = controller.state_dict()
    try:
        wanted = {"ranks": state["ranks"], "budget": controller.budget, "rule": controller.config.rule}
        check_state(state, controller.adapters, **wanted)
        model.load_state_dict(checkpoint.tensors, strict=False)
        controller.load_state_dict(state)
    except BaseException:
        model.load_state_dict(before, strict=False)
        if not adapted:
            unpatch(model)
        elif there is None:
            controller.close()
        else:
            controller.load_state_dict(kept)
        raise
    parameters = dict(model.named_parameters())
    for name in parameters.keys() & set(checkpoint.trained):
        parameters[name].requires_grad_(True)
    return controller


def _put_in(model: nn.Module, checkpoint: Checkpoint, adapted: bool, auto: bool) -> RankController:
    """A controller as the checkpoint's, with adapters if there are none."""
    state, config = checkpoint.controller, checkpoint.config
    if adapted:
        return RankController(model, state["budget"], config=config, auto=auto)
    names = "|".join(re.escape(name) for name in checkpoint.adapters)
    controller = patch(model, state["budget"], target_modules=names, modules_to_save=[], config=config, auto=auto)
    for name, layer in controller.adapters.items():  # as from_peft may have given them other ranks than patch
        layer.set_initial_rank(state["initial_ranks"][name], config.alpha, config.rank_stabilized)
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
        _check_adapter(name, size, checkpoint, module.reserve if adapted else checkpoint.config.reserve)
    there = model.state_dict()
    adapters = {f"{name}.{part}" for name in checkpoint.controller["ranks"] for part in ADAPTER_PARAMETERS}
    for name in checkpoint.trained:
        found = checkpoint.tensors.get(name)
        here = there.get(name if adapted else _before_patch(name, checkpoint))
        fits = here is not None and found is not None and here.shape == found.shape
        if not fits or name in adapters:
            shape = None if found is None else tuple(found.shape)
            raise ValueError(f"the checkpoint is of another model: it has a trained {name} of shape {shape}.")


def _before_patch(name: str, checkpoint: Checkpoint) -> str:
    owner, within, rest = name.partition(".base_layer.")
    return f"{owner}.{rest}" if within and owner in checkpoint.adapters else name


def _check_adapter(name: str, size: tuple[int, int], checkpoint: Checkpoint, reserve: int | None) -> None:
    ranks = [checkpoint.controller[part].get(name, 0) for part in ("ranks", "initial_ranks")]
    expected = {
        part: (ranks[0], *of) for part, of in zip(ADAPTER_PARAMETERS, ((size[0],), (), (size[1],)), strict=True)
    }
    found = {part: checkpoint.tensors.get(f"{name}.{part}") for part in ADAPTER_PARAMETERS}
    if min(ranks) < 1 or any(rows is None or tuple(rows.shape) != expected[part] for part, rows in found.items()):
        raise ValueError(f"the checkpoint is damaged: the tensors of {name} are not those of an adapter of its rank.")
    if ranks[0] > (reserve or min(size)):
        raise ValueError(f"{name} has rank {ranks[0]} in the checkpoint, and room for {reserve or min(size)} here.")


def _belongs(name: str, checkpoint: Checkpoint) -> bool:
    owner, _, part = name.rpartition(".")
    return name in checkpoint.trained or (owner in checkpoint.adapters and part in ADAPTER_PARAMETERS)
