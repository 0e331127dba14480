"""Online softmax over one tile of logits (the fold): in torch, and in one Triton launch.

    peak, total, target, rescale <- z_NT = cap(scale * (products_NT + bias_T))
    p_NT = exp(z - peak) * c, 0 for the label   c = 1 - (z / softcap)², or 1 without a cap

N rows, T columns of the vocabulary from `start` on. README.md says what for. The label's part in
the gradient is 1 - p, which p in 16 bits would have rounded away where a model is sure: it is left
out here and made from the answer, in float32.
"""

import math
from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.products import has_fast_mkl

LOG2_E = math.log2(math.e)
BLOCK_V = 1024  # columns that a program of the Triton fold reads at a time
BLOCK_V_OF_SUMS = 512  # with sums for statistics: of 1024, triton 3.7.1 spills some on sm_90


@dataclass(frozen=True, slots=True)
class RunningSoftmax:
    """The state of each row's online softmax; float32, or float64 for float64 inputs."""

    peak_N: Tensor  # largest logit
    total_N: Tensor  # sum of exp(z - peak)
    target_N: Tensor  # logit of the label; NaN while none was found
    rescale_N: Tensor  # exp(peak before the last tile - peak after it)
    weighted_N: Tensor | None  # sum of exp(z - peak) * z, for the entropy
    sum_N: Tensor | None  # sum of z, for the mean logit
    squares_N: Tensor | None  # sum of exp(z - peak)², for log_sum_p2

    @classmethod
    def start(cls, N: int, dtype: torch.dtype, device: torch.device, stats=()) -> "RunningSoftmax":
        """No column seen yet; the last three are summed for the statistics that need them."""

        def full(value):
            return torch.full((N,), value, dtype=dtype, device=device)

        optional = ("entropy", "mean_logit", "log_sum_p2")
        sums = [full(0.0) if name in stats else None for name in optional]
        lowest = torch.finfo(dtype).min  # not -inf: the first tile's logits may all be
        return cls(full(lowest), full(0.0), full(float("nan")), full(0.0), *sums)

    def block(self, rows: slice) -> "RunningSoftmax":
        """The state of some rows: views, so that a fold of them changes this one."""
        parts = (getattr(self, field.name) for field in fields(self))
        return RunningSoftmax(*(None if part is None else part[rows] for part in parts))


def _exp_(x: Tensor) -> Tensor:
    """exp, in place; as a power of two, which torch does not hand to MKL, where MKL is slow."""
    return x.exp_() if has_fast_mkl() else x.mul_(LOG2_E).exp2_()


