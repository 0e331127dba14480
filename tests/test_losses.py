"""The DPO loss on numbers worked out by hand."""

import math

import pytest
import torch

from fastdpo.losses import completion_logps, sigmoid_loss

# Two pairs. Token log-probabilities, end to end: chosen 0, chosen 1, rejected 0, rejected 1.
TOKEN_LOGPS = [-1.0, -0.5, -2.0, -0.5, -0.5, -1.0, -3.0]
CU_SEQLENS = torch.tensor([0, 2, 3, 6, 7], dtype=torch.int32)
REFERENCE_LOGPS = torch.tensor([-2.5, -1.0, -1.0, -1.0])
BETA = 0.5
# chosen 0: -1.5 against -2.5: +1, reward  0.5    rejected 0: -2.0 against -1.0: -1, reward -0.5
# chosen 1: -2.0 against -1.0: -1, reward -0.5    rejected 1: -3.0 against -1.0: -2, reward -1.0
MARGINS = [0.5 - -0.5, -0.5 - -1.0]  # 1.0 and 0.5


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def loss_of(token_logps, **settings):
    return sigmoid_loss(token_logps, CU_SEQLENS, REFERENCE_LOGPS, beta=BETA, **settings)


def test_a_completions_logp_is_the_sum_of_its_tokens():
    logps_S = completion_logps(torch.tensor(TOKEN_LOGPS), CU_SEQLENS)
    assert logps_S.tolist() == [-1.5, -2.0, -2.0, -3.0]


def test_rewards_are_beta_times_the_log_ratios():
    losses = loss_of(torch.tensor(TOKEN_LOGPS))
    assert losses.chosen_logps_B.tolist() == [-1.5, -2.0]
    assert losses.rejected_logps_B.tolist() == [-2.0, -3.0]
    assert losses.chosen_reward_B.tolist() == [0.5, -0.5]
    assert losses.rejected_reward_B.tolist() == [-0.5, -1.0]


def test_sigmoid_loss_by_hand():
    # -log sigmoid(1) = log(1 + 1/e) = 0.313262; -log sigmoid(0.5) = 0.474077
    losses = loss_of(torch.tensor(TOKEN_LOGPS))
    assert losses.loss_B.tolist() == pytest.approx([0.3132617, 0.4740770], abs=1e-6)


def test_label_smoothing_weighs_both_ways_round():
    # -log sigmoid(-1) = 1.313262: 0.9 * 0.313262 + 0.1 * 1.313262 = 0.413262
    losses = loss_of(torch.tensor(TOKEN_LOGPS), label_smoothing=0.1)
    assert losses.loss_B.tolist() == pytest.approx([0.4132617, 0.5240770], abs=1e-6)


def test_gradient_by_hand():
    # d loss / d token = -beta * sigmoid(-margin) for a chosen token, the opposite for a rejected
    token_logps = torch.tensor(TOKEN_LOGPS, requires_grad=True)
    loss_of(token_logps).loss_B.sum().backward()
    slopes = [BETA * sigmoid(-margin) for margin in MARGINS]
    expected = [-slopes[0]] * 2 + [-slopes[1]] + [slopes[0]] * 3 + [slopes[1]]
    assert token_logps.grad.tolist() == pytest.approx(expected, abs=1e-6)


def test_at_the_reference_the_loss_is_ln_2():
    token_logps = torch.tensor(TOKEN_LOGPS)
    logps_S = completion_logps(token_logps, CU_SEQLENS)
    losses = sigmoid_loss(token_logps, CU_SEQLENS, logps_S, beta=0.1)
    assert losses.loss_B.tolist() == pytest.approx([math.log(2)] * 2)
