"""The adapted linear layer."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from l1ra.allocation.plan import LayerPlan
from l1ra.layers.base_layers import (
    FLOATS,
    allow_packing,
    base_features,
    check_gradient,
    dense_weight,
    fallback_reason,
    is_conv1d,
    main_tensor,
    prevent_packing,
)
from l1ra.layers.gradient_probe import Probe
from l1ra.layers.low_rank import GatedLowRank
from l1ra.layers.merged_weight import OriginalWeight, Rounding, add_to_weight, restore_weight
from l1ra.layers.padded_weight import PaddedWeight
from l1ra.layers.recompute import repeat_decision
from l1ra.layers.row_moves import RowMoves
from l1ra.layers.shared_input import SharedInput
from l1ra_kernels import dispatch

__all__ = ["L1RALinear"]


class L1RALinear(GatedLowRank):
    """A frozen linear layer with a gated low-rank adapter: ``y = base(x) + s * ((x @ A.T) * g) @ B``.

    Attributes besides those of :class:`GatedLowRank`:
        base_layer: the frozen layer, an ``nn.Linear`` (or subclass), transformers' ``Conv1D`` or a quantised one.
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
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._adapt(
            base,
            dropout,
            rank=rank,
            alpha=alpha,
            rank_stabilized=rank_stabilized,
            scale_with_rank=scale_with_rank,
            init=init,
            adapter_dtype=adapter_dtype,
            reserve=reserve,
            generator=generator,
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
        layer._adapt(
            base,
            dropout,
            rank=rank,
            alpha=alpha,
            rank_stabilized=rank_stabilized,
            scale_with_rank=scale_with_rank,
            init=init,
            adapter_dtype=adapter_dtype,
            reserve=reserve,
            generator=generator,
        )
        return layer

    def _adapt(self, base: nn.Module, dropout: float, **adapter: Any) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, not {dropout!r}: at 1 the adapter would see nothing.")
        super().__init__(*base_features(base), device=main_tensor(base).device, **adapter)
        self._packs_for_cpu = prevent_packing(base)
        self.base_layer = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.train(base.training)
        self._merged_from: OriginalWeight | None = None
        self.probe: Probe | None = None
        self.strict = False
        self.disabled = False
        self.padded_weight: PaddedWeight | None = None
        self.sharing: SharedInput | None = None

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
        more = "it was called with more than its input" if args or kwargs else ""
        path, output = self.call_path(x, more), None
        if path is None:
            return self.base_layer(x, *args, **kwargs)
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
        return dispatch.gated_linears(x, [self.kernel_inputs(output)], self.dropout_now, path)[0]

    def call_path(self, x: Tensor, more: str = "") -> dispatch.Path | None:
        """The path of a call with ``x``, now; None: the base layer alone. ``more`` as of :meth:`kernel_path`.

        A recompute takes that of its forward: what has come or gone since, a hook on the base layer or a block in which
        adapters are disabled, would make it another computation.
        """
        if self.merged:
            return None
        return repeat_decision((self, x.dtype, more), lambda: None if self.disabled else self.kernel_path(x, more))

    def kernel_path(self, x: Tensor | None = None, more: str = "") -> dispatch.Path:
        """How the layer is computed for ``x``; None stands for an input like its weight, outside of autocast.

        Args:
            more: a reason to leave the product with the weight to the base layer.
        """
        like = main_tensor(self.base_layer) if x is None else x
        dtype = like.dtype if like.dtype in FLOATS else self.lora_A.dtype
        path = dispatch.path_for(like.device, dtype, more or fallback_reason(self.base_layer, like.device, dtype))
        return path if self.padded_weight is None or path.name != "chain" else dispatch.AUG

    @property
    def parameter_version(self) -> int:
        """Rises whenever the adapter's parameters are written to, as an optimizer's step does."""
        return self.lora_A._version + self.gate._version + self.lora_B._version

    @property
    def output_version(self) -> tuple:
        """Differs after anything that an output depends on has changed: parameters, weight, scaling, probe, dropout."""
        base = self.base_layer
        bias = None if base.bias is None else base.bias._version
        return self.parameter_version, base.weight._version, bias, self.scaling, id(self.probe), self.dropout_now

    @property
    def dropout_now(self) -> float:
        """The probability that an element of the adapter's input is dropped, 0 in evaluation."""
        return self.dropout.p if self.training and isinstance(self.dropout, nn.Dropout) else 0.0

    def kernel_inputs(self, output: Tensor | None = None) -> dispatch.Layer:
        """What the kernels need: the adapter, and the ``output`` of the base layer or its weight."""
        a, gate, b = self.lora_A, self.gate, self.lora_B
        if self.probe is not None and torch.is_grad_enabled():
            a, gate, b = self.probe.append_to(a, gate, b)
        if output is not None:
            return dispatch.Layer(a, gate, b, self.scaling, output=output)
        augmented = (
            None
            if self.padded_weight is None or torch.compiler.is_compiling()
            else self.padded_weight.storage(self.base_layer)
        )
        return dispatch.Layer(
            a, gate, b, self.scaling, dense_weight(self.base_layer), self.base_layer.bias, augmented=augmented
        )

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """``s * (g * B).T @ A`` in the layout of the base weight, float32, or float64 where A is."""
        exact = self.gate.dtype  # adapters in 16 bits would be rounded twice on the way
        delta = (self.lora_B.to(exact) * (self.scaling * self.gate).unsqueeze(1)).T @ self.lora_A.to(exact)
        return delta.T if is_conv1d(self.base_layer) else delta

    def merge_without_warning(self) -> Rounding | None:
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
        rounding = self.merge_without_warning()
        if rounding is not None:
            warnings.warn(str(rounding), stacklevel=2)

    def unmerge(self) -> None:
        """Give the base weight back, bit for bit.

        Raises:
            RuntimeError: not merged.
        """
        if self._merged_from is None:
            raise RuntimeError("the adapter is not merged: call merge() first.")
        restore_weight(self.base_layer, self._merged_from)
        self._merged_from = None

    def release(self, *, merged: bool = False) -> nn.Module:
        """The base layer as it was before it was adapted, for use without the adapter; with ``merged`` its weight stays
        merged if it is."""
        if self.merged and not merged:
            self.unmerge()
        if self.padded_weight is not None:
            self.padded_weight.remove(self.base_layer)
        if self._packs_for_cpu:
            allow_packing(self.base_layer)
        return self.base_layer

    def plan_resize(self, moves: RowMoves, plan: LayerPlan, new_rows: Tensor | None = None) -> None:
        """As of :class:`GatedLowRank`.

        Raises:
            RuntimeError: the adapter is merged.
        """
        if self.merged:
            raise RuntimeError("a merged adapter can't change its rank: call unmerge() first.")
        super().plan_resize(moves, plan, new_rows)

    def _apply(self, *args: Any, **kwargs: Any) -> L1RALinear:
        # What .to() and its like go through: a probe is no submodule.
        super()._apply(*args, **kwargs)
        if self.probe is not None:
            self.probe.to_like(self.lora_A.detach())
        return self

    def _replicate_for_data_parallel(self) -> L1RALinear:
        # nn.DataParallel's replicas live for one forward, on their own devices: nothing of theirs is to be kept.
        replica = super()._replicate_for_data_parallel()
        replica.padded_weight = replica.sharing = None
        return replica

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no controller that would ever take its probe, or leave the block in which it is disabled.
        return {**self.__dict__, "probe": None, "disabled": False}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling * self.rank_scaling:g}" + (", merged" if self.merged else "")
