"""Select the layers to adapt (``target_modules``) and the modules to train in full (``modules_to_save``)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import nn

from l1ra.layers.adapted_model import abbreviated, optional_submodule, task_head
from l1ra.layers.base_layers import TENSOR_PARALLEL, base_features, element_count, is_tensor_parallel
from l1ra.model.drawn_anew import drawn_anew, new_modules

__all__ = ["name_matches", "saved_modules", "select_targets", "tensor_parallel_warning", "unadapted_warning"]


def name_matches(name: str, pattern: str) -> bool:
    """Whether a module's name is ``pattern`` or ends with ``pattern`` as its last components."""
    return name == pattern or name.endswith("." + pattern)


def saved_modules(
    model: nn.Module, modules_to_save: Sequence[str] | None, target_modules: str | Sequence[str] = "all-linear"
) -> dict[str, nn.Module]:
    """The modules to train in full, by name.

    Args:
        modules_to_save: module names or their last components. None: the head of a transformers model for
            classification or question answering, and the modules that its checkpoint does not have.
        target_modules: as in :func:`select_targets`. Layers that it names are not trained in full because the
            checkpoint does not have them.

    Raises:
        TypeError: ``modules_to_save`` is no list of strings.
        ValueError: no module has one of the names.
    """
    if isinstance(modules_to_save, str):
        raise TypeError(f"modules_to_save must be a list of names: write [{modules_to_save!r}].")
    if modules_to_save is not None and not _is_list_of_names(modules_to_save):
        raise TypeError(f"modules_to_save must be a list of names, not {modules_to_save!r}.")
    if modules_to_save is None:
        return _new_modules(model, target_modules)
    modules = dict(model.named_modules())
    found = {}
    for pattern in modules_to_save:
        matches = {name: module for name, module in modules.items() if name and name_matches(name, pattern)}
        if not matches:
            raise ValueError(f"modules_to_save: no module is named {pattern!r}.{_suggestion(pattern, modules)}")
        found.update(matches)
    return found


def _new_modules(model: nn.Module, target_modules: str | Sequence[str]) -> dict[str, nn.Module]:
    new = new_modules(model, drawn_anew(model))
    if target_modules != "all-linear":
        modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
        named = {id(layer) for layer in _matching_layers(model, modules, target_modules).values()}
        new = {n: module for n, module in new.items() if not any(id(inner) in named for inner in module.modules())}
    found = task_head(model) | new
    return {name: found[name] for name in found if not any(name.startswith(f"{outer}.") for outer in found)}


