"""Queries of a model with adapters: its adapters, its controller, and the other tensors that training changes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from l1ra.layers.base_layers import base_features, is_partitioned
from l1ra.layers.gathered import adapter_parameters, gathered
from l1ra.layers.linear import L1RALinear
from l1ra.layers.low_rank import ADAPTER_PARAMETERS
from l1ra.layers.sharding import first_writes, is_sharded
from l1ra.layers.zero import whole_parameters

__all__ = [
    "CONTROLLER",
    "DRAWN_ANEW",
    "FSDP_PREFIX",
    "MERGED_FOR_GOOD",
    "abbreviated",
    "adapters_disabled",
    "carried_tensors",
    "check_whole",
    "controller_of",
    "find_adapters",
    "frozen_and_drawn_anew",
    "has_sharded_adapters",
    "has_unreadable_adapters",
    "name_before_patch",
    "optional_submodule",
    "running_statistics",
    "task_head",
    "trained_modules",
    "trained_tensors",
    "whole_for_saving",
]

CONTROLLER = "_l1ra_controller"  # the attribute of a model that holds its controller
MERGED_FOR_GOOD = "_l1ra_merged_for_good"  # set on a model whose adapters were merged and removed
# The attribute of a module with the names of its own parameters that are not those of the pretrained checkpoint.
DRAWN_ANEW = "_l1ra_drawn_anew"
FSDP_PREFIX = "_fsdp_wrapped_module."  # within the names of modules that FSDP 1 has wrapped
# Task heads of transformers, which are newly initialised when a pretrained model is loaded, and the models with one.
HEADS = ("score", "classifier", "pre_classifier", "classification_head", "qa_outputs")
TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
TASKS += ("ForImageClassification", "ForVideoClassification", "ForAudioClassification", "ForAudioFrameClassification")


def find_adapters(model: nn.Module) -> Iterator[tuple[str, L1RALinear]]:
    """Yield the name, as in ``named_modules()``, and the module of every :class:`L1RALinear` in ``model``."""
    for name, module in model.named_modules():
        if isinstance(module, L1RALinear):
            yield name, module


def check_whole(adapters: Mapping[str, L1RALinear]) -> None:
    """Check that the parameters of ``adapters``, by name, have their own shapes.

    Raises:
        RuntimeError: FSDP 1 stores them as parts of flat tensors.
    """
    flat = next((name for name, layer in adapters.items() if layer.is_flat), None)
    if flat is not None:
        raise RuntimeError(
            f"FullyShardedDataParallel (FSDP 1) holds {flat} and other adapters as parts of flat tensors, of which "
            "this process has some: do this within FullyShardedDataParallel.summon_full_params(wrapped_model)."
        )


def has_sharded_adapters(model: nn.Module) -> bool:
    """Whether FSDP 2 has sharded an adapter of ``model``."""
    return any(is_sharded(param) for _, layer in find_adapters(model) for param in layer._parameters.values())


def has_unreadable_adapters(model: nn.Module) -> bool:
    """Whether an adapter of ``model`` lies elsewhere than in its parameters, which are flat (FSDP 1) or may be empty
    (ZeRO 3)."""
    return any(layer.is_flat or is_partitioned(layer.lora_A) for _, layer in find_adapters(model))


def controller_of(model: nn.Module) -> Any:
    """The ``RankController`` of ``model``, or None if it has none."""
    return getattr(model, CONTROLLER, None)


def name_before_patch(name: str, adapted: Collection[str]) -> str:
    """The name of a tensor of the base model before the layers ``adapted`` were adapted."""
    layer, inside, rest = name.partition(".base_layer.")
    return f"{layer}.{rest}" if inside and layer in adapted else name


def optional_submodule(model: nn.Module, getter: str) -> nn.Module | None:
    """The module that a method of a transformers model returns, e.g. ``get_input_embeddings``.

    Returns:
        None if the model has no such method or no such module.
    """
    try:
        part = getattr(model, getter)()
    except Exception:  # transformers models without the module raise errors of various types
        return None
    return part if isinstance(part, nn.Module) else None


def task_head(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of the head of a transformers model for classification or question answering.

    Empty for other models.
    """
    has_head = type(model).__name__.endswith(TASKS)
    return {name: module for name, module in model.named_children() if has_head and name in HEADS}


