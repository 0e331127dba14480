import pytest
import torch

from fastdpo.batch import TokensRun
from fastdpo.token_budget import (
    SAFE_SHARE,
    UNBOUNDED,
    TokenBudget,
    half_of_largest,
    tokens_that_fit,
)


def inputs(tokens, pairs=1):
    return {"tokens": TokensRun(tokens), "cu_seqlens": range(2 * pairs + 1)}


class PretendedGPU:
    """A GPU whose token of a forward costs `per_token` bytes, gradients 1000, and a first run 7000.

    Each run leaves 40 bytes behind, and a cache, which is not free before it is emptied.
    """

    def __init__(self, monkeypatch, *, free, per_token=10):
        self.free, self.per_token = free, per_token
        self.allocated, self.peak, self.cached, self.runs = 500, 90_000, 0, 0
        for name, value in {
            "reset_peak_memory_stats": lambda device: setattr(self, "peak", self.allocated),
            "memory_allocated": lambda device: self.allocated,
            "max_memory_allocated": lambda device: self.peak,
            "empty_cache": lambda: setattr(self, "cached", 0),
            "mem_get_info": lambda device: (self.free - self.cached, 10 * self.free),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def run(self, inputs):
        taken = 1000 + self.per_token * inputs["tokens"].run + 7000 * (self.runs == 0)
        if taken > self.free:
            raise torch.OutOfMemoryError("pretended")
        self.peak = max(self.peak, self.allocated + taken)
        self.cached, self.runs, self.allocated = taken, self.runs + 1, self.allocated + 40

    def fit(self, smaller=100, larger=180, kept_bytes=0):
        device = torch.device("cuda")
        return tokens_that_fit(
            self.run, inputs(smaller), inputs(larger), device, kept_bytes=kept_bytes
        )


def test_tokens_are_what_is_free_over_what_one_more_token_costs(monkeypatch):
    gpu = PretendedGPU(monkeypatch, free=50_000)
    assert gpu.fit(kept_bytes=10_000) == int(SAFE_SHARE * (50_000 - 10_000) / 10)


def test_a_budget_is_at_least_a_token_and_a_token_at_least_a_byte(monkeypatch):
    assert PretendedGPU(monkeypatch, free=50_000).fit(kept_bytes=60_000) == 1
    gpu = PretendedGPU(monkeypatch, free=50_000, per_token=0)
    assert gpu.fit() == int(SAFE_SHARE * 50_000)


def test_pairs_of_as_many_tokens_tell_nothing(monkeypatch):
    assert PretendedGPU(monkeypatch, free=50_000).fit(100, 100) == UNBOUNDED


def test_where_two_pairs_do_not_fit_the_budget_is_one(monkeypatch):
    gpu = PretendedGPU(monkeypatch, free=9_500)
    assert gpu.fit(100, 900) == 100
    with pytest.raises(torch.OutOfMemoryError):
        gpu.fit(900, 1000)


def test_without_a_gpu_there_is_no_bound():
    none = tokens_that_fit(None, inputs(100), inputs(180), torch.device("cpu"), kept_bytes=0)
    assert none == UNBOUNDED


def test_a_smaller_budget_splits_the_largest_pack_that_can_be_split():
    assert half_of_largest([inputs(900), inputs(300, pairs=2), inputs(200, pairs=3)]) == 150
    assert half_of_largest([inputs(900), inputs(200)]) == 0


def test_a_pack_fits_its_budget_or_is_a_single_pair():
    budget = TokenBudget(100)
    fits = [budget.fits(pack) for pack in (inputs(100, 2), inputs(101, 2), inputs(101, 1))]
    assert fits == [True, False, True]
