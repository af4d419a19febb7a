"""Averages of a model's weights (EMA, SWA): their rows move with the ranks of the model.

A row of an average is the average of one rank over the steps. Without the same move it would be continued with the
values of another rank, whose row it has become.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim.swa_utils import AveragedModel

from l1ra.allocation.plan import Plan
from l1ra.layers.adapted_model import find_adapters
from l1ra.layers.gathered import adapter_parameters, gathered
from l1ra.layers.linear import L1RALinear
from l1ra.layers.low_rank import ADAPTER_PARAMETERS
from l1ra.layers.row_moves import RowMoves
from l1ra.layers.tensor_lists import divide_all_, multiply_all_
from l1ra.training.row_rotation import RowRotation, rotate_rows

__all__ = ["Averages"]

SHADOWS = "shadow_params"  # the list of averages in diffusers' EMAModel and in torch_ema


class _Part(NamedTuple):
    """What an average has of one adapter. A part that is not averaged is None."""

    a: Tensor | None
    gate: Tensor | None
    b: Tensor | None
    layer: L1RALinear | None

    def fits(self, own: L1RALinear) -> bool:
        """Whether it has the rank and the shapes of the model's adapter."""
        params = (getattr(own, name) for name in ADAPTER_PARAMETERS)
        same = all(tensor is None or tensor.shape == p.shape for tensor, p in zip(self[:3], params, strict=True))
        return same and (self.layer is None or self.layer.rank == own.rank)


def _part(owner: nn.Module) -> _Part:
    """Of an adapter, or of what :func:`_holder` has returned."""
    tensors = (owner._parameters[name] for name in ADAPTER_PARAMETERS)
    if isinstance(owner, L1RALinear):
        return _Part(*(tensor.detach() for tensor in tensors), owner)
    return _Part(*tensors, None)


def _holder(part: _Part) -> nn.Module:
    """A module whose parameters are the averages."""
    holder = nn.Module()
    holder._parameters.update(zip(ADAPTER_PARAMETERS, part[:3], strict=True))
    return holder


class _Followed(NamedTuple):
    average: Any
    parameters: list[nn.Parameter] | None


