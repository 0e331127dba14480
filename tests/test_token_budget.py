"""How many tokens memory has room for, and which packs a budget takes."""

import families
import pytest
import tiny
import torch
from trainers import make_trainer
from watches import Live

from fastdpo import pack_trainer
from fastdpo.batch import TokensRun
from fastdpo.kernels import tiles
from fastdpo.token_budget import (
    SAFE_SHARE,
    UNBOUNDED,
    TokenBudget,
    half_of_largest,
    tokens_that_fit,
)


def inputs(tokens, pairs=1):
    return {"tokens": TokensRun(tokens), "cu_seqlens": range(2 * pairs + 1)}


def pretend_gpu(monkeypatch, *, start_over, allocated, peak, free):
    """torch.cuda's view of memory, from functions that say it."""
    for name, value in {
        "reset_peak_memory_stats": lambda device: start_over(),
        "memory_allocated": lambda device: allocated(),
        "max_memory_allocated": lambda device: peak(),
        "empty_cache": lambda: None,
        "mem_get_info": lambda device: (free(), 10 * free()),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


class PretendedGPU:
    """A GPU whose token of a forward costs `per_token` bytes, all else `on_top`, a first run 7000.

    No run takes less than `least`. Each leaves 40 bytes behind, and a cache, which is not free
    before it is emptied.
    """

    def __init__(self, monkeypatch, *, free, per_token=10, on_top=1000, least=0):
        self.free, self.per_token, self.on_top, self.least = free, per_token, on_top, least
        self.allocated, self.peak, self.cached, self.runs = 500, 90_000, 0, 0
        pretend_gpu(
            monkeypatch,
            start_over=lambda: setattr(self, "peak", self.allocated),
            allocated=lambda: self.allocated,
            peak=lambda: self.peak,
            free=lambda: self.free - self.cached,
        )
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: setattr(self, "cached", 0))

    def run(self, inputs):
        taken = self.on_top + self.per_token * inputs["tokens"].run + 7000 * (self.runs == 0)
        taken = max(taken, self.least)
        if taken > self.free:
            raise torch.OutOfMemoryError("pretended")
        self.peak = max(self.peak, self.allocated + taken)
        self.cached, self.runs, self.allocated = taken, self.runs + 1, self.allocated + 40

    def fit(self, *tokens, kept_bytes=0):
        probes = [inputs(each) for each in tokens or (100, 180)]
        return tokens_that_fit(self.run, probes, torch.device("cuda"), kept_bytes=kept_bytes)


def test_tokens_are_what_is_free_over_what_one_more_token_costs(monkeypatch):
    gpu = PretendedGPU(monkeypatch, free=50_000)
    assert gpu.fit(kept_bytes=10_000) == int((SAFE_SHARE * (50_000 - 10_000) - 1000) / 10)


def test_a_budget_is_at_least_a_token_and_a_token_at_least_a_byte(monkeypatch):
    assert PretendedGPU(monkeypatch, free=50_000).fit(kept_bytes=60_000) == 1
    gpu = PretendedGPU(monkeypatch, free=50_000, per_token=0)
    assert gpu.fit() == int(SAFE_SHARE * 50_000 - (1000 - 180))


def test_tokens_that_cost_more_and_more_do_not_lend_memory(monkeypatch):
    gpu = PretendedGPU(monkeypatch, free=50_000, on_top=-800)
    assert gpu.fit() == int(SAFE_SHARE * 50_000 / 10)


def test_a_forward_whose_peak_is_not_its_tokens_tells_nothing(monkeypatch):
    gpu = PretendedGPU(monkeypatch, free=50_000, least=1_900)
    assert gpu.fit(10, 100, 180) == int((SAFE_SHARE * 50_000 - 1000) / 10)


def test_pairs_of_as_many_tokens_tell_nothing(monkeypatch):
    assert PretendedGPU(monkeypatch, free=50_000).fit(100, 100) == UNBOUNDED
    assert PretendedGPU(monkeypatch, free=50_000).fit(100) == UNBOUNDED
    some = PretendedGPU(monkeypatch, free=50_000).fit(100, 180, 180)
    assert some == PretendedGPU(monkeypatch, free=50_000).fit(100, 180)


def test_where_a_probe_does_not_fit_the_budget_is_the_one_before(monkeypatch):
    gpu = PretendedGPU(monkeypatch, free=9_500)
    assert gpu.fit(100, 200, 900) == 200
    with pytest.raises(torch.OutOfMemoryError):
        gpu.fit(900, 1000)
    first = gpu.run

    def run(inputs):
        first(inputs)
        gpu.free = 1_500  # once there are gradients

    gpu.run = run
    with pytest.raises(torch.OutOfMemoryError):
        gpu.fit(100, 200)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_a_token_costs_what_it_costs_in_a_large_forward(
    monkeypatch, tmp_path, tokenizer, checkpointing
):
    """In full: the gradients are larger than the activations of a pair."""
    monkeypatch.setitem(tiles.TILE_ROWS, "cpu", 512)  # beside which the activations are large
    model = families.model(
        "llama",
        torch.float32,
        vocab_size=4000,
        hidden_size=64,
        num_hidden_layers=8,
        tie_word_embeddings=True,
    )
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        model=model,
        rows=tiny.rows(32),
        gradient_checkpointing=checkpointing,
        layout="packed",
        max_tokens_per_forward="auto",
    )
    if checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    free = 1 << 30
    with Live() as live:
        pretend_gpu(
            monkeypatch,
            start_over=lambda: setattr(live, "peak", live.live),
            allocated=lambda: live.live,
            peak=lambda: live.peak,
            free=lambda: free - live.live,
        )

        def on_a_gpu(run, probes, device, *, kept_bytes):
            return tokens_that_fit(run, probes, torch.device("cuda"), kept_bytes=0)

        monkeypatch.setattr(pack_trainer, "tokens_that_fit", on_a_gpu)
        budget = trainer._tokens_that_fit()
        assert all(parameter.grad is None for parameter in trainer.model.parameters())

        def peak_of(count):
            pairs = [*trainer.train_dataset] * 2
            batch = trainer.data_collator(pairs[:count])
            live.peak = live.live
            before = live.live
            trainer._run_once(batch)
            return batch["tokens"].run, live.peak - before

        peak_of(1)
        (few, small), (many, large) = peak_of(32), peak_of(64)
    per_token = (large - small) / (many - few)
    assert SAFE_SHARE * free / budget == pytest.approx(per_token, rel=0.15)


def test_without_a_gpu_there_is_no_bound():
    probes = [inputs(100), inputs(180)]
    none = tokens_that_fit(None, probes, torch.device("cpu"), kept_bytes=0)
    assert none == UNBOUNDED


def test_a_smaller_budget_splits_the_largest_pack_that_can_be_split():
    assert half_of_largest([inputs(900), inputs(300, pairs=2), inputs(200, pairs=3)]) == 150
    assert half_of_largest([inputs(900), inputs(200)]) == 0


def test_a_pack_fits_its_budget_or_is_a_single_pair():
    budget = TokenBudget(100)
    fits = [budget.fits(pack) for pack in (inputs(100, 2), inputs(101, 2), inputs(101, 1))]
    assert fits == [True, False, True]
