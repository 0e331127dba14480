"""TR-DPO: a reference that follows the policy, also through a checkpoint."""

import logging

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from trainers import (
    BEST_OF_EVERY_STEP,
    LORA,
    logged,
    make_trainer,
    weights,
    with_transformers_adapter,
)
from transformers import LlamaForCausalLM

from fastdpo import DPOTrainer
from fastdpo.following_reference import FILE, FollowPolicy

FOLLOWING = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.25}


def test_the_reference_moves_to_the_policy_every_few_updates(tmp_path, tokenizer):
    start = weights(tiny.model("llama", len(tokenizer)))
    trainer = make_trainer(tmp_path, tokenizer, max_steps=3, **FOLLOWING)
    assert "; takes 0.25 of the policy in after every 2 updates" in trainer.summary()
    at_step_2 = {}
    own = trainer.follower.on_step_end

    def noted(args, state, control, **others):
        own(args, state, control, **others)
        if state.global_step == 2:
            at_step_2.update(weights(trainer.model))

    trainer.follower.on_step_end = noted
    trainer.train()
    for name, weight in trainer.ref_model.named_parameters():
        wanted = 0.25 * at_step_2[name] + 0.75 * start[name]
        torch.testing.assert_close(weight, wanted, rtol=0, atol=1e-7)
        assert not weight.requires_grad
    assert abs(logged(trainer)[0] - 0.6931) < 1e-4


def test_what_the_reference_has_in_common_with_the_policy_stays(tmp_path, tokenizer):
    model = tiny.model("llama", len(tokenizer))
    model.model.embed_tokens.requires_grad_(False)
    before = model.model.embed_tokens.weight.clone()
    trainer = make_trainer(tmp_path, tokenizer, model=model, **FOLLOWING)
    assert trainer.ref_model.model.embed_tokens.weight is model.model.embed_tokens.weight
    trainer.train()
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_a_resumed_run_goes_on_with_its_reference(tmp_path, tokenizer):
    settings = FOLLOWING | {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = make_trainer(tmp_path, tokenizer, **settings)
    whole.train()
    resumed = make_trainer(tmp_path, tokenizer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert logged(resumed) == logged(whole)
    for (name, one), other in zip(
        resumed.ref_model.named_parameters(), whole.ref_model.parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_the_best_model_comes_with_its_reference(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        max_steps=4,
        learning_rate=0.05,  # too high to get better
        eval_dataset=Dataset.from_list(tiny.rows(4)),
        **BEST_OF_EVERY_STEP | FOLLOWING | {"ref_model_sync_steps": 1},
    )
    trainer.train()
    assert trainer.state.best_global_step < 4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


def test_a_checkpoint_without_the_reference_starts_it_again_and_says_so(
    tmp_path, tokenizer, caplog
):
    start = weights(tiny.model("llama", len(tokenizer)))
    settings = FOLLOWING | {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    make_trainer(tmp_path, tokenizer, max_steps=2, **settings).train()
    resumed = make_trainer(tmp_path, tokenizer, max_steps=3, **settings)
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert f"no reference in {tmp_path / 'checkpoint-2'}" in caplog.text
    for name, weight in resumed.ref_model.named_parameters():
        assert torch.equal(weight, start[name]), name


def test_a_reference_that_a_resumed_run_leaves_alone_is_warned_of(tmp_path, tokenizer, caplog):
    settings = FOLLOWING | {"save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, tokenizer, max_steps=2, **settings).train()
    resumed = make_trainer(tmp_path, tokenizer, max_steps=3, **settings | {"sync_ref_model": False})
    with caplog.at_level(logging.WARNING):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert f"{FILE} in {tmp_path / 'checkpoint-2'} is not read" in caplog.text


def test_another_models_reference_is_refused(tmp_path, tokenizer):
    settings = FOLLOWING | {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(tmp_path, tokenizer, **settings).train()
    torch.save({"lm_head.weight": torch.zeros(3)}, tmp_path / "checkpoint-2" / FILE)
    with pytest.raises(ValueError, match=f"reference's parameters in .*{FILE}, got others"):
        make_trainer(tmp_path, tokenizer, **settings | {"max_steps": 3}).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-2")
        )


def test_the_models_weights_are_the_only_safetensors_of_a_checkpoint(tmp_path, tokenizer):
    # servers load whatever has the suffix, the last file last
    make_trainer(tmp_path, tokenizer, save_strategy="steps", save_steps=2, **FOLLOWING).train()
    saved = (tmp_path / "checkpoint-2").glob("*.safetensors")
    assert [file.name for file in saved] == ["model.safetensors"]


def test_a_parameter_that_was_replaced_is_followed(tmp_path, tokenizer):
    settings = FOLLOWING | {"ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    trainer = make_trainer(tmp_path, tokenizer, **settings)
    head = trainer.model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach() + 0.01)
    trainer.train()
    assert torch.equal(trainer.ref_model.lm_head.weight, head.weight)


def test_a_run_whose_reference_stays_saves_none(tmp_path, tokenizer):
    make_trainer(tmp_path, tokenizer, save_strategy="steps", save_steps=2).train()
    assert (tmp_path / "checkpoint-2").exists() and not (tmp_path / "checkpoint-2" / FILE).exists()


def test_one_rank_alone_saves_the_reference(tmp_path, tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer, save_strategy="steps", save_steps=2, **FOLLOWING)
    monkeypatch.setattr(type(trainer.args), "should_save", property(lambda args: False))
    trainer._save_optimizer_and_scheduler(str(tmp_path))
    assert not (tmp_path / FILE).exists()


def test_what_cannot_follow_is_refused(tmp_path, tokenizer):
    def refused(wanted, **settings):
        with pytest.raises(ValueError, match=wanted):
            make_trainer(tmp_path, tokenizer, **FOLLOWING, **settings)

    refused("full fine-tuning .*got adapters", peft_config=LoraConfig(**LORA))
    scored = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -30.0}
    refused("a reference model .*in the rows", rows=[row | scored for row in tiny.rows()])
    refused("precompute_ref_log_probs=False", precompute_ref_log_probs=True)
    smaller = tiny.model("llama", len(tokenizer), seed=1)
    del smaller.model.layers[-1]
    refused(r"differs in model\.layers\.\d", ref_model=smaller)
    config = tiny.config("llama", len(tokenizer))
    config.intermediate_size = 48
    refused(r"differs in model\.layers\.\d", ref_model=LlamaForCausalLM(config))


def test_an_adapter_that_transformers_added_does_not_follow(tmp_path, tokenizer):
    adapted = with_transformers_adapter(tiny.model("llama", len(tokenizer)))
    with pytest.raises(ValueError, match="full fine-tuning .*got adapters"):
        make_trainer(tmp_path, tokenizer, model=adapted, **FOLLOWING)


def test_weights_in_pieces_do_not_follow(tmp_path, tokenizer):
    trainer: DPOTrainer = make_trainer(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="got FSDP or DeepSpeed"):
        FollowPolicy(trainer.model, trainer.reference, is_sharded=True)
