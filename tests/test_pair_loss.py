import pytest
import torch
from numerics import assert_as_accurate

from fastdpo.kernels import reference
from fastdpo.kernels.pair_loss import BLOCK_C, pair_loss

LENGTHS = {
    "one-token-each": [1, 1],
    "exactly-one-block": [BLOCK_C, 3],
    "ragged-last-block": [BLOCK_C + 1, 2, 5, 2 * BLOCK_C - 1],
    "an-empty-completion": [0, 3, 2, 0],
    "no-pair": [],
}


def inputs(lengths, device, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    token_logps_C = -torch.rand(sum(lengths), generator=random)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    reference_logps_S = -torch.rand(len(lengths), generator=random) * 3
    return token_logps_C.to(device, dtype), ends.to(device), reference_logps_S.to(device, dtype)


def run(function, lengths, device, dtype, **settings):
    token_logps_C, cu_seqlens, reference_logps_S = inputs(lengths, device, dtype)
    token_logps_C.requires_grad_()
    loss_B, logps_S, rewards_S = function(token_logps_C, cu_seqlens, reference_logps_S, **settings)
    weights_B = torch.arange(1.0, len(loss_B) + 1, device=device, dtype=dtype)
    (loss_B * weights_B).sum().backward()
    return loss_B.detach(), logps_S, rewards_S, token_logps_C.grad


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_value_and_gradient_are_as_accurate_as_pytorch(lengths, label_smoothing, device):
    settings = {"beta": 0.3, "label_smoothing": label_smoothing}
    ours = run(pair_loss, lengths, device, torch.float32, **settings)
    same = run(reference.pair_loss, lengths, device, torch.float32, **settings)
    truth = run(reference.pair_loss, lengths, device, torch.float64, **settings)
    for kernel, torch_own, exact in zip(ours, same, truth, strict=True):
        assert_as_accurate(kernel, torch_own, exact)


@pytest.mark.parametrize("reward", [0.0, 40.0, -40.0, 1e4, -1e4])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_extreme_margins_neither_overflow_nor_vanish(reward, label_smoothing, device):
    def measure(function, dtype):
        token_logps_C = torch.tensor([reward, 0.0], device=device, dtype=dtype).requires_grad_()
        loss_B, _, _ = function(
            token_logps_C,
            torch.tensor([0, 1, 2], dtype=torch.int32, device=device),
            torch.zeros(2, device=device, dtype=dtype),
            beta=1.0,
            label_smoothing=label_smoothing,
        )
        loss_B.sum().backward()
        return loss_B.detach(), token_logps_C.grad

    for ours, truth in zip(
        measure(pair_loss, torch.float32), measure(reference.pair_loss, torch.float64), strict=True
    ):
        torch.testing.assert_close(ours, truth.float(), rtol=1e-5, atol=1e-12)


def test_rewards_and_sums_carry_no_gradient(device):
    token_logps_C, cu_seqlens, reference_logps_S = inputs([2, 3], device)
    for function in (pair_loss, reference.pair_loss):
        loss_B, logps_S, rewards_S = function(
            token_logps_C.requires_grad_(), cu_seqlens, reference_logps_S, beta=0.1
        )
        assert loss_B.requires_grad and not logps_S.requires_grad and not rewards_S.requires_grad


def test_gradcheck_of_the_specification():
    token_logps_C, cu_seqlens, reference_logps_S = inputs([3, 1, 2, 4], "cpu", torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: reference.pair_loss(
            x, cu_seqlens, reference_logps_S, beta=0.5, label_smoothing=0.1
        )[0],
        token_logps_C.requires_grad_(),
    )


@pytest.mark.parametrize(
    ("position", "wrong", "message"),
    [
        (0, torch.zeros(5, 1), "want token_logps"),
        (1, torch.zeros(2, dtype=torch.int32), "want token_logps"),
        (2, torch.zeros(3), "want token_logps"),
        (0, torch.zeros(5, dtype=torch.float16), "want float32"),
        (1, torch.zeros(3, dtype=torch.int64), "want float32"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(position, wrong, message):
    arguments = [torch.zeros(5), torch.tensor([0, 2, 5], dtype=torch.int32), torch.zeros(2)]
    arguments[position] = wrong
    with pytest.raises(ValueError, match=message):
        pair_loss(*arguments, beta=0.1)
