"""Load a checkpoint of adapters and controller into a model."""

from __future__ import annotations

import os
import re

from torch import nn

from l1ra.allocation.costs import rows_to_reserve
from l1ra.files.checkpoint import Checkpoint, read
from l1ra.files.controller_state import check_state
from l1ra.layers.adapted_model import controller_of, find_adapters, name_before_patch
from l1ra.layers.base_layers import base_features
from l1ra.layers.low_rank import ADAPTER_PARAMETERS, REFERENCE
from l1ra.model.patch import patch, unpatch
from l1ra.processes.group import launched_processes
from l1ra.training.controller import RankController

__all__ = ["load"]


def load(model: nn.Module, folder: str | os.PathLike, *, auto: bool = True) -> RankController:
    """Load the adapters, the other trained tensors and the controller's state of a checkpoint into ``model``.

    A model without adapters is patched first. To resume a training, load the optimizer's state dict after this call:
    the tensors of the optimizer state have the shapes of the saved ranks.

    Example::

        controller = l1ra.load(model, "checkpoint")  # written by controller.save("checkpoint")
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    Args:
        model: the model as it was before ``l1ra.patch``; or a model patched with the same budget and settings; or one
            that was built with :class:`L1RALinear`.
        folder: the folder that was passed to ``controller.save``.
        auto: as in ``l1ra.patch``; not used if the model has a controller.

    Returns:
        The model's controller.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: the checkpoint is damaged, was written by a newer version of l1ra, or belongs to another model. The
            model is unchanged.
        RuntimeError: an adapter of the model is merged; or the saved config has ``strict`` and an adapter would run as
            plain PyTorch on this machine. The model is unchanged.
    """
    checkpoint = read(folder)
    adapted = next(find_adapters(model), None) is not None
    _check_not_merged(model)
    _check_adapters(model, checkpoint, adapted)
    _check_trained(model, checkpoint, adapted)
    existing, state = controller_of(model), checkpoint.controller
    controller = existing or _add_controller(model, checkpoint, adapted, auto)
    tensors_before = {n: value.clone() for n, value in model.state_dict().items() if _is_in_checkpoint(n, checkpoint)}
    state_before = controller.state_dict()
    try:
        check_state(
            state,
            controller.adapters,
            ranks=state["ranks"],
            budget=controller.budget,
            rule=controller.config.rule,
        )
        model.load_state_dict(checkpoint.tensors, strict=False)
        controller.load_state_dict(state)
    except BaseException:
        model.load_state_dict(tensors_before, strict=False)
        if not adapted:
            unpatch(model)
        elif existing is None:
            controller.close()
        else:
            controller.load_state_dict(state_before)
        raise
    parameters = dict(model.named_parameters())
    for name in (parameters.keys() & set(checkpoint.trained)) - set(checkpoint.frozen):
        parameters[name].requires_grad_(True)
    return controller


def _add_controller(model: nn.Module, checkpoint: Checkpoint, adapted: bool, auto: bool) -> RankController:
    """Create a controller with the settings of the checkpoint, and the adapters if the model has none."""
    state, config = checkpoint.controller, checkpoint.config
    if adapted:
        return RankController(model, state["budget"], config=config, auto=auto)
    if config.reserve is None and launched_processes() > 1:
        config = config.replace(reserve=rows_to_reserve(state["ranks"].values(), config))
    names = "|".join(re.escape(name) for name in checkpoint.adapters)
    controller = patch(model, state["budget"], target_modules=names, modules_to_save=[], config=config, auto=auto)
    for name, layer in controller.adapters.items():  # from_peft may have set other initial ranks than patch does
        layer.set_initial_rank(state["initial_ranks"][name], config.alpha, config.rank_stabilized)
    return controller


def _check_not_merged(model: nn.Module) -> None:
    for name, layer in find_adapters(model):
        if layer.merged:
            raise RuntimeError(f"{name} is merged: call l1ra.unmerge(model) before other adapters are loaded.")


def _check_adapters(model: nn.Module, checkpoint: Checkpoint, adapted: bool) -> None:
    """Check that the adapters of ``checkpoint`` fit the layers of ``model``."""
    modules = dict(model.named_modules())
    if adapted and list(checkpoint.adapters) != [name for name, _ in find_adapters(model)]:
        raise ValueError("the checkpoint has other adapters than the model: patch it with the same target_modules.")
    for name, size in checkpoint.adapters.items():
        module = modules.get(name)
        if module is None:
            found = None
        elif adapted:
            found = (module.in_features, module.out_features)
        else:
            found = base_features(module)
        if found is None or tuple(found) != size:
            description = "no layer that can be adapted" if found is None else f"{found[0]} -> {found[1]}"
            raise ValueError(
                f"the checkpoint is of another model: it has an adapter for a layer {size[0]} -> {size[1]} at {name}, "
                f"this model has {description} there."
            )
        _check_adapter(name, size, checkpoint, module.reserve if adapted else checkpoint.config.reserve)


def _check_adapter(name: str, size: tuple[int, int], checkpoint: Checkpoint, reserve: int | None) -> None:
    """Check that the tensors of one adapter have the shapes of its rank, and that the rank is possible here."""
    rank, initial_rank = (checkpoint.controller[part].get(name, 0) for part in ("ranks", "initial_ranks"))
    in_features, out_features = size
    expected = dict(zip(ADAPTER_PARAMETERS, ((rank, in_features), (rank,), (rank, out_features)), strict=True))
    found = {part: checkpoint.tensors.get(f"{name}.{part}") for part in ADAPTER_PARAMETERS}
    wrong = any(tensor is None or tuple(tensor.shape) != expected[part] for part, tensor in found.items())
    if min(rank, initial_rank) < 1 or wrong:
        raise ValueError(f"the checkpoint is damaged: the tensors of {name} are not those of an adapter of its rank.")
    if rank > (reserve or min(size)):
        raise ValueError(f"{name} has rank {rank} in the checkpoint, and room for {reserve or min(size)} here.")


def _check_trained(model: nn.Module, checkpoint: Checkpoint, adapted: bool) -> None:
    """Check that the other trained tensors of ``checkpoint`` have the shapes of those in ``model``."""
    state = model.state_dict()
    adapter_tensors = {f"{name}.{part}" for name in checkpoint.controller["ranks"] for part in ADAPTER_PARAMETERS}
    references = {f"{name}.{part}" for name in checkpoint.adapters for part in REFERENCE}
    for name in set(checkpoint.trained) - references:  # the adapters make room for a reference
        saved = checkpoint.tensors.get(name)
        own = state.get(name if adapted else name_before_patch(name, checkpoint.adapters))
        fits = own is not None and saved is not None and own.shape == saved.shape
        if not fits or name in adapter_tensors:
            shape = None if saved is None else tuple(saved.shape)
            raise ValueError(f"the checkpoint is of another model: it has a trained {name} of shape {shape}.")


def _is_in_checkpoint(name: str, checkpoint: Checkpoint) -> bool:
    """Whether the tensor ``name`` of the model's state dict is one that the checkpoint replaces."""
    layer, _, part = name.rpartition(".")
    return name in checkpoint.trained or (layer in checkpoint.adapters and part in ADAPTER_PARAMETERS)
