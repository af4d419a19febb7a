"""Sharded parameters made whole for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn
from torch.optim import Optimizer

from l1ra.layers.low_rank import ADAPTER_PARAMETERS, GatedLowRank
from l1ra.layers.row_moves import COLUMNS
from l1ra.layers.sharding import columns_of, is_sharded, wholes, with_all_rows, write_rows

__all__ = ["adapter_parameters", "gathered"]


def adapter_parameters(layers: Iterable[GatedLowRank]) -> list[tuple[nn.Module, str]]:
    """The parameters of these adapters, as :func:`gathered` takes them."""
    return [(layer, name) for layer in layers for name in ADAPTER_PARAMETERS]


@contextmanager
def gathered(
    owners: Iterable[tuple[nn.Module, str]],
    optimizers: Sequence[Optimizer] | None = None,
    values: Mapping[Tensor, Tensor] | None = None,
) -> Iterator[None]:
    """Within the block sharded parameters are plain tensors. All processes must enter it alike.

    Args:
        owners: modules, and names of parameters of theirs. Nothing happens to parameters that are not sharded.
        optimizers: None if nothing will be changed, and the tensors are whole. Otherwise gradients, and the state in
            these optimizers, are plain, too, and what was changed is written back at the end. Shapes must stay. Of
            tensors that are split by columns each process then has its own columns; ``RowMoves`` and
            ``rotate_to_principal_axes`` know of it.
        values: the wholes, if they are known: then the processes need not communicate.
    """
    owners = [(module, name, param) for module, name in owners if is_sharded(param := module._parameters[name])]
    if not owners:
        yield
        return
    sharded = list(dict.fromkeys(param for *_, param in owners))
    found = with_all_rows if optimizers is not None else wholes
    known = found(sharded) if values is None else [values[param] for param in sharded]
    plain = [nn.Parameter(tensor, requires_grad=p.requires_grad) for tensor, p in zip(known, sharded, strict=True)]
    swapped = dict(zip(sharded, plain, strict=True))
    states = [] if optimizers is None else [_GatheredState(optimizer, swapped) for optimizer in optimizers]
    if optimizers is not None:
        for param, own in swapped.items():
            setattr(own, COLUMNS, columns_of(param))
        with_grad = [param for param in sharded if param.grad is not None]
        for param, grad in zip(with_grad, with_all_rows([param.grad for param in with_grad]), strict=True):
            swapped[param].grad = grad
    try:
        for module, name, param in owners:
            module._parameters[name] = swapped[param]
        yield
    finally:
        for module, name, param in owners:
            module._parameters[name] = param
        for state in states:
            state.restore()
    if optimizers is not None:
        write_rows(sharded, plain)
        write_rows([param.grad for param in with_grad], [swapped[param].grad for param in with_grad])
        for state in states:
            state.write()


class _GatheredState:
    """The state that an optimizer keeps for sharded parameters, put under plain ones in their place."""

    def __init__(self, optimizer: Optimizer, swapped: Mapping[Tensor, nn.Parameter]) -> None:
        self._optimizer = optimizer
        self._groups = [(group, group["params"]) for group in optimizer.param_groups]
        for group, params in self._groups:
            group["params"] = [swapped.get(param, param) for param in params]
        self._pairs = [(param, swapped[param]) for _, params in self._groups for param in params if param in swapped]
        self._pairs = [(param, plain) for param, plain in self._pairs if param in optimizer.state]
        found = [
            (plain, name, value)
            for param, plain in self._pairs
            for name, value in optimizer.state[param].items()
            if is_sharded(value)
        ]
        for param, plain in self._pairs:
            optimizer.state[plain] = dict(optimizer.state[param])
        for (plain, name, _), whole in zip(found, with_all_rows([value for *_, value in found]), strict=True):
            optimizer.state[plain][name] = whole

    def restore(self) -> None:
        """The optimizer holds the sharded parameters again."""
        self._plain = {plain: self._optimizer.state.pop(plain, {}) for _, plain in self._pairs}
        for group, params in self._groups:
            group["params"] = params

    def write(self) -> None:
        """Write back what was changed."""
        targets, values = [], []
        for param, plain in self._pairs:
            state, found = self._optimizer.state[param], self._plain[plain]
            for name in list(state):
                if name not in found:
                    del state[name]
                elif is_sharded(state[name]):
                    targets.append(state[name])
                    values.append(found[name])
                else:
                    state[name] = found[name]
        write_rows(targets, values)