class Averages:
    """The averages of one model."""

    def __init__(self, model: nn.Module, adapters: Mapping[str, L1RALinear]) -> None:
        self._model = model
        self._adapters = adapters
        # An average that its user has replaced is gone. Lists and dicts can't be referred to weakly.
        self._followed: list[tuple[Callable[[], Any], list[nn.Parameter] | None]] = []
        self._gathered: list[list[nn.Module]] | None = None

    def follow(self, average: Any, parameters: Iterable[nn.Parameter] | None = None) -> None:
        """See ``RankController.follow``."""
        parameters = None if parameters is None else list(parameters)
        self._parts(_Followed(average, parameters))
        try:
            reference = weakref.ref(average)
        except TypeError:
            reference = partial(lambda kept: kept, average)
        if all(known.average is not average for known in self._alive()):
            self._followed.append((reference, parameters))

    def _alive(self) -> list[_Followed]:
        found = [_Followed(reference(), parameters) for reference, parameters in self._followed]
        return [followed for followed in found if followed.average is not None]

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within the block averages that are sharded, as those of sharded parameters, are plain tensors.

        What was changed is written back at the end. All processes must enter it alike, while the parameters themselves
        are sharded still.
        """
        found = list(self._all())
        owners = [[_holder(part) if part.layer is None else part.layer for part in parts] for parts in found]
        with gathered(adapter_parameters(owner for some in owners for owner in some), ()):
            self._gathered = owners
            try:
                yield
            finally:
                self._gathered = None

    def plan_move(self, moves: RowMoves, plan: Plan, new_rows: Sequence[Tensor | None]) -> None:
        """Add the moves of all averages to ``moves``, by a plan that the model's adapters will follow.

        Args:
            new_rows: A of the new ranks of each adapter.
        """
        up: list[tuple[Tensor, float]] = []
        down: list[tuple[Tensor, float]] = []
        for parts in self._all():
            for part, own, change, rows in zip(parts, self._adapters.values(), plan.layers, new_rows, strict=True):
                if part.layer is not None:
                    part.layer.plan_resize(moves, change, rows)
                elif change.grow or len(change.keep) != own.rank:
                    new, sources = slice(len(change.keep), change.rank), own.row_sources(change)
                    if part.a is not None:
                        moves.add_parameter(part.a, sources, new, rows if change.grow else None)
                    if part.gate is not None:
                        moves.add_parameter(part.gate, sources, new, own.rank_scaling)
                        up.append((part.gate, own.gate_factor(change.rank)))
                    if part.b is not None:
                        moves.add_parameter(part.b, sources)
                        down.append((part.b, own.gate_factor(change.rank)))
        for pairs, change_all_ in ((up, multiply_all_), (down, divide_all_)):
            pairs = [pair for pair in pairs if pair[1] != 1]
            if pairs:
                moves.afterwards(partial(change_all_, *zip(*pairs, strict=True)))

    def rotate(self, rows: Sequence[Sequence[int]], rotations: Sequence[Tensor | None]) -> None:
        """Rotate these rows of each adapter's averages as the rows themselves were rotated."""
        rotate_rows(
            [
                RowRotation(tensor, chosen, rotation)
                for parts in self._all()
                for part, chosen, rotation in zip(parts, rows, rotations, strict=True)
                for tensor in (part.a, part.b)
                if rotation is not None and tensor is not None
            ]
        )

    def not_followed(self) -> Any | None:
        """An average of diffusers that fits the model and is not followed; None if there is none."""
        module = sys.modules.get("diffusers.training_utils")
        if module is None:
            return None
        known = {id(followed.average) for followed in self._alive()}
        for found in gc.get_objects():
            if type(found) is module.EMAModel and id(found) not in known:
                try:
                    self._parts(_Followed(found, None))
                except (TypeError, ValueError):
                    continue
                return found
        return None

    def _all(self) -> Iterator[list[_Part]]:
        if self._gathered is not None:
            yield from ([_part(owner) for owner in some] for some in self._gathered)
            return
        alive = self._alive()
        yield from map(self._parts, alive)
        known = {id(followed.average) for followed in alive}
        mine = next(iter(self._adapters.values())).family
        for average in list(_averaged_models):
            if id(average) not in known and any(layer.family == mine for _, layer in find_adapters(average)):
                yield self._parts(_Followed(average, None))

    def _parts(self, followed: _Followed) -> list[_Part]:
        """What the average has of each adapter.

        Raises:
            TypeError: it is no average that can be followed.
            ValueError: it does not fit the model.
        """
        average, parameters = followed
        if isinstance(average, nn.Module):
            parts = self._of_module(average)
        else:
            parts = self._of_tensors(self._by_parameter(getattr(average, SHADOWS, average), parameters))
        if all(tensor is None for part in parts for tensor in part):
            raise ValueError(f"{type(average).__name__} holds an average of no adapter: make it after l1ra.patch.")
        if not all(part.fits(layer) for part, layer in zip(parts, self._adapters.values(), strict=True)):
            raise ValueError(
                f"{type(average).__name__} has other ranks than the model: make it from the model as it is now, or "
                "load the state that was saved with the model's."
            )
        return parts

    def _of_module(self, average: nn.Module) -> list[_Part]:
        mine = next(iter(self._adapters.values())).family
        layers = [layer for _, layer in find_adapters(average)]
        layers = [layer for layer in layers if layer.family == mine] or layers
        if len(layers) != len(self._adapters) or any(layer in self._adapters.values() for layer in layers):
            raise ValueError(
                f"{type(average).__name__} has {len(layers)} adapters that average those of the model, which has "
                f"{len(self._adapters)}: pass a copy of the whole model that was made after l1ra.patch."
            )
        return [_part(layer) for layer in layers]

    def _by_parameter(self, average: Any, parameters: list[nn.Parameter] | None) -> Mapping[int, Tensor]:
        """``id`` of a parameter of the model -> its average."""
        named = dict(self._model.named_parameters())
        if isinstance(average, Mapping):
            return {id(named[name]): tensor for name, tensor in average.items() if name in named}
        if not isinstance(average, list | tuple) or not all(isinstance(tensor, Tensor) for tensor in average):
            raise TypeError(
                f"{type(average).__name__} can't be followed: pass a copy of the model, a list of tensors in the order "
                f"of the model's parameters, a dict of them by name, or an object with such a list in .{SHADOWS}."
            )
        trained = [param for param in named.values() if param.requires_grad]
        orders = [list(named.values()), trained] if parameters is None else [parameters]
        for order in orders:
            shapes = [param.shape for param in order]
            if shapes == [tensor.shape for tensor in average]:
                return dict(zip(map(id, order), average, strict=True))
        raise ValueError(
            f"the {len(average)} averages have not the shapes of the model's {len(named)} parameters, nor of its "
            f"{len(trained)} trained ones: pass those that are averaged, as they are now, as parameters=."
        )

    def _of_tensors(self, averages: Mapping[int, Tensor]) -> list[_Part]:
        return [
            _Part(*(averages.get(id(getattr(layer, name))) for name in ADAPTER_PARAMETERS), None)
            for layer in self._adapters.values()
        ]


# A model has no reference to its averages. torch reports each module that is put into another one.
# In the order of construction: processes gather them in the same order.
_averaged_models: weakref.WeakKeyDictionary[AveragedModel, None] = weakref.WeakKeyDictionary()


def _record_average(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
    if isinstance(module, AveragedModel) and name == "module":
        _averaged_models.setdefault(module)


register_module_module_registration_hook(_record_average)
