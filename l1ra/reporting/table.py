"""The report on a model's adapters: a table by layer, one by projection, and a line by depth."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from l1ra.layers.adapted_model import abbreviated, controller_of, find_adapters
from l1ra.layers.gradient_probe import least_coherence
from l1ra.layers.linear import L1RALinear
from l1ra.reporting.columns import aligned_columns
from l1ra.reporting.rank_map import ProjectionRanks, ranks_by_depth, ranks_by_projection
from l1ra.training.controller import RankController

__all__ = ["Report", "ReportRow", "report"]


@dataclass(frozen=True)
class ReportRow:
    """One adapter.

    Attributes:
        name: as in ``named_modules()``.
        in_features, out_features: of the layer.
        rank, initial_rank: now and at the start.
        smallest_gate: of its ranks.
        coherence: how much its gradients agreed before the last reallocation: below ``least_coherence`` of the report
            it got no rank that another adapter could take. None where nobody has looked yet.
        params: adapter parameters now, gates included.
        path: ``"fused (chain)"``, ``"fused (aug)"`` or ``"fused (add)"``, the Triton kernels around cuBLAS' product or
            around the base layer's own forward, or ``"torch"``, with the reason; and which layers read their input
            together.
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
    """The adapters of a model; ``str()`` makes tables of it: by layer, by kind of projection, and a line by depth.

    ``budget``, ``spare``, ``moved`` and ``least_coherence`` are None where no controller drives the model, and
    ``least_coherence`` as long as nobody has looked.
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
        """Adapter parameters in all, gates included."""
        return sum(row.params for row in self.rows)

    @property
    def by_projection(self) -> dict[str, ProjectionRanks]:
        """Kind of projection -> its layers, mean ranks and shares, in the order of the model."""
        return ranks_by_projection(self.rows)

    @property
    def by_depth(self) -> dict[int | None, int]:
        """Block number -> sum of its ranks, first to last; None: the layers outside of blocks, if there are any."""
        return ranks_by_depth({row.name: row.rank for row in self.rows})

    def __str__(self) -> str:
        paths = list(dict.fromkeys(row.path for row in self.rows))
        lines = self._layers(paths)
        if self.budget is not None:
            lines.append(f"budget {self.budget:,} {self.budget_unit}, spare {self.spare:,}; {self.moved:,} ranks moved")
        looked_at = [row.coherence for row in self.rows if row.coherence is not None]
        if looked_at:
            learning, limit = sum(c >= self.least_coherence for c in looked_at), f"{self.least_coherence:.2f}"
            lines.append(
                f"{learning} of {len(looked_at)} adapters could use more ranks: a coherence of {limit} or more"
            )
        if self.trained_in_full:
            lines.append(f"trained in full besides: {self.trained_in_full:,} parameters")
        for number, path in enumerate(paths, 1):
            lines.append(f"path{'' if len(paths) == 1 else f' [{number}]'}: {path}")
        return "\n".join([*lines, "", *self._rank_map()])

    def _layers(self, paths: list[str]) -> list[str]:
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

    def _rank_map(self) -> list[str]:
        head = ("projection", "layers", "mean rank", "was", "of ranks", "of parameters")
        cells = [
            (
                name,
                str(kind.layers),
                f"{kind.mean_rank:.2f}",
                f"{kind.mean_initial_rank:.2f}",
                f"{kind.share_of_ranks:.1%}",
                f"{kind.share_of_params:.1%}",
            )
            for name, kind in self.by_projection.items()
        ]
        first, *lines = aligned_columns([head, *cells], left=(0,))
        lines = [first, "-" * len(first), *lines]
        depths = self.by_depth
        if any(block is not None for block in depths):
            told = (f"{'outside of blocks' if block is None else block}: {sum_}" for block, sum_ in depths.items())
            lines.append(f"ranks by depth, block by block: {', '.join(told)}")
        return lines


def report(model: nn.Module, *, strict: bool = False) -> Report:
    """The adapters of ``model``: ranks now and at the start, gates, parameters, and which implementation runs.

    Args:
        strict: raise if any adapter would run as plain PyTorch.

    Raises:
        ValueError: the model has no adapter.
        RuntimeError: ``strict`` is set and an adapter would run as plain PyTorch; the message says which, and why.
    """
    adapters = dict(find_adapters(model))
    if not adapters:
        raise ValueError("the model has no adapter: call l1ra.patch(model, budget=...) first.")
    if strict:
        _refuse_plain(adapters)
    controller = controller_of(model)
    names = {layer: name for name, layer in adapters.items()}
    rows = tuple(_row(name, layer, controller, names) for name, layer in adapters.items())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    others = max(0, trainable - sum(p.numel() for layer in adapters.values() for p in layer.parameters(recurse=False)))
    if controller is None:
        return Report(rows, others)
    config = controller.config
    looked_at = [row.coherence for row in rows if row.coherence is not None]
    limit = least_coherence(looked_at, config.min_coherence) if looked_at else None
    return Report(rows, others, controller.budget, config.budget_unit, controller.spare, controller.moved, limit)


def _refuse_plain(adapters: dict[str, L1RALinear]) -> None:
    reasons: dict[str, list[str]] = {}
    for name, layer in adapters.items():
        path = layer.kernel_path()
        if not path.fused:
            reasons.setdefault(path.reason, []).append(name)
    if reasons:
        told = "; ".join(f"{abbreviated(names)} ({reason})" for reason, names in reasons.items())
        raise RuntimeError(f"strict=True, but adapters would run as plain PyTorch: {told}.")


def _path(layer: L1RALinear, names: dict[L1RALinear, str]) -> str:
    path = layer.kernel_path()
    if layer.sharing is None or not (path.fused and path.dense):
        return str(path)
    partners = [names[other].rpartition(".")[2] for other in layer.sharing.partners(layer) if other in names]
    if partners:
        return f"{path}, x read together with {', '.join(partners)}"
    return f"{path}, alone: its inputs differ from its siblings'" if layer.sharing.computes_alone(layer) else str(path)


def _row(name: str, layer: L1RALinear, controller: RankController | None, names: dict[L1RALinear, str]) -> ReportRow:
    return ReportRow(
        name,
        layer.in_features,
        layer.out_features,
        layer.rank,
        controller.initial_ranks.get(name, layer.initial_rank) if controller else layer.initial_rank,
        layer.gate.detach()[: layer.rank].min().item() / layer.rank_scaling,
        controller.history[-1]["coherence"].get(name) if controller else None,
        layer.rank * (layer.in_features + layer.out_features + 1),
        _path(layer, names),
    )
