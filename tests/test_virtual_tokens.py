"""Adapters that put tokens of their own before each row: prompt tuning, p-tuning, prefix tuning."""

import math

import pytest
import tiny
import torch
from datasets import Dataset
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from trainers import logged, make_trainer, weights

from fastdpo.batch import PairBatch
from fastdpo.collate import PaddedCollator
from fastdpo.kernels.reference import completion_sums
from fastdpo.model import attach_scorer, token_logps_without_grad

KINDS = [PrefixTuningConfig, PromptTuningConfig, PromptEncoderConfig]
THREE_TOKENS = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_virtual_tokens_of_a_model_train_padded(tmp_path, tokenizer, family, kind):
    torch.manual_seed(0)
    config = kind(**THREE_TOKENS)
    model = get_peft_model(tiny.model(family, len(tokenizer)), config)
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        model=model,
        learning_rate=1e-2,
        gradient_checkpointing=kind is not PrefixTuningConfig,
        per_device_train_batch_size=8,
    )
    assert "puts tokens of its own before each row" in trainer.layout.line
    trainer.train()
    balance = logged(trainer, "aux_loss") or [0.0] * 4
    losses = [
        a - trainer.router_aux_loss_coef * b for a, b in zip(logged(trainer), balance, strict=True)
    ]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < losses[0] - 1e-4

    found = trainer.predict(Dataset.from_list(tiny.rows(3)))
    for logits_LV, ids_L in zip(found.predictions, found.label_ids, strict=True):
        ids_L = torch.tensor(ids_L[ids_L != 0])
        with torch.no_grad():
            own_LV = trainer.model.eval()(ids_L[None]).logits[0, -len(ids_L) :]
        torch.testing.assert_close(torch.tensor(logits_LV[: len(ids_L)]), own_LV, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_new_virtual_tokens_are_held_against_the_model_without(tmp_path, tokenizer, kind):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        peft_config=kind(**THREE_TOKENS),
        learning_rate=1e-2,
        gradient_checkpointing=False,
    )
    start = weights(trainer.model)
    trainer.train()
    batch = PairBatch.from_inputs(next(iter(trainer.get_train_dataloader())))
    without = tiny.model("llama", len(tokenizer))
    attach_scorer(without)
    expected_S = completion_sums(token_logps_without_grad(without, batch), batch.cu_seqlens, None)
    assert torch.equal(trainer.reference.logps(trainer.model, batch), expected_S)
    moved = {name for name, each in weights(trainer.model).items() if not each.equal(start[name])}
    assert moved and all(name.startswith("prompt_encoder") for name in moved)
    assert abs(logged(trainer)[0] - math.log(2)) > 1e-4  # they start at random
    assert logged(trainer)[-1] < logged(trainer)[0]


def test_a_model_that_scored_without_virtual_tokens_scores_with_them(tokenizer):
    def scores(*, scored_before):
        model = tiny.model("llama", len(tokenizer))
        if scored_before:
            attach_scorer(model)
        torch.manual_seed(0)
        tuned = get_peft_model(model, PromptTuningConfig(**THREE_TOKENS))
        attach_scorer(tuned)
        inputs = PaddedCollator(pad_token_id=0)(tiny.ID_PAIRS)
        return token_logps_without_grad(tuned, PairBatch.from_inputs(inputs))

    assert torch.equal(scores(scored_before=True), scores(scored_before=False))


def test_new_virtual_tokens_go_on_from_a_checkpoint(tmp_path, tokenizer):
    def trained(**resume):
        config = PromptTuningConfig(**THREE_TOKENS)
        saving = {"save_strategy": "steps", "save_steps": 2}
        trainer = make_trainer(tmp_path, tokenizer, peft_config=config, **saving)
        trainer.train(**resume)
        return weights(trainer.model)

    whole = trained()
    resumed = trained(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(each, resumed[name]) for name, each in whole.items())