def select_targets(
    model: nn.Module, target_modules: str | Sequence[str], saved: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """The layers to adapt, by name, in the order of ``named_modules()``.

    A layer that several parents share is selected if any of its names matches. It is listed once, under its first name.

    Args:
        target_modules: ``"all-linear"``: every linear layer, also quantised ones, except the output head, layers that
            share their weight with another module, and those under tensor parallelism. Any other string: a regular
            expression that matches the whole module name. A list: module names or their last components.
        saved: the modules to train in full. Layers inside of them are not adapted.

    Raises:
        TypeError: ``target_modules`` is neither a string nor a list of strings.
        ValueError: no layer matches, or a matching layer can't be adapted.
    """
    if base_features(model) is not None:
        raise ValueError(
            "the model is itself a linear layer, which can't be replaced in place: use L1RALinear.from_linear(model, "
            "rank=...), or patch a module that contains it."
        )
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    inside_saved = {id(inner) for module in saved.values() for inner in module.modules()}
    if target_modules == "all-linear":
        linear = _all_linear(model, saved)
        chosen = {name: module for name, module in linear.items() if not is_tensor_parallel(module)}
        if linear and not chosen:
            raise ValueError(f'target_modules="all-linear": {_not_whole(linear)}')
        if not chosen:
            raise ValueError('target_modules="all-linear": the model has no linear layer besides its head.')
    else:
        chosen = _matching_layers(model, modules, target_modules)
        if parallel := [name for name, module in chosen.items() if is_tensor_parallel(module)]:
            raise ValueError(f"target_modules: {_not_whole(parallel)}")
        if clash := [name for name, module in chosen.items() if id(module) in inside_saved]:
            raise ValueError(f"{', '.join(clash)}: named in both target_modules and modules_to_save; choose one.")
        _check_not_tied(chosen, _tied_layers(model))
    ids = {id(module) for module in chosen.values()}
    chosen = {name: module for name, module in model.named_modules() if id(module) in ids}
    _check_fast_path(model, chosen)
    return chosen


def tensor_parallel_warning(model: nn.Module, saved: dict[str, nn.Module]) -> str:
    """A warning about layers that ``"all-linear"`` leaves out because of tensor parallelism.

    Args:
        saved: the modules that are trained in full. Their layers are not named.

    Returns:
        "" if the model has no such layers.
    """
    parallel = [name for name, module in _all_linear(model, saved).items() if is_tensor_parallel(module)]
    return _not_whole(parallel) if parallel else ""


def _not_whole(names: Collection[str]) -> str:
    return (
        f"{abbreviated(names)} can't be adapted: {TENSOR_PARALLEL}. Train without it, for example with "
        "DistributedDataParallel, or leave the layers that are to be adapted out of the plan."
    )


def unadapted_warning(model: nn.Module, saved: dict[str, nn.Module]) -> str:
    """A warning about weights that ``"all-linear"`` can't adapt because they have more than two dimensions.

    transformers 5 stores the experts of a mixture of experts in this way: as three-dimensional Parameters that are used
    without an ``nn.Linear``. They may be most of a model's parameters.

    Args:
        saved: the modules that are trained in full. Their weights are not counted.

    Returns:
        "" if the model has no such weights.
    """
    trained = {id(inner) for module in saved.values() for inner in module.modules()}
    stacked = {
        name: [key for key, weight in module._parameters.items() if weight is not None and _is_stacked(weight)]
        for name, module in model.named_modules()
        # Modules of torch itself are left out: the weight of a convolution has more than two dimensions too.
        if id(module) not in trained
        and all(cls is nn.Module or not cls.__module__.startswith("torch.") for cls in type(module).__mro__)
    }
    names = [f"{name}.{key}" if name else key for name, keys in stacked.items() for key in keys]
    if not names:
        return ""
    share = sum(element_count(model.get_parameter(n)) for n in names) / sum(map(element_count, model.parameters()))
    return (
        f"{', '.join(names[:2])}{f' and {len(names) - 2} more' if len(names) > 2 else ''}: {share:.0%} of the model's "
        "parameters are not adapted. Weights of more than two dimensions, such as stacked experts, can't be"
        f"{_modules_to_save_hint(name for name, keys in stacked.items() if keys)}. Name the layers in target_modules "
        "if this is what you want."
    )


def _is_stacked(weight: nn.Parameter) -> bool:
    return weight.dim() > 2 and min(weight.shape) > 1


def _all_linear(model: nn.Module, saved: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The linear layers under all their names, without the head, tied layers and those in ``saved``."""
    head = optional_submodule(model, "get_output_embeddings")
    excluded = {id(head), *_tied_layers(model)} | {id(inner) for module in saved.values() for inner in module.modules()}
    return {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and base_features(module) is not None and id(module) not in excluded
    }


def _tied_layers(model: nn.Module) -> dict[int, str]:
    """The modules that share their weight with another one: ``id`` of the module -> name of the other module."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append((name, module))
    return {
        id(module): next(name for name, other in sharers if other is not module)
        for sharers in owners.values()
        if len(sharers) > 1
        for _, module in sharers
    }


def _check_not_tied(chosen: dict[str, nn.Module], tied: dict[int, str]) -> None:
    for name, module in chosen.items():
        if id(module) in tied:
            raise ValueError(
                f"{name} shares its weight with {tied[id(module)]}, so an adapter on it could neither be merged nor "
                "saved by transformers. Untie it first (layer.weight = nn.Parameter(layer.weight.detach().clone()); "
                "model.config.tie_word_embeddings = False if it is a head), or train the weight in full: "
                f"modules_to_save=[{tied[id(module)]!r}]."
            )


def _matching_layers(
    model: nn.Module, modules: dict[str, nn.Module], target_modules: str | Sequence[str]
) -> dict[str, nn.Module]:
    if isinstance(target_modules, str):
        chosen = _matching_expression(model, modules, target_modules)
    else:
        chosen = _matching_names(model, modules, target_modules)
    unfit = {name: module for name, module in chosen.items() if base_features(module) is None}
    if unfit:
        described = [f"{name} ({type(module).__name__})" for name, module in unfit.items()]
        more = " ..." if len(described) > 8 else ""
        with_parameters = [
            name for name, module in unfit.items() if any(True for _ in module.parameters(recurse=False))
        ]
        raise ValueError(
            f"target_modules names layers that can't be adapted: {', '.join(described[:8])}{more}. Only nn.Linear, "
            f"transformers' Conv1D and quantised linear layers can{_modules_to_save_hint(with_parameters)}."
        )
    return chosen


def _matching_expression(model: nn.Module, modules: dict[str, nn.Module], expression: str) -> dict[str, nn.Module]:
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise ValueError(f"target_modules={expression!r} is no regular expression: {error}.") from None
    chosen = {name: module for name, module in modules.items() if pattern.fullmatch(name)}
    if not chosen:
        _check_no_parameter(model, lambda name: pattern.fullmatch(name) is not None)
        raise ValueError(
            f"target_modules={expression!r} fits no module as a regular expression for the whole name; for a "
            f"suffix write [{expression!r}].{_suggestion(expression, modules)}"
        )
    return chosen


def _matching_names(model: nn.Module, modules: dict[str, nn.Module], names: Sequence[str]) -> dict[str, nn.Module]:
    if not _is_list_of_names(names) or not names:
        raise TypeError(f"target_modules must be 'all-linear', a regular expression or a list of names, not {names!r}.")
    for name in names:
        if not any(name_matches(module, name) for module in modules):
            _check_no_parameter(model, lambda parameter, name=name: name_matches(parameter, name))
            raise ValueError(f"target_modules: no module is named {name!r}.{_suggestion(name, modules)}")
    return {key: module for key, module in modules.items() if any(name_matches(key, name) for name in names)}


def _check_no_parameter(model: nn.Module, matches: Callable[[str], bool]) -> None:
    """Raise a ValueError if ``matches`` is true for the name of a parameter, such as stacked experts."""
    for name, weight in model.named_parameters():
        owner = name.rpartition(".")[0]
        kind = type(model.get_submodule(owner)).__name__
        if matches(name) and base_features(model.get_submodule(owner)) is None:
            raise ValueError(
                f"target_modules: {name} is no layer but a parameter of a {kind}, of shape {tuple(weight.shape)}. Only "
                f"linear layers can be adapted{_modules_to_save_hint([owner])}."
            )


def _modules_to_save_hint(modules: Iterable[str]) -> str:
    names = list(dict.fromkeys(name.rpartition(".")[2] for name in modules if name))
    return f"; modules_to_save={names[:8]!r} trains them in full" if names else ""


def _is_list_of_names(value: object) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(isinstance(name, str) for name in value)


def _suggestion(wanted: str, modules: dict[str, nn.Module]) -> str:
    """The names of the linear layers, those similar to ``wanted`` first, for an error message."""
    suffixes = sorted({name.rsplit(".", 1)[-1] for name, m in modules.items() if base_features(m) is not None})
    close = difflib.get_close_matches(wanted.rsplit(".", 1)[-1], suffixes, 3, 0.5)
    meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"{meant} The linear layers are named: {', '.join(suffixes) or '(none)'}."


def _check_fast_path(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """Raise a ValueError if the inference fast path of an ``nn.TransformerEncoderLayer`` would skip an adapter."""
    if not torch.backends.mha.get_fastpath_enabled():
        return
    ids = {id(module) for module in chosen.values()}
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(id(m) in ids for m in module.modules()):
            raise ValueError(
                f"{name} is an nn.TransformerEncoderLayer, whose inference fast path reads its weights directly and "
                "would skip the adapters: call torch.backends.mha.set_fastpath_enabled(False) first."
            )
