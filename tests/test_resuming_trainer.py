"""A run that goes on from a checkpoint, and the best checkpoint at a run's end."""

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from safetensors.torch import load_file, save_file
from trainers import (
    BEST_OF_EVERY_STEP,
    LORA,
    logged,
    make_trainer,
    trained_before,
    weights,
    with_transformers_adapter,
)
from transformers import TrainerCallback

from fastdpo.checkpoints import STATE_FILE


@pytest.mark.parametrize(
    ("family", "adapters"), [("llama", False), ("llama", True), ("mixtral", False)]
)
def test_resume_continues_exactly(tmp_path, tokenizer, family, adapters, caplog):
    def trainer(folder, **settings):
        return make_trainer(
            folder,
            tokenizer,
            model=tiny.model(family, len(tokenizer)),
            peft_config=LoraConfig(**LORA) if adapters else None,
            max_steps=6,
            per_device_train_batch_size=2,
            save_strategy="steps",
            save_steps=3,
            **settings,
        )

    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert "does not start at its reference" not in caplog.text
    assert logged(resumed) == logged(whole)
    assert logged(resumed, "rewards/margins") == logged(whole, "rewards/margins")
    expected = weights(whole.model)
    for name, parameter in weights(resumed.model).items():
        assert torch.equal(parameter, expected[name]), name


def test_every_rank_has_written_before_a_checkpoint_is_marked_as_whole(
    tmp_path, tokenizer, monkeypatch
):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, save_strategy="steps", save_steps=1)
    when_waiting = []

    def wait():
        when_waiting.append({file.name for file in tmp_path.glob("checkpoint-1/*")})

    monkeypatch.setattr(trainer.accelerator, "wait_for_everyone", wait)
    trainer.train()
    assert (tmp_path / "checkpoint-1" / STATE_FILE).exists()
    assert any("rng_state.pth" in files and STATE_FILE not in files for files in when_waiting)


