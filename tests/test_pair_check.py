"""Pairs a model cannot embed: how they are looked for; test_trainer_check.py has the refusals."""

import tiny
from datasets import Dataset

from fastdpo import DPOConfig
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
