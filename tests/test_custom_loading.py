"""Collators and data loaders of one's own, as scripts written for TRL have them."""

import pytest
import tiny
from datasets import Dataset
from torch.utils.data import DataLoader
from trainers import logged, make_trainer

from fastdpo import DPOTrainer


def test_custom_columns_reach_a_custom_collator(tmp_path, tokenizer):
    rows = [row | {"weight": i, "status": "new"} for i, row in enumerate(tiny.rows())]
    padded = make_trainer(tmp_path, tokenizer, layout="padded").data_collator
    seen = []

    def collator(batch):
        seen.extend((row["weight"], row["status"], row["prompt"]) for row in batch)
        return padded(batch)

    settings = {"remove_unused_columns": False, "data_collator": collator, "max_steps": 1}
    trainer = make_trainer(tmp_path, tokenizer, rows=rows, **settings)
    trainer.train()
    assert {(row["weight"], "new", row["prompt"]) for row in rows} >= {*seen} and len(seen) >= 4
    assert trainer.train_dataset["prompt"] == [row["prompt"] for row in rows]
    # and none of them is in the way of fastdpo's own
    kept = make_trainer(tmp_path, tokenizer, rows=rows, remove_unused_columns=False)
    plain = make_trainer(tmp_path, tokenizer)
    for each in (kept, plain):
        each.train()
    assert logged(kept) == logged(plain)


def test_an_evaluation_sets_texts_stay_for_callbacks_that_generate(tmp_path, tokenizer):
    rows = Dataset.from_list(tiny.rows(3))
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset={"a": rows, "b": rows})
    for each in trainer.eval_dataset.values():
        assert each["prompt"] == rows["prompt"]
    assert trainer.evaluate()["eval_a_loss"] == pytest.approx(0.6931, abs=1e-4)


def test_a_collator_set_later_gets_lists_as_one_given_at_the_start(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, layout="padded", max_steps=1)
    padded, seen = trainer.data_collator, []

    def collator(rows):
        seen.extend(row["prompt_ids"] + row["chosen_ids"] for row in rows)
        return padded(rows)

    trainer.data_collator = collator
    trainer.train()
    ids = [row["prompt_ids"] + row["chosen_ids"] for row in trainer.train_dataset]
    assert seen and all(each in ids for each in seen)


def test_a_custom_collator_makes_the_batches_of_evaluations_too(tmp_path, tokenizer):
    padded = make_trainer(tmp_path, tokenizer, layout="padded").data_collator
    settings = {"data_collator": lambda rows: padded(rows), "compute_metrics": lambda _: {}}
    rows = Dataset.from_list(tiny.rows(3))
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset=rows, **settings)
    for loader in (trainer.get_eval_dataloader(), trainer.get_test_dataloader(rows)):
        assert loader.collate_fn is settings["data_collator"]


def test_all_that_a_collator_written_for_trl_gives_reaches_the_model(tmp_path, tokenizer):
    padded = make_trainer(tmp_path, tokenizer, layout="padded").data_collator

    def collator(rows):
        inputs = padded(rows)
        mask = inputs["attention_mask"]
        given = {name: inputs[name] for name in ("input_ids", "completion_mask")}
        positions = (mask.cumsum(1) * 3 - 1).clamp(min=0)
        return given | {"attention_mask": mask, "position_ids": positions}

    trainer = make_trainer(tmp_path, tokenizer, data_collator=collator, max_steps=1)
    seen = []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    trainer.train()
    assert seen and all(x is not None and x.max() > 30 for x in seen)


def test_a_loader_of_ones_own_without_packs_is_refused(tmp_path, tokenizer):
    class Loading(DPOTrainer):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, 2, collate_fn=self.data_collator)

    make_trainer(tmp_path, tokenizer, kind=Loading, max_steps=1).train()
    packed = make_trainer(tmp_path, tokenizer, kind=Loading, max_tokens_per_forward=100)
    with pytest.raises(ValueError, match="want max_tokens_per_forward unset with a get_train_data"):
        packed.train()


def test_a_loader_of_ones_own_is_to_pad_for_compute_metrics(tmp_path, tokenizer):
    class Loading(DPOTrainer):
        def get_eval_dataloader(self, eval_dataset=None):
            return DataLoader(self.eval_dataset, 2, collate_fn=self.data_collator)

    settings = {"kind": Loading, "eval_dataset": Dataset.from_list(tiny.rows(2))}
    settings["compute_metrics"] = lambda prediction: {"rows": len(prediction.predictions)}
    with pytest.raises(ValueError, match="want batches that are padded .* or layout='padded'"):
        make_trainer(tmp_path, tokenizer, **settings).evaluate()
    padded = make_trainer(tmp_path, tokenizer, layout="padded", **settings)
    assert padded.evaluate()["eval_rows"] == 4
