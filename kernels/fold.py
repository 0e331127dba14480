"""Online softmax over one tile of logits (the fold): in torch, and in one Triton launch.

    peak, total, label_logit, rescale <- z_NT = cap(scale * (products_NT + bias_T))
    p_NT = exp(z - peak) * c, 0 for the label   c = 1 - (z / softcap)², or 1 without a cap

N rows, T columns of the vocabulary from `start` on; no p is made where p_NT is None. README.md
derives it. The label's part in the gradient is 1 - p, which p in 16 bits would round away where the
model is confident: it is left out here and computed from the answer, in float32 (dlogits.py).
"""

import math
from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.products import has_fast_mkl

# A program reads one number of each: a variant compiled for aligned addresses would gain nothing.
ONE_NUMBER_A_ROW = ["labels_ptr", "peak_ptr", "total_ptr", "label_logit_ptr", "rescale_ptr"]
ONE_NUMBER_A_ROW += ["exp_z_sum_ptr", "z_sum_ptr", "exp_square_sum_ptr"]
LOG2_E = math.log2(math.e)
MOST_IN_REGISTERS = 8192  # columns: a row up to this long is read once and stays in registers
BLOCK_T = 1024  # columns read at a time in a longer row, which is read twice
BLOCK_T_OF_SUMS = 512  # the same with sums for statistics: with 1024, triton 3.7.1 spills on sm_100


@dataclass(frozen=True, slots=True)
class RunningSoftmax:
    """The state of each row's online softmax; float32, or float64 for float64 inputs."""

    peak_N: Tensor  # largest logit
    total_N: Tensor  # sum of exp(z - peak)
    label_logit_N: Tensor  # logit of the label; NaN while none was found
    rescale_N: Tensor  # exp(peak before the last tile - peak after it)
    exp_z_sum_N: Tensor | None  # sum of exp(z - peak) * z, for the entropy
    z_sum_N: Tensor | None  # sum of z, for the mean logit
    exp_square_sum_N: Tensor | None  # sum of exp(z - peak)², for log_sum_p2

    @classmethod
    def start(
        cls, N: int, dtype: torch.dtype, device: torch.device, with_sums: tuple[str, ...] = ()
    ) -> "RunningSoftmax":
        """No column seen yet. with_sums: the statistics whose sums, the last three, are kept."""

        def full(value):
            return torch.full((N,), value, dtype=dtype, device=device)

        optional = ("entropy", "mean_logit", "log_sum_p2")
        sums = [full(0.0) if name in with_sums else None for name in optional]
        lowest = torch.finfo(dtype).min  # not -inf: a first tile may be all of it
        return cls(full(lowest), full(0.0), full(float("nan")), full(0.0), *sums)

    def of_rows(self, rows: slice) -> "RunningSoftmax":
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


def _torch_fold(z_NT, p_NT, bias_T, labels_N, start, softmax, scale, softcap):
    """Update `softmax` with the products z_NT of one tile, which are overwritten, and write p_NT.

    p_NT: where p goes, perhaps z_NT itself; None where nothing will read p.
    """
    if bias_T is not None:
        z_NT.add_(bias_T)
    if scale != 1.0:
        z_NT.mul_(scale)
    if softcap is not None:
        z_NT.div_(softcap).tanh_().mul_(softcap)
    is_here_N, column_N1 = label_columns(labels_N, start, z_NT.shape[1])
    logit_N = z_NT.gather(1, column_N1).squeeze(1)
    torch.where(is_here_N, logit_N, softmax.label_logit_N, out=softmax.label_logit_N)

    peak_N = torch.maximum(softmax.peak_N, z_NT.amax(1))
    torch.exp(softmax.peak_N - peak_N, out=softmax.rescale_N)
    softmax.peak_N.copy_(peak_N)
    c_NT = None if softcap is None else (z_NT / softcap).square_().neg_().add_(1.0)
    if softmax.z_sum_N is not None:
        softmax.z_sum_N.add_(z_NT.sum(1))
    # 0 times a logit of -inf is 0
    copy_NT = None if softmax.exp_z_sum_N is None else z_NT.clamp(min=torch.finfo(z_NT.dtype).min)
    exp_NT = _exp_(z_NT.sub_(peak_N[:, None]))  # in z's memory, whose rows start at whole vectors
    if copy_NT is not None:
        dots_N = torch.linalg.vecdot(exp_NT, copy_NT)
        softmax.exp_z_sum_N.mul_(softmax.rescale_N).add_(dots_N)
    if softmax.exp_square_sum_N is not None:
        squares_N = torch.linalg.vecdot(exp_NT, exp_NT)
        softmax.exp_square_sum_N.mul_(softmax.rescale_N.square()).add_(squares_N)
    softmax.total_N.mul_(softmax.rescale_N).add_(exp_NT.sum(1))
    if p_NT is None:
        return
    pc_NT = exp_NT if c_NT is None else exp_NT.mul_(c_NT)
    label_N1 = pc_NT.gather(1, column_N1).masked_fill_(is_here_N[:, None], 0.0)
    pc_NT.scatter_(1, column_N1, label_N1)
    if pc_NT is not p_NT:
        p_NT.copy_(pc_NT)


