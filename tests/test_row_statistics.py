"""Entropy and the others of a row's distribution, from the walk that scores its label."""

import pytest
import torch
from tiny_heads import inputs

from fastdpo.kernels import reference
from fastdpo.kernels.linear_logps import linear_logps
from fastdpo.kernels.row_statistics import STATS

pytestmark = pytest.mark.usefixtures("small_tiles")


@pytest.mark.usefixtures("narrow_operands")
def test_statistics_of_narrow_operands_are_exact(backend, device):
    hidden_ND, head_VD, labels_N, _ = inputs((5, 16, 100), torch.bfloat16, device)
    hidden_ND.requires_grad_()
    _, stats = linear_logps(hidden_ND, head_VD, labels_N, stats=STATS, backend=backend)
    _, exact = reference.linear_logps(hidden_ND.double(), head_VD.double(), labels_N, stats=STATS)
    for name in STATS:
        torch.testing.assert_close(
            stats[name].double(), exact[name].double(), atol=1e-4, rtol=1e-5, msg=name
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_need_no_gradient_and_no_wide_inputs(backend, dtype, device):
    hidden_ND, head_VD, labels_N, _ = inputs((5, 8, 100), dtype, device)
    _, stats = linear_logps(hidden_ND, head_VD, labels_N, stats=STATS, backend=backend)
    _, with_u = linear_logps(
        hidden_ND.requires_grad_(), head_VD, labels_N, stats=STATS, backend=backend
    )
    _, exact = reference.linear_logps(hidden_ND.double(), head_VD.double(), labels_N, stats=STATS)
    for name in STATS:
        for found in (stats, with_u):
            torch.testing.assert_close(
                found[name].double(), exact[name].double(), atol=1e-4, rtol=1e-5, msg=name
            )


def test_a_sure_rows_entropy_is_not_below_0():
    hidden_ND, head_VD, labels_N, _ = inputs((300, 64, 500), torch.float32)
    hidden_ND = (5 * hidden_ND).requires_grad_()
    stats = ("entropy",)
    _, ours = linear_logps(hidden_ND, head_VD, labels_N, stats=stats, backend="torch")
    _, truth = reference.linear_logps(hidden_ND.double(), head_VD.double(), labels_N, stats=stats)
    assert (truth["entropy"] < 1e-4).any(), "some rows are sure"
    assert ours["entropy"].min() >= 0
    assert (ours["entropy"] - truth["entropy"]).abs().max() < 5e-3


@pytest.mark.parametrize("needs_grad", [False, True])
def test_entropy_loses_no_more_than_logits_do(needs_grad):
    """Logits of some 3000, labels that are likely."""
    hidden_ND, head_VD, _, _ = inputs((64, 16, 300), torch.float32)
    hidden_ND = torch.cat([hidden_ND, torch.full((64, 1), 100.0)], 1)
    head_VD = torch.cat([0.3 * head_VD, torch.full((300, 1), 30.0)], 1)
    labels_N = (hidden_ND @ head_VD.T).argmax(1)
    stats = ("entropy",)
    wide = hidden_ND.double(), head_VD.double()
    _, truth = reference.linear_logps(*wide, labels_N, stats=stats)
    assert truth["entropy"].mean() > 0.5
    hidden_ND.requires_grad_(needs_grad)
    _, ours = linear_logps(hidden_ND, head_VD, labels_N, stats=stats, backend="torch")
    assert (ours["entropy"] - truth["entropy"]).abs().max() < 8 * 3000 * torch.finfo().eps


def test_a_column_that_is_never_taken_leaves_the_statistics_finite(backend, device):
    hidden_ND, head_VD, labels_N, bias_V = inputs((5, 16, 100), torch.float32, device, bias=True)
    labels_N %= 50
    bias_V[50:] = -float("inf")
    args = hidden_ND, head_VD, labels_N
    _, ours = linear_logps(*args, bias_V=bias_V, stats=STATS, backend=backend)
    few = hidden_ND.double(), head_VD[:50].double(), labels_N
    _, truth = reference.linear_logps(*few, bias_V=bias_V[:50].double(), stats=STATS)
    _, twin = reference.linear_logps(*args, bias_V=bias_V, stats=STATS)
    for name in ("lse", "entropy", "log_sum_p2", "is_top1"):
        wanted = truth[name].double()
        torch.testing.assert_close(ours[name].double(), wanted, atol=1e-4, rtol=1e-5, msg=name)
        torch.testing.assert_close(twin[name].double(), wanted, atol=1e-4, rtol=1e-5, msg=name)


@pytest.mark.parametrize("hidden_grad", [False, True])
def test_one_of_two_terms_may_have_no_gradient(hidden_grad):
    """As with an adapter on the head alone: the other term's rows are then not summed."""
    hidden_ND, head_VD, labels_N, _ = inputs((20, 8, 100), torch.float32)
    low_rank = torch.randn(20, 3), torch.randn(100, 3)
    wide = hidden_ND.double(), head_VD.double(), labels_N
    wide_low_rank = [x.double() for x in low_rank]
    _, truth = reference.linear_logps(*wide, low_rank=wide_low_rank, stats=STATS)
    (hidden_ND if hidden_grad else low_rank[0]).requires_grad_()
    args = hidden_ND, head_VD, labels_N
    _, ours = linear_logps(*args, low_rank=low_rank, stats=STATS, backend="torch")
    for name in STATS:
        wanted = truth[name].double()
        torch.testing.assert_close(ours[name].double(), wanted, atol=1e-4, rtol=1e-5, msg=name)
