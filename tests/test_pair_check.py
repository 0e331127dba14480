"""Pairs a model cannot embed: how they are looked for, and that they are refused."""

import copy

import families
import pytest
import tiny
import torch
from datasets import Dataset
from trainers import make_trainer
from transformers import AutoConfig, AutoModelForCausalLM

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


def test_a_pair_is_named_by_its_place_among_all(tmp_path, monkeypatch):
    monkeypatch.setattr(pair_check, "CHUNK", 2)
    row = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [2]}
    pairs = Dataset.from_list([row] * 3 + [row | {"rejected_ids": [2, 3]}])
    args = DPOConfig(output_dir=tmp_path, use_cpu=True)
    with pytest.raises(ValueError, match="train dataset, pair 3, rejected_ids"):
        check_pairs({"train": pairs}, [tiny.model("llama", 3)], args)


def test_the_smaller_of_two_tables_of_positions_bounds_a_pair(tmp_path):
    sizes = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    models = [
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model("gpt2", max_position_embeddings=positions, **sizes)
        )
        for positions in (64, 8)
    ]
    args = DPOConfig(output_dir=tmp_path, use_cpu=True)
    row = {"prompt_ids": [1] * 7, "chosen_ids": [2], "rejected_ids": [3]}
    check_pairs({"train": Dataset.from_list([row])}, models, args)
    longer = Dataset.from_list([row | {"chosen_ids": [2, 3]}])
    with pytest.raises(ValueError, match="want at most 8 tokens, .* got 9"):
        check_pairs({"train": longer}, models, args)


def test_positions_by_whispers_name_bound_a_pair(tmp_path):
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 4, "pad_token_id": 0}
    config = AutoConfig.for_model("whisper", vocab_size=300, max_target_positions=8, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    pairs = Dataset.from_list([{"prompt_ids": [1] * 8, "chosen_ids": [2], "rejected_ids": [3]}])
    with pytest.raises(ValueError, match="want at most 8 tokens, the positions of Whisper"):
        check_pairs({"train": pairs}, [model], DPOConfig(output_dir=tmp_path, use_cpu=True))


LONGROPE = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "factor": 4.0}
LONGROPE |= {"rope_type": "longrope", "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
DYNAMIC |= {"original_max_position_embeddings": 4}  # which transformers does not read
SIX = {"original_max_position_embeddings": 6}
SCALED = {
    "longrope": {"rope_parameters": LONGROPE | SIX},
    "longrope, its length beside it": {"rope_parameters": LONGROPE, **SIX},
    "dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": 6},
}


@pytest.mark.parametrize("scaled", SCALED)
def test_pairs_that_change_rotary_frequencies_go_without_packs_and_precomputing(
    tmp_path, scaled, monkeypatch
):
    model = families.model("llama", torch.float32, **copy.deepcopy(SCALED[scaled]))
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


def test_rotary_frequencies_are_looked_at_by_layer_type_and_in_the_reference(tmp_path):
    model, reference = (families.model("llama", torch.float32) for _ in range(2))
    reference.config.rope_parameters = {"full_attention": LONGROPE | SIX}
    row = {"prompt_ids": [1, 2, 3], "chosen_ids": [4], "rejected_ids": [5, 6, 7, 8]}
    args = DPOConfig(output_dir=tmp_path, use_cpu=True, max_tokens_per_forward=20)
    with pytest.raises(ValueError, match="pair 0: 7 tokens.*max_tokens_per_forward"):
        check_pairs({"train": Dataset.from_list([row])}, [model, reference], args)


@pytest.mark.parametrize("which", ["model", "ref_model"])
def test_a_token_outside_a_models_vocabulary_is_refused(tmp_path, tokenizer, which):
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}] * 3
    rows[2] = rows[2] | {"chosen_ids": [7, 250]}
    small = tiny.model("llama", 240)
    with pytest.raises(
        ValueError, match=r"train dataset, pair 2, chosen_ids: want .* 240.* got 250"
    ):
        make_trainer(tmp_path, tokenizer, rows=rows, **{which: small})


def test_a_token_outside_the_vocabulary_is_refused_in_an_evaluation_too(tmp_path, tokenizer):
    rows = [{"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}]
    small = tiny.model("llama", 240)
    run = make_trainer(tmp_path, tokenizer, model=small, rows=rows)
    with pytest.raises(ValueError, match="eval dataset, pair 0, rejected_ids"):
        run.evaluate(Dataset.from_list([rows[0] | {"rejected_ids": [240]}]))


@pytest.mark.parametrize("family", ["gpt2", "opt", "openai-gpt", "gptj", "codegen", "ctrl"])
def test_a_pair_longer_than_a_models_positions_is_refused(tmp_path, tokenizer, family):
    # sizes of its own: OPT's rows of positions are two more than its positions
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "rotary_dim": 4}
    config = AutoConfig.for_model(family, vocab_size=300, max_position_embeddings=64, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    rows = [*tiny.rows(2), tiny.rows(1)[0] | {"chosen": "x" * 60}]
    # GPT has no gradient checkpointing
    plain = {"model": model, "rows": rows, "gradient_checkpointing": False}
    with pytest.raises(ValueError, match="train dataset, pair 2: want at most 64 tokens"):
        make_trainer(tmp_path, tokenizer, **plain)
    run = make_trainer(tmp_path, tokenizer, **plain, max_length=64)
    with torch.no_grad():  # a pair as long as that runs
        run.compute_loss(run.model, run.data_collator([run.train_dataset[2]]))
    padding = {"max_length": 64, "pad_to_multiple_of": 24, "layout": "padded"}
    with pytest.raises(ValueError, match="at most 48 tokens, .*padded to multiples of 24, got"):
        make_trainer(tmp_path, tokenizer, **plain, **padding)