def trained_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module, for the modules other than adapters that own trainable parameters.

    A shared module is listed under each of its names.
    """
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, L1RALinear)
        and any(p is not None and p.requires_grad for p in module._parameters.values())
    }


def frozen_and_drawn_anew(model: nn.Module) -> dict[str, Tensor]:
    """Name in the state dict -> tensor, for the frozen parameters that are not those of the pretrained checkpoint.

    Nobody who loads the checkpoint again gets them. They are those that ``l1ra.patch`` has found; see
    ``model.drawn_anew``. A shared parameter is listed under the first of its names.
    """
    marked = {
        id(module._parameters[key])
        for module in model.modules()
        for key in module.__dict__.get(DRAWN_ANEW, ())
        if module._parameters.get(key) is not None
    }
    return {_plain(n): p.detach() for n, p in model.named_parameters() if id(p) in marked and not p.requires_grad}


def _plain(name: str) -> str:
    """The name in the state dict of a tensor whose name in ``named_parameters()`` this is."""
    return name.replace(FSDP_PREFIX, "")


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Name in the state dict -> buffer, for the moving statistics of batch normalisation, which change in training also
    where their module is frozen."""
    return {
        f"{name}.{key}" if name else key: value
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase)
        for key, value in module._buffers.items()
        if value is not None
    }


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name in the state dict -> tensor, for the tensors outside of the adapters that the pretrained model does not
    have.

    These are the trainable parameters, including those of base layers, the persistent buffers, such as the running
    statistics of a normalisation, and :func:`frozen_and_drawn_anew`. A shared tensor is listed under the first of its
    names.
    """
    adapters = {f"{name}.{part}" for name, _ in find_adapters(model) for part in ADAPTER_PARAMETERS}
    found = {_plain(n): p.detach() for n, p in model.named_parameters() if p.requires_grad and n not in adapters}
    found |= frozen_and_drawn_anew(model)
    for name, module in model.named_modules():
        # The buffers of a linear layer hold its quantised weight, which training does not change.
        if base_features(module) is None:
            for key, value in module._buffers.items():
                if value is not None and key not in module._non_persistent_buffers_set:
                    found[_plain(f"{name}.{key}" if name else key)] = value
    return found


def carried_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name in the state dict -> tensor, for all tensors that the pretrained model does not have.

    These are the parameters of the adapters, including reserved rows, and :func:`trained_tensors`.
    """
    adapters = {
        f"{name}.{p}": getattr(layer, p).detach() for name, layer in find_adapters(model) for p in ADAPTER_PARAMETERS
    }
    return {**adapters, **trained_tensors(model)}


@contextmanager
def whole_for_saving(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> Iterator[bool]:
    """Within the block the parameters that the pretrained model does not have are whole, also where they are sharded.

    Args:
        state_dict: of the whole model, plain tensors. Without it, all processes that hold parts must enter the block
            alike.

    Yields:
        Whether this process is to write: all do, but where parameters are sharded the first one.

    Raises:
        ValueError: ``state_dict`` lacks a sharded parameter.
        RuntimeError: the block has raised an error in the process that writes; raised in the others.
    """
    owners = adapter_parameters(layer for _, layer in find_adapters(model))
    owners += [
        (module, name)
        for module in model.modules()
        for name, param in module._parameters.items()
        if param is not None and (param.requires_grad or name in module.__dict__.get(DRAWN_ANEW, ()))
    ]
    parts = [part for head in task_head(model).values() for part in head.modules()]
    owners += [(module, name) for module in parts for name, param in module._parameters.items() if param is not None]
    if state_dict:
        values = {param: state_dict[name] for name, param in model.named_parameters() if name in state_dict}
        params = (module._parameters[name] for module, name in owners)
        if any(is_sharded(param) and param not in values for param in params):
            raise ValueError("state_dict lacks parameters that are trained: pass that of the whole patched model.")
        with gathered(owners, values=values):
            yield True
        return
    params = [module._parameters[name] for module, name in owners]
    with first_writes(params) as writes, gathered(owners), whole_parameters(params):
        yield writes


def abbreviated(names: Collection[str]) -> str:
    """``names`` as text for a message: of more than eight, the first eight and the number of the others."""
    first = ", ".join(list(names)[:8])
    return first if len(names) <= 8 else f"{first} and {len(names) - 8} more"


@contextmanager
def adapters_disabled(adapters: Mapping[str, L1RALinear]) -> Iterator[None]:
    """A context in which ``adapters``, by name, compute their base layers alone; see ``RankController.disabled``.

    Raises:
        RuntimeError: an adapter is merged.
    """
    merged = next((name for name, layer in adapters.items() if layer.merged), None)
    if merged is not None:
        raise RuntimeError(
            f"{merged} is merged into its weight: call l1ra.unmerge(model) before controller.disabled(), and "
            "l1ra.merge(model) after it."
        )
    before = [(layer, layer.disabled) for layer in adapters.values()]
    try:
        for layer in adapters.values():
            layer.disabled = True
        yield
    finally:
        for layer, disabled in before:
            layer.disabled = disabled