def test_a_run_that_had_ended_within_an_epoch_resumes_to_no_update(tmp_path, tokenizer):
    settings = {"max_steps": 3, "lr_scheduler_type": "constant", "save_strategy": "steps"}
    whole, resumed = (
        make_trainer(tmp_path / name, tokenizer, save_steps=3, **settings) for name in "ab"
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/checkpoint-3"))
    assert resumed.state.global_step == 3 and logged(resumed) == logged(whole)
    expected = weights(whole.model)
    assert all(torch.equal(x, expected[name]) for name, x in weights(resumed.model).items())


def test_a_stream_resumes_in_the_pass_that_it_was_in(tmp_path, tokenizer):
    """Passes of 5 batches: two updates, and one batch that joins the first of the next pass."""

    def trainer(folder, max_steps):
        return make_trainer(
            tmp_path / folder,
            tokenizer,
            train_dataset=Dataset.from_list(tiny.rows(10)).to_iterable_dataset(),
            max_steps=max_steps,
            lr_scheduler_type="constant",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=1,
        )

    whole, shorter = trainer("whole", 6), trainer("shorter", 2)
    whole.train()
    shorter.train()
    for checkpoint in [*(tmp_path / f"whole/checkpoint-{step}" for step in (1, 3, 4)), shorter]:
        if checkpoint is shorter:  # to resume from its end, with more updates now
            checkpoint = tmp_path / "shorter/checkpoint-2"
        resumed = trainer(checkpoint.name, 6)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert logged(resumed, "logps/chosen") == logged(whole, "logps/chosen"), checkpoint.name


def test_a_stream_resumes_at_the_start_of_its_pass_where_no_data_is_skipped(tmp_path, tokenizer):
    def trainer(**settings):
        stream = Dataset.from_list(tiny.rows()).to_iterable_dataset()  # two batches
        settings |= {"max_steps": 2, "learning_rate": 0.0, "save_strategy": "steps"}
        return make_trainer(tmp_path, tokenizer, train_dataset=stream, save_steps=1, **settings)

    whole, resumed = trainer(), trainer(ignore_data_skip=True)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert logged(resumed, "logps/chosen") == 2 * logged(whole, "logps/chosen")[:1]


def test_a_checkpoint_without_some_experts_is_refused(tmp_path, tokenizer):
    model = tiny.model("mixtral", len(tokenizer))
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(tmp_path, tokenizer, model=model, **settings).train()
    file = tmp_path / "checkpoint-1/model.safetensors"
    kept = {name: weight for name, weight in load_file(file).items() if "layers.1" not in name}
    save_file(kept, file, metadata={"format": "pt"})
    trainer = make_trainer(tmp_path / "other", tokenizer, model=model)
    with pytest.raises(ValueError, match="want all weights in checkpoint .*, got none for"):
        trainer.train(resume_from_checkpoint=str(file.parent))


def test_a_stream_too_short_for_an_update_ends_the_run(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        train_dataset=Dataset.from_list(tiny.rows(4)).to_iterable_dataset(),
        gradient_accumulation_steps=2,
    )
    with pytest.raises(ValueError, match="for gradient_accumulation_steps=2, got fewer"):
        trainer.train()

    class Stops(TrainerCallback):
        passes = 0

        def on_epoch_begin(self, *args, **kwargs):
            self.passes += 1

        def on_substep_end(self, args, state, control, **kwargs):
            control.should_training_stop = self.passes == 2

    trainer.add_callback(Stops())
    trainer.train()
    assert trainer.state.global_step == 0


def test_sharded_weights_are_loaded_by_transformers(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, peft_config=LoraConfig(**LORA))
    trainer.is_fsdp_enabled = True  # it does not run on a CPU
    assert not trainer._try_to_load(str(tmp_path))


def test_several_adapters_resume_exactly(tmp_path, tokenizer):
    def trainer(folder):
        model = trained_before(tokenizer, LoraConfig(**LORA))
        model.add_adapter("more", LoraConfig(**LORA))
        model.base_model.set_adapter(["more", "default"])
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        return make_trainer(
            tmp_path / folder,
            tokenizer,
            model=model,
            learning_rate=1e-2,
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
        )

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert logged(resumed) == logged(whole)
    assert logged(resumed, "rewards/margins") == logged(whole, "rewards/margins")
    ours, theirs = (
        {name: (p.requires_grad, p.tolist()) for name, p in each.model.named_parameters()}
        for each in (whole, resumed)
    )
    assert ours == theirs and resumed.model.active_adapters == ["more", "default"]


def test_an_adapter_that_transformers_added_resumes_exactly(tmp_path, tokenizer):
    def trainer(folder):
        model = with_transformers_adapter(tiny.model("llama", len(tokenizer)), "mine")
        settings = {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
        return make_trainer(tmp_path / folder, tokenizer, model=model, **settings)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert logged(resumed) == logged(whole)
    ours, theirs = weights(whole.model), weights(resumed.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("kind", ["adapter", "transformers' adapter", "experts"])
def test_the_best_model_is_loaded_whatever_its_weights_are_called(tmp_path, tokenizer, kind):
    if kind == "adapter":
        model = trained_before(tokenizer, LoraConfig(**LORA), "mine")
    elif kind == "transformers' adapter":
        model = with_transformers_adapter(tiny.model("llama", len(tokenizer)))
    else:
        model = tiny.model("mixtral", len(tokenizer))

    class Remember(TrainerCallback):
        saved = {}

        def on_save(self, args, state, control, model, **kwargs):
            self.saved[state.global_step] = weights(model)

    trainer = make_trainer(
        tmp_path,
        tokenizer,
        model=model,
        eval_dataset=Dataset.from_list(tiny.rows(5)),
        greater_is_better=True,  # of the loss: the first is the best
        callbacks=[Remember()],
        **BEST_OF_EVERY_STEP,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    best = Remember.saved[1]
    assert all(torch.equal(best[name], each) for name, each in weights(trainer.model).items())


def test_a_checkpoint_without_the_policys_adapter_is_refused(tmp_path, tokenizer):
    settings = {"save_strategy": "steps", "save_steps": 4}
    make_trainer(tmp_path, tokenizer, peft_config=LoraConfig(**LORA), **settings).train()
    model = trained_before(tokenizer, LoraConfig(**LORA), "mine")
    trainer = make_trainer(tmp_path / "other", tokenizer, model=model)
    with pytest.raises(ValueError, match="want adapter 'mine' in checkpoint .*checkpoint-4, got"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize(
    "config",
    [
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8),
        PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=2,
            prefix_projection=True,
            encoder_hidden_size=8,
        ),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_virtual_tokens_of_an_encoder_are_not_gone_back_to(tmp_path, tokenizer, config):
    model = get_peft_model(tiny.model("llama", len(tokenizer)), config)
    settings = {"model": model, "gradient_checkpointing": False, "eval_strategy": "steps"}
    settings |= {"save_strategy": "steps", "eval_dataset": Dataset.from_list(tiny.rows(4))}
    trainer = make_trainer(tmp_path, tokenizer, max_steps=1, **settings)
    trainer.train()
    with pytest.raises(ValueError, match=f"checkpoints hold whole, got {config.peft_type.value}"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(ValueError, match="want load_best_model_at_end=False with"):
        make_trainer(tmp_path, tokenizer, load_best_model_at_end=True, **settings)
