"""Packs on two ranks, of which one may run out of memory, train as whole batches of one process."""

import json
from pathlib import Path

import pytest
import torch
from processes import run_ranks


def trained(folder, world_size, runs):
    """What tests/two_ranks.py saves of `runs`, by their names, and of "averaged" on each rank."""
    script = (Path(__file__).parent / "two_ranks.py").read_text("utf-8")
    run_ranks(folder, script, str(folder), json.dumps(runs), world_size=world_size)
    return {
        name: [torch.load(folder / f"{name}.{rank}.pt") for rank in range(world_size)]
        for name in [*runs, "averaged"]
    }


NUMBERED = {"max_tokens_per_forward": 90}
# 2 ranks score 10 of 32 pairs at a time, and the last 2 with some that are there already
PRECOMPUTED = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 5}
AUTO = {"settings": {"max_tokens_per_forward": "auto"}, "start_with": 130}
FAILURES = {
    "first": {"batch": 1, "pack": 1, "in_backward": False},  # where DDP has run nothing yet
    "forward": {"batch": 2, "pack": 2, "in_backward": False},  # after another batch of the update
    "backward": {"batch": 2, "pack": 2, "in_backward": True},
    "second-update": {"batch": 3, "pack": 2, "in_backward": True},
}
RUNS = {
    "uneven": {"settings": NUMBERED},
    "even": {"settings": NUMBERED | PRECOMPUTED, "even": True},
    "again": {"settings": PRECOMPUTED},
    # a forward more for each pack, where one rank has several and the other one
    "mixing": {"settings": {"max_tokens_per_forward": 450, "loss_type": "aot"}},
    "evaluated": {"settings": {}, "evaluate_first": True},
    "logging": {"settings": {}, "logs": True},
    "auto": AUTO,
    **{name: AUTO | {"fails": failure} for name, failure in FAILURES.items()},
    "hopeless": AUTO | {"fails": "always"},
}


def assert_trained_alike(ours, theirs):
    for one, other in zip(ours["logged"], theirs["logged"], strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "num_tokens"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    for name, weight in ours["weights"].items():
        torch.testing.assert_close(weight, theirs["weights"][name], rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, whole batches."""
    return trained(tmp_path_factory.mktemp("alone"), 1, {"whole": {"settings": {}}})["whole"][0]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("two"), 2, RUNS)


def assert_same_weights(ranks):
    for name, weight in ranks[0]["weights"].items():
        assert torch.equal(weight, ranks[1]["weights"][name]), name


@pytest.mark.parametrize(
    "run", ["uneven", "even", "again", "evaluated", "logging", "auto", *FAILURES]
)
def test_two_ranks_train_as_one(two_ranks, alone, run):
    assert_trained_alike(two_ranks[run][0], alone)
    assert_same_weights(two_ranks[run])


def test_ranks_find_what_an_earlier_run_scored(two_ranks):
    assert "cache" not in two_ranks["even"][0]["reference"]
    assert "(32 found in the cache)" in two_ranks["again"][0]["reference"]


def test_ranks_have_as_many_forwards_where_these_are_collective(two_ranks):
    uneven, even = ([rank["forwards"] for rank in two_ranks[run]] for run in ("uneven", "even"))
    assert uneven[0] != uneven[1] and even[0] == even[1]


def test_a_loss_that_mixes_pairs_may_have_one_pack_here_and_several_there(two_ranks):
    forwards = [rank["forwards"] for rank in two_ranks["mixing"]]
    assert any(1 in counts and max(counts) > 1 for counts in zip(*forwards, strict=True)), forwards
    assert_same_weights(two_ranks["mixing"])


@pytest.mark.parametrize("run", FAILURES)
def test_all_ranks_shrink_the_budget_where_one_runs_out_of_memory(two_ranks, run):
    first, second = two_ranks[run]
    assert (first["raised"], second["raised"]) == (0, 1)
    assert first["budget"] == second["budget"] < AUTO["start_with"]


def test_memory_for_no_pair_ends_all_ranks(two_ranks):
    assert [rank["error"] for rank in two_ranks["hopeless"]] == [
        "out of memory on another rank, for a single pair",
        "pretended",
    ]


def test_a_gradient_that_a_rank_has_not_counts_as_0(two_ranks):
    for gradients in two_ranks["averaged"]:
        assert gradients["none"] is None
        assert torch.equal(gradients["both"], torch.full((2, 3), 1.5))
        assert torch.equal(gradients["one"], torch.full((2, 3), 2.0))
