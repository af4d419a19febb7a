"""A gated low-rank adapter: its parameters, its scaling, and how its rank changes."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l1ra.allocation.plan import LayerPlan
from l1ra.config import INITS
from l1ra.layers.row_moves import RowMoves, row_sources

__all__ = ["ADAPTER_PARAMETERS", "GatedLowRank"]

ADAPTER_PARAMETERS = ("lora_A", "gate", "lora_B")  # an adapter's parameters


class GatedLowRank(nn.Module):
    """The parameters of ``s * ((x @ A.T) * g) @ B``, which stay the same objects whatever the rank becomes.

    Source: L1RA. ``s`` is ``alpha / rank`` (or ``alpha / sqrt(rank)``) of the rank at construction for good. With
    ``scale_with_rank`` the gates take :attr:`rank_scaling` as a factor when the rank changes, so that in effect the
    scaling follows it: no graph that was compiled or captured with ``s`` in it has to learn of that.

    Attributes:
        lora_A: Parameter ``(rows, in_features)``; ``rows`` is the rank, or ``reserve``, then 0 beyond the rank.
        gate: Parameter ``(rows,)``, :attr:`rank_scaling` unless penalised, 1 at first; float32, or float64 where A is.
        lora_B: Parameter ``(rows, out_features)``, 0 at first.
        scaling: s.
        scale_with_rank: as in ``L1RAConfig``.
        gate_loaded: set when a state dict with the gate was loaded, for whoever holds a copy of the gate.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float | None,
        rank_stabilized: bool,
        scale_with_rank: bool,
        init: str,
        adapter_dtype: torch.dtype,
        reserve: int | None,
        generator: torch.Generator | None,
        device: torch.device | str | None,
    ) -> None:
        """An adapter that adds nothing yet. Arguments as of ``L1RALinear``.

        Raises:
            ValueError: a rank, reserve or alpha out of its range, or no such init.
        """
        super().__init__()
        largest = min(in_features, out_features)
        if not isinstance(rank, int) or not 1 <= rank <= largest:
            raise ValueError(
                f"rank must be from 1 to {largest} for a layer {in_features} -> {out_features}, not {rank!r}."
            )
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, not {init!r}.")
        if alpha is not None and not alpha > 0:
            raise ValueError(f"alpha must be above 0, not {alpha!r}: at 0 the adapter would do nothing.")
        if reserve is not None and not (isinstance(reserve, int) and rank <= reserve <= largest):
            raise ValueError(
                f"reserve must be None, or from the rank {rank} to {largest} for this layer, not {reserve!r}."
            )
        self.in_features, self.out_features = in_features, out_features
        self.set_initial_rank(rank, alpha, rank_stabilized)
        self.scale_with_rank = scale_with_rank
        self.init = init
        gate_dtype = torch.promote_types(adapter_dtype, torch.float32)
        rows = self.initial_rows(rank, generator)
        total = rank if reserve is None else reserve
        self.lora_A = nn.Parameter(torch.zeros(total, in_features, device=device, dtype=adapter_dtype))
        self.gate = nn.Parameter(torch.zeros(total, device=device, dtype=gate_dtype))
        self.lora_B = nn.Parameter(torch.zeros(total, out_features, device=device, dtype=adapter_dtype))
        with torch.no_grad():
            self.lora_A[:rank] = rows.to(device, adapter_dtype)
            self.gate[:rank] = 1.0
        self._rank = None if reserve is None else rank
        self.gate_loaded = False

    def set_initial_rank(self, rank: int, alpha: float | None, rank_stabilized: bool) -> None:
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
    def rank_scaling(self) -> float:
        """What a gate of 1 is in :attr:`gate`: ``sqrt(initial_rank / rank)``, 1 without ``scale_with_rank``."""
        return self._rank_scaling(self.rank)

    def _rank_scaling(self, rank: int) -> float:
        if not self.scale_with_rank:
            return 1.0
        # A float32, as the gates are: what B is divided by is then what the gates are multiplied by.
        return torch.tensor(math.sqrt(self.initial_rank / rank), dtype=torch.float32).item()

    @property
    def reserve(self) -> int | None:
        """The rows that the parameters have for good; None: as many as ranks."""
        return None if self._rank is None else self.lora_A.shape[0]

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
        """
        keep, grow = plan.keep, plan.grow
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
        moves.add_parameter(self.gate, sources, new, self.gate.new_full((grow,), self.rank_scaling))
        moves.add_parameter(self.lora_B, sources)
        factor = self.gate_factor(plan.rank)
        if factor != 1:
            moves.afterwards(partial(self._rescale, factor))
        if self._rank is not None:
            moves.afterwards(partial(setattr, self, "_rank", plan.rank))

    def gate_factor(self, rank: int) -> float:
        """The factor that the gates, and B's gradient, take when the rank becomes ``rank``; B is divided by it."""
        return self._rank_scaling(rank) / self.rank_scaling

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
        params = {name: getattr(self, name) for name in ADAPTER_PARAMETERS}
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


def _live_rows(a: Tensor, gate: Tensor) -> int:
    """Rows of a saved adapter without those reserved beyond its rank, which hold nothing but 0."""
    live = ((gate != 0) | (a != 0).any(1)).nonzero()
    return int(live[-1]) + 1 if len(live) else gate.shape[0]
