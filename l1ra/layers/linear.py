"""The adapted linear layer."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from l1ra.allocation.plan import LayerPlan
from l1ra.layers.base_layers import (
    FLOATS,
    TENSOR_PARALLEL,
    allow_packing,
    base_features,
    check_gradient,
    dense_weight,
    fallback_reason,
    is_conv1d,
    is_partitioned,
    is_tensor_parallel,
    main_tensor,
    prevent_packing,
    tensor_of,
)
from l1ra.layers.gradient_probe import Probe
from l1ra.layers.low_rank import ADAPTER_PARAMETERS, GatedLowRank
from l1ra.layers.merged_weight import (
    OriginalWeight,
    Rounding,
    add_to_weight,
    restore_weight,
    weight_with,
    why_not_exactly_mergeable,
)
from l1ra.layers.padded_weight import PaddedWeight
from l1ra.layers.pending_graphs import PendingGraphs
from l1ra.layers.recompute import may_be_recomputed, repeat_decision
from l1ra.layers.row_moves import RowMoves
from l1ra.layers.shared_input import SharedInput
from l1ra_kernels import dispatch

__all__ = ["L1RALinear"]


class L1RALinear(GatedLowRank):
    """A frozen linear layer with a gated low-rank adapter: ``y = base(x) + s * ((x @ A.T) * gate) @ B``.

    Source: L1RA, arXiv:2509.04884.

    Example::

        layer = l1ra.L1RALinear(768, 3072, rank=8)
        y = layer(torch.randn(4, 768))  # (4, 3072)

    Attributes besides those of :class:`GatedLowRank`:
        base_layer: the frozen layer: an ``nn.Linear``, a transformers ``Conv1D`` or a quantised linear layer.
        strict: raise an error if no fused kernel can run, instead of falling back to plain PyTorch. Default False.
        disabled: compute the base layer, with the reference if there is one; see ``RankController.disabled``.
        probe: collects the gradient of the weight while it is set, see :class:`Probe`.
        padded_weight: stores the base weight with padding, for the path ``"aug"``. None: the path is ``"chain"``.
        sharing: the layers that may be computed jointly with this one, see :class:`SharedInput`.
        family: a number of the controller, which copies of the layer keep. None without one.
        pending_graphs: records the calls whose backward has yet to run, while it is set.
    """

    @torch.inference_mode(False)
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
        """Create an ``nn.Linear(in_features, out_features, bias)``, freeze it, and add an adapter.

        Args:
            in_features, out_features, bias: of the base layer.
            rank: initial rank of the adapter, from 1 to the smaller of ``in_features`` and ``out_features``.
            alpha: numerator of the scaling. None stands for ``rank``, a scaling of 1.
            rank_stabilized: use the scaling ``alpha / sqrt(rank)`` instead of ``alpha / rank`` (rsLoRA).
            scale_with_rank: rescale the adapter when its rank changes, see ``L1RAConfig``.
            dropout: dropout probability of the adapter's input, from 0 to below 1.
            init: initial values of A, ``"kaiming"`` or ``"gaussian"``, see ``L1RAConfig``.
            adapter_dtype: dtype of A and B. The base layer keeps its own. The input is not copied to this dtype.
            reserve: constant number of rows of A, gate and B, and so the largest rank. Rows beyond the rank are 0. The
                shapes and addresses don't change with the rank then, so compiled and captured graphs stay valid. None:
                as many rows as ranks.
            generator: a CPU generator, for the initial values of A.
            device, dtype: of the base layer. The adapter is on the same device.

        Raises:
            ValueError: rank, alpha, dropout, init or reserve is out of its range.
        """
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._adapt(
            base, dropout, rank, alpha, rank_stabilized, scale_with_rank, init, adapter_dtype, reserve, generator
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
        """Freeze an existing layer and add an adapter to it.

        Example::

            linear = nn.Linear(768, 3072)
            layer = l1ra.L1RALinear.from_linear(linear, rank=8)  # layer.base_layer is linear

        Args:
            base: an ``nn.Linear``, a transformers ``Conv1D`` or a quantised linear layer. The object itself becomes
                :attr:`base_layer`, without a copy.

        The other arguments are those of the constructor.

        Raises:
            TypeError: ``base`` can't be adapted.
            ValueError: rank, alpha, dropout, init or reserve is out of its range, or ``base`` has a 4-bit weight that
                bitsandbytes has packed for inference, through which no gradient passes.
        """
        if is_tensor_parallel(base):
            raise TypeError(f"this {type(base).__name__} can't be adapted: {TENSOR_PARALLEL}.")
        if base_features(base) is None:
            raise TypeError(
                f"{type(base).__name__} can't be adapted: pass an nn.Linear, a transformers Conv1D or a quantised "
                "linear layer, not a module that contains one."
            )
        layer = cls.__new__(cls)
        layer._adapt(
            base, dropout, rank, alpha, rank_stabilized, scale_with_rank, init, adapter_dtype, reserve, generator
        )
        return layer

    @torch.inference_mode(False)  # what is made here is trained later
    def _adapt(self, base: nn.Module, dropout: float, *adapter: Any) -> None:
        """The common part of the constructors. ``adapter``: arguments of :class:`GatedLowRank` from the rank on."""
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, not {dropout!r}: at 1 the adapter would see nothing.")
        super().__init__(*base_features(base), main_tensor(base).device, *adapter)
        self._packs_on_cpu = prevent_packing(base)
        self.base_layer = base.requires_grad_(False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.train(base.training)
        self.strict = False
        self.disabled = False
        self.probe: Probe | None = None
        self.padded_weight: PaddedWeight | None = None
        self.sharing: SharedInput | None = None
        self.family: int | None = None
        self.pending_graphs: PendingGraphs | None = None
        self._original_weight: OriginalWeight | None = None

    @property
    def weight(self) -> Tensor:
        """The weight of the base layer, without the adapter. Code of models reads its dtype and device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base layer."""
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        """Whether the adapter has been added to the base weight."""
        return self._original_weight is not None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the layer.

        Args:
            x: ``(..., in_features)``.
            *args, **kwargs: passed to the forward of the base layer.

        Returns:
            ``(..., out_features)`` in the dtype that the base layer returns.

        Raises:
            RuntimeError: ``strict`` is set and no fused kernel can run, a quantised base layer gives no gradient in
                training, or the base layer is divided by tensor parallelism. The message says why.
        """
        reason = "it was called with more than its input" if args or kwargs else ""
        path, output = self.call_path(x, reason), None
        if path is None:
            output = self.base_layer(x, *args, **kwargs)
            if self.merged or not self.has_reference:
                return output
            return output + self.reference_output(x).to(output.dtype)
        if not path.dense:
            if is_tensor_parallel(self.base_layer):
                raise RuntimeError(
                    f"an adapted {type(self.base_layer).__name__} can't be computed: {TENSOR_PARALLEL}. Leave the "
                    "adapted layers out of the plan, or train without tensor parallelism."
                )
            output = self.base_layer(x, *args, **kwargs)
            if self.training:
                check_gradient(self.base_layer, x, output)
            if output.dtype != x.dtype:
                path = dispatch.path_for(output.device, output.dtype, path.reason)
        if self.strict and not path.fused:
            raise RuntimeError(f"strict=True, but the adapter would run as plain PyTorch: {path.reason}.")
        shares = self.sharing is not None and path.dense and path.fused
        y = self.sharing.output_for(self, x) if shares else None
        if y is None:
            y = dispatch.gated_linears(x, [self.kernel_inputs(output)], self.dropout_p, path)[0]
        if not torch.compiler.is_compiling() and self.pending_graphs is not None:
            self.pending_graphs.add(self, y)
        return y

    def call_path(self, x: Tensor, reason: str = "") -> dispatch.Path | None:
        """The path of a call with ``x``, or None if the adapter is not computed: merged or disabled.

        A recompute under activation checkpointing uses the path of its forward. Otherwise a hook on the base layer, or
        a block in which adapters are disabled, that was added or removed in between would change the computation.

        Args:
            x: the input.
            reason: as in :meth:`kernel_path`.
        """
        if self._original_weight is not None:
            return None
        if may_be_recomputed():
            decide = lambda: None if self.disabled else self.kernel_path(x, reason)  # noqa: E731
            return repeat_decision((self, x.dtype, reason), decide)
        return None if self.disabled else self.kernel_path(x, reason)

    def kernel_path(self, x: Tensor | None = None, reason: str = "") -> dispatch.Path:
        """The path by which the layer is computed.

        Args:
            x: the input. None stands for an input with the dtype and device of the weight, outside of autocast.
            reason: why the base layer has to compute the product with the weight itself; empty if there is no reason.
        """
        base = self._modules["base_layer"]
        like = main_tensor(base) if x is None else x
        device, dtype = like.device, like.dtype
        if dtype not in FLOATS:
            dtype = self.lora_A.dtype
        path = dispatch.path_for(device, dtype, reason or fallback_reason(base, device, dtype))
        return path if self.padded_weight is None or path.name != "chain" else dispatch.AUG

    @property
    def parameter_version(self) -> int:
        """A number that increases with each write to the adapter's parameters, as by an optimizer step."""
        a, gate, b = (tensor_of(self, name) for name in ADAPTER_PARAMETERS)
        return a._version + gate._version + b._version

    @property
    def counts_versions(self) -> bool:
        """Whether writes to the tensors of the layer can be detected. Inference tensors have no version counter."""
        weight = tensor_of(self._modules["base_layer"], "weight")
        return not (tensor_of(self, "lora_A").is_inference() or weight.is_inference())

    @property
    def output_version(self) -> tuple:
        """A tuple that changes with everything that affects the output: parameters, base weight, scaling, probe and
        dropout."""
        base = self.base_layer
        bias = None if base.bias is None else base.bias._version
        return self.parameter_version, base.weight._version, bias, self.scaling, id(self.probe), self.dropout_p

    @property
    def dropout_p(self) -> float:
        """The dropout probability of the adapter's input in the current mode: 0 in evaluation."""
        if not self.training:
            return 0.0
        dropout = self._modules["dropout"]
        return dropout.p if isinstance(dropout, nn.Dropout) else 0.0

    def kernel_inputs(self, output: Tensor | None = None) -> dispatch.Layer:
        """The tensors of the layer for the kernels.

        Args:
            output: the output of the base layer. None: the kernels compute it, and get the weight and bias instead.
        """
        a, gate, b = tensor_of(self, "lora_A"), tensor_of(self, "gate"), tensor_of(self, "lora_B")
        if self.probe is not None and torch.is_grad_enabled():
            a, gate, b = self.probe.append_to(a, gate, b)
        if output is not None:
            return dispatch.Layer(a, gate, b, self.scaling, output=output)
        base, padded = self._modules["base_layer"], self.padded_weight
        augmented = None if padded is None or torch.compiler.is_compiling() else padded.storage(base)
        return dispatch.Layer(a, gate, b, self.scaling, dense_weight(base), tensor_of(base, "bias"), None, augmented)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """``s * (gate * B).T @ A`` in the layout of the base weight; float64 if A is, otherwise float32.

        Raises:
            RuntimeError: ZeRO stage 3 has partitioned the parameters.
        """
        if is_partitioned(self.lora_A):
            raise RuntimeError(
                "ZeRO stage 3 has partitioned the parameters: call l1ra.export_peft(model, folder) in all processes, "
                "and load and merge that in one process."
            )
        exact = self.gate.dtype  # 16-bit parameters would be rounded twice
        delta = (self.lora_B.to(exact) * (self.scaling * self.gate).unsqueeze(1)).T @ self.lora_A.to(exact)
        return delta.T if is_conv1d(self.base_layer) else delta

    def why_not_exactly_mergeable(self) -> str:
        """Why there is no :meth:`merged_weight`, e.g. because the base weight is quantised; empty if there is one."""
        return why_not_exactly_mergeable(self.base_layer)

    def merged_weight(self) -> Tensor:
        """The base weight with the adapter added, in the dtype and layout of the base weight. The layer is unchanged.

        Raises:
            TypeError: the base weight can't be added to without loss; the message is a reason.
        """
        if reason := self.why_not_exactly_mergeable():
            raise TypeError(reason)
        return weight_with(self.base_layer, self.delta_weight())

    def merge(self) -> None:
        """Add the adapter to the base weight. The forward computes the base layer alone until :meth:`unmerge`.

        A copy of the original weight is kept. Merging into a 16-bit weight rounds the sum: changes smaller than half a
        unit in the last place of an element are lost. A 4-bit or 8-bit weight of bitsandbytes is quantised again, and a
        ``UserWarning`` states the error.

        Raises:
            RuntimeError: the adapter is merged already, or disabled.
            TypeError: the base weight can't be added to: it is quantised in another way, or not a plain weight.
        """
        rounding = self.merge_without_warning()
        if rounding is not None:
            warnings.warn(str(rounding), stacklevel=2)

    def merge_without_warning(self) -> Rounding | None:
        """As :meth:`merge`, but return the rounding error of a quantised weight instead of warning."""
        if self.merged:
            raise RuntimeError("the adapter is merged already: call unmerge() first.")
        if self.disabled:
            raise RuntimeError("a disabled adapter can't be merged: leave controller.disabled() first.")
        self._original_weight, rounding = add_to_weight(self.base_layer, self.delta_weight())
        return rounding

    def unmerge(self) -> None:
        """Restore the original base weight, bit for bit.

        Raises:
            RuntimeError: the adapter is not merged.
        """
        if self._original_weight is None:
            raise RuntimeError("the adapter is not merged: call merge() first.")
        restore_weight(self.base_layer, self._original_weight)
        self._original_weight = None

    def restore_base(self, *, keep_merged: bool = False) -> nn.Module:
        """Return the base layer in its state before it was adapted, for use without this layer. It remains frozen.

        Args:
            keep_merged: don't unmerge the adapter if it is merged.
        """
        if self.merged and not keep_merged:
            self.unmerge()
        if self.padded_weight is not None:
            self.padded_weight.remove(self.base_layer)
        if self._packs_on_cpu:
            allow_packing(self.base_layer)
        return self.base_layer

    def plan_resize(self, moves: RowMoves, plan: LayerPlan, new_rows: Tensor | None = None) -> None:
        """See :meth:`GatedLowRank.plan_resize`.

        Raises:
            RuntimeError: the adapter is merged.
        """
        if self.merged:
            raise RuntimeError("a merged adapter can't change its rank: call unmerge() first.")
        super().plan_resize(moves, plan, new_rows)

    def _apply(self, *args: Any, **kwargs: Any) -> L1RALinear:
        # .to(), .cuda() and the like call this method. The probe is not a submodule, so it is moved here.
        super()._apply(*args, **kwargs)
        if self.probe is not None:
            self.probe.move_to(self.lora_A.detach())
        return self

    def _replicate_for_data_parallel(self) -> L1RALinear:
        # A replica of nn.DataParallel exists for one forward on its own device, and must not keep any state.
        replica = super()._replicate_for_data_parallel()
        replica.padded_weight = replica.sharing = replica.pending_graphs = None
        return replica

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no controller that would remove its probe or enable it again.
        return {**self.__dict__, "probe": None, "disabled": False, "pending_graphs": None}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling * self.rank_scaling:g}" + (", merged" if self.merged else "")
