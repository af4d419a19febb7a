"""Weights that are not those of the pretrained checkpoint: drawn anew when it was loaded, or resized since.

A fresh head is the usual case; others are the pooler of a classifier made from a language model, and embeddings with
new tokens. Who loads the checkpoint again gets other values. So they are trained in full, or saved as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from l1ra.layers.adapted_model import DRAWN_ANEW, abbreviated, optional_submodule
from l1ra.layers.base_layers import FLOATS, element_count

__all__ = ["drawn_anew", "forget", "mark", "new_modules", "outside_warning"]

LOADED = "_is_hf_initialized"  # transformers 5 sets it on each parameter that it has read from a checkpoint


def drawn_anew(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, for the parameters that the checkpoint of a transformers model does not have.

    Empty for models that were not loaded by ``from_pretrained`` of transformers 5, older versions of which do not tell.
    """
    found = {}
    for prefix, part in _pretrained_models(model):
        # Quantised weights are of other types and dtypes.
        plain = {n: p for n, p in part.named_parameters(prefix) if type(p) is nn.Parameter and p.dtype in FLOATS}
        unknown = {name: param for name, param in plain.items() if not getattr(param, LOADED, False)}
        # New heads and embeddings are outside of stacks. In them, something has replaced the parameters since.
        stacked = {id(p) for m in part.modules() if isinstance(m, nn.ModuleList) for p in m.parameters()}
        sizes = [sum(element_count(p) for p in params.values() if id(p) in stacked) for params in (unknown, plain)]
        if 2 * sizes[0] <= sizes[1]:
            found |= unknown
        ids = _resized_embeddings(part)
        found |= {name: param for name, param in plain.items() if id(param) in ids}
    return found


def new_modules(model: nn.Module, anew: Mapping[str, nn.Parameter]) -> dict[str, nn.Module]:
    """Name -> module, for the largest modules with no parameter outside of ``anew``: new heads, poolers, projections.

    Left out are embeddings that were resized, and parts of a stack of layers of which others come from the checkpoint:
    copied layers, or the cross-attention of an encoder-decoder model made of two pretrained ones.
    """
    ids = {id(param) for param in anew.values()}
    for _, part in _pretrained_models(model):
        ids -= _resized_embeddings(part)
    return dict(_covered(model, "", ids))


def mark(model: nn.Module, anew: Collection[Tensor]) -> None:
    """Remember which parameters are not those of the checkpoint, for ``adapted_model.frozen_and_drawn_anew``."""
    ids = {id(param) for param in anew}
    for module in model.modules():
        if keys := {key for key, param in module._parameters.items() if id(param) in ids}:
            module.__dict__[DRAWN_ANEW] = keys | module.__dict__.get(DRAWN_ANEW, set())


def forget(model: nn.Module) -> None:
    """Undo :func:`mark`."""
    for module in model.modules():
        module.__dict__.pop(DRAWN_ANEW, None)


def outside_warning(model: nn.Module, adapted: Collection[str], saved: Mapping[str, nn.Module]) -> str:
    """A warning about weights beside a pretrained transformers model, such as a head in a module of the user's own.

    Nothing tells whether they are new. If they are, they must be trained in full, and saved.

    Args:
        adapted: the layers to adapt.
        saved: the modules that are trained in full.

    Returns:
        "" if there are no such weights, or no pretrained model.
    """
    parts = [part for _, part in _pretrained_models(model)]
    known = {id(param) for part in (*parts, *saved.values()) for param in part.parameters()}
    beside = [name for name, p in model.named_parameters() if id(p) not in known and p.is_floating_point()]
    if not (parts and beside):
        return ""
    modules = sorted({name.rpartition(".")[0] for name in beside if "." in name})
    own = [name for name in beside if "." not in name]
    advice = []
    if modules:
        advice.append(f"pass modules_to_save={[*saved, *modules][:8]}, which trains and saves them in full")
    if own:
        advice.append(f"call model.{own[0]}.requires_grad_(True) after l1ra.patch, which has it trained and saved")
    state = "adapted" if set(modules) & set(adapted) else "frozen"
    return (
        f"{abbreviated([*own, *modules])} {'is' if len(own) + len(modules) == 1 else 'are'} outside of the pretrained "
        f"model, and {state}. If new: {'; '.join(advice)}. If not: modules_to_save=[]."
    )


def _pretrained_models(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of the outermost transformers models in ``model`` that were loaded from a checkpoint."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(outer == "" or name.startswith(f"{outer}.") for outer, _ in found)
        if (
            not inside
            and _is_transformers_model(module)
            and any(getattr(p, LOADED, False) for p in module.parameters())
        ):
            found.append((name, module))
    return found


def _is_transformers_model(module: nn.Module) -> bool:
    return any(
        (cls.__module__, cls.__name__) == ("transformers.modeling_utils", "PreTrainedModel")
        for cls in type(module).__mro__
    )


def _covered(module: nn.Module, name: str, ids: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules in ``module`` whose parameters are all in ``ids``."""
    params = list(module.parameters())
    if not any(id(param) in ids for param in params):
        return
    if name and all(id(param) in ids for param in params):
        yield name, module
        return
    if isinstance(module, nn.ModuleList):  # a stack, some of whose layers come from the checkpoint
        return
    for key, child in module.named_children():
        yield from _covered(child, f"{name}.{key}" if name else key, ids)


def _resized_embeddings(model: nn.Module) -> set[int]:
    """The ids of the parameters of the input and the output embeddings, if the vocabulary of a transformers model is
    not as large as that of the checkpoint from which it was loaded."""
    now = _vocabulary(model.config)
    try:
        before = _vocabulary(type(model.config).from_pretrained(model.name_or_path, local_files_only=True))
    except Exception:  # the checkpoint is not at hand any more
        return set()
    if None in (now, before) or now == before:
        return set()
    parts = [optional_submodule(model, f"get_{kind}_embeddings") for kind in ("input", "output")]
    return {id(param) for part in parts if part is not None for param in part.parameters()}


def _vocabulary(config: Any) -> int | None:
    try:
        return getattr(config.get_text_config(), "vocab_size", None)
    except (AttributeError, ValueError):  # it has several texts
        return None
