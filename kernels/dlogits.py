"""The gradient of one tile's logits from its p, in torch and in one Triton launch.

    out_NT = row_scale_N p_NT, and dlabel_N in the column of each row's label

N rows, T columns of the vocabulary from `start` on; p_NT is 0 in a label's column (fold.py). out_NT
may be p_NT.
"""

import torch
import triton
import triton.language as tl

from fastdpo.kernels.fold import label_columns

BLOCK_T = 1024  # columns at a time


def _torch_dlogits(p_NT, out_NT, row_scale_N, dlabel_N, labels_N, start):
    torch.mul(p_NT, row_scale_N[:, None], out=out_NT)
    is_here_N, column_N1 = label_columns(labels_N, start, p_NT.shape[1])
    # a product, not torch.where: a NaN stays one in every tile
    dlabel_N = (dlabel_N * is_here_N).to(out_NT.dtype)
    out_NT.scatter_add_(1, column_N1, dlabel_N[:, None])


@triton.jit(do_not_specialize_on_alignment=["row_scale_ptr", "dlabel_ptr", "labels_ptr"])
def _dlogits_kernel(
    p_ptr,
    out_ptr,
    row_scale_ptr,
    dlabel_ptr,
    labels_ptr,
    start,
    width,
    p_stride,
    out_stride,
    BLOCK_T: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    column = tl.load(labels_ptr + n) - start
    row_scale, dlabel = tl.load(row_scale_ptr + n), tl.load(dlabel_ptr + n)
    for first in range(0, width, BLOCK_T):
        t = first + tl.arange(0, BLOCK_T)
        p_T = tl.load(p_ptr + n * p_stride + t, mask=t < width, other=0.0).to(tl.float32)
        out_T = tl.where(t == column, dlabel, row_scale * p_T)
        tl.store(out_ptr + n * out_stride + t, out_T.to(out_ptr.dtype.element_ty), mask=t < width)


def _triton_dlogits(p_NT, out_NT, row_scale_N, dlabel_N, labels_N, start):
    N, T = p_NT.shape
    with torch.cuda.device_of(p_NT):  # Triton launches on the current GPU, wherever tensors are
        _dlogits_kernel[(N,)](
            p_NT,
            out_NT,
            row_scale_N,
            dlabel_N,
            labels_N,
            start,
            T,
            p_NT.stride(0),
            out_NT.stride(0),
            BLOCK_T,
        )


DLOGITS = {"torch": _torch_dlogits, "triton": _triton_dlogits}
