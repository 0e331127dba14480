"""What training logs, and evaluate() and predict() measure: of every pair once, and all alike."""

import copy
import gc
import math
import multiprocessing
import weakref

import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from processes import printed_json, run_ranks
from trainers import logged, make_trainer

from fastdpo.metrics import MetricSums


def test_evaluation_measures_what_training_does(tmp_path, tokenizer):
    rows = Dataset.from_list(tiny.rows())
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        eval_dataset={"seen": rows, "half": Dataset.from_list(tiny.rows(4))},
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_seen_loss"] < 0.69
    assert metrics["eval_seen_rewards/accuracies"] == 1.0
    assert "eval_half_rewards/margins" in metrics
    fresh = trainer.evaluate(rows)
    assert fresh["eval_loss"] == pytest.approx(metrics["eval_seen_loss"], abs=1e-6)
    margins = fresh["eval_rewards/margins"]
    assert margins == pytest.approx(metrics["eval_seen_rewards/margins"], abs=1e-6)


def test_compute_metrics_sees_the_logits(tmp_path, tokenizer):
    seen = {}

    def compute_metrics(prediction):
        seen["logits"], seen["ids"] = prediction.predictions, prediction.label_ids
        return {"rows": len(prediction.label_ids)}

    rows = Dataset.from_list(tiny.rows(4))
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        eval_dataset=rows,
        compute_metrics=compute_metrics,
        per_device_eval_batch_size=4,
    )
    assert trainer.evaluate()["eval_rows"] == 8  # a chosen and a rejected sequence each
    assert seen["logits"].shape == (*seen["ids"].shape, len(tokenizer))
    assert trainer.evaluate(metric_key_prefix="held")["held_rows"] == 8


@pytest.mark.parametrize("kind", [tuple, list, dict])
def test_logits_may_be_made_into_several_tensors(tmp_path, tokenizer, kind):
    def several(logits, labels):
        found = {"best": logits.argmax(-1), "lse": logits.logsumexp(-1)}
        return found if kind is dict else kind(found.values())

    trainer = make_trainer(
        tmp_path,
        tokenizer,
        eval_dataset=Dataset.from_list(tiny.rows(6)),
        compute_metrics=lambda prediction: {"kinds": len(prediction.predictions)},
        per_device_eval_batch_size=4,
    )
    trainer.preprocess_logits_for_metrics = several
    prediction = trainer.predict(Dataset.from_list(tiny.rows(6)))
    found = prediction.predictions
    found = list(found.values()) if kind is dict else found
    assert [len(each) for each in found] == [12, 12]
    assert trainer.evaluate()["eval_kinds"] == 2


def test_workers_that_stay_serve_what_is_asked_for_now(tmp_path, tokenizer):
    others = set(multiprocessing.active_children())
    rows = Dataset.from_list(tiny.rows(4))
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        eval_dataset=rows,
        per_device_eval_batch_size=4,
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
    )
    trainer.evaluate()
    assert trainer.get_eval_dataloader() is trainer.get_eval_dataloader(), "kept"
    trainer.compute_metrics = lambda prediction: {"rows": len(prediction.label_ids)}
    for _ in range(2):
        assert trainer.evaluate()["eval_rows"] == 8
        assert trainer.get_eval_dataloader() is trainer.get_eval_dataloader(), "kept"
    assert trainer.evaluate(rows.select([1]))["eval_rows"] == 2
    gc.collect()
    assert len(set(multiprocessing.active_children()) - others) == 1, "of the last loader"


def test_no_loader_of_an_evaluation_outlives_the_next(tmp_path, tokenizer):
    others = set(multiprocessing.active_children())
    rows = Dataset.from_list(tiny.rows(4))
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset=rows)
    trainer.evaluate()
    first = weakref.ref(trainer.callback_handler.eval_dataloader)
    trainer.evaluate()
    gc.collect()
    assert first() is None

    trainer.args.dataloader_num_workers = 1
    trainer.args.dataloader_persistent_workers = True
    for _ in range(2):
        trainer.predict(rows)
    gc.collect()
    assert len(set(multiprocessing.active_children()) - others) <= 1


