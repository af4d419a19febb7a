"""Which layers of a model to adapt: PEFT's ways of naming them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from l1ra.layers.adapted_model import task_head
from l1ra.layers.base_layers import base_features

__all__ = ["describe_unadapted", "optional_submodule", "saved_modules", "select_targets"]


def name_matches(name: str, pattern: str) -> bool:
    """Whether a module's name is ``pattern`` or ends with it as whole components."""
    return name == pattern or name.endswith("." + pattern)


def optional_submodule(model: nn.Module, getter: str) -> nn.Module | None:
    """What a method such as ``get_input_embeddings`` of a transformers model returns; None if there is no such part."""
    try:
        part = getattr(model, getter)()
    except Exception:  # models without the part say so in many ways, and it is optional
        return None
    return part if isinstance(part, nn.Module) else None


def saved_modules(model: nn.Module, modules_to_save: Sequence[str] | None) -> dict[str, nn.Module]:
    """The modules that are trained in full, by name.

    None stands for the task head of a transformers model for classification or question answering, else nothing.

    Raises:
        TypeError: a single string.
        ValueError: a name that no module has.
    """
    if isinstance(modules_to_save, str):
        raise TypeError(f"modules_to_save must be a list of names: write [{modules_to_save!r}].")
    if modules_to_save is not None and not _is_names(modules_to_save):
        raise TypeError(f"modules_to_save must be a list of names, not {modules_to_save!r}.")
    if modules_to_save is None:
        return task_head(model)
    modules = dict(model.named_modules())
    found = {}
    for pattern in modules_to_save:
        matches = {name: module for name, module in modules.items() if name and name_matches(name, pattern)}
        if not matches:
            raise ValueError(f"modules_to_save: no module is named {pattern!r}.{_suggest(pattern, modules)}")
        found.update(matches)
    return found


