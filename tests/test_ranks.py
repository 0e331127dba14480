"""What two ranks settle together, one of them here and the other pretended."""

import pickle
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import pytest
import torch

from fastdpo import ranks
from fastdpo.ranks import (
    average_gradients,
    from_main_process,
    least_of_ranks,
    one_rank_first,
    pairs_not_repeated,
)


class OfTwo(SimpleNamespace):
    """An accelerator of this rank and another, which has its own count and uses one parameter."""

    def __init__(self, *, others_count=None, others_use=()):
        super().__init__(num_processes=2, device=torch.device("cpu"))
        self.count, self.use = others_count, others_use

    def gather(self, counts):
        return torch.cat([counts, torch.tensor([self.count])])

    def reduce(self, have_one, how):
        assert how == "sum"
        return have_one + torch.tensor(self.use)


def parameter(gradient, shape=(2, 3), dtype=torch.float32, trained=True):
    made = torch.nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=trained)
    made.grad = None if gradient is None else torch.full(shape, gradient, dtype=dtype)
    return made


@pytest.fixture
def reduced(monkeypatch):
    """What is added up over ranks, where the other rank has gradients of 1 throughout."""
    calls = []

    def all_reduce(flat):
        calls.append(flat.shape)
        assert flat.dtype != torch.float16 or flat.isfinite().all()
        flat += 0.5

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    return calls


def test_no_rank_waits_for_pairs_that_are_not_kept(monkeypatch):
    turns = object()
    args = SimpleNamespace(main_process_first=lambda desc: turns)
    assert one_rank_first(args) is turns
    monkeypatch.setattr(datasets.fingerprint, "_CACHING_ENABLED", False)
    assert isinstance(one_rank_first(args), nullcontext)


def test_every_process_has_the_main_ones_answer_or_its_error(monkeypatch):
    sent = []

    def broadcast(answers):
        sent.append(pickle.dumps(answers))
        return pickle.loads(sent[0])

    def fail():
        raise OSError("want a folder")

    def never():
        raise AssertionError("made twice")

    monkeypatch.setattr(ranks, "broadcast_object_list", broadcast)
    main, other = (SimpleNamespace(process_index=rank) for rank in (0, 1))
    for args, make in ((main, fail), (other, never)):
        with pytest.raises(OSError, match="want a folder"):
            from_main_process(make, args)
    sent.clear()
    assert from_main_process(lambda: "run", main) == from_main_process(never, other) == "run"


@pytest.mark.parametrize(("here", "there"), [(3, 5), (5, 3)])
def test_the_least_of_two_ranks_counts(here, there):
    assert least_of_ranks(here, OfTwo(others_count=there)) == 3
    assert least_of_ranks(here, SimpleNamespace(num_processes=1)) == here


@pytest.mark.parametrize(
    "at_end, remainder, new",
    [(False, 3, [4, 4]), (True, 3, [3, 0]), (True, 6, [4, 2]), (True, 0, [4, 4])],
)
def test_pairs_that_fill_up_the_last_batches_are_not_counted(at_end, remainder, new):
    state = SimpleNamespace(end_of_dataloader=at_end, remainder=remainder)
    of_two = {"gradient_state": state, "num_processes": 2}
    both = [SimpleNamespace(**of_two, process_index=rank) for rank in (0, 1)]
    assert [pairs_not_repeated(4, each) for each in both] == new


def test_a_single_rank_repeats_no_pairs():
    """Though a loader has a ragged end: of training, say, where a callback evaluates a batch."""
    state = SimpleNamespace(end_of_dataloader=True, remainder=3)
    alone = SimpleNamespace(gradient_state=state, num_processes=1, process_index=0)
    assert pairs_not_repeated(4, alone) == 4


def test_gradients_are_averaged_however_they_are_cut_into_lots(reduced, monkeypatch):
    monkeypatch.setattr(ranks, "BUCKET_BYTES", 48)
    two, strided = parameter(2.0), parameter(None)
    strided.grad = torch.arange(6.0).view(3, 2).T
    large = parameter(3.0, shape=(5, 5))
    narrow = parameter(4.0, dtype=torch.bfloat16)
    there, unused, frozen = parameter(None), parameter(None), parameter(9.0, trained=False)
    all_of_them = [two, strided, large, narrow, there, unused, frozen]
    average_gradients(iter(all_of_them), OfTwo(others_use=[1, 1, 1, 1, 1, 0]))
    assert torch.equal(two.grad, torch.full((2, 3), 1.5))
    assert torch.equal(strided.grad, (torch.arange(6.0).view(3, 2).T + 1) / 2)
    assert torch.equal(large.grad, torch.full((5, 5), 2.0))
    assert torch.equal(narrow.grad, torch.full((2, 3), 2.5, dtype=torch.bfloat16))
    assert torch.equal(there.grad, torch.full((2, 3), 0.5))
    assert unused.grad is None and torch.equal(frozen.grad, torch.full((2, 3), 9.0))
    # two small ones at once, a larger one alone, another dtype by itself
    assert reduced == [(12,), (25,), (6,), (6,)]


def test_a_sum_of_gradients_stays_in_its_dtypes_range(reduced):
    half = parameter(6e4, dtype=torch.float16)
    average_gradients([half], OfTwo(others_use=[1]))
    assert (half.grad == 3e4).all()


def test_one_process_reduces_nothing(reduced):
    alone = parameter(2.0)
    average_gradients([alone], SimpleNamespace(num_processes=1))
    assert (alone.grad == 2.0).all() and not reduced


def test_a_lot_is_large_enough_for_a_small_models_gradients(reduced):
    average_gradients(
        [parameter(1.0, shape=(256, 256)) for _ in range(8)], OfTwo(others_use=[1] * 8)
    )
    assert len(reduced) == 1
