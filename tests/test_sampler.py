"""The order of rows that are grouped by length, and which of a stream's rows a rank has."""

import pytest
import tiny
import torch
from datasets import Column, Dataset, IterableDataset
from processes import printed_json, run_ranks
from trainers import logged, make_trainer

from fastdpo.sampler import WholeStream


def test_rows_grouped_by_length_are_ordered_each_epoch_anew_by_the_datas_seed(tmp_path, tokenizer):
    def orders(**settings):
        settings |= {"rows": tiny.rows(24), "train_sampling_strategy": "group_by_length"}
        sampler = make_trainer(tmp_path, tokenizer, **settings)._get_train_sampler()
        for epoch in (0, 1):
            sampler.set_epoch(epoch)
            yield list(sampler)

    first, second = orders()
    assert first != second
    assert [*orders(data_seed=42)] == [first, second]  # the seed that a run has by default
    assert next(orders(data_seed=7)) != first


def test_a_sampler_grouped_by_length_resumes_in_its_order(tmp_path, tokenizer):
    def trainer(folder):
        return make_trainer(
            tmp_path / folder,
            tokenizer,
            rows=tiny.rows(24),
            train_sampling_strategy="group_by_length",
            num_train_epochs=2,
            max_steps=-1,
            save_strategy="steps",
            save_steps=8,
        )

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    torch.manual_seed(5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-8"))
    assert whole.state.global_step == 12
    assert logged(resumed, "logps/chosen") == logged(whole, "logps/chosen")


def test_the_longest_of_rows_grouped_by_length_comes_first(tmp_path, tokenizer):
    """What does not fit, fails at once."""
    trainer = make_trainer(tmp_path, tokenizer, train_sampling_strategy="group_by_length")
    lengths, order = trainer.train_dataset["length"], [*trainer._get_train_sampler()]
    assert sorted(order) == [*range(8)] and lengths[order[0]] == max(lengths) > min(lengths)


def test_lengths_to_group_by_are_read_once(tmp_path, tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer, train_sampling_strategy="group_by_length")
    sampler = trainer._get_train_sampler()
    monkeypatch.delattr(Column, "__getitem__")  # which reads a row
    assert sorted(sampler) == [*range(8)]


def test_predictions_are_in_the_order_of_the_rows(tmp_path, tokenizer):
    settings = {"train_sampling_strategy": "group_by_length", "per_device_eval_batch_size": 1}
    trainer = make_trainer(tmp_path, tokenizer, **settings)
    rows = tiny.rows()
    rows = [row | {"chosen": row["chosen"] * (1 + i % 3)} for i, row in enumerate(rows)]
    pairs = trainer._prepare(Dataset.from_list(rows), "test")
    longest = max(len(pair["prompt_ids"]) + len(pair["chosen_ids"]) for pair in pairs)
    predicted = trainer.predict(Dataset.from_list(rows)).label_ids[::2, :longest].tolist()
    for ids, pair in zip(predicted, pairs, strict=True):
        own = pair["prompt_ids"] + pair["chosen_ids"]
        assert ids[: len(own)] == own


RESUME_BY_LENGTH = """
import sys
from pathlib import Path
import tiny
from trainers import logged, make_trainer

def trainer(name):
    return make_trainer(
        Path(sys.argv[1]) / name, tiny.tokenizer(), rows=tiny.rows(24), max_steps=9,
        train_sampling_strategy="group_by_length", per_device_train_batch_size=2,
        save_strategy="steps", save_steps=8, optim="sgd",  # torch 2.11 loads no state on "cpu:0"
    )

whole, resumed = trainer("whole"), trainer("resumed")
whole.train()
resumed.train(resume_from_checkpoint=str(Path(sys.argv[1]) / "whole/checkpoint-8"))
assert logged(resumed, "logps/chosen") == logged(whole, "logps/chosen")
"""


def test_rows_grouped_by_length_resume_in_their_order_on_two_ranks(tmp_path):
    run_ranks(tmp_path, RESUME_BY_LENGTH, str(tmp_path), world_size=2)


def rows_of(counts):
    """The rows of several files, of so many each."""
    for count in counts:
        yield from tiny.rows(count)


def test_a_shuffled_stream_of_several_ranks_has_another_order_in_each_pass():
    stream = WholeStream(Dataset.from_list(tiny.rows(24)).to_iterable_dataset().shuffle(seed=0))
    first = [*stream]
    stream.set_epoch(1)
    assert [*stream] != first
    stream.set_epoch(0)
    assert [*stream] == first


TRAIN_ON_STREAM = """
import json, sys
from pathlib import Path
import tiny
from datasets import IterableDataset
from test_sampler import rows_of
from trainers import logged, make_trainer

trainer = make_trainer(
    Path(sys.argv[1]), tiny.tokenizer(), per_device_train_batch_size=2,
    train_dataset=IterableDataset.from_generator(rows_of, gen_kwargs={"counts": [9, 3]}),
)
trainer.train()
if trainer.is_world_process_zero():
    print("LOGGED", json.dumps(logged(trainer, "logps/chosen")))
"""


def test_files_of_unequal_length_are_one_stream_to_two_ranks(tmp_path, tokenizer):
    stream = IterableDataset.from_generator(rows_of, gen_kwargs={"counts": [9, 3]})
    alone = make_trainer(tmp_path, tokenizer, train_dataset=stream)  # its batches are both ranks'
    alone.train()
    printed = run_ranks(tmp_path, TRAIN_ON_STREAM, str(tmp_path), world_size=2)
    together = printed_json(printed, "LOGGED")
    assert together == pytest.approx(logged(alone, "logps/chosen"), rel=1e-5)
