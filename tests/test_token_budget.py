import pytest
import torch

from fastdpo.batch import TokensRun
from fastdpo.token_budget import SAFE_SHARE, UNBOUNDED, half_of_largest, tokens_that_fit


def inputs(tokens, pairs=1):
    return {"tokens": TokensRun(tokens), "cu_seqlens": range(2 * pairs + 1)}


class PretendedGPU:
    """Memory in which a token of a forward costs `per_token` bytes, and gradients 1000 once."""

    def __init__(self, monkeypatch, *, free, per_token=10):
        self.free, self.per_token, self.peak = free, per_token, 0
        for name, value in {
            "reset_peak_memory_stats": lambda device: None,
            "memory_allocated": lambda device: 500,
            "max_memory_allocated": lambda device: self.peak,
            "empty_cache": lambda: None,
            "mem_get_info": lambda device: (self.free, 10 * self.free),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def run(self, inputs):
        taken = 1000 + self.per_token * inputs["tokens"].run
        if taken > self.free:
            raise torch.OutOfMemoryError("pretended")
        self.peak = 500 + taken


def test_tokens_are_what_is_free_over_what_one_more_token_costs(monkeypatch):
    gpu = PretendedGPU(monkeypatch, free=50_000)
    fit = tokens_that_fit(
        gpu.run, inputs(100), inputs(180), torch.device("cuda"), kept_bytes=10_000
    )
    assert fit == int(SAFE_SHARE * (50_000 - 10_000) / 10)


def test_where_two_pairs_do_not_fit_the_budget_is_one(monkeypatch):
    gpu = PretendedGPU(monkeypatch, free=2500)
    arguments = torch.device("cuda")
    assert tokens_that_fit(gpu.run, inputs(100), inputs(180), arguments, kept_bytes=0) == 100
    with pytest.raises(torch.OutOfMemoryError):
        tokens_that_fit(gpu.run, inputs(200), inputs(380), arguments, kept_bytes=0)


def test_without_a_gpu_there_is_no_bound():
    none = tokens_that_fit(None, inputs(100), inputs(180), torch.device("cpu"), kept_bytes=0)
    assert none == UNBOUNDED


def test_a_smaller_budget_splits_the_largest_pack_that_can_be_split():
    assert half_of_largest([inputs(900), inputs(200, pairs=2), inputs(300, pairs=3)]) == 150
    assert half_of_largest([inputs(900), inputs(200)]) == 0
