"""A LoRA linear in LoRAFusion's published structure: a Triton product that takes the rank-r term along.

The shrink is a product of its own (split off, cuBLAS); ``Y = X W^T + s H B`` is one kernel, whose last step over the
inner dimension is the rank. The same kernel computes ``dX = dY W + s P A``. Another makes ``P = dY B^T`` and
``dB = s H^T dY`` from one read of dY; dA is a cuBLAS product. The code is ours.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from benchmarks.gpu.bench import LeftOut
from l1ra_kernels.choice import interpreting

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

__all__ = ["LoRAFusionStyle"]


class Tiles(NamedTuple):
    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


# The fastest is picked for each shape at its first call.
CHOICES = (Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 64, 8, 4), Tiles(128, 128, 64, 4, 3), Tiles(128, 256, 32, 8, 4))
SMALL = Tiles(16, 16, 16, 4, 1)
GROUP = 8
TRIES = 5
_chosen: dict[tuple, Tiles] = {}

if triton is not None:

    @triton.jit
    def _product_with_rank(
        p_x,  # (M, K), rows contiguous
        p_w,  # (K, N), any strides
        p_h,  # (M, rank), rows contiguous
        p_b,  # (rank, N), rows contiguous
        p_y,  # (M, N), rows contiguous
        M,
        N,
        K,
        rank,
        s_wk,
        s_wn,
        scaling,
        BM: tl.constexpr,
        BN: tl.constexpr,
        BK: tl.constexpr,
        R: tl.constexpr,
        GROUP: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        pid = tl.program_id(0)
        tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
        # Programs that run together share rows and columns, which then come from L2.
        first = pid // (GROUP * tiles_n) * GROUP
        height = min(tiles_m - first, GROUP)
        tile_m = first + pid % (GROUP * tiles_n) % height
        tile_n = pid % (GROUP * tiles_n) // height
        o_m = tile_m.to(tl.int64) * BM + tl.arange(0, BM)
        o_n = tile_n.to(tl.int64) * BN + tl.arange(0, BN)
        o_k, o_r = tl.arange(0, BK), tl.arange(0, R)
        m_m, m_n, m_r = o_m < M, o_n < N, o_r < rank
        # Rows beyond the end are read from the first ones, so that the loop needs no mask for them.
        p_xs = p_x + (o_m % M)[:, None] * K + o_k[None, :]
        p_ws = p_w + o_k[:, None] * s_wk + (o_n % N)[None, :] * s_wn
        b_y = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            b_x = tl.load(p_xs, mask=o_k[None, :] < K - k, other=0.0)
            b_w = tl.load(p_ws, mask=o_k[:, None] < K - k, other=0.0)
            b_y = tl.dot(b_x, b_w, b_y, input_precision=PRECISION)
            p_xs += BK
            p_ws += BK * s_wk
        b_h = tl.load(p_h + o_m[:, None] * rank + o_r[None, :], mask=m_m[:, None] & m_r[None, :], other=0.0)
        b_b = tl.load(p_b + o_r[:, None] * N + o_n[None, :], mask=m_r[:, None] & m_n[None, :], other=0.0)
        b_h = (b_h.to(tl.float32) * scaling).to(b_b.dtype)
        b_y = tl.dot(b_h, b_b, b_y, input_precision=PRECISION)
        p_ys = p_y + o_m[:, None] * N + o_n[None, :]
        tl.store(p_ys, b_y.to(p_y.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])

    @triton.jit
    def _hidden_and_rows(
        p_dy,  # (M, N), rows contiguous
        p_h,  # (M, rank), rows contiguous
        p_b,  # (rank, N), rows contiguous
        p_p,  # (M, rank), rows contiguous
        p_db,  # (rank, N) float32, zeros
        M,
        N,
        rank,
        scaling,
        BM: tl.constexpr,
        BN: tl.constexpr,
        R: tl.constexpr,
        PRECISION: tl.constexpr,
    ):
        o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
        o_r = tl.arange(0, R)
        m_m, m_r = o_m < M, o_r < rank
        m_h = m_m[:, None] & m_r[None, :]
        b_h = tl.load(p_h + o_m[:, None] * rank + o_r[None, :], mask=m_h, other=0.0)
        b_p = tl.zeros((BM, R), tl.float32)
        for n in range(0, N, BN):
            o_n = n + tl.arange(0, BN)
            m_rn = m_r[:, None] & (o_n < N)[None, :]
            b_dy = tl.load(p_dy + o_m[:, None] * N + o_n[None, :], mask=m_m[:, None] & (o_n < N)[None, :], other=0.0)
            b_b = tl.load(p_b + o_r[:, None] * N + o_n[None, :], mask=m_rn, other=0.0)
            b_p = tl.dot(b_dy, tl.trans(b_b), b_p, input_precision=PRECISION)
            b_db = tl.dot(tl.trans(b_h), b_dy, input_precision=PRECISION)
            tl.atomic_add(p_db + o_r[:, None] * N + o_n[None, :], scaling * b_db, mask=m_rn, sem="relaxed")
        tl.store(p_p + o_m[:, None] * rank + o_r[None, :], b_p.to(p_p.dtype.element_ty), mask=m_h)


def launch(x: Tensor, w: Tensor, h: Tensor, b: Tensor, y: Tensor, scaling: float, tiles: Tiles) -> None:
    (m, k), n, rank = x.shape, w.shape[1], h.shape[1]
    _product_with_rank[(triton.cdiv(m, tiles.rows) * triton.cdiv(n, tiles.columns),)](
        x,
        w,
        h,
        b,
        y,
        m,
        n,
        k,
        rank,
        w.stride(0),
        w.stride(1),
        scaling,
        BM=tiles.rows,
        BN=tiles.columns,
        BK=tiles.inner,
        R=max(16, triton.next_power_of_2(rank)),
        GROUP=GROUP,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )


def pick(*args) -> Tiles:
    """The fastest tiles for these operands, found once a shape."""
    x, w = args[0], args[1]
    if x.device.type != "cuda":
        return SMALL
    key = (x.shape, w.shape, w.stride(), args[2].shape, x.dtype)
    if key not in _chosen:
        times = {}
        for tiles in CHOICES:
            try:
                launch(*args, tiles)
            except triton.runtime.errors.OutOfResources:
                continue
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(TRIES):
                launch(*args, tiles)
            end.record()
            end.synchronize()
            times[start.elapsed_time(end)] = tiles
        if not times:
            raise LeftOut("none of its tiles fits this card")
        _chosen[key] = times[min(times)]
    return _chosen[key]


def product_with_rank(x: Tensor, w: Tensor, h: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``x w + s h b``: x (M, K), w (K, N) of any strides, h (M, r), b (r, N)."""
    x, h, b = x.contiguous(), h.contiguous(), b.contiguous()
    y = x.new_empty(x.shape[0], w.shape[1])
    args = (x, w, h, b, y, scaling)
    launch(*args, pick(*args))
    return y