def label_columns(labels_N: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """is_here_N, column_N1: whether each label lies in the tile of `width` columns from `start` on,
    and its column there. A label outside gets some column inside: mask it with is_here_N.
    """
    column_N = labels_N - start
    is_here_N = (column_N >= 0) & (column_N < width)
    return is_here_N, column_N.clamp_(0, width - 1)[:, None]


def _torch_fold(z_NT, p_NT, bias_T, labels_N, start, rows, scale, softcap):
    """Update `rows` with the products z_NT of one tile, and write its p_NT."""
    if bias_T is not None:
        z_NT.add_(bias_T)
    if scale != 1.0:
        z_NT.mul_(scale)
    if softcap is not None:
        z_NT.div_(softcap).tanh_().mul_(softcap)
    is_here_N, column_N1 = label_columns(labels_N, start, z_NT.shape[1])
    torch.where(is_here_N, z_NT.gather(1, column_N1).squeeze(1), rows.target_N, out=rows.target_N)

    peak_N = torch.maximum(rows.peak_N, z_NT.amax(1))
    torch.exp(rows.peak_N - peak_N, out=rows.rescale_N)
    rows.peak_N.copy_(peak_N)
    c_NT = None if softcap is None else (z_NT / softcap).square_().neg_().add_(1.0)
    if rows.sum_N is not None:
        rows.sum_N.add_(z_NT.sum(1))
    # from here on z_NT holds exp(z - peak)
    if rows.weighted_N is None:
        _exp_(z_NT.sub_(peak_N[:, None]))
    else:
        exp_NT = _exp_(z_NT - peak_N[:, None])
        rows.weighted_N.mul_(rows.rescale_N).add_(torch.linalg.vecdot(exp_NT, z_NT))
        z_NT.copy_(exp_NT)
    if rows.squares_N is not None:
        rows.squares_N.mul_(rows.rescale_N.square()).add_(torch.linalg.vecdot(z_NT, z_NT))
    rows.total_N.mul_(rows.rescale_N).add_(z_NT.sum(1))
    if c_NT is not None:  # and from here on p
        z_NT.mul_(c_NT)
    z_NT.scatter_(1, column_N1, z_NT.gather(1, column_N1).masked_fill_(is_here_N[:, None], 0.0))
    if p_NT is not z_NT:
        p_NT.copy_(z_NT)


@triton.jit
def _logit(z_ptr, bias_ptr, v, mask, scale, softcap, HAS_BIAS: tl.constexpr, CAP: tl.constexpr):
    z_V = tl.load(z_ptr + v, mask=mask, other=0.0)
    if HAS_BIAS:
        z_V += tl.load(bias_ptr + v, mask=mask, other=0.0).to(tl.float32)
    z_V *= scale
    if CAP:
        # softcap * tanh(z / softcap), with an exp that cannot overflow
        decay_V = tl.exp(tl.abs(z_V) * (-2.0 / softcap))
        tanh_V = (1.0 - decay_V) / (1.0 + decay_V)
        z_V = softcap * tl.where(z_V < 0, -tanh_V, tanh_V)
    return z_V


@triton.jit
def _fold_kernel(
    z_ptr,
    p_ptr,
    bias_ptr,
    labels_ptr,
    peak_ptr,
    total_ptr,
    target_ptr,
    rescale_ptr,
    weighted_ptr,
    sum_ptr,
    squares_ptr,
    start,
    width,
    z_stride,
    p_stride,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    CAP: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SUM: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # n * z_stride outgrows int32 from 16k rows of 128k
    z_ptr += n * z_stride
    p_ptr += n * p_stride
    old_peak = tl.load(peak_ptr + n)
    tile_peak_V = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    for first in range(0, width, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        z_V = _logit(z_ptr, bias_ptr, v, v < width, scale, softcap, HAS_BIAS, CAP)
        tile_peak_V = tl.maximum(tile_peak_V, tl.where(v < width, z_V, -float("inf")))
    peak = tl.maximum(old_peak, tl.max(tile_peak_V))
    rescale = tl.exp(old_peak - peak)

    column = tl.load(labels_ptr + n) - start
    target_V = tl.zeros((BLOCK_V,), tl.float32)
    total_V = tl.zeros((BLOCK_V,), tl.float32)
    weighted_V = tl.zeros((BLOCK_V,), tl.float32)
    sum_V = tl.zeros((BLOCK_V,), tl.float32)
    squares_V = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, width, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        z_V = _logit(z_ptr, bias_ptr, v, v < width, scale, softcap, HAS_BIAS, CAP)
        target_V += tl.where(v == column, z_V, 0.0)
        exp_V = tl.where(v < width, tl.exp(z_V - peak), 0.0)
        total_V += exp_V
        if WEIGHTED:
            weighted_V += exp_V * z_V
        if SUM:
            sum_V += z_V  # 0 from width on
        if SQUARES:
            squares_V += exp_V * exp_V
        if CAP:
            capped_V = z_V * (1.0 / softcap)
            exp_V *= 1.0 - capped_V * capped_V
        exp_V = tl.where(v == column, 0.0, exp_V)
        tl.store(p_ptr + v, exp_V.to(p_ptr.dtype.element_ty), mask=v < width)
    if (column >= 0) & (column < width):
        tl.store(target_ptr + n, tl.sum(target_V))
    tl.store(peak_ptr + n, peak)
    tl.store(rescale_ptr + n, rescale)
    tl.store(total_ptr + n, tl.load(total_ptr + n) * rescale + tl.sum(total_V))
    if WEIGHTED:
        tl.store(weighted_ptr + n, tl.load(weighted_ptr + n) * rescale + tl.sum(weighted_V))
    if SUM:
        tl.store(sum_ptr + n, tl.load(sum_ptr + n) + tl.sum(sum_V))
    if SQUARES:
        squares = tl.load(squares_ptr + n) * rescale * rescale
        tl.store(squares_ptr + n, squares + tl.sum(squares_V))


def _triton_fold(z_NT, p_NT, bias_T, labels_N, start, rows, scale, softcap):
    """As _torch_fold, in one launch: a program a row."""
    sums = (rows.weighted_N, rows.sum_N, rows.squares_N)
    with torch.cuda.device_of(z_NT):  # Triton launches on the current GPU, wherever tensors are
        _fold_kernel[(z_NT.shape[0],)](
            z_NT,
            p_NT,
            bias_T,
            labels_N,
            rows.peak_N,
            rows.total_N,
            rows.target_N,
            rows.rescale_N,
            *sums,
            start,
            z_NT.shape[1],
            z_NT.stride(0),
            p_NT.stride(0),
            scale,
            1.0 if softcap is None else softcap,
            HAS_BIAS=bias_T is not None,
            CAP=softcap is not None,
            WEIGHTED=rows.weighted_N is not None,
            SUM=rows.sum_N is not None,
            SQUARES=rows.squares_N is not None,
            BLOCK_V=BLOCK_V if all(x is None for x in sums) else BLOCK_V_OF_SUMS,
        )


FOLDS = {"torch": _torch_fold, "triton": _triton_fold}
