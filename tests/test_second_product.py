"""u += p w of one tile, whole and filtered, against float64."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.kernels.fold import RunningSoftmax
from fastdpo.kernels.second_product import BLOCKS, RESCALED_AT_ONCE, SECOND_PRODUCTS

BLOCK_N, BLOCK_T, BLOCK_K = BLOCKS[4]
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),  # the interpreter multiplies its bits
]
SHAPES = {
    "one-cell": (1, 1, 1),
    "one-block": (BLOCK_N, BLOCK_T, BLOCK_K),
    "ragged-last-blocks": (BLOCK_N + 3, 2 * BLOCK_T + 5, BLOCK_K + 7),
    "wide": (3, 40, RESCALED_AT_ONCE + 1),
}


def inputs(shape, device, seed=0):
    """p, w, u and softmax; blocks of p are likely in one place, some or none."""
    N, T, K = shape
    random = torch.Generator().manual_seed(seed)
    p_NT = 1e-6 * torch.rand(N, T, generator=random)
    likely = torch.randint(0, N * T, (1 + N * T // 3000,), generator=random)
    p_NT.view(-1)[likely] = torch.rand(len(likely), generator=random)
    w_TK, u_NK = torch.randn(T, K, generator=random), torch.randn(N, K, generator=random)
    softmax = RunningSoftmax.start(N, torch.float32, torch.device(device))
    rescale_N = torch.where(torch.arange(N) % 2 == 0, 1.0, torch.rand(N, generator=random))
    total_N = 1000 * (1 + torch.rand(N, generator=random))  # some likely p are below its share
    softmax = dataclasses.replace(
        softmax, total_N=total_N.to(device), rescale_N=rescale_N.to(device)
    )
    return p_NT.to(device), w_TK.to(device), u_NK.to(device), softmax


def kept_p(p_NT, softmax, skip_below, block_n, block_t):
    """p in float64, without the blocks that no row of theirs reaches."""
    p_NT, least_N = p_NT.double(), skip_below * softmax.total_N.double()
    kept_NT = torch.zeros_like(p_NT)
    for n in range(0, len(p_NT), block_n):
        for t in range(0, p_NT.shape[1], block_t):
            at = slice(n, n + block_n), slice(t, t + block_t)
            kept_NT[at] = p_NT[at] * (p_NT[at] >= least_N[at[0], None]).any()
    return kept_NT


def assert_adds(backend, args, skip_below, dtype=torch.float32, blocks=(BLOCK_N, BLOCK_T)):
    p_NT, w_TK, u_NK, softmax = args
    p_NT, w_TK, before_NK = p_NT.to(dtype), w_TK.to(dtype), u_NK.clone()
    SECOND_PRODUCTS[backend](p_NT, w_TK, u_NK, softmax, skip_below)
    kept_NT = kept_p(p_NT, softmax, skip_below, *blocks) if skip_below else p_NT.double()
    wanted_NK = before_NK * softmax.rescale_N[:, None].double() + kept_NT @ w_TK.double()
    torch.testing.assert_close(u_NK.double(), wanted_NK, rtol=1e-5, atol=1e-5)
    return kept_NT


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_tile_is_added_to_the_rescaled_sum(backend, shape, device):
    assert_adds(backend, inputs(shape, device), 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_blocks_that_no_row_reaches_are_left_out_and_no_other(shape, dtype, device):
    args = inputs(shape, device)
    blocks = BLOCKS[dtype.itemsize][:2]
    kept_NT = assert_adds("triton", args, 2**-12, dtype, blocks)
    if shape == SHAPES["ragged-last-blocks"]:
        assert 0 < (kept_NT == 0).sum() < kept_NT.numel(), "some blocks, not all"


def test_single_columns_are_left_out_in_torch(device):
    args = inputs(SHAPES["ragged-last-blocks"], device)
    kept_NT = assert_adds("torch", args, 2**-12, blocks=(BLOCK_N + 3, 1))
    assert 0 < (kept_NT == 0).sum() < kept_NT.numel()


def test_where_no_row_reaches_any_block_the_sum_is_only_rescaled(backend, device):
    p_NT, w_TK, u_NK, softmax = inputs(SHAPES["ragged-last-blocks"], device)
    rescaled_NK = u_NK * softmax.rescale_N[:, None]
    SECOND_PRODUCTS[backend](p_NT.clamp(max=1e-6), w_TK, u_NK, softmax, 2**-12)
    assert torch.equal(u_NK, rescaled_NK)


@pytest.mark.parametrize("skip_below", [0.0, 2**-12])
def test_a_head_may_lie_any_way_in_memory(backend, skip_below, device):
    p_NT, w_TK, u_NK, softmax = inputs((5, 40, 20), device)
    turned_NK = u_NK.clone()
    SECOND_PRODUCTS[backend](p_NT, w_TK, u_NK, softmax, skip_below)
    SECOND_PRODUCTS[backend](p_NT, w_TK.T.contiguous().T, turned_NK, softmax, skip_below)
    torch.testing.assert_close(turned_NK, u_NK, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("skip_below", [0.0, 2**-12])
def test_a_row_that_is_not_finite_breaks_no_other(backend, skip_below, device):
    p_NT, w_TK, u_NK, softmax = inputs((5, 40, 20), device)
    whole_NK = u_NK.clone()
    SECOND_PRODUCTS[backend](p_NT, w_TK, whole_NK, softmax, skip_below)
    p_NT[2], softmax.total_N[2], softmax.rescale_N[2] = float("nan"), float("nan"), float("nan")
    SECOND_PRODUCTS[backend](p_NT, w_TK, u_NK, softmax, skip_below)
    assert u_NK[2].isnan().all()
    others = torch.arange(5, device=device) != 2
    torch.testing.assert_close(u_NK[others], whole_NK[others], rtol=1e-5, atol=1e-6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(*[st.integers(1, 2 * block + 9) for block in BLOCKS[4]], st.integers(0, 99))
def test_any_shape_is_filtered_alike(N, T, K, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert_adds("triton", inputs((N, T, K), device, seed), 2**-12)
