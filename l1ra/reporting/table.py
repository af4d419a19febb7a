"""``report``: tables of a model's adapters by layer and by projection, and the ranks by depth."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from l1ra.layers.adapted_model import abbreviated, check_whole, controller_of, find_adapters
from l1ra.layers.base_layers import element_count, is_partitioned
from l1ra.layers.gradient_probe import least_coherence
from l1ra.layers.linear import L1RALinear
from l1ra.layers.sharding import is_sharded
from l1ra.reporting.columns import aligned_columns
from l1ra.reporting.rank_map import ProjectionRanks, ranks_by_depth, ranks_by_projection
from l1ra.training.controller import RankController

__all__ = ["Report", "ReportRow", "report"]


@dataclass(frozen=True)
class ReportRow:
    """The row of one adapter in a :class:`Report`.

    Attributes:
        name: the module name, as in ``named_modules()``.
        in_features, out_features: of the layer.
        rank, initial_rank: the rank now and at the start.
        smallest_gate: the smallest gate of its ranks; NaN if DeepSpeed has partitioned it and there is no controller.
        coherence: how much its gradients agreed in the interval before the last reallocation, see
            ``gradient_probe.coherence``. Below ``Report.least_coherence`` the adapter received only ranks that no other
            adapter could take. None before the first measurement.
        params: the number of adapter parameters now, including gates.
        path: the implementation that runs. ``"fused (chain)"`` and ``"fused (aug)"``: Triton kernels around the matrix
            product of cuBLAS. ``"fused (add)"``: Triton kernels around the base layer's own forward. ``"torch"``: plain
            PyTorch. The reason, and the layers with which a read of the input is shared, are appended.
    """

    name: str
    in_features: int
    out_features: int
    rank: int
    initial_rank: int
    smallest_gate: float
    coherence: float | None
    params: int
    path: str


@dataclass(frozen=True)
class Report:
    """The adapters of a model. ``str()`` formats them as tables by layer and by projection, and a line by depth.

    Attributes:
        rows: one row for each adapter, in the order of the model.
        trained_in_full: the number of trainable parameters outside of adapters.
        budget: the controller's budget, in ``budget_unit``. None without a controller.
        budget_unit: ``"ranks"`` or ``"params"``.
        spare: the part of the budget that no adapter has. None without a controller.
        moved: the number of ranks by which adapters grew so far. None without a controller.
        least_coherence: the smallest coherence with which an adapter counts as needy. None without a controller and
            before the first measurement.
    """

    rows: tuple[ReportRow, ...]
    trained_in_full: int
    budget: int | None = None
    budget_unit: str = "ranks"
    spare: int | None = None
    moved: int | None = None
    least_coherence: float | None = None

    @property
    def params(self) -> int:
        """The number of adapter parameters, including gates."""
        return sum(row.params for row in self.rows)

    @property
    def by_projection(self) -> dict[str, ProjectionRanks]:
        """Projection, e.g. ``"self_attn.q_proj"``, -> its mean rank and shares, in the order of the model."""
        return ranks_by_projection(self.rows)

    @property
    def by_depth(self) -> dict[int | None, int]:
        """Block number -> sum of its ranks, in ascending order. Layers outside of blocks are summed under None."""
        return ranks_by_depth({row.name: row.rank for row in self.rows})

    def __str__(self) -> str:
        paths = list(dict.fromkeys(row.path for row in self.rows))
        lines = self._layer_table(paths)
        if self.budget is not None:
            lines.append(f"budget {self.budget:,} {self.budget_unit}, spare {self.spare:,}; {self.moved:,} ranks moved")
        measured = [row.coherence for row in self.rows if row.coherence is not None]
        if measured:
            needy, limit = sum(c >= self.least_coherence for c in measured), f"{self.least_coherence:.2f}"
            lines.append(f"{needy} of {len(measured)} adapters could use more ranks: a coherence of {limit} or more")
        if self.trained_in_full:
            lines.append(f"trained in full besides: {self.trained_in_full:,} parameters")
        for number, path in enumerate(paths, 1):
            lines.append(f"path{'' if len(paths) == 1 else f' [{number}]'}: {path}")
        return "\n".join([*lines, "", *self._projection_table(), *self._depth_line()])

    def _layer_table(self, paths: list[str]) -> list[str]:
        head = ("layer", "shape", "rank", "was", "smallest gate", "coherence", "parameters", "path")
        cells = [
            (
                row.name,
                f"{row.in_features} -> {row.out_features}",
                str(row.rank),
                str(row.initial_rank),
                f"{row.smallest_gate:.3f}",
                "" if row.coherence is None else f"{row.coherence:.2f}",
                f"{row.params:,}",
                row.path.split(" ")[0] + ("" if len(paths) == 1 else f" [{paths.index(row.path) + 1}]"),
            )
            for row in self.rows
        ]
        ranks = sum(row.rank for row in self.rows)
        was = sum(row.initial_rank for row in self.rows)
        total = (f"{len(self.rows)} adapters", "", str(ranks), str(was), "", "", f"{self.params:,}", "")
        first, *lines, last = aligned_columns([head, *cells, total], left=(0, 1, 7))
        rule = "-" * len(first)
        return [first, rule, *lines, rule, last]

    def _projection_table(self) -> list[str]:
        head = ("projection", "layers", "mean rank", "was", "of ranks", "of parameters")
        cells = [
            (
                name,
                str(ranks.layers),
                f"{ranks.mean_rank:.2f}",
                f"{ranks.mean_initial_rank:.2f}",
                f"{ranks.share_of_ranks:.1%}",
                f"{ranks.share_of_params:.1%}",
            )
            for name, ranks in self.by_projection.items()
        ]
        first, *lines = aligned_columns([head, *cells], left=(0,))
        return [first, "-" * len(first), *lines]

    def _depth_line(self) -> list[str]:
        depths = self.by_depth
        if all(block is None for block in depths):
            return []
        sums = (f"{'outside of blocks' if block is None else block}: {ranks}" for block, ranks in depths.items())
        return [f"ranks by depth, block by block: {', '.join(sums)}"]


def report(model: nn.Module, *, strict: bool = False) -> Report:
    """Report the adapters of ``model``: ranks now and at the start, gates, parameters, and which implementation runs.

    Example::

        print(l1ra.report(model))
        ranks = {row.name: row.rank for row in l1ra.report(model).rows}

    Args:
        strict: raise an error if an adapter would run as plain PyTorch.

    Returns:
        A :class:`Report`. Its ``str()`` is the tables; ``rows`` has one :class:`ReportRow` for each adapter.

    Raises:
        ValueError: the model has no adapter.
        RuntimeError: ``strict`` is set and adapters would run as plain PyTorch; the message names them and the reason.
            Or FSDP 1 holds the adapters as parts of flat tensors.
    """
    adapters = dict(find_adapters(model))
    if not adapters:
        raise ValueError("the model has no adapter: call l1ra.patch(model, budget=...) first.")
    check_whole(adapters)
    if strict:
        _check_fused(adapters)
    controller = controller_of(model)
    names = {layer: name for name, layer in adapters.items()}
    # Where layers are divided among processes, this one alone can't read their gates.
    divided = any(is_partitioned(layer.gate) or is_sharded(layer.gate) for layer in names)
    known = controller.gates() if controller and divided else {}
    gates = {name: known.get(name) or _gates_held(layer) for name, layer in adapters.items()}
    rows = tuple(_row(name, layer, controller, names, min(gates[name])) for name, layer in adapters.items())
    trainable = sum(element_count(p) for p in model.parameters() if p.requires_grad)
    in_adapters = sum(element_count(p) for layer in adapters.values() for p in layer.parameters(recurse=False))
    trained_in_full = max(0, trainable - in_adapters)
    if controller is None:
        return Report(rows, trained_in_full)
    config = controller.config
    measured = [row.coherence for row in rows if row.coherence is not None]
    return Report(
        rows,
        trained_in_full,
        controller.budget,
        config.budget_unit,
        controller.spare,
        controller.moved,
        least_coherence(measured, config.min_coherence) if measured else None,
    )


def _check_fused(adapters: dict[str, L1RALinear]) -> None:
    reasons: dict[str, list[str]] = {}
    for name, layer in adapters.items():
        path = layer.kernel_path()
        if not path.fused:
            reasons.setdefault(path.reason, []).append(name)
    if reasons:
        details = "; ".join(f"{abbreviated(names)} ({reason})" for reason, names in reasons.items())
        raise RuntimeError(f"strict=True, but adapters would run as plain PyTorch: {details}.")


def _path(layer: L1RALinear, names: dict[L1RALinear, str]) -> str:
    path = layer.kernel_path()
    if layer.sharing is None or not (path.fused and path.dense):
        return str(path)
    partners = [names[other].rpartition(".")[2] for other in layer.sharing.partners(layer) if other in names]
    if partners:
        return f"{path}, x read together with {', '.join(partners)}"
    return f"{path}, alone: its inputs differ from its siblings'" if layer.sharing.computes_alone(layer) else str(path)


def _gates_held(layer: L1RALinear) -> list[float]:
    if is_sharded(layer.gate):
        return [math.nan]
    gates = (layer.gate.detach()[: layer.rank] / layer.rank_scaling).tolist()
    return gates or [math.nan]


def _row(
    name: str,
    layer: L1RALinear,
    controller: RankController | None,
    names: dict[L1RALinear, str],
    smallest_gate: float,
) -> ReportRow:
    return ReportRow(
        name,
        layer.in_features,
        layer.out_features,
        layer.rank,
        controller.initial_ranks.get(name, layer.initial_rank) if controller else layer.initial_rank,
        smallest_gate,
        controller.history[-1]["coherence"].get(name) if controller else None,
        layer.rank * (layer.in_features + layer.out_features + 1),
        _path(layer, names),
    )
