"""The kernel against its twin in float64, and the twin against finite differences."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_as_accurate
from triton.runtime.interpreter import InterpreterBuilder
from watches import Watch

from fastdpo import ops
from fastdpo.kernels import reference
from fastdpo.kernels.pair_loss import BLOCK_C, F_DIVERGENCES, LOSSES, pair_loss

LENGTHS = {
    "one-token-each": [1, 1],
    "exactly-one-block": [BLOCK_C, 3],
    "ragged-last-block": [BLOCK_C + 1, 2, 5, 2 * BLOCK_C - 1],
    "an-empty-completion": [0, 3, 2, 0],
    "two-empty-completions": [0, 3, 0, 2],
    "no-pair": [],
}
SETTINGS = {"beta": 0.3, "label_smoothing": 0.1, "discopop_tau": 0.4}
FUNCTIONS = {"kernel": pair_loss, "reference": reference.pair_loss}
# what may be left of a gradient that autograd makes from a difference of two ones
LEFT_OVER = {pair_loss: 1e-12, reference.pair_loss: 1e-7}


def inputs(lengths, device, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    token_logps_C = -torch.rand(sum(lengths), generator=random)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    # log-ratios of a few nats, either way, whatever the length
    logps_S = torch.segment_reduce(token_logps_C, "sum", offsets=ends.long(), unsafe=True)
    reference_logps_S = logps_S + 4 * torch.rand(len(lengths), generator=random) - 2
    return token_logps_C.to(device, dtype), ends.to(device), reference_logps_S.to(device, dtype)


def run(function, lengths, device, dtype, **changed):
    token_logps_C, cu_seqlens, reference_logps_S = inputs(lengths, device, dtype)
    token_logps_C.requires_grad_()
    loss_B, metrics_MB = function(
        token_logps_C, cu_seqlens, reference_logps_S, **{**SETTINGS, **changed}
    )
    weights_B = torch.arange(1.0, len(loss_B) + 1, device=device, dtype=dtype)
    (loss_B * weights_B).sum().backward()
    return loss_B.detach(), metrics_MB, token_logps_C.grad


def assert_kernel_as_accurate(lengths, device, **changed):
    ours = run(pair_loss, lengths, device, torch.float32, **changed)
    same = run(reference.pair_loss, lengths, device, torch.float32, **changed)
    truth = run(reference.pair_loss, lengths, device, torch.float64, **changed)
    times = 8 if device.type == "cuda" else 2  # a GPU's exp2 and division are off by an ulp or two
    for kernel, torch_own, exact in zip(ours, same, truth, strict=True):
        assert kernel.shape == exact.shape and not kernel.requires_grad
        assert_as_accurate(kernel, torch_own, exact, times)


@pytest.mark.parametrize("f_divergence_type", F_DIVERGENCES)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_is_as_accurate_as_pytorch(loss_type, f_divergence_type, device):
    assert_kernel_as_accurate(
        [3, 1, 7, 2],
        device,
        loss_type=(loss_type,),
        f_divergence_type=f_divergence_type,
    )


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("ld_alpha", [None, 0.0, 0.3])
def test_every_shape_is_as_accurate_as_pytorch(lengths, ld_alpha, device):
    mix = {"loss_type": ("sigmoid", "ipo"), "loss_weights": (1.0, 0.25)}
    assert_kernel_as_accurate(lengths, device, ld_alpha=ld_alpha, **mix)


def test_the_kernel_knows_the_losses_that_the_reference_knows():
    assert tuple(reference.LOSSES) == LOSSES
    assert tuple(reference.SCORES) == F_DIVERGENCES


@given(
    lengths=st.lists(st.tuples(*[st.integers(0, 5)] * 2), min_size=1, max_size=4),
    loss_types=st.lists(st.sampled_from(LOSSES), min_size=1, max_size=3),
    f_divergence_type=st.sampled_from(F_DIVERGENCES),
    alpha=st.sampled_from([-0.5, 0.0, 0.5, 1.0, 2.0]),
    ld_alpha=st.sampled_from([None, 0.0, 0.7, 1.0]),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_kernel_and_reference_agree(lengths, loss_types, f_divergence_type, alpha, ld_alpha):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lengths = [length for side in zip(*lengths, strict=True) for length in side]
    changed = {
        "loss_type": tuple(loss_types),
        "loss_weights": tuple(0.5 + i for i in range(len(loss_types))),
        "f_divergence_type": f_divergence_type,
        "f_alpha_divergence_coef": alpha,
        "ld_alpha": ld_alpha,
    }
    ours = run(pair_loss, lengths, device, torch.float32, **changed)
    truth = run(reference.pair_loss, lengths, device, torch.float64, **changed)
    for kernel, exact in zip(ours, truth, strict=True):
        scale = exact.abs().max().item() if exact.numel() else 0.0
        torch.testing.assert_close(kernel, exact.float(), rtol=1e-5, atol=3e-6 * (1 + scale))


def of_two_tokens(function, chosen, rejected, dtype, device, **changed):
    """Loss and gradient of one pair whose log-ratios are these."""
    token_logps_C = torch.tensor([chosen, rejected], device=device, dtype=dtype).requires_grad_()
    loss_B, _ = function(
        token_logps_C,
        torch.tensor([0, 1, 2], dtype=torch.int32, device=device),
        torch.zeros(2, device=device, dtype=dtype),
        **{**SETTINGS, "beta": 1.0, **changed},
    )
    loss_B.sum().backward()
    return loss_B.detach(), token_logps_C.grad


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("logratio", [0.0, 20.0, -20.0, 95.0, -95.0, 1e4, -1e4])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_extreme_margins_neither_overflow_nor_vanish(loss_type, logratio, function, device):
    for chosen, rejected in ((logratio, 0.0), (0.0, logratio)):
        pair = (chosen, rejected)
        ours = of_two_tokens(function, *pair, torch.float32, device, loss_type=(loss_type,))
        truth = of_two_tokens(
            reference.pair_loss, *pair, torch.float64, device, loss_type=(loss_type,)
        )
        for value, exact in zip(ours, truth, strict=True):
            torch.testing.assert_close(value, exact.float(), rtol=1e-5, atol=LEFT_OVER[function])


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("logratio", [60.0, -60.0, 1e4, -1e4])
@pytest.mark.parametrize("f_divergence_type", F_DIVERGENCES)
def test_extreme_scores_stay_finite(f_divergence_type, logratio, function, device):
    settings = {"f_divergence_type": f_divergence_type}
    ours = of_two_tokens(function, logratio, 0.0, torch.float32, device, **settings)
    truth = of_two_tokens(reference.pair_loss, logratio, 0.0, torch.float64, device, **settings)
    for value, exact in zip(ours, truth, strict=True):
        assert value.isfinite().all()
        # exp(80) from an exponent rounded to float32: 80 times its rounding
        torch.testing.assert_close(value, exact.float(), rtol=3e-5, atol=LEFT_OVER[function])


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("alpha", [1 - 2e-5, 1 + 2e-5])
def test_a_divergence_near_its_limit_loses_no_digit(alpha, function, device):
    """(t^(alpha - 1) - 1) / (alpha - 1), of a power that is 1 but for its last digits."""
    divergence = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": alpha}
    ours = of_two_tokens(function, 1.5, -0.5, torch.float32, device, **divergence)
    limit = of_two_tokens(reference.pair_loss, 1.5, -0.5, torch.float64, device)
    for value, exact in zip(ours, limit, strict=True):
        torch.testing.assert_close(value, exact.float(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_margin_of_one_is_enough_for_hinge(function, device):
    loss_B, grad_C = of_two_tokens(function, 1.0, 0.0, torch.float32, device, loss_type=("hinge",))
    assert loss_B.item() == 0.0 and not grad_C.any()


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_tensors_may_have_any_strides(function, device):
    arguments = inputs([2, 1, 2, 3], device)
    strided = [torch.stack([x, 7 + x], 1)[:, 0] for x in arguments]
    leaves = [tokens.requires_grad_() for tokens in (arguments[0], strided[0].detach())]
    results = [
        function(leaf, *others, **SETTINGS)
        for leaf, others in zip(leaves, (arguments[1:], strided[1:]), strict=True)
    ]
    grads = [
        torch.autograd.grad(loss_B.sum(), leaf)[0]
        for (loss_B, _), leaf in zip(results, leaves, strict=True)
    ]
    assert not strided[0].is_contiguous() and torch.equal(*grads)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    expected = torch.autograd.grad(
        reference.pair_loss(leaves[0], *arguments[1:], **SETTINGS)[0].sum(), leaves[0]
    )[0]
    torch.testing.assert_close(grads[0], expected)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_tie_is_no_win(function, device):
    token_logps_C, cu_seqlens, _ = inputs([2, 1, 2, 3], device)
    token_logps_C[3:5] = token_logps_C[:2]  # the first pair's completions are alike
    _, metrics_MB = function(token_logps_C, cu_seqlens, torch.zeros(4, device=device), **SETTINGS)
    assert metrics_MB[3].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("ld_alpha", [None, 0.3])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_where_policy_and_reference_agree_rewards_are_zero(ld_alpha, function, device):
    token_logps_C, cu_seqlens, _ = inputs(LENGTHS["ragged-last-block"], device)
    token_logps_C *= 20
    logps_S = reference.completion_sums(token_logps_C, cu_seqlens, ld_alpha)
    _, metrics_MB = function(token_logps_C, cu_seqlens, logps_S, **SETTINGS, ld_alpha=ld_alpha)
    assert metrics_MB[:3].tolist() == [[0.0, 0.0]] * 3  # by the bit, in whatever order they add
    assert torch.equal(metrics_MB[4:].flatten(), logps_S)


@pytest.mark.parametrize("f_divergence_type", F_DIVERGENCES)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_nan_log_probabilities_make_nan_of_their_pair(
    loss_type, f_divergence_type, device, monkeypatch
):
    # maximum and minimum on a GPU return the operand that is a number, unless told otherwise
    monkeypatch.setattr(InterpreterBuilder, "create_maxnumf", _binary(np.fmax))
    monkeypatch.setattr(InterpreterBuilder, "create_minnumf", _binary(np.fmin))
    token_logps_C, cu_seqlens, reference_logps_S = inputs([3, 2, 4, 1], device)
    reference_logps_S[1] = float("nan")
    changed = {"loss_type": (loss_type,), "f_divergence_type": f_divergence_type}
    loss_B, _ = pair_loss(token_logps_C, cu_seqlens, reference_logps_S, **SETTINGS | changed)
    assert loss_B.isnan().tolist() == [False, True]


def _binary(function):
    return lambda self, a, b: self.binary_op(a, b, function)


def test_metrics_carry_no_gradient(device):
    token_logps_C, cu_seqlens, reference_logps_S = inputs([2, 3], device)
    for function in FUNCTIONS.values():
        loss_B, metrics_MB = function(
            token_logps_C.requires_grad_(), cu_seqlens, reference_logps_S, beta=0.1
        )
        assert loss_B.requires_grad and not metrics_MB.requires_grad


@pytest.mark.parametrize("f_divergence_type", F_DIVERGENCES)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_gradcheck_of_the_specification(loss_type, f_divergence_type):
    token_logps_C, cu_seqlens, reference_logps_S = inputs([3, 1, 2, 4], "cpu", torch.float64)
    changed = {"loss_type": (loss_type,), "f_divergence_type": f_divergence_type, "ld_alpha": 0.4}
    assert torch.autograd.gradcheck(
        lambda x: reference.pair_loss(x, cu_seqlens, reference_logps_S, **SETTINGS | changed)[0],
        token_logps_C.requires_grad_(),
    )


@pytest.mark.parametrize("ld_alpha", [None, 0.4])
@pytest.mark.parametrize("loss_type", reference.BATCH_LOSSES)
def test_gradcheck_of_the_losses_of_a_batch(loss_type, ld_alpha):
    lengths = [3, 1, 2, 4, 0, 2, 5, 3]
    token_logps_C, cu_seqlens, reference_logps_S = inputs(lengths, "cpu", torch.float64)
    changed = {"loss_type": (loss_type, "ipo"), "loss_weights": (1.0, 0.1), "ld_alpha": ld_alpha}
    assert torch.autograd.gradcheck(
        lambda x: reference.pair_loss(x, cu_seqlens, reference_logps_S, **SETTINGS | changed)[0],
        token_logps_C.requires_grad_(),
    )


@pytest.mark.parametrize("ld_alpha", [None, 0.5])
def test_nothing_waits_for_the_device(ld_alpha):
    with Watch():
        run(
            reference.pair_loss,
            [3, 0, 2, 4],
            "cpu",
            torch.float32,
            loss_type=(*LOSSES, *reference.BATCH_LOSSES),
            ld_alpha=ld_alpha,
        )


@pytest.mark.parametrize("loss_type", [("sigmoid", "hinge"), ("aot", "sigmoid"), ("sft",)])
def test_on_a_gpu_a_loss_of_a_batch_leaves_the_kernel_out(monkeypatch, loss_type):
    monkeypatch.setattr(ops, "backend_for", lambda device: "triton")
    runs_kernel = []
    monkeypatch.setattr(
        ops._pair_loss,
        "pair_loss",
        lambda *tensors, **settings: runs_kernel.append(1) or pair_loss(*tensors, **settings),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ours = run(ops.pair_loss, [3, 1, 2, 4], device, torch.float32, loss_type=loss_type)
    truth = run(reference.pair_loss, [3, 1, 2, 4], device, torch.float64, loss_type=loss_type)
    assert bool(runs_kernel) == (loss_type == ("sigmoid", "hinge"))
    for value, exact in zip(ours, truth, strict=True):
        torch.testing.assert_close(value, exact.float())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"token_logps_C": torch.zeros(5, 1)}, "want token_logps"),
        ({"cu_seqlens": torch.zeros(2).int()}, "want token_logps"),
        ({"reference_logps_S": torch.zeros(4)}, "want token_logps"),
        ({"cu_seqlens": torch.zeros(4).int(), "reference_logps_S": torch.zeros(3)}, "want token"),
        ({"token_logps_C": torch.zeros(5).half()}, "want token_logps and reference_logps in"),
        ({"cu_seqlens": torch.zeros(3).long()}, "cu_seqlens in torch.int32, got .*int64"),
        ({"reference_logps_S": torch.zeros(2).double()}, "got torch.float32, torch.float64"),
    ],
    ids=["column", "one-length", "four-logps", "odd", "half", "long", "double"],
)
def test_inputs_that_do_not_fit_are_refused(wrong, message):
    right = {
        "token_logps_C": torch.zeros(5),
        "cu_seqlens": torch.tensor([0, 2, 5]).int(),
        "reference_logps_S": torch.zeros(2),
    }
    with pytest.raises(ValueError, match=message):
        pair_loss(**(right | wrong), beta=0.1)


def test_the_kernel_refuses_a_loss_of_a_batch():
    arguments = [torch.zeros(5), torch.tensor([0, 2, 5], dtype=torch.int32), torch.zeros(2)]
    with pytest.raises(ValueError, match="aot"):
        pair_loss(*arguments, beta=0.1, loss_type=("aot",))


def test_a_gradient_of_the_gradient_is_an_error(device):
    token_logps_C = torch.randn(5, device=device, requires_grad=True)
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
    loss_B, _ = pair_loss(token_logps_C, cu_seqlens, torch.zeros(2, device=device), beta=0.1)
    with pytest.raises(RuntimeError, match="want create_graph=False"):
        torch.autograd.grad(loss_B.sum(), token_logps_C, create_graph=True)
