"""The adapted linear layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l1ra.allocation import LayerPlan
from l1ra.base_layers import (
    FLOATS,
    base_features,
    check_gradient,
    dense_weight,
    foreign,
    is_conv1d,
    keep_unpacked,
    let_repack,
    main_tensor,
)
from l1ra.config import INITS
from l1ra.merged_weight import Kept, Rounding, add_to_weight, give_back
from l1ra.probe import Probe
from l1ra.room import Room
from l1ra.row_moves import RowMoves, row_sources
from l1ra.sharing import SharedInput
from l1ra_kernels import dispatch

__all__ = ["PARTS", "L1RALinear", "find_adapters"]

PARTS = ("lora_A", "gate", "lora_B")  # an adapter's parameters


class L1RALinear(nn.Module):
    """A frozen linear layer with a gated low-rank adapter: ``y = base(x) + s * ((x @ A.T) * g) @ B``.

    Source: L1RA. ``s`` is ``alpha / rank`` (or ``alpha / sqrt(rank)``) of the rank at construction for good. With
    ``scale_with_rank`` the gates take :attr:`share` as a factor when the rank changes, so that in effect the scaling
    follows it: no graph that was compiled or captured with ``s`` in it has to learn of that.

    Attributes:
        base_layer: the frozen layer, an ``nn.Linear`` (or subclass), transformers' ``Conv1D`` or a quantised one.
        lora_A: Parameter ``(rows, in_features)``; ``rows`` is the rank, or ``reserve``, then 0 beyond the rank.
        gate: Parameter ``(rows,)``, :attr:`share` unless penalised, 1 at first; float32, or float64 where A is.
        lora_B: Parameter ``(rows, out_features)``, 0 at first.
        scaling: s.
        scale_with_rank: as in ``L1RAConfig``.
        gate_loaded: set when a state dict with the gate was loaded, for whoever holds a copy of the gate.
        strict: raise where no fused kernel can run, instead of falling back to plain PyTorch.
        disabled: compute the base layer alone, see ``RankController.disabled``.
        probe: collects the weight's gradient, seen from a few random directions, while it is set.
        room: behind the weight's columns, for the path ``"aug"``; None: chain.
        sharing: the group of layers that may read the same input, see ``SharedInput``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int,
        alpha: float | None = None,
        rank_stabilized: bool = False,
        scale_with_rank: bool = True,
        dropout: float = 0.0,
        init: str = "kaiming",
        adapter_dtype: torch.dtype = torch.float32,
        reserve: int | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """A new ``nn.Linear(in_features, out_features, bias)``, frozen, with an adapter on it.

        Args:
            rank: of the adapter, from 1 to the smaller of the two sizes.
            alpha: numerator of the scaling; None means ``rank``.
            rank_stabilized: divide alpha by the square root of the rank.
            scale_with_rank: let the scaling follow the rank (see ``L1RAConfig``).
            dropout: of the adapter's input, from 0 to below 1.
            init: of A, ``"kaiming"`` or ``"gaussian"`` (see ``L1RAConfig``).
            adapter_dtype: of A and B; the base keeps its own, and no copy of the input is made in this one.
            reserve: rows that A, gate and B have for good, whatever the rank, up to this many, becomes: the rows beyond
                it are 0, and so are their gates. Nothing that knows the tensors' shapes or memory has to learn of a
                changed rank: no compiled graph, no captured one. None: as many rows as ranks.
            generator: a CPU generator for A.

        Raises:
            ValueError: a rank, alpha or dropout out of its range, or no such init.
        """
        super().__init__()
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._adapt(
            base, rank, alpha, rank_stabilized, scale_with_rank, dropout, init, adapter_dtype, reserve, generator
        )

    @classmethod
    def from_linear(
        cls,
        base: nn.Module,
        *,
        rank: int,
        alpha: float | None = None,
        rank_stabilized: bool = False,
        scale_with_rank: bool = True,
        dropout: float = 0.0,
        init: str = "kaiming",
        adapter_dtype: torch.dtype = torch.float32,
        reserve: int | None = None,
        generator: torch.Generator | None = None,
    ) -> L1RALinear:
        """An adapter around an existing layer, which is frozen and kept as the very object.

        Raises:
            TypeError: ``base`` is neither an ``nn.Linear`` nor a ``Conv1D`` nor a quantised linear layer.
            ValueError: a rank, alpha or dropout out of its range, no such init, or a 4-bit weight through which no
                gradient passes.
        """
        if base_features(base) is None:
            raise TypeError(
                f"{type(base).__name__} can't be adapted: pass an nn.Linear, transformers' Conv1D or a quantised "
                "linear layer, the layer itself."
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._adapt(
            base, rank, alpha, rank_stabilized, scale_with_rank, dropout, init, adapter_dtype, reserve, generator
        )
        return layer

    def _adapt(
        self,
        base: nn.Module,
        rank: int,
        alpha: float | None,
        rank_stabilized: bool,
        scale_with_rank: bool,
        dropout: float,
        init: str,
        adapter_dtype: torch.dtype,
        reserve: int | None,
        generator: torch.Generator | None,
    ) -> None:
        self.in_features, self.out_features = base_features(base)
        largest = min(self.in_features, self.out_features)
        if not isinstance(rank, int) or not 1 <= rank <= largest:
            raise ValueError(
                f"rank must be from 1 to {largest} for a layer {self.in_features} -> {self.out_features}, not {rank!r}."
            )
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, not {init!r}.")
        if alpha is not None and not alpha > 0:
            raise ValueError(f"alpha must be above 0, not {alpha!r}: at 0 the adapter would do nothing.")
        if reserve is not None and not (isinstance(reserve, int) and rank <= reserve <= largest):
            raise ValueError(
                f"reserve must be None, or from the rank {rank} to {largest} for this layer, not {reserve!r}."
            )
        self.start_at(rank, alpha, rank_stabilized)
        self.scale_with_rank = scale_with_rank
        self.init = init
        self._repacks = keep_unpacked(base)
        self.base_layer = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.train(base.training)
        device = main_tensor(base).device
        gate_dtype = torch.promote_types(adapter_dtype, torch.float32)
        rows = self.initial_rows(rank, generator)
        total = rank if reserve is None else reserve
        self.lora_A = nn.Parameter(torch.zeros(total, self.in_features, device=device, dtype=adapter_dtype))
        self.gate = nn.Parameter(torch.zeros(total, device=device, dtype=gate_dtype))
        self.lora_B = nn.Parameter(torch.zeros(total, self.out_features, device=device, dtype=adapter_dtype))
        with torch.no_grad():
            self.lora_A[:rank] = rows.to(device, adapter_dtype)
            self.gate[:rank] = 1.0
        self._rank = None if reserve is None else rank
        self._merged_from: Kept | None = None
        self.probe: Probe | None = None
        self.gate_loaded = False
        self.strict = False
        self.disabled = False
        self.room: Room | None = None
        self.sharing: SharedInput | None = None

    def start_at(self, rank: int, alpha: float | None, rank_stabilized: bool) -> None:
        """Let ``rank`` be the one that the adapter has started with, and by which its scaling is settled."""
        self.initial_rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.scaling = self.alpha / (math.sqrt(rank) if rank_stabilized else rank)

    def initial_rows(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """``count`` new random rows of A, ``(count, in_features)`` float32 on the CPU."""
        if self.init == "gaussian":
            return torch.randn(count, self.in_features, generator=generator, device="cpu") / self.initial_rank
        bound = 1 / math.sqrt(self.in_features)
        return torch.empty(count, self.in_features, device="cpu").uniform_(-bound, bound, generator=generator)

    @property
    def rank(self) -> int:
        """The current rank, pruned gates that wait to be cut included."""
        return self.lora_A.shape[0] if self._rank is None else self._rank

    @property
    def share(self) -> float:
        """What a gate of 1 is in :attr:`gate`: ``sqrt(initial_rank / rank)``, 1 without ``scale_with_rank``."""
        return self._share(self.rank)

    def _share(self, rank: int) -> float:
        if not self.scale_with_rank:
            return 1.0
        # A float32, as the gates are: what B is divided by is then what the gates are multiplied by.
        return torch.tensor(math.sqrt(self.initial_rank / rank), dtype=torch.float32).item()

    @property
    def reserve(self) -> int | None:
        """The rows that the parameters have for good; None: as many as ranks."""
        return None if self._rank is None else self.lora_A.shape[0]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: model code reads its dtype and device. The adapter is not in it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        """Whether the adapter is added into the base weight."""
        return self._merged_from is not None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``(..., in_features)`` -> ``(..., out_features)``, in the dtype that the base layer returns.

        Raises:
            RuntimeError: ``strict`` is set and no fused kernel can run; or a quantised base gives no gradient in
                training. The message says why.
        """
        if self.merged or self.disabled:
            return self.base_layer(x, *args, **kwargs)
        more = "it was called with more than its input" if args or kwargs else ""
        path, output = self.path_on(x, more), None
        if not path.dense:
            output = self.base_layer(x, *args, **kwargs)
            if self.training:
                check_gradient(self.base_layer, x, output)
            if output.dtype != x.dtype:
                path = dispatch.path_for(output.device, output.dtype, path.reason)
        if self.strict and not path.fused:
            raise RuntimeError(f"strict=True, but the adapter would run as plain PyTorch: {path.reason}.")
        if path.fused and path.dense and self.sharing is not None:
            shared = self.sharing.take(self, x)
            if shared is not None:
                return shared
        return dispatch.gated_linears(x, [self.parts(output)], self.dropout_now, path)[0]

    def path_on(self, x: Tensor | None = None, more: str = "") -> dispatch.Path:
        """How the layer is computed for ``x``; None stands for an input like its weight, outside of autocast.

        Args:
            more: a reason to leave the product with the weight to the base layer.
        """
        like = main_tensor(self.base_layer) if x is None else x
        dtype = like.dtype if like.dtype in FLOATS else self.lora_A.dtype
        path = dispatch.path_for(like.device, dtype, more or foreign(self.base_layer, like.device, dtype))
        return path if self.room is None or path.name != "chain" else dispatch.AUG

    @property
    def version(self) -> tuple:
        """Differs after anything that an output depends on has changed: parameters, weight, probe, dropout."""
        tensors = (self.lora_A, self.gate, self.lora_B, self.base_layer.weight)
        return (*(t._version for t in tensors), id(self.probe), self.dropout_now)

    @property
    def dropout_now(self) -> float:
        """The probability that an element of the adapter's input is dropped, 0 in evaluation."""
        return self.dropout.p if self.training and isinstance(self.dropout, nn.Dropout) else 0.0

    def parts(self, output: Tensor | None = None) -> dispatch.Layer:
        """What the kernels need: the adapter, and the ``output`` of the base layer or its weight."""
        a, gate, b = self.lora_A, self.gate, self.lora_B
        if self.probe is not None and torch.is_grad_enabled():
            a, gate, b = self.probe.beside(a, gate, b)
        if output is not None:
            return dispatch.Layer(a, gate, b, self.scaling, output=output)
        augmented = None if self.room is None or torch.compiler.is_compiling() else self.room.memory(self.base_layer)
        return dispatch.Layer(
            a, gate, b, self.scaling, dense_weight(self.base_layer), self.base_layer.bias, augmented=augmented
        )

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """``s * (g * B).T @ A`` in the layout of the base weight, float32, or float64 where A is."""
        exact = self.gate.dtype  # adapters in 16 bits would be rounded twice on the way
        delta = (self.lora_B.to(exact) * (self.scaling * self.gate).unsqueeze(1)).T @ self.lora_A.to(exact)
        return delta.T if is_conv1d(self.base_layer) else delta

    def merge_quietly(self) -> Rounding | None:
        """As :meth:`merge`, but what rounding did to a quantised weight is returned."""
        if self.merged:
            raise RuntimeError("the adapter is merged already: call unmerge() first.")
        if self.disabled:
            raise RuntimeError("a disabled adapter can't be merged: leave controller.disabled() first.")
        self._merged_from, rounding = add_to_weight(self.base_layer, self.delta_weight())
        return rounding

    def merge(self) -> None:
        """Add the adapter into the base weight; the adapter's forward is skipped until :meth:`unmerge`.

        The original weight is kept beside the merged one. Merging into a 16-bit weight rounds the sum: changes smaller
        than half a unit in the last place of an entry are lost. A 4-bit or 8-bit weight of bitsandbytes is quantised
        anew, and a ``UserWarning`` states the error.

        Raises:
            RuntimeError: already merged, or disabled.
            TypeError: nothing can be added to the base weight: quantised in another way, or no weight of a plain layer.
        """
        rounding = self.merge_quietly()
        if rounding is not None:
            warnings.warn(str(rounding), stacklevel=2)

    def unmerge(self) -> None:
        """Give the base weight back, bit for bit.

        Raises:
            RuntimeError: not merged.
        """
        if self._merged_from is None:
            raise RuntimeError("the adapter is not merged: call merge() first.")
        give_back(self.base_layer, self._merged_from)
        self._merged_from = None

    def release(self, *, merged: bool = False) -> nn.Module:
        """The base layer as it was before it was adapted, for use without the adapter; with ``merged`` its weight stays
        merged if it is."""
        if self.merged and not merged:
            self.unmerge()
        if self.room is not None:
            self.room.give_back(self.base_layer)
        if self._repacks:
            let_repack(self.base_layer)
        return self.base_layer

    def resize(self, plan: LayerPlan, new_rows: Tensor | None = None) -> None:
        """Keep the rows ``plan.keep`` in order and append ``plan.grow`` new ones: :meth:`plan_resize`, done at once."""
        moves = RowMoves()
        self.plan_resize(moves, plan, new_rows)
        moves.run()

    def plan_resize(self, moves: RowMoves, plan: LayerPlan, new_rows: Tensor | None = None) -> None:
        """Add to ``moves``: the rows ``plan.keep`` stay in order, then come ``plan.grow`` new ones of gate 1, B = 0.

        The Parameters stay the same objects, hooks included, and a gradient they hold moves along. With
        ``scale_with_rank``, what the gates are multiplied by is taken out of B.

        Args:
            new_rows: A of the new ranks, ``(plan.grow, in_features)``; None draws them as at construction.

        Raises:
            ValueError: a plan that does not fit this layer.
            RuntimeError: the adapter is merged.
        """
        keep, grow = plan.keep, plan.grow
        if self.merged:
            raise RuntimeError("a merged adapter can't change its rank: call unmerge() first.")
        if list(keep) != sorted(set(keep)) or any(not 0 <= k < self.rank for k in keep):
            raise ValueError(f"keep must be rising row numbers below the rank {self.rank}, not {keep}.")
        if grow < 0 or plan.rank < 1:
            raise ValueError(f"the plan leaves rank {plan.rank}: at least 1 must stay.")
        if self.reserve is not None and plan.rank > self.reserve:
            raise ValueError(f"the plan makes rank {plan.rank}: no more than {self.reserve} are reserved.")
        rows = self.initial_rows(grow) if new_rows is None else new_rows
        if rows.shape != (grow, self.in_features):
            raise ValueError(f"new_rows must be {(grow, self.in_features)}, not {tuple(rows.shape)}.")
        if grow == 0 and len(keep) == self.rank:
            return
        new = slice(len(keep), plan.rank)
        sources = self.row_sources(plan)
        moves.add_parameter(self.lora_A, sources, new, rows)
        moves.add_parameter(self.gate, sources, new, self.gate.new_full((grow,), self.share))
        moves.add_parameter(self.lora_B, sources)
        factor = self.rescaling(plan.rank)
        if factor != 1:
            moves.afterwards(partial(self._rescale, factor))
        if self._rank is not None:
            moves.afterwards(partial(setattr, self, "_rank", plan.rank))

    def rescaling(self, rank: int) -> float:
        """The factor that the gates, and B's gradient, take when the rank becomes ``rank``; B is divided by it."""
        return self._share(rank) / self.share

    @torch.no_grad()
    def _rescale(self, factor: float) -> None:
        self.gate.mul_(factor)
        self.lora_B.div_(factor)
        for param, change in ((self.gate, 1 / factor), (self.lora_B, factor)):
            if param.grad is not None:
                param.grad.mul_(change)

    def row_sources(self, plan: LayerPlan) -> tuple[int, ...]:
        """For each row of the parameters after ``plan`` the row it was before, -1 if it is new or beyond the rank."""
        sources = row_sources(plan)
        return (*sources, *[-1] * ((self.reserve or 0) - len(sources)))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint of another moment of training has other ranks: take them, as long as the layer is the same.
        params = {name: getattr(self, name) for name in PARTS}
        found = {name: state_dict[prefix + name] for name in params if prefix + name in state_dict}
        ranks = {rows.shape[:1] for rows in found.values()}
        same_layer = all(rows.shape[1:] == params[name].shape[1:] for name, rows in found.items())
        if len(found) == len(params) and len(ranks) == 1 and same_layer:
            rank = _live_rows(found["lora_A"], found["gate"])
            rows = rank if self.reserve is None else self.reserve
            if rank <= rows:
                if rank != self.rank:
                    self.resize(LayerPlan((), rank), torch.zeros(rank, self.in_features))
                for name, saved in found.items():
                    state_dict[prefix + name] = F.pad(saved[:rank].movedim(0, -1), (0, rows - rank)).movedim(-1, 0)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.gate_loaded |= "gate" in found

    def _apply(self, *args: Any, **kwargs: Any) -> L1RALinear:
        # What .to() and its like go through: a probe is no submodule.
        super()._apply(*args, **kwargs)
        if self.probe is not None:
            self.probe.follow(self.lora_A.detach())
        return self

    def _replicate_for_data_parallel(self) -> L1RALinear:
        # nn.DataParallel's replicas live for one forward, on their own devices: nothing of theirs is to be kept.
        replica = super()._replicate_for_data_parallel()
        replica.room = replica.sharing = None
        return replica

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no controller that would ever take its probe, or leave the block in which it is disabled.
        return {**self.__dict__, "probe": None, "disabled": False}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling * self.share:g}" + (", merged" if self.merged else "")


def _live_rows(a: Tensor, gate: Tensor) -> int:
    """Rows of a saved adapter without those reserved beyond its rank, which hold nothing but 0."""
    live = ((gate != 0) | (a != 0).any(1)).nonzero()
    return int(live[-1]) + 1 if len(live) else gate.shape[0]


def find_adapters(model: nn.Module) -> Iterator[tuple[str, L1RALinear]]:
    """Every :class:`L1RALinear` of ``model`` with its name as in ``named_modules()``."""
    for name, module in model.named_modules():
        if isinstance(module, L1RALinear):
            yield name, module
