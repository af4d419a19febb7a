"""Which layers of a model to adapt: PEFT's ways of naming them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import torch
from torch import nn

from l1ra.base_layers import base_features

__all__ = ["part_of", "saved_modules", "select_targets"]

# Fresh heads of transformers' task models, and the tasks that have them.
HEADS = ("score", "classifier", "classification_head", "qa_outputs")
TASKS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")
TASKS += ("ForImageClassification", "ForVideoClassification", "ForAudioClassification", "ForAudioFrameClassification")


def fits(name: str, pattern: str) -> bool:
    """Whether a module's name is ``pattern`` or ends with it as whole components."""
    return name == pattern or name.endswith("." + pattern)


def part_of(model: nn.Module, getter: str) -> nn.Module | None:
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
        has_head = type(model).__name__.endswith(TASKS)
        return {name: m for name, m in model.named_children() if has_head and name in HEADS}
    modules = dict(model.named_modules())
    found = {}
    for pattern in modules_to_save:
        matches = {name: module for name, module in modules.items() if name and fits(name, pattern)}
        if not matches:
            raise ValueError(f"modules_to_save: no module is named {pattern!r}.{_suggest(pattern, modules)}")
        found.update(matches)
    return found


def select_targets(
    model: nn.Module, target_modules: str | Sequence[str], saved: dict[str, nn.Module]
) -> dict[str, nn.Module]:
    """The layers to adapt, by name, in the order of ``named_modules()``.

    Args:
        target_modules: ``"all-linear"``: every Linear and Conv1D but the output head; any other string: a regular
            expression for the whole name; a list: names, or their last components.
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
    if target_modules == "all-linear":
        head = part_of(model, "get_output_embeddings")
        chosen = {
            name: module
            for name, module in modules.items()
            if base_features(module) is not None and module is not head and id(module) not in blocked
        }
        if not chosen:
            raise ValueError('target_modules="all-linear": the model has no nn.Linear or Conv1D besides its head.')
    else:
        chosen = _named(modules, target_modules)
        if clash := [name for name, module in chosen.items() if id(module) in blocked]:
            raise ValueError(f"{', '.join(clash)}: named in both target_modules and modules_to_save; choose one.")
    ids = {id(module) for module in chosen.values()}
    chosen = {name: module for name, module in model.named_modules() if id(module) in ids}
    _refuse_fast_path(model, chosen)
    return chosen


def _named(modules: dict[str, nn.Module], target_modules: str | Sequence[str]) -> dict[str, nn.Module]:
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"target_modules={target_modules!r} is no regular expression: {error}.") from None
        chosen = {name: module for name, module in modules.items() if pattern.fullmatch(name)}
        if not chosen:
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
        lost = [name for name in names if not any(fits(module, name) for module in modules)]
        if lost:
            raise ValueError(f"target_modules: no module is named {lost[0]!r}.{_suggest(lost[0], modules)}")
        chosen = {key: module for key, module in modules.items() if any(fits(key, name) for name in names)}
    unfit = [f"{name} ({type(module).__name__})" for name, module in chosen.items() if base_features(module) is None]
    if unfit:
        raise ValueError(
            f"target_modules names layers that can't be adapted: {', '.join(unfit[:8])}"
            f"{' ...' if len(unfit) > 8 else ''}. Only nn.Linear and transformers' Conv1D can."
        )
    return chosen


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