def hidden_and_rows(dy: Tensor, h: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """``dY B^T`` (M, r) in the dtype of dY (M, N), and ``s H^T dY`` (r, N) in float32."""
    dy, h, b = dy.contiguous(), h.contiguous(), b.contiguous()
    (m, n), rank = dy.shape, h.shape[1]
    p, db = torch.empty_like(h), torch.zeros(b.shape, dtype=torch.float32, device=b.device)
    rows, columns = (64, 128) if dy.device.type == "cuda" else (16, 16)
    _hidden_and_rows[(triton.cdiv(m, rows),)](
        dy,
        h,
        b,
        p,
        db,
        m,
        n,
        rank,
        scaling,
        BM=rows,
        BN=columns,
        R=max(16, triton.next_power_of_2(rank)),
        PRECISION="ieee" if dy.dtype == torch.float32 else "tf32",
        num_warps=8,
        num_stages=3,
    )
    return p, db


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        a16, b16 = a.to(x.dtype), b.to(x.dtype)
        h = x @ a16.t()
        y = product_with_rank(x, w.t(), h, b16, scaling)
        ctx.save_for_backward(x, h, a16, b16)
        ctx.w, ctx.scaling, ctx.dtypes = w, scaling, (a.dtype, b.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, h, a, b = ctx.saved_tensors
        s = ctx.scaling
        p, db = hidden_and_rows(dy, h, b, s)
        da = torch.empty_like(a)
        da.addmm_(p.t(), x, alpha=s, beta=0)
        dx = product_with_rank(dy, ctx.w, p, a, s)
        return dx, None, da.to(ctx.dtypes[0]), db.to(ctx.dtypes[1]), None


class LoRAFusionStyle(nn.Module):
    """``x W^T + s (x A^T) B`` with a (r, K) and b (r, N); x is two-dimensional.

    Raises:
        LeftOut: neither a GPU nor Triton's interpreter is there.
    """

    def __init__(self, linear: nn.Linear, a: nn.Parameter, b: nn.Parameter, scaling: float) -> None:
        super().__init__()
        if triton is None:
            raise LeftOut("triton can't be imported")
        if linear.weight.device.type != "cuda" and not interpreting():
            raise LeftOut("its kernel needs a GPU, or TRITON_INTERPRET=1")
        self.base, self.a, self.b, self.scaling = linear, a, b, scaling

    def forward(self, x: Tensor) -> Tensor:
        return _Function.apply(x, self.base.weight, self.a, self.b, self.scaling)