@pytest.mark.parametrize("several", [False, True], ids=["one", "by-name"])
def test_workers_that_stay_serve_every_evaluation_of_the_same_rows(tmp_path, tokenizer, several):
    rows = Dataset.from_list(tiny.rows(4))
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        eval_dataset={"a": rows} if several else rows,
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
    )
    loaders = []
    for _ in range(2):
        trainer.evaluate()
        loaders += trainer._eval_dataloaders.values()
    assert len(loaders) == 2 and loaders[0] is loaders[1]
    pairs = trainer.eval_dataset["a"] if several else trainer.eval_dataset
    trainer.eval_dataset = {"a": pairs.select([1])} if several else pairs.select([1])
    trainer.evaluate()
    assert [len(loader.dataset) for loader in trainer._eval_dataloaders.values()] == [1]


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_a_streamed_evaluation_measures_what_a_kept_one_does(tmp_path, tokenizer, layout):
    rows = tiny.rows(7)
    rows[5]["chosen"] *= 3  # rows of unlike width
    reference = tiny.model("llama", len(tokenizer), seed=1)

    def evaluation(dataset):
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            ref_model=copy.deepcopy(reference),
            eval_dataset=dataset,
            per_device_eval_batch_size=7,
            layout=layout,
        )
        timings = ("time", "per_second")
        return {k: v for k, v in trainer.evaluate().items() if not any(t in k for t in timings)}

    kept = evaluation(Dataset.from_list(rows))
    assert evaluation(IterableDataset.from_generator(lambda: iter(rows))) == pytest.approx(kept)
    assert kept["eval_loss"] != pytest.approx(math.log(2), abs=1e-3)


def test_predictions_come_with_the_logits_and_the_metrics(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, per_device_eval_batch_size=3)
    rows = Dataset.from_list(tiny.rows(4))
    evaluated = trainer.evaluate(rows)
    predicted = trainer.predict(rows)
    assert predicted.predictions.shape[0] == 8  # a chosen and a rejected sequence each
    assert predicted.predictions.shape[2] == len(tokenizer)
    for name in ("loss", "rewards/margins", "logps/chosen"):
        assert predicted.metrics[f"test_{name}"] == pytest.approx(
            evaluated[f"eval_{name}"], abs=1e-5
        )
    assert trainer.evaluate(rows)["eval_logps/chosen"] == evaluated["eval_logps/chosen"]


@pytest.mark.parametrize("streamed", [False, True], ids=["kept", "streamed"])
def test_an_evaluations_pairs_weigh_alike_and_are_all_there(tmp_path, tokenizer, streamed):
    def evaluation(batch_size):
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            ref_model=tiny.model("llama", len(tokenizer), seed=1),
            per_device_eval_batch_size=batch_size,
            compute_metrics=lambda prediction: {"rows": len(prediction.label_ids)},
        )
        rows = tiny.rows(7)
        if streamed:
            return trainer.evaluate(IterableDataset.from_generator(lambda: iter(rows)))
        return trainer.evaluate(Dataset.from_list(rows))

    whole, ragged = evaluation(7), evaluation(4)
    assert ragged["eval_loss"] == pytest.approx(whole["eval_loss"], abs=1e-5)
    assert ragged["eval_rows"] == whole["eval_rows"] == 14


def test_an_evaluation_between_two_logs_takes_nothing_from_them(tmp_path, tokenizer):
    def trained(**settings):
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            max_steps=3,
            logging_steps=2,
            eval_dataset=Dataset.from_list(tiny.rows(3)),
            **settings,
        )
        trainer.train()
        history = trainer.state.log_history
        return [e for e in history if "loss" in e], history[-1]

    (plain, last), (evaluated, last_evaluated) = (
        trained(),
        trained(eval_strategy="steps", eval_steps=1),
    )
    assert evaluated == plain
    # what no log had told yet: the third step's
    assert (
        last["rewards/margins"] == last_evaluated["rewards/margins"] != plain[0]["rewards/margins"]
    )


def test_no_logits_are_made_that_no_one_asks_for(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset=Dataset.from_list(tiny.rows(3)))

    def made(*_):
        raise AssertionError("logits were made")

    trainer.model.lm_head.register_forward_hook(made)  # the scorer reads its weight
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.75
    trainer.compute_metrics = lambda prediction: {}
    with pytest.raises(AssertionError, match="logits were made"):
        trainer.evaluate()


EVALUATE = """
import json, sys
from functools import partial
from pathlib import Path
import tiny
from datasets import Dataset
from trainers import make_trainer

tokenizer = tiny.tokenizer()
reference = tiny.model("llama", len(tokenizer), seed=1)
trainer = make_trainer(
    Path(sys.argv[1]),
    tokenizer,
    ref_model=reference,
    per_device_eval_batch_size=2,
    loss_type=["sigmoid", "sft", "aot_unpaired"],  # the latter mix a batch's pairs
)
datasets = [Dataset.from_list(tiny.rows(count)) for count in (1, 5, 7, 8)]
if sys.argv[2] == "streamed":
    datasets = [dataset.to_iterable_dataset() for dataset in datasets]
metrics = [trainer.evaluate(dataset) for dataset in datasets]
for dataset, measured in zip(datasets, metrics):
    measured["predicted"] = len(trainer.predict(dataset).predictions)
# eval_use_gather_object's
trainer.gather_function = partial(trainer.accelerator.gather_for_metrics, use_gather_object=True)
metrics[1]["predicted as objects"] = len(trainer.predict(datasets[1]).predictions)
if trainer.is_world_process_zero():
    print("METRICS", json.dumps(metrics))
trainer.accelerator.wait_for_everyone()
"""