@triton.jit
def _logit(z_ptr, bias_ptr, t, mask, scale, softcap):
    z_T = tl.load(z_ptr + t, mask=mask, other=0.0)
    if bias_ptr is not None:
        z_T += tl.load(bias_ptr + t, mask=mask, other=0.0).to(tl.float32)
    z_T *= scale
    if softcap is not None:
        # softcap * tanh(x), with an exp that cannot overflow. Near 0, 1 - decay would lose digits:
        # below 1/2, tanh(x) / x is a polynomial in s = x², fitted to within 1.5e-8
        x_T = z_T * (1.0 / softcap)
        s_T = x_T * x_T
        near_T = 0.13325987 + s_T * (-0.05305294 + s_T * 0.01725698)
        near_T = z_T * (1.0 + s_T * (-0.33333148 + s_T * near_T))
        decay_T = tl.exp(tl.abs(x_T) * -2.0)
        far_T = softcap - 2.0 * softcap * decay_T / (1.0 + decay_T)
        z_T = tl.where(s_T < 0.25, near_T, tl.where(z_T < 0, -far_T, far_T))
    return z_T


@triton.jit(do_not_specialize_on_alignment=ONE_NUMBER_A_ROW)
def _fold_kernel(
    z_ptr,
    p_ptr,
    bias_ptr,
    labels_ptr,
    peak_ptr,
    total_ptr,
    label_logit_ptr,
    rescale_ptr,
    exp_z_sum_ptr,
    z_sum_ptr,
    exp_square_sum_ptr,
    start,
    width,
    z_stride,
    p_stride,
    scale,
    softcap,
    BLOCK_T: tl.constexpr,
    IS_ONE_BLOCK: tl.constexpr,  # the row's logits then stay in registers, and are read once
    IS_FULL: tl.constexpr,  # and are BLOCK_T, so that no mask is left
):
    n = tl.program_id(0).to(tl.int64)
    z_ptr += n * z_stride
    old_peak = tl.load(peak_ptr + n)
    column = tl.load(labels_ptr + n) - start
    is_here = (column >= 0) & (column < width)
    width = BLOCK_T if IS_FULL else width
    tile_peak_T = tl.full((BLOCK_T,), -float("inf"), tl.float32)
    end = 1 if IS_ONE_BLOCK else width  # one pass, which is then known when compiled
    for first in range(0, end, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        z_T = _logit(z_ptr, bias_ptr, t, t < width, scale, softcap)
        tile_peak_T = tl.maximum(tile_peak_T, tl.where(t < width, z_T, -float("inf")))
    # read before the barrier in tl.max, as p may be written over it
    label_logit = _logit(z_ptr, bias_ptr, column, is_here, scale, softcap)
    peak = tl.maximum(old_peak, tl.max(tile_peak_T))
    rescale = tl.exp(old_peak - peak)

    total_T = tl.zeros((BLOCK_T,), tl.float32)
    exp_z_sum_T = tl.zeros((BLOCK_T,), tl.float32)
    z_sum_T = tl.zeros((BLOCK_T,), tl.float32)
    exp_square_sum_T = tl.zeros((BLOCK_T,), tl.float32)
    for first in range(0, end, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        z_T = _logit(z_ptr, bias_ptr, t, t < width, scale, softcap)
        exp_T = tl.where(t < width, tl.exp(z_T - peak), 0.0)
        total_T = exp_T if IS_ONE_BLOCK else total_T + exp_T
        if exp_z_sum_ptr is not None:
            exp_z_T = tl.where(exp_T == 0.0, 0.0, exp_T * z_T)
            exp_z_sum_T = exp_z_T if IS_ONE_BLOCK else exp_z_sum_T + exp_z_T
        if z_sum_ptr is not None:
            z_sum_T = z_T if IS_ONE_BLOCK else z_sum_T + z_T  # 0 from width on
        if exp_square_sum_ptr is not None:
            exp_square_T = exp_T * exp_T
            exp_square_sum_T = exp_square_T if IS_ONE_BLOCK else exp_square_sum_T + exp_square_T
        if p_ptr is not None:
            p_T = exp_T
            if softcap is not None:
                capped_T = z_T * (1.0 / softcap)
                p_T *= 1.0 - capped_T * capped_T
            p_ptrs = p_ptr + n * p_stride + t
            tl.store(p_ptrs, p_T.to(p_ptr.dtype.element_ty), mask=t < width)
    if is_here:
        tl.store(label_logit_ptr + n, label_logit)
    if p_ptr is not None:
        tl.debug_barrier()  # another thread wrote the label's p
        tl.store(p_ptr + n * p_stride + column, 0.0, mask=is_here)
    tl.store(peak_ptr + n, peak)
    tl.store(rescale_ptr + n, rescale)
    tl.store(total_ptr + n, tl.load(total_ptr + n) * rescale + tl.sum(total_T))
    if exp_z_sum_ptr is not None:
        so_far = tl.load(exp_z_sum_ptr + n) * rescale
        tl.store(exp_z_sum_ptr + n, so_far + tl.sum(exp_z_sum_T))
    if z_sum_ptr is not None:
        tl.store(z_sum_ptr + n, tl.load(z_sum_ptr + n) + tl.sum(z_sum_T))
    if exp_square_sum_ptr is not None:
        so_far = tl.load(exp_square_sum_ptr + n) * rescale * rescale
        tl.store(exp_square_sum_ptr + n, so_far + tl.sum(exp_square_sum_T))


def launch_of(width: int, *, has_sums: bool) -> dict[str, int | bool]:
    """Launch settings for the fold of one tile: all but a few variants keep it in registers. With
    sums a thread has 16 logits, as with 32 more variants spill (bench/results/kernels.md). Not
    timed."""
    if width > MOST_IN_REGISTERS:
        block = BLOCK_T_OF_SUMS if has_sums else BLOCK_T
        return {"BLOCK_T": block, "IS_ONE_BLOCK": False, "IS_FULL": False, "num_warps": 4}
    block = max(BLOCK_T, triton.next_power_of_2(width))
    shape = {"BLOCK_T": block, "IS_ONE_BLOCK": True, "IS_FULL": width == block}
    return shape | {"num_warps": max(4, block // (512 if has_sums else 1024))}


def _triton_fold(z_NT, p_NT, bias_T, labels_N, start, softmax, scale, softcap):
    """As _torch_fold, in one launch: a program a row."""
    sums = (softmax.exp_z_sum_N, softmax.z_sum_N, softmax.exp_square_sum_N)
    has_sums = any(x is not None for x in sums)
    with torch.cuda.device_of(z_NT):  # Triton launches on the current GPU, wherever tensors are
        _fold_kernel[(z_NT.shape[0],)](
            z_NT,
            p_NT,
            bias_T,
            labels_N,
            softmax.peak_N,
            softmax.total_N,
            softmax.label_logit_N,
            softmax.rescale_N,
            *sums,
            start,
            z_NT.shape[1],
            z_NT.stride(0),
            0 if p_NT is None else p_NT.stride(0),
            scale,
            softcap,
            **launch_of(z_NT.shape[1], has_sums=has_sums),
        )


FOLDS = {"torch": _torch_fold, "triton": _triton_fold}
