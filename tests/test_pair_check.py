"""Pairs a model cannot embed: how they are looked for; test_trainer_check.py has the refusals."""

import families
import pytest
import tiny
import torch
from datasets import Dataset

from fastdpo import DPOConfig, pair_check
from fastdpo.data import prepare_pairs
from fastdpo.pair_check import check_pairs


def test_token_ids_are_looked_at_without_python_lists(tmp_path, monkeypatch):
    tokenizer = tiny.tokenizer()
    pairs, _ = prepare_pairs(Dataset.from_list(tiny.rows()), tokenizer)
    monkeypatch.setattr(Dataset, "__getitem__", None)  # what would make them
    check_pairs(
        {"train": pairs},
        [tiny.model("llama", len(tokenizer))],
        DPOConfig(output_dir=tmp_path, use_cpu=True),
    )


def test_completions_without_a_token_have_none_to_embed(tmp_path):
    pairs = Dataset.from_list([{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": []}])
    check_pairs(
        {"train": pairs}, [tiny.model("llama", 3)], DPOConfig(output_dir=tmp_path, use_cpu=True)
    )


LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 4.0}
SCALED = {
    "longrope": LONGROPE | {"original_max_position_embeddings": 6},
    "dynamic": {"factor": 2.0, "original_max_position_embeddings": 6},
}


@pytest.mark.parametrize("rope_type", SCALED)
def test_pairs_that_change_rotary_frequencies_go_without_packs_and_precomputing(
    tmp_path, rope_type, monkeypatch
):
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, **SCALED[rope_type]}
    model = families.model("llama", torch.float32, rope_parameters=rope)
    row = {"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5]}
    datasets = {"train": Dataset.from_list([row, row | {"rejected_ids": [5, 6, 7, 8]}])}

    def check(**settings):
        check_pairs(datasets, [model], DPOConfig(output_dir=tmp_path, use_cpu=True, **settings))

    warned = []
    monkeypatch.setattr(pair_check.logger, "warning", warned.append)
    check(max_length=6, max_tokens_per_forward=20, precompute_ref_log_probs=True)
    assert not warned
    check()
    assert "train dataset, pair 1: 7 tokens, and from 7 on" in warned[0]
    for setting in ({"max_tokens_per_forward": 20}, {"precompute_ref_log_probs": True}):
        with pytest.raises(ValueError, match=f"pair 1: 7 tokens.*{next(iter(setting))}"):
            check(**setting)