@pytest.mark.parametrize("rows", ["kept", "streamed"])
def test_two_ranks_measure_what_one_does_of_any_number_of_pairs(tmp_path, rows):
    def metrics(world_size):
        printed = run_ranks(tmp_path, EVALUATE, str(tmp_path), rows, world_size=world_size)
        return printed_json(printed, "METRICS")

    for count, alone, together in zip((1, 5, 7, 8), metrics(1), metrics(2), strict=True):
        speeds = [name for name in alone if name.endswith(("time", "per_second"))]
        counts = [m["eval_samples_per_second"] * m["eval_runtime"] for m in (alone, together)]
        assert counts == pytest.approx([count, count], rel=2e-2)  # they are rounded
        for name in set(alone) - set(speeds):
            assert together[name] == pytest.approx(alone[name], rel=1e-5), name


def test_rows_of_unlike_sizes_may_be_gathered_as_objects(tmp_path, tokenizer):
    rows = Dataset.from_list(tiny.rows(4))
    trainer = make_trainer(
        tmp_path, tokenizer, per_device_eval_batch_size=2, eval_do_concat_batches=False
    )

    def as_objects(x):
        return [row[: 3 + i] if row.ndim else row for i, row in enumerate(x)]

    trainer.gather_function = as_objects
    for batch in trainer.predict(rows).predictions:
        assert [row.shape for row in batch] == [(3 + i, len(tokenizer)) for i in (0, 1, 0, 1)]


def test_experts_of_pairs_that_another_rank_had_too_are_not_counted(
    tmp_path, tokenizer, monkeypatch
):
    model = tiny.model("mixtral", len(tokenizer))
    trainer = make_trainer(tmp_path, tokenizer, model=model, per_device_eval_batch_size=2)
    new = iter([2, 1, 0])  # of each batch
    monkeypatch.setattr("fastdpo.trainer.pairs_not_repeated", lambda *_: next(new))
    metrics = trainer.evaluate(Dataset.from_list(tiny.rows(6)))
    aux_loss = trainer.router_aux_loss_coef * metrics["eval_aux_loss"]
    assert metrics["eval_loss"] == pytest.approx(math.log(2) + aux_loss, abs=1e-6)


def test_what_is_summed_for_a_log_holds_no_graph(tmp_path, tokenizer, monkeypatch):
    added = []
    monkeypatch.setattr(MetricSums, "add", lambda _, sums: added.extend(sums.items()))
    model = tiny.model("mixtral", len(tokenizer))
    make_trainer(tmp_path, tokenizer, model=model, max_steps=1).train()
    assert ("aux_loss",) in dict(added)
    assert not any(sums.requires_grad for _, (sums, _) in added)


def test_an_evaluation_that_fails_leaves_nothing_to_the_next(tmp_path, tokenizer):
    rows = Dataset.from_list(tiny.rows(6))
    reference = tiny.model("llama", len(tokenizer), seed=1)
    trainer = make_trainer(
        tmp_path, tokenizer, ref_model=reference, eval_dataset=rows, per_device_eval_batch_size=2
    )
    own, gather = trainer.evaluate(), trainer.gather_function
    batches = []

    def fail_in_the_second(*_):
        batches.append(1)
        if len(batches) == 2:
            raise RuntimeError("pretended")

    hook = trainer.model.register_forward_hook(fail_in_the_second)
    with pytest.raises(RuntimeError, match="pretended"):
        trainer.evaluate()
    assert trainer.gather_function == gather
    hook.remove()
    assert trainer.evaluate()["eval_loss"] == own["eval_loss"]


def test_what_a_failed_start_or_an_earlier_training_counted_is_not_counted_again(
    tmp_path, tokenizer
):
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "disable_tqdm": True}
    plain = make_trainer(tmp_path, tokenizer, **settings)
    output = plain.train()
    assert plain.train().metrics["tokens/run"] == output.metrics["tokens/run"]

    settings |= {"per_device_train_batch_size": 8, "auto_find_batch_size": True}
    trainer = make_trainer(tmp_path, tokenizer, **settings)
    layer, forwards = trainer.model.model.layers[-1], []

    def fail_in_the_second(*_):
        if trainer.model.training:
            forwards.append(1)
            if len(forwards) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    layer.register_forward_hook(fail_in_the_second)
    trainer.train()
    assert len(forwards) > 2
    assert logged(trainer, "num_tokens")[-1] == logged(plain, "num_tokens")[-1]


def test_a_streamed_evaluations_speed_is_in_pairs(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, per_device_eval_batch_size=2)
    metrics = trainer.evaluate(IterableDataset.from_generator(lambda: iter(tiny.rows(7))))
    pairs = metrics["eval_samples_per_second"] * metrics["eval_runtime"]
    assert pairs == pytest.approx(7, rel=2e-2)  # both are rounded