def select_targets(
    model: nn.Module, target_modules: str | Sequence[str], saved: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """The layers to adapt, by name, in the order of ``named_modules()``.

    Args:
        target_modules: ``"all-linear"``: every linear layer, quantised ones too, but the output head and what shares
            its weight with another module; any other string: a regular expression for the whole name; a list: names,
            or their last components.
        saved: modules trained in full; nothing inside them is adapted.

    Raises:
        TypeError: neither a string nor a list of strings.
        ValueError: nothing fits, or a layer that is named can't be adapted.
    """
    if base_features(model) is not None:
        raise ValueError(
            "the model is itself a linear layer, which can't be replaced in place: use L1RALinear.from_linear(model, "
            "rank=...), or patch a module that contains it."
        )
    # A layer that is shared between parents answers to all its names, and is listed once, by the first.
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    blocked = {id(inner) for module in saved.values() for inner in module.modules()}
    tied = _tied(model)
    if target_modules == "all-linear":
        head = optional_submodule(model, "get_output_embeddings")
        out = {id(head), *blocked, *tied}
        chosen = {
            name: module
            for name, module in modules.items()
            if base_features(module) is not None and id(module) not in out
        }
        if not chosen:
            raise ValueError('target_modules="all-linear": the model has no linear layer besides its head.')
    else:
        chosen = _named(model, modules, target_modules)
        if clash := [name for name, module in chosen.items() if id(module) in blocked]:
            raise ValueError(f"{', '.join(clash)}: named in both target_modules and modules_to_save; choose one.")
        _refuse_tied(chosen, tied)
    ids = {id(module) for module in chosen.values()}
    chosen = {name: module for name, module in model.named_modules() if id(module) in ids}
    _refuse_fast_path(model, chosen)
    return chosen


def describe_unadapted(model: nn.Module, saved: dict[str, nn.Module]) -> str:
    """What ``"all-linear"`` leaves frozen though it may be most of a model, in words; "" if there is nothing.

    transformers 5 stores the experts of a mixture so: as Parameters of three dimensions, used without a layer.
    """
    trained = {id(inner) for module in saved.values() for inner in module.modules()}
    owners = {
        name: [key for key, weight in module._parameters.items() if weight is not None and _is_stacked(weight)]
        for name, module in model.named_modules()
        # A convolution's weights have three dimensions too, and are its own.
        if id(module) not in trained
        and all(cls is nn.Module or not cls.__module__.startswith("torch.") for cls in type(module).__mro__)
    }
    names = [f"{name}.{key}" if name else key for name, keys in owners.items() for key in keys]
    if not names:
        return ""
    share = sum(model.get_parameter(name).numel() for name in names) / sum(p.numel() for p in model.parameters())
    return (
        f"{', '.join(names[:2])}{f' and {len(names) - 2} more' if len(names) > 2 else ''}: {share:.0%} of the model's "
        "parameters are not adapted. Weights of more than two dimensions, such as stacked experts, can't be"
        f"{_in_full(name for name, keys in owners.items() if keys)}. Name the layers in target_modules if this is what "
        "you want."
    )


def _is_stacked(weight: nn.Parameter) -> bool:
    return weight.dim() > 2 and min(weight.shape) > 1


def _tied(model: nn.Module) -> dict[int, str]:
    """For each layer whose weight is also another module's: its id -> the name of the other."""
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


def _refuse_tied(chosen: dict[str, nn.Module], tied: dict[int, str]) -> None:
    for name, module in chosen.items():
        if id(module) in tied:
            raise ValueError(
                f"{name} shares its weight with {tied[id(module)]}, so an adapter on it could neither be merged nor "
                "saved by transformers. Untie it first (layer.weight = nn.Parameter(layer.weight.detach().clone()); "
                "model.config.tie_word_embeddings = False if it is a head), or train the weight in full: "
                f"modules_to_save=[{tied[id(module)]!r}]."
            )


def _named(
    model: nn.Module, modules: dict[str, nn.Module], target_modules: str | Sequence[str]
) -> dict[str, nn.Module]:
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"target_modules={target_modules!r} is no regular expression: {error}.") from None
        chosen = {name: module for name, module in modules.items() if pattern.fullmatch(name)}
        if not chosen:
            _refuse_parameter(model, lambda name: pattern.fullmatch(name) is not None)
            raise ValueError(
                f"target_modules={target_modules!r} fits no module as a regular expression for the whole name; for a "
                f"suffix write [{target_modules!r}].{_suggest(target_modules, modules)}"
            )
    else:
        if not _is_names(target_modules) or not target_modules:
            raise TypeError(
                f"target_modules must be 'all-linear', a regular expression or a list of names, not {target_modules!r}."
            )
        names = list(target_modules)
        lost = [name for name in names if not any(name_matches(module, name) for module in modules)]
        if lost:
            _refuse_parameter(model, lambda name: name_matches(name, lost[0]))
            raise ValueError(f"target_modules: no module is named {lost[0]!r}.{_suggest(lost[0], modules)}")
        chosen = {key: module for key, module in modules.items() if any(name_matches(key, name) for name in names)}
    unfit = {name: module for name, module in chosen.items() if base_features(module) is None}
    if unfit:
        told = [f"{name} ({type(module).__name__})" for name, module in unfit.items()]
        more = " ..." if len(told) > 8 else ""
        own = [name for name, module in unfit.items() if any(True for _ in module.parameters(recurse=False))]
        raise ValueError(
            f"target_modules names layers that can't be adapted: {', '.join(told[:8])}{more}. Only nn.Linear, "
            f"transformers' Conv1D and quantised linear layers can{_in_full(own)}."
        )
    return chosen


def _refuse_parameter(model: nn.Module, named: Callable[[str], bool]) -> None:
    """Say so if what was meant for a layer is a parameter, such as stacked experts."""
    for name, weight in model.named_parameters():
        owner = name.rpartition(".")[0]
        kind = type(model.get_submodule(owner)).__name__
        if named(name) and base_features(model.get_submodule(owner)) is None:
            raise ValueError(
                f"target_modules: {name} is no layer but a parameter of a {kind}, of shape {tuple(weight.shape)}. Only "
                f"linear layers can be adapted{_in_full([owner])}."
            )


def _in_full(modules: Iterable[str]) -> str:
    names = list(dict.fromkeys(name.rpartition(".")[2] for name in modules if name))
    return f"; modules_to_save={names[:8]!r} trains them in full" if names else ""


def _is_names(value: object) -> bool:
    return isinstance(value, list | tuple | set | frozenset) and all(isinstance(name, str) for name in value)


def _suggest(wanted: str, modules: dict[str, nn.Module]) -> str:
    suffixes = sorted({name.rsplit(".", 1)[-1] for name, m in modules.items() if base_features(m) is not None})
    close = difflib.get_close_matches(wanted.rsplit(".", 1)[-1], suffixes, 3, 0.5)
    meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"{meant} The linear layers are named: {', '.join(suffixes) or '(none)'}."


def _refuse_fast_path(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    if not torch.backends.mha.get_fastpath_enabled():
        return
    ids = {id(module) for module in chosen.values()}
    for name, module in model.named_modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(id(m) in ids for m in module.modules()):
            raise ValueError(
                f"{name} is an nn.TransformerEncoderLayer, whose inference fast path reads its weights directly and "
                "would skip the adapters: call torch.backends.mha.set_fastpath_enabled(False) first."
            )
