"""The gated low-rank adapter: its parameters, its scaling, and changes of its rank."""

from __future__ import annotations

import math
import struct
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from l1ra.allocation.plan import LayerPlan
from l1ra.config import INITS
from l1ra.layers.base_layers import is_partitioned, tensor_of
from l1ra.layers.row_moves import RowMoves, row_sources
from l1ra.layers.sharding import is_sharded, wholes

__all__ = ["ADAPTER_PARAMETERS", "REFERENCE", "GatedLowRank"]

ADAPTER_PARAMETERS = ("lora_A", "gate", "lora_B")  # names of an adapter's parameters
REFERENCE = ("reference_A", "reference_B")  # buffers, see GatedLowRank.set_reference


class GatedLowRank(nn.Module):
    """The parameters of the adapter ``s * ((x @ A.T) * gate) @ B``, and changes of its rank.

    Source: L1RA, arXiv:2509.04884.

    Two factors scale the adapter. :attr:`scaling`, s, is ``alpha / rank`` (or ``alpha / sqrt(rank)``) for the rank at
    construction, and stays constant: compiled and captured graphs contain it. :attr:`rank_scaling` follows the current
    rank if ``scale_with_rank`` is set, and is a factor of the gates.

    The parameters remain the same objects when the rank changes.

    Attributes:
        lora_A: Parameter ``(rows, in_features)``. ``rows`` is the rank, or ``reserve``; rows beyond the rank are 0.
        gate: Parameter ``(rows,)``, the controller's gate, from 0 to 1, times :attr:`rank_scaling`. Its dtype is
            float64 if that of A is, otherwise float32.
        lora_B: Parameter ``(rows, out_features)``, the transpose of PEFT's, 0 at construction.
        scaling: s.
        scale_with_rank: as in ``L1RAConfig``.
        gate_loaded: set to True when a state dict with a gate is loaded. The controller, which has a copy of the gate,
            resets it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None,
        rank: int,
        alpha: float | None,
        rank_stabilized: bool,
        scale_with_rank: bool,
        init: str,
        adapter_dtype: torch.dtype,
        reserve: int | None,
        generator: torch.Generator | None,
    ) -> None:
        """Arguments as in ``L1RALinear``.

        Raises:
            ValueError: rank, alpha, init or reserve is out of its range.
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
        rows = rank if reserve is None else reserve
        gate_dtype = torch.promote_types(adapter_dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.zeros(rows, in_features, device=device, dtype=adapter_dtype))
        self.gate = nn.Parameter(torch.zeros(rows, device=device, dtype=gate_dtype))
        self.lora_B = nn.Parameter(torch.zeros(rows, out_features, device=device, dtype=adapter_dtype))
        with torch.no_grad():
            self.lora_A[:rank] = self.initial_rows(rank, generator).to(device, adapter_dtype)
            self.gate[:rank] = 1.0
        # The shapes don't tell them: of reserved rows, or where FSDP 1 or ZeRO stage 3 stores the parameters.
        self._rank, self._reserve = rank, reserve
        self.gate_loaded = False

    def set_initial_rank(self, rank: int, alpha: float | None, rank_stabilized: bool) -> None:
        """Set the initial rank and the scaling, which depends on it."""
        self.initial_rank = rank
        self.alpha = float(rank if alpha is None else alpha)
        self.scaling = self.alpha / (math.sqrt(rank) if rank_stabilized else rank)

    def initial_rows(self, count: int, generator: torch.Generator | None = None, out: Tensor | None = None) -> Tensor:
        """``count`` new random rows of A, ``(count, in_features)`` float32 on the CPU, in ``out`` if it is given."""
        rows = torch.empty(count, self.in_features, dtype=torch.float32, device="cpu") if out is None else out
        if self.init == "gaussian":
            return rows.normal_(generator=generator).div_(self.initial_rank)
        bound = 1 / math.sqrt(self.in_features)
        return rows.uniform_(-bound, bound, generator=generator)

    @property
    def rank(self) -> int:
        """The current rank, including ranks whose gate is 0 that have not been pruned yet."""
        return self._rank

    @property
    def reserve(self) -> int | None:
        """The constant number of rows of the parameters, or None if they have as many rows as ranks."""
        return self._reserve

    @property
    def rank_scaling(self) -> float:
        """The factor that :attr:`gate` contains: ``sqrt(initial_rank / rank)``, or 1 without ``scale_with_rank``."""
        return self._rank_scaling_at(self.rank)

    def _rank_scaling_at(self, rank: int) -> float:
        if not self.scale_with_rank:
            return 1.0
        # Rounded to float32, the dtype of the gates: B is divided by exactly the factor by which they are multiplied.
        (rounded,) = struct.unpack("f", struct.pack("f", math.sqrt(self.initial_rank / rank)))
        return rounded

    @property
    def is_flat(self) -> bool:
        """Whether the parameters are parts of flat tensors, as those of FSDP 1 are outside of a forward."""
        a = tensor_of(self, "lora_A")
        return not is_partitioned(a) and (a.dim() != 2 or not isinstance(a, nn.Parameter))

    def gate_factor(self, rank: int) -> float:
        """The factor by which the gates and B's gradient are multiplied, and B is divided, if the rank becomes
        ``rank``."""
        return self._rank_scaling_at(rank) / self.rank_scaling

    def adopt_rank(self, rank: int) -> None:
        """Take ``rank`` over for rows that have been loaded.

        Raises:
            ValueError: the parameters have not as many rows.
        """
        if rank != self._rank and rank > (self._reserve or 0):
            raise ValueError(
                f"the state has rank {rank}, and the adapter {self._reserve or self._rank} rows: patch the model with "
                "the same reserve."
            )
        self._rank = rank

    def resize(self, plan: LayerPlan, new_rows: Tensor | None = None) -> None:
        """Change the rank: prune and append rows at once. Arguments as in :meth:`plan_resize`."""
        moves = RowMoves()
        self.plan_resize(moves, plan, new_rows)
        moves.run()

    def plan_resize(self, moves: RowMoves, plan: LayerPlan, new_rows: Tensor | None = None) -> None:
        """Add a change of the rank to ``moves``. Nothing changes before ``moves.run()``.

        The rows ``plan.keep`` are kept, in order. ``plan.grow`` new rows follow, with gate 1 and B = 0. The parameters
        remain the same objects with the same hooks, and their gradients are moved along. With ``scale_with_rank`` the
        gates are multiplied by :meth:`gate_factor` and B is divided by it, so the output does not change.

        Args:
            moves: collects the moves of all adapters.
            plan: the rows to keep and the number of new rows.
            new_rows: A of the new rows, ``(plan.grow, in_features)``. None draws them as at construction.

        Raises:
            ValueError: the plan or ``new_rows`` does not fit this layer.
        """
        keep, grow = plan.keep, plan.grow
        if list(keep) != sorted(set(keep)) or any(not 0 <= k < self.rank for k in keep):
            raise ValueError(f"keep must be row numbers below the rank {self.rank} in ascending order, not {keep}.")
        if grow < 0 or plan.rank < 1:
            raise ValueError(f"the plan leaves rank {plan.rank}: at least 1 must stay.")
        if self.reserve is not None and plan.rank > self.reserve:
            raise ValueError(f"the plan makes rank {plan.rank}: no more than {self.reserve} are reserved.")
        if new_rows is not None and new_rows.shape != (grow, self.in_features):
            raise ValueError(f"new_rows must be {(grow, self.in_features)}, not {tuple(new_rows.shape)}.")
        if grow == 0 and len(keep) == self.rank:
            return
        if grow and new_rows is None:
            new_rows = self.initial_rows(grow)
        new = slice(len(keep), plan.rank)
        sources = self.row_sources(plan)
        moves.add_parameter(self.lora_A, sources, new, new_rows)
        moves.add_parameter(self.gate, sources, new, self.rank_scaling)
        moves.add_parameter(self.lora_B, sources)
        factor = self.gate_factor(plan.rank)
        if factor != 1:
            moves.rescale(self.gate, self.lora_B, factor)
        moves.afterwards(partial(setattr, self, "_rank", plan.rank))

    def row_sources(self, plan: LayerPlan) -> tuple[int, ...]:
        """For each row of the parameters after ``plan`` its index before, -1 for new rows and rows beyond the rank."""
        sources = row_sources(plan)
        return (*sources, *[-1] * ((self.reserve or 0) - len(sources)))

    @torch.no_grad()
    def set_reference(self) -> None:
        """Keep the adapter as it is now, for :meth:`reference_output`."""
        b = self.lora_B[: self.rank] * (self.scaling * self.gate[: self.rank]).to(self.lora_B.dtype).unsqueeze(1)
        self.register_buffer(REFERENCE[0], self.lora_A[: self.rank].detach().clone())
        self.register_buffer(REFERENCE[1], b.detach())

    @property
    def has_reference(self) -> bool:
        """Whether there is an adapter of :meth:`set_reference`."""
        return REFERENCE[0] in self._buffers

    def reference_output(self, x: Tensor) -> Tensor:
        """What the adapter of :meth:`set_reference` adds to the output for x ``(..., in_features)``."""
        a, b = (self._buffers[name].to(x.dtype) for name in REFERENCE)
        return F.linear(F.linear(x, a), b.t())

    def _load_reference(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Make room for a reference in ``state_dict``, of which the shapes are not known before."""
        for name in REFERENCE:
            if (saved := state_dict.get(prefix + name)) is not None:
                self.register_buffer(name, torch.empty_like(saved, device=self.lora_A.device))

    @torch.inference_mode(False)  # a resized parameter is trained later
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._load_reference(state_dict, prefix)
        # The ranks of a checkpoint depend on the step at which it was saved. If the features agree, adopt its rank;
        # otherwise leave the error to torch.
        params = {name: getattr(self, name) for name in ADAPTER_PARAMETERS}
        found = {name: state_dict[prefix + name] for name in params if prefix + name in state_dict}
        row_counts = {saved.shape[:1] for saved in found.values()}
        same_features = all(saved.shape[1:] == params[name].shape[1:] for name, saved in found.items())
        whole = len(found) == len(params) and not is_partitioned(self.lora_A)
        if whole and len(row_counts) == 1 and same_features:
            rank = _saved_rank(*wholes([found["lora_A"], found["gate"]]))
            rows = rank if self.reserve is None else self.reserve
            if any(map(is_sharded, found.values())):
                if self.reserve is not None and row_counts == {params["lora_A"].shape[:1]}:
                    self._rank = rank
            elif rank <= rows:
                if rank != self.rank:
                    self.resize(LayerPlan((), rank), self.lora_A.new_zeros(rank, self.in_features))
                for name, saved in found.items():
                    state_dict[prefix + name] = F.pad(saved[:rank].movedim(0, -1), (0, rows - rank)).movedim(-1, 0)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.gate_loaded |= "gate" in found


def _saved_rank(a: Tensor, gate: Tensor) -> int:
    """The rank of a saved adapter: the number of its rows without the reserved rows at its end, which are 0."""
    used = ((gate != 0) | (a != 0).any(1)).nonzero()
    return int(used[-1]) + 1 if len(used) else gate.shape[0]
