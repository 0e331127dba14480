"""Every loss on numbers worked out by hand, through the function that the trainer calls."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.kernels.reference import completion_sums
from fastdpo.losses import (
    LOSS_TYPES,
    PAIR_METRICS,
    SMOOTHED,
    WITH_F_DIVERGENCE,
    pair_loss,
    pair_weights,
)

# Two pairs. Token log-probabilities, end to end: chosen 0, chosen 1, rejected 0, rejected 1.
TOKEN_LOGPS = [-1.0, -0.5, -2.0, -0.5, -0.5, -1.0, -3.0]
CU_SEQLENS = torch.tensor([0, 2, 3, 6, 7], dtype=torch.int32)
REFERENCE_LOGPS = torch.tensor([-2.5, -1.0, -1.0, -1.0])
BETA = 0.5
# chosen 0: -1.5 against -2.5: +1, reward  0.5    rejected 0: -2.0 against -1.0: -1, reward -0.5
# chosen 1: -2.0 against -1.0: -1, reward -0.5    rejected 1: -3.0 against -1.0: -2, reward -1.0
MARGINS = [0.5 - -0.5, -0.5 - -1.0]  # 1.0 and 0.5
# -log sigmoid, and the sigmoid of what the two pairs are made of
SOFT = {1.0: 0.3132617, 0.5: 0.4740770, -0.5: 0.9740770, -1.0: 1.3132617}
SIGMOID = {1.0: 0.7310586, 0.5: 0.6224593, -0.5: 0.3775407, -1.0: 0.2689414}


def loss_of(token_logps, *loss_types, **settings):
    settings = {"beta": BETA, "loss_type": loss_types or ("sigmoid",), **settings}
    return pair_loss(torch.as_tensor(token_logps), CU_SEQLENS, REFERENCE_LOGPS, **settings)


def test_a_completions_logp_is_the_sum_of_its_tokens():
    logps_S = completion_sums(torch.tensor(TOKEN_LOGPS), CU_SEQLENS)
    assert logps_S.tolist() == [-1.5, -2.0, -2.0, -3.0]


def test_rewards_are_beta_times_the_log_ratios_whatever_the_loss():
    for loss_type, divergence in (("sigmoid", "reverse_kl"), ("ipo", "forward_kl")):
        losses = loss_of(TOKEN_LOGPS, loss_type, f_divergence_type=divergence)
        assert losses.logps_S.tolist() == [-1.5, -2.0, -2.0, -3.0]
        metrics = dict(zip(PAIR_METRICS, losses.metrics_MB.tolist(), strict=True))
        assert metrics == {
            "rewards/chosen": [0.5, -0.5],
            "rewards/rejected": [-0.5, -1.0],
            "rewards/margins": [1.0, 0.5],
            "rewards/accuracies": [1.0, 1.0],
            "logps/chosen": [-1.5, -2.0],
            "logps/rejected": [-2.0, -3.0],
        }


BY_HAND = {
    "sigmoid": [SOFT[1.0], SOFT[0.5]],
    # lengths 2 and 3: 0.5 / 2 + 0.5 / 3 = 5 / 12; one token each: as sigmoid
    "sigmoid_norm": [math.log1p(math.exp(-5 / 12)), SOFT[0.5]],
    "hinge": [0.0, 0.5],
    # log-ratios per token 1/2 + 1/3 and -1 + 2, less 1 / (2 beta) = 1, squared
    "ipo": [(5 / 6 - 1) ** 2, 0.0],
    "nca_pair": [1.5 * SOFT[0.5] + 0.5 * SOFT[-0.5], SOFT[-0.5] + 0.5 * (SOFT[0.5] + SOFT[1.0])],
    "bco_pair": [2 * SOFT[0.5], SOFT[-0.5] + SOFT[1.0]],
    # log-ratios 1 and -1 against -1 and -2: each against its own, by pair and by rank
    "aot": [SOFT[1.0], SOFT[0.5]],
    "aot_unpaired": [SOFT[1.0], SOFT[0.5]],
    # sums 1.5 and 2 of three tokens, times B
    "sft": [1.0, 4 / 3],
    # 1 / (2 beta) = 1: (1 - 1)² + (-1 + 1)² and (-1 - 1)² + (-2 + 1)²
    "sppo_hard": [0.0, 5.0],
    "apo_zero": [2 * SIGMOID[-0.5], SIGMOID[0.5] + SIGMOID[-1.0]],
    "apo_down": [SIGMOID[0.5] + SIGMOID[-1.0], 2 * SIGMOID[-0.5]],
    # the gate sigmoid(margin / 0.05) is all but open: 1 - 2e-9 and 1 - 4.5398e-5
    "discopop": [math.exp(-1), math.exp(-0.5) * (1 - 4.5398e-5) + SOFT[0.5] * 4.5398e-5],
}
BY_HAND_SMOOTHED = {  # label_smoothing 0.1
    "sigmoid": [0.9 * SOFT[1.0] + 0.1 * SOFT[-1.0], 0.9 * SOFT[0.5] + 0.1 * SOFT[-0.5]],
    "aot": [0.9 * SOFT[1.0] + 0.1 * SOFT[-1.0], 0.9 * SOFT[0.5] + 0.1 * SOFT[-0.5]],
    "aot_unpaired": [0.9 * SOFT[1.0] + 0.1 * SOFT[-1.0], 0.9 * SOFT[0.5] + 0.1 * SOFT[-0.5]],
    "robust": [
        (0.9 * SOFT[1.0] - 0.1 * SOFT[-1.0]) / 0.8,
        (0.9 * SOFT[0.5] - 0.1 * SOFT[-0.5]) / 0.8,
    ],
    # KL from (sigmoid(m), sigmoid(-m)) to (0.9, 0.1)
    "exo_pair": [
        p * math.log(p / 0.9) + (1 - p) * math.log((1 - p) / 0.1)
        for p in (SIGMOID[1.0], SIGMOID[0.5])
    ],
}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_loss_by_hand(loss_type):
    for table, label_smoothing in ((BY_HAND, 0.0), (BY_HAND_SMOOTHED, 0.1)):
        if loss_type in table:
            loss_B = loss_of(TOKEN_LOGPS, loss_type, label_smoothing=label_smoothing).loss_B
            assert loss_B.tolist() == pytest.approx(table[loss_type], abs=2e-6)
    assert loss_type in {**BY_HAND, **BY_HAND_SMOOTHED}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_label_smoothing_is_read_by_those_that_are_said_to(loss_type):
    less, more = (
        loss_of(TOKEN_LOGPS, loss_type, label_smoothing=label_smoothing).loss_B
        for label_smoothing in (0.1, 0.2)
    )
    assert torch.equal(less, more) == (loss_type not in SMOOTHED)


@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if "aot" not in name])
def test_an_f_divergence_goes_with_a_loss_in_which_a_constant_of_both_rewards_cancels(loss_type):
    # of one token each: ipo and sigmoid_norm divide rewards by their completions' lengths
    settings = {"beta": BETA, "loss_type": (loss_type,), "label_smoothing": 0.1}
    here, shifted = (
        pair_loss(THREE, torch.arange(7).int(), THREE_REFERENCE + constant, **settings).loss_B
        for constant in (0.0, 1.0)
    )
    assert torch.allclose(here, shifted) == (loss_type in WITH_F_DIVERGENCE)


# Three pairs of one token each. Chosen minus rejected: 1, 2, 0; the reference's: 3, 0, 1.
# Log-ratios: chosen 0, -1, -2, rejected 2, -3, -1.
THREE = torch.tensor([-1.0, -2.0, -3.0, -2.0, -4.0, -3.0])
THREE_REFERENCE = torch.tensor([-1.0, -1.0, -1.0, -4.0, -1.0, -2.0])


@pytest.mark.parametrize(
    ("loss_type", "distances", "rejected_meets"),
    [
        # 1, 2, 0 against 0, 1, 3 in the order of 0, 1, 2; each pair's own two tokens move it
        ("aot", [0.0, -1.0, 0.0], [0, 1, 2]),
        # 0, -1, -2 against 2, -1, -3: the third's rejected meets the second's chosen, and so on
        ("aot_unpaired", [-2.0, 0.0, 1.0], [0, 2, 1]),
    ],
)
def test_aot_holds_against_what_has_the_same_rank(loss_type, distances, rejected_meets):
    token_logps = THREE.clone().requires_grad_()
    ends = torch.arange(7).int()
    settings = {"beta": BETA, "loss_type": (loss_type,)}
    loss_B = pair_loss(token_logps, ends, THREE_REFERENCE, **settings).loss_B
    expected = [math.log1p(math.exp(-BETA * distance)) for distance in distances]
    assert loss_B.tolist() == pytest.approx(expected, abs=1e-6)
    loss_B.sum().backward()
    slopes = [BETA / (1 + math.exp(BETA * distance)) for distance in distances]
    expected = [-slope for slope in slopes] + [slopes[b] for b in rejected_meets]
    assert token_logps.grad.tolist() == pytest.approx(expected, abs=1e-6)


@given(
    logps=st.lists(st.tuples(*[st.floats(-9, 0, width=32)] * 4), min_size=1, max_size=9),
    loss_type=st.sampled_from(["aot", "aot_unpaired"]),
)
@settings(deadline=None, derandomize=True)
def test_ranks_are_those_of_two_sorted_samples(logps, loss_type):
    policy, reference = torch.tensor(logps, dtype=torch.float64).T.reshape(2, -1)
    loss_B = pair_loss(
        policy, torch.arange(len(policy) + 1).int(), reference, beta=0.1, loss_type=(loss_type,)
    ).loss_B
    (chosen, rejected), (own_chosen, own_rejected) = policy.chunk(2), reference.chunk(2)
    if loss_type == "aot":
        above, below = chosen - rejected, own_chosen - own_rejected
    else:
        above, below = chosen - own_chosen, rejected - own_rejected
    distances = 0.1 * (above.msort() - below.msort())
    expected = -torch.nn.functional.logsigmoid(distances).sum()
    torch.testing.assert_close(loss_B.sum(), expected)


def test_sft_weighs_every_chosen_token_alike():
    token_logps = torch.tensor(TOKEN_LOGPS, requires_grad=True)
    longer_chosen = torch.tensor([0, 3, 4, 6, 7], dtype=torch.int32)  # LD-DPO would weigh its rest
    settings = {"beta": BETA, "loss_type": ("sft",), "ld_alpha": 0.0}
    losses = pair_loss(token_logps, longer_chosen, REFERENCE_LOGPS, **settings)
    losses.loss_B.mean().backward()
    assert token_logps.grad.tolist() == pytest.approx([-1 / 4] * 4 + [0.0] * 3)


def test_sft_without_a_chosen_token_costs_nothing():
    cu_seqlens = torch.tensor([0, 0, 2], dtype=torch.int32)
    losses = pair_loss(-torch.ones(2), cu_seqlens, torch.zeros(2), beta=BETA, loss_type=("sft",))
    assert losses.loss_B.tolist() == [0.0]


def test_gradient_by_hand():
    # d loss / d token = -beta * sigmoid(-margin) for a chosen token, the opposite for a rejected
    token_logps = torch.tensor(TOKEN_LOGPS, requires_grad=True)
    loss_of(token_logps).loss_B.sum().backward()
    slopes = [BETA * SIGMOID[-margin] for margin in MARGINS]
    expected = [-slopes[0]] * 2 + [-slopes[1]] + [slopes[0]] * 3 + [slopes[1]]
    assert token_logps.grad.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("divergence", "score"),
    [
        ("forward_kl", lambda x: 1 - math.exp(-x)),
        ("js_divergence", lambda x: math.log(2 / (1 + math.exp(-x)))),
        ("alpha_divergence", lambda x: 2 * (1 - math.exp(-x / 2))),  # alpha = 0.5
    ],
)
def test_an_f_divergence_by_hand(divergence, score):
    margins = [BETA * (score(1) - score(-1)), BETA * (score(-1) - score(-2))]
    expected = [math.log1p(math.exp(-margin)) for margin in margins]
    loss_B = loss_of(TOKEN_LOGPS, f_divergence_type=divergence).loss_B
    assert loss_B.tolist() == pytest.approx(expected, abs=1e-6)


def test_alpha_divergence_meets_its_neighbours():
    settings = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.0}
    forward = loss_of(TOKEN_LOGPS, f_divergence_type="forward_kl").loss_B
    assert loss_of(TOKEN_LOGPS, **settings).loss_B.tolist() == forward.tolist()
    for alpha in (1.0, 1 + 1e-5):  # the limit itself, and close to it
        loss_B = loss_of(TOKEN_LOGPS, **settings | {"f_alpha_divergence_coef": alpha}).loss_B
        assert loss_B.tolist() == pytest.approx(BY_HAND["sigmoid"], abs=1e-5)


def test_a_mix_is_the_weighted_sum():
    mix = ("hinge", "sppo_hard", "sigmoid")
    loss_B = loss_of(TOKEN_LOGPS, *mix, loss_weights=(2.0, 0.5, -1.0)).loss_B
    expected = [2 * 0.0 + 0.5 * 0.0 - SOFT[1.0], 2 * 0.5 + 0.5 * 5.0 - SOFT[0.5]]
    assert loss_B.tolist() == pytest.approx(expected, abs=1e-6)
    with_batch = loss_of(TOKEN_LOGPS, "sft", "hinge", "aot", loss_weights=(3.0, 2.0, 0.5)).loss_B
    expected = [3 * 1.0 + 0.5 * SOFT[1.0], 3 * 4 / 3 + 2 * 0.5 + 0.5 * SOFT[0.5]]
    assert with_batch.tolist() == pytest.approx(expected, abs=1e-6)
    unweighted = loss_of(TOKEN_LOGPS, *mix).loss_B
    assert unweighted.tolist() == pytest.approx([SOFT[1.0], 5.5 + SOFT[0.5]], abs=1e-6)


def test_ld_alpha_weighs_what_is_longer_than_the_other():
    # rejected 0 has one token, -1.0, more than chosen 0; its sum is -1.0 + 0.25 * -1.0
    token_logps = torch.tensor(TOKEN_LOGPS, requires_grad=True)
    losses = loss_of(token_logps, ld_alpha=0.25)
    assert losses.logps_S.tolist() == [-1.5, -2.0, -1.25, -3.0]
    assert completion_sums(token_logps, CU_SEQLENS, 0.25).tolist() == [-1.5, -2.0, -1.25, -3.0]
    margin = BETA * (1.0 - -0.25)
    assert losses.loss_B[0].item() == pytest.approx(math.log1p(math.exp(-margin)))
    losses.loss_B[0].backward()
    slope = BETA / (1 + math.exp(margin))
    expected = [-slope, -slope, 0, slope, slope, 0.25 * slope, 0]
    assert token_logps.grad.tolist() == pytest.approx(expected)


def test_a_completions_sum_is_rounded_once():
    token_logps_C = -20 * torch.rand(3000, generator=torch.Generator().manual_seed(0))
    cu_seqlens = torch.tensor([0, 1000, 3000], dtype=torch.int32)
    exact = [part.double().sum().float() for part in token_logps_C.split([1000, 2000])]
    assert torch.equal(completion_sums(token_logps_C, cu_seqlens), torch.stack(exact))


def test_at_the_reference_the_sigmoid_loss_is_ln_2():
    token_logps = torch.tensor(TOKEN_LOGPS)
    logps_S = completion_sums(token_logps, CU_SEQLENS)
    losses = pair_loss(token_logps, CU_SEQLENS, logps_S, beta=0.1)
    assert losses.loss_B.tolist() == pytest.approx([math.log(2)] * 2)


def test_a_pairs_weight_is_the_product_of_geometric_means():
    # p over the sum of squares: chosen 0: 1/2 / (1/2), 1/8 / (1/2); rejected 0: 1/4 / (1/4)
    #                            chosen 1: 1/2 / (1/4);                rejected 1: 3/4 / (5/8) twice
    log_p = torch.tensor([1 / 2, 1 / 8, 1 / 2, 1 / 4, 3 / 4, 3 / 4]).log()
    log_sum_p2 = torch.tensor([1 / 2, 1 / 2, 1 / 4, 1 / 4, 5 / 8, 5 / 8]).log()
    cu_seqlens = torch.tensor([0, 2, 3, 4, 6], dtype=torch.int32)
    weight_B = pair_weights(log_p.requires_grad_(), log_sum_p2, cu_seqlens)
    assert weight_B.tolist() == pytest.approx([1 / 2, 2 * 6 / 5])  # sqrt(1 * 1/4) * 1
    assert not weight_B.requires_grad


def test_an_empty_completion_weighs_nothing_away():
    cu_seqlens = torch.tensor([0, 0, 1], dtype=torch.int32)
    weight_B = pair_weights(torch.tensor([0.5]).log(), torch.tensor([0.25]).log(), cu_seqlens)
    assert weight_B.tolist() == pytest.approx([2.0])
