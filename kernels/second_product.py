"""One tile of p taken into each row's sum of head rows, in torch and in Triton launches.

    u_NK <- rescale_N u_NK + p_NT w_TK

N rows, T columns of the vocabulary, K the width of the head or the rank of an adapter on it. With
skip_below, what is unlikely in every row of a block is left out of the product (Cut Cross-Entropy's
filter, arXiv:2411.09009): in torch single columns, for all rows at hand; in Triton blocks of
columns, for blocks of rows, and nothing is read on the host to know which.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdpo.kernels.fold import RunningSoftmax
from fastdpo.kernels.products import product

# BLOCK_N, BLOCK_T, BLOCK_K by the bytes of an operand: none spills where K is a multiple of 16, and
# a larger BLOCK_T would leave out less; not timed
BLOCKS = {2: (128, 64, 128), 4: (64, 32, 128)}
NUM_WARPS = 8  # for a block of that size
NUM_STAGES = 5  # one goes to the load of `order`; with Triton's 3, a product would wait for p and w
RESCALED_AT_ONCE = 1024  # columns of u


def _torch_second_product(p_NT, w_TK, u_NK, softmax: RunningSoftmax, skip_below: float) -> None:
    reached = slice(None)  # all columns, or those where some row's p is enough of its total so far
    if skip_below:
        reached = (p_NT >= skip_below * softmax.total_N[:, None]).any(0).nonzero().squeeze(1)
    u_NK.mul_(softmax.rescale_N[:, None])
    product(p_NT[:, reached], w_TK[reached], u_NK, accumulate=True)


@triton.jit(do_not_specialize_on_alignment=["rescale_ptr"])
def _rescale_kernel(u_ptr, rescale_ptr, K, u_stride, BLOCK_K: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    rescale = tl.load(rescale_ptr + n)
    if rescale != 1.0:  # most rows have their peak in an early tile: u is then not touched again
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            u_ptrs = u_ptr + n * u_stride + k
            tl.store(u_ptrs, rescale * tl.load(u_ptrs, mask=k < K), mask=k < K)


@triton.jit
def _reached_kernel(
    p_ptr,
    total_ptr,
    reached_ptr,
    N,
    T,
    p_stride,
    skip_below,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_here = (n < N)[:, None] & (t < T)[None, :]
    p_NT = tl.load(p_ptr + n.to(tl.int64)[:, None] * p_stride + t[None, :], mask=is_here, other=0.0)
    least_N = skip_below * tl.load(total_ptr + n, mask=n < N, other=0.0)
    is_reached_N = (n < N) & (tl.max(p_NT.to(tl.float32), axis=1) >= least_N)  # False for a NaN
    reached = tl.max(tl.where(is_reached_N, 1.0, 0.0)).to(tl.int32)
    tl.store(reached_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), reached)


@triton.jit
def _reached_product_kernel(
    p_ptr,
    w_ptr,
    u_ptr,
    order_ptr,
    counts_ptr,
    N,
    T,
    K,
    order_stride,
    p_stride,
    w_stride_T,
    w_stride_K,
    u_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # the programs that run at once share rows of p; what they read of w stays in the L2 cache
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    p_ptrs = p_ptr + n.to(tl.int64)[:, None] * p_stride
    w_ptrs = w_ptr + k.to(tl.int64)[None, :] * w_stride_K
    order_ptr += tl.program_id(1) * order_stride
    sum_NK = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for i in range(0, tl.load(counts_ptr + tl.program_id(1))):
        t = tl.load(order_ptr + i).to(tl.int32) * BLOCK_T + tl.arange(0, BLOCK_T)
        is_p, is_w = (n < N)[:, None] & (t < T)[None, :], (t < T)[:, None] & (k < K)[None, :]
        p_NT = tl.load(p_ptrs + t[None, :], mask=is_p, other=0.0)
        w_TK = tl.load(w_ptrs + t.to(tl.int64)[:, None] * w_stride_T, mask=is_w, other=0.0)
        sum_NK = tl.dot(p_NT, w_TK, sum_NK, input_precision="tf32x3")  # float32's, on tensor cores
    is_u = (n < N)[:, None] & (k < K)[None, :]
    u_ptrs = u_ptr + n.to(tl.int64)[:, None] * u_stride + k[None, :]
    tl.store(u_ptrs, tl.load(u_ptrs, mask=is_u) + sum_NK, mask=is_u)


def _triton_second_product(p_NT, w_TK, u_NK, softmax: RunningSoftmax, skip_below: float) -> None:
    """As _torch_second_product, but it leaves out blocks of columns for blocks of rows."""
    with torch.cuda.device_of(u_NK):  # Triton launches on the current GPU, wherever tensors are
        N, K = u_NK.shape
        _rescale_kernel[(N,)](u_NK, softmax.rescale_N, K, u_NK.stride(0), RESCALED_AT_ONCE)
        if skip_below:
            _add_reached(p_NT, w_TK, u_NK, softmax.total_N, skip_below)
        else:
            product(p_NT, w_TK, u_NK, accumulate=True)


def _add_reached(p_NT: Tensor, w_TK: Tensor, u_NK: Tensor, total_N: Tensor, skip_below) -> None:
    """u += p w over the blocks of p in which some row reaches skip_below of its total so far."""
    (N, T), K = p_NT.shape, w_TK.shape[1]
    BLOCK_N, BLOCK_T, BLOCK_K = BLOCKS[p_NT.element_size()]
    grid = triton.cdiv(N, BLOCK_N), triton.cdiv(T, BLOCK_T)
    reached = torch.empty(grid, dtype=torch.int32, device=p_NT.device)
    _reached_kernel[grid](
        p_NT,
        total_N,
        reached,
        N,
        T,
        p_NT.stride(0),
        skip_below,
        BLOCK_N,
        BLOCK_T,
        num_warps=NUM_WARPS,
    )
    _reached_product_kernel[triton.cdiv(K, BLOCK_K), grid[0]](
        p_NT,
        w_TK,
        u_NK,
        reached.argsort(dim=1, descending=True, stable=True),  # those reached come first
        reached.sum(1),
        N,
        T,
        K,
        grid[1],
        p_NT.stride(0),
        *w_TK.stride(),
        u_NK.stride(0),
        BLOCK_N,
        BLOCK_T,
        BLOCK_K,
        num_warps=NUM_WARPS,
        num_stages=NUM_STAGES,
    )


SECOND_PRODUCTS = {"torch": _torch_second_product, "triton": _triton_second_product}
