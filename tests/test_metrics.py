"""What a run logs, from batches on the device to numbers on the host."""

from types import SimpleNamespace

import pytest
import torch
from watches import Watch

from fastdpo.batch import PairBatch, TokensRun
from fastdpo.losses import pair_loss
from fastdpo.metrics import (
    MetricSums,
    evaluation_metrics,
    first_pairs,
    pair_metrics,
    tokens_over_ranks,
)
from fastdpo.model import ScoredOutput

SFT = {"beta": 0.5, "loss_type": ["sigmoid", "sft"]}  # the latter mixes a batch's pairs
ONE_RANK = SimpleNamespace(reduce=lambda sums, how: sums)


def scored_batch(lengths, mean_logit):
    """One batch whose tokens all have log-probability -1 and this mean logit."""
    token_logps_C = -torch.ones(sum(lengths))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    losses = pair_loss(token_logps_C, cu_seqlens, torch.zeros(len(lengths)), beta=0.5)
    scored = ScoredOutput(
        entropy_C=torch.full_like(token_logps_C, 2.0),
        mean_logit_C=torch.full_like(token_logps_C, mean_logit),
        is_top1_C=torch.arange(sum(lengths)) % 2 == 0,
    )
    batch = PairBatch(
        model_inputs={},
        token_uses=torch.ones(1, sum(lengths), dtype=torch.int64),
        scored_rows_N=torch.arange(sum(lengths)),
        labels_N=torch.zeros(sum(lengths), dtype=torch.int64),
        completion_rows_C=None,
        cu_seqlens=cu_seqlens,
    )
    return batch, scored, losses


def measured(lengths, mean_logit):
    return pair_metrics(*scored_batch(lengths, mean_logit))


def test_pairs_and_tokens_weigh_alike_however_they_are_batched():
    sums = MetricSums()
    sums.add(measured([4, 3], mean_logit=1.0))  # one pair
    sums.add(measured([1, 2, 3, 2], mean_logit=2.0))  # two pairs
    sums.add({("aux_loss",): (torch.tensor(3.0), 1)})
    metrics = sums.take_means(ONE_RANK)
    assert metrics == {
        "rewards/chosen": pytest.approx(-0.5 * (4 + 1 + 2) / 3),
        "rewards/rejected": pytest.approx(-0.5 * (3 + 3 + 2) / 3),
        "rewards/margins": pytest.approx(0.5 / 3),
        "rewards/accuracies": pytest.approx(1 / 3),  # 4 against 3, 1 against 3, 2 against 2
        "logps/chosen": pytest.approx(-7 / 3),
        "logps/rejected": pytest.approx(-8 / 3),
        "entropy": 2.0,
        "mean_token_accuracy": pytest.approx((2 + 2) / 7),
        "logits/chosen": pytest.approx((4 * 1 + 3 * 2) / 7),
        "logits/rejected": pytest.approx((3 * 1 + 5 * 2) / 8),
        "aux_loss": 3.0,
    }
    assert sums.take_means(ONE_RANK) == {}


def test_nothing_waits_for_the_device_before_the_read():
    sums = MetricSums()
    with Watch():
        for _ in range(2):
            sums.add(measured([4, 2], mean_logit=1.0))


def test_ranks_add_up_in_one_order_whatever_came_first():
    here, there = MetricSums(), MetricSums()
    here.add({("b",): (torch.tensor(1.0), 1)})
    here.add({("a",): (torch.tensor(5.0), 2)})
    there.add({("a",): (torch.tensor(1.0), 1)})
    there.add({("b",): (torch.tensor(3.0), 1)})
    seen = []
    there.take_means(SimpleNamespace(reduce=lambda sums, how: seen.append(sums) or sums))
    both = SimpleNamespace(reduce=lambda sums, how: {"sum": sums + seen[0]}[how])
    assert here.take_means(both) == {"a": 2.0, "b": 2.0}


def test_tokens_add_up_over_ranks():
    two_ranks = SimpleNamespace(device="cpu", reduce=lambda counts, how: {"sum": 2 * counts}[how])
    assert tokens_over_ranks(TokensRun(30, 2, 8), two_ranks) == {
        "tokens/run": 60,
        "tokens/shared": 4,
        "tokens/padding_avoided": 16,
    }


def test_a_long_interval_loses_no_small_number():
    sums = MetricSums()
    sums.add({("loss",): (torch.tensor(2.0**24), 1)})
    for _ in range(2):
        sums.add({("loss",): (torch.tensor(1.0), 0)})
    assert sums.take_means(ONE_RANK) == {"loss": 2.0**24 + 2}


def test_no_token_of_chosen_completions_counts_as_none_right():
    sums = MetricSums()
    sums.add(measured([0, 2], mean_logit=1.0))
    metrics = sums.take_means(ONE_RANK)
    assert metrics["mean_token_accuracy"] == metrics["logits/chosen"] == 0.0


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_an_evaluation_measures_the_first_pairs_as_if_they_were_alone(count):
    lengths = [4, 0, 3, 2, 5, 1]  # three chosen, then three rejected
    first = [*lengths[:count], *lengths[3 : 3 + count]]
    batch, _, _ = scored_batch(lengths, mean_logit=1.0)
    scored = ScoredOutput(
        token_logps_C=-torch.arange(15.0),
        entropy_C=torch.arange(15.0),
        mean_logit_C=torch.arange(15.0).sin(),
        is_top1_C=torch.arange(15) % 3 == 0,
    )
    reference_logps_S = torch.arange(6.0)
    few, few_scored, few_reference_S = first_pairs(batch, scored, reference_logps_S, max(count, 1))
    losses = pair_loss(few_scored.token_logps_C, few.cu_seqlens, few_reference_S, **SFT)
    sums = MetricSums()
    sums.add(evaluation_metrics(few, few_scored, losses, count))
    found = sums.take_means(ONE_RANK)
    if count == 0:
        assert set(found.values()) == {0.0}
        return
    alone = MetricSums()
    kept = torch.tensor([*range(sum(first[:count])), *range(7, 7 + sum(first[count:]))])  # 7 chosen
    alone_batch, _, _ = scored_batch(first, mean_logit=1.0)
    alone_reference_S = torch.tensor([*range(count), *range(3, 3 + count)]).float()
    alone_losses = pair_loss(
        scored.token_logps_C[kept], alone_batch.cu_seqlens, alone_reference_S, **SFT
    )
    alone.add(pair_metrics(alone_batch, scored.of_rows(kept), alone_losses))
    alone.add({("loss",): (alone_losses.loss_B.sum()[None], count)})
    assert found == pytest.approx(alone.take_means(ONE_RANK))
