"""The same script under TRL and under fastdpo; needs the `bench` extra, where TRL is a peer."""

import pytest
import tiny
from datasets import Dataset
from peft import LoraConfig

import fastdpo

trl = pytest.importorskip("trl", reason="TRL is not installed (extra: bench)")


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_changing_the_import_changes_no_logged_number(tmp_path, adapters):
    tokenizer = tiny.tokenizer()
    tiny.model("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def run(library):
        lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
        trainer = library.DPOTrainer(
            model=str(tmp_path / "model"),
            args=library.DPOConfig(
                output_dir=tmp_path / library.__name__,
                max_steps=6,
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                bf16=False,
                use_cpu=True,
            ),
            train_dataset=Dataset.from_list(tiny.rows()),
            peft_config=lora if adapters else None,
        )
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    for theirs, ours in zip(run(trl), run(fastdpo), strict=True):
        assert set(theirs) == set(ours)
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name
