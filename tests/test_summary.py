"""The lines that say what a run is about to do."""

import pytest
import tiny
from peft import LoraConfig
from trainers import LORA, make_trainer

from fastdpo import DPOConfig
from fastdpo.row_report import PairCounts
from fastdpo.summary import describe_run
from fastdpo.token_budget import TokenBudget


def lines(trainer, **changes):
    """What is said of `trainer`, by the names of the lines."""
    settings = {
        "pair_counts": trainer.pair_counts,
        "layout": trainer.layout,
        "budget": trainer.budget,
        "reference": trainer.reference.source,
    }
    text = describe_run(trainer.model, trainer.args, **settings | changes)
    return {name: line.strip() for name, line in (each.split("  ", 1) for each in text.split("\n"))}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    settings = {"max_steps": -1, "num_train_epochs": 1.5, "gradient_accumulation_steps": 2}
    return make_trainer(tmp_path_factory.mktemp("run"), tiny.tokenizer(), bf16=True, **settings)


def test_what_trains_is_told_with_its_precision(trainer, tmp_path, tokenizer):
    total = sum(parameter.numel() for parameter in trainer.model.parameters())
    of_all = f"LlamaForCausalLM, {total:,} parameters in torch.float32, {total:,} trained in full"
    assert lines(trainer)["model"] == f"{of_all}, bf16 autocast"
    assert lines(trainer)["kernels"] == "torch on cpu, trained head"
    adapted = make_trainer(tmp_path, tokenizer, peft_config=LoraConfig(**LORA))
    trained = sum(each.numel() for each in adapted.model.parameters() if each.requires_grad)
    assert lines(adapted)["model"].endswith(f"torch.float32, {trained:,} trained adapters")
    assert lines(adapted)["kernels"] == "torch on cpu, frozen head, two products"


def test_no_update_is_told_as_none(tmp_path, tokenizer):
    idle = make_trainer(tmp_path, tokenizer, max_steps=0)
    assert lines(idle)["updates"].startswith("0 updates of 4 pairs")
    assert idle.train().global_step == 0


def test_an_updates_pairs_are_those_of_all_batches_of_all_ranks(trainer, monkeypatch):
    told = lines(trainer)["updates"]
    assert told == "1.5 epochs of 8 pairs, learning rate 0.001, beta 0.1"
    monkeypatch.setattr(DPOConfig, "world_size", 2)
    assert lines(trainer)["updates"] == told.replace("8 pairs", "16 pairs")


def test_what_became_of_the_rows_is_told_by_its_number(trainer):
    names = "rows pairs too_long bad equal prompt_end_lost truncated".split()
    counts = PairCounts(
        **{name: 1001 + i for i, name in enumerate(names)}, prompt_tokens=21, completion_tokens=22
    )
    told = lines(trainer, pair_counts={"train": counts, "eval": None})
    assert told["train pairs"] == (
        "1,002 of 1,001 rows; 1,003 dropped: their prompt alone fills max_length; "
        "1,004 dropped: malformed; 1,005 with chosen equal to rejected; "
        "1,006 without the end of their prompt; 1,007 cut to max_length; "
        "21 prompt and 22 completion tokens before"
    )
    assert told["eval pairs"] == "streamed, not counted"


@pytest.mark.parametrize(
    ("may_shrink", "told"), [(False, "; packs of 8,192 tokens"), (True, "; packs as large as ")]
)
def test_a_token_budget_is_told(trainer, may_shrink, told):
    assert told in lines(trainer, budget=TokenBudget(8192, may_shrink=may_shrink))["layout"]
