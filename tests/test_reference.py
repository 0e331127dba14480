"""Whose log-probabilities the policy's are held against, and that they stay what they were."""

import math

import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from test_trainer import LORA, logged, make_trainer, weights

import fastdpo
from fastdpo import DPOTrainer
from fastdpo.batch import PairBatch

SCORED = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -30.0}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def scored_rows():
    return [row | SCORED for row in tiny.rows()]


def with_trained_adapters(tokenizer):
    torch.manual_seed(0)
    lora = LoraConfig(**LORA, init_lora_weights=False)
    return get_peft_model(tiny.model("llama", len(tokenizer)), lora)


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_the_reference_stays_where_the_policy_started(tmp_path, tokenizer, adapters):
    lora = LoraConfig(**LORA) if adapters else None
    trainer = make_trainer(tmp_path, tokenizer, peft_config=lora)
    batch = next(iter(trainer.get_train_dataloader()))
    before = trainer.reference.logps(trainer.model, PairBatch.from_inputs(batch))
    trainer.train()
    after = trainer.reference.logps(trainer.model, PairBatch.from_inputs(batch))
    assert torch.equal(before, after)
    assert trainer.model.training  # the reference's forward put the mode back


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("precompute", [False, True], ids=["as-it-goes", "precomputed"])
def test_the_reference_weighs_tokens_as_the_loss_does(tmp_path, tokenizer, adapters, precompute):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        peft_config=LoraConfig(**LORA) if adapters else None,
        ld_alpha=0.3,
        precompute_ref_log_probs=precompute,
    )
    if adapters or not precompute:  # else no one is there to score new rows
        new_rows = trainer.evaluate(Dataset.from_list(tiny.rows(3)))
        assert new_rows["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_every_set_of_rows_is_scored_before_training(tmp_path, tokenizer, monkeypatch):
    def scored(**settings):
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            precompute_ref_log_probs=True,
            per_device_eval_batch_size=3,
            **settings,
        )
        evaluated = trainer.eval_dataset
        several = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
        return [trainer.train_dataset, *several]

    own, sizes = fastdpo.trainer.with_reference_logps, []

    def with_reference_logps(dataset, *, batch_size, **arguments):
        sizes.append(batch_size)
        return own(dataset, batch_size=batch_size, **arguments)

    monkeypatch.setattr("fastdpo.trainer.with_reference_logps", with_reference_logps)
    rows = Dataset.from_list(tiny.rows(5))
    for given in (rows, {"one": rows, "other": rows}):
        for dataset in scored(eval_dataset=given):
            assert set(SCORED) <= set(dataset.column_names)
    scored(eval_dataset=given, precompute_ref_batch_size=2)
    assert sizes == [4, 3, 4, 3, 3, 2, 2, 2]


def test_an_explicit_reference_is_used_and_not_trained(tmp_path, tokenizer):
    other = tiny.model("llama", len(tokenizer), seed=1)
    start = weights(other)
    trainer = make_trainer(tmp_path, tokenizer, ref_model=other)
    trainer.train()
    assert abs(logged(trainer)[0] - math.log(2)) > 1e-3
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, start[name]), name


def test_a_trained_adapter_is_held_against_a_copy_of_itself(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, model=with_trained_adapters(tokenizer))
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(trainer)[-1] < 0.69
    assert trainer.model.active_adapter == "default"


def test_reference_logps_of_the_rows_are_used_without_a_second_model(tmp_path, tokenizer):
    plain = make_trainer(tmp_path, tokenizer)
    plain.train()
    scored = make_trainer(tmp_path, tokenizer, precompute_ref_log_probs=True)
    rows = [dict(row) for row in scored.train_dataset]
    assert {"ref_chosen_logps", "ref_rejected_logps"} <= set(rows[0])
    scored.train()
    from_rows = make_trainer(tmp_path, tokenizer, rows=rows)
    from_rows.train()
    assert logged(plain) == pytest.approx(logged(scored), abs=1e-6)
    assert logged(plain) == pytest.approx(logged(from_rows), abs=1e-6)
    assert "rows" in from_rows.reference.source and "rows" in scored.reference.source


def test_two_references_are_one_too_many(tmp_path, tokenizer):
    other = tiny.model("llama", len(tokenizer))
    with pytest.raises(ValueError, match="want one reference"):
        make_trainer(tmp_path, tokenizer, rows=scored_rows(), ref_model=other)


def test_a_streams_reference_logps_are_used(tmp_path, tokenizer):
    kept = make_trainer(tmp_path, tokenizer, rows=scored_rows())
    kept.args.train_sampling_strategy = "sequential"
    kept.train()
    streamed = DPOTrainer(
        model=tiny.model("llama", len(tokenizer)),
        args=kept.args,
        train_dataset=stream(scored_rows()),
        processing_class=tokenizer,
    )
    assert "rows" in streamed.reference.source
    streamed.train()
    assert logged(streamed) == pytest.approx(logged(kept), abs=1e-6)
    assert abs(logged(kept)[0] - math.log(2)) > 1e-3


@pytest.mark.parametrize("wrap", [Dataset.from_list, stream], ids=["kept", "streamed"])
@pytest.mark.parametrize("scored", ["train", "eval"])
def test_reference_logps_in_some_data_sets_alone_are_refused(tmp_path, tokenizer, scored, wrap):
    rows = {"train": tiny.rows(), "eval": tiny.rows(), scored: scored_rows()}
    other = "eval" if scored == "train" else "train"
    with pytest.raises(ValueError, match=rf"in all data sets or in none.*{scored}.*not in {other}"):
        make_trainer(tmp_path, tokenizer, rows=rows["train"], eval_dataset=wrap(rows["eval"]))


def test_rows_that_bring_another_reference_to_an_evaluation_are_refused(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="want one reference, got log-probabilities in the rows"):
        trainer.evaluate(Dataset.from_list(scored_rows()))


def test_a_second_trainer_on_adapters_starts_where_the_first_ended(tmp_path, tokenizer):
    first = make_trainer(tmp_path, tokenizer, model=with_trained_adapters(tokenizer))
    first.train()
    second = make_trainer(tmp_path, tokenizer, model=first.model)
    second.train()
    assert logged(second)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(second)[-1] < 0.69


def test_trained_adapters_resume_exactly(tmp_path, tokenizer):
    def trainer(folder):
        return make_trainer(
            tmp_path / folder,
            tokenizer,
            model=with_trained_adapters(tokenizer),
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
        )

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert logged(resumed) == logged(whole)
    assert logged(resumed, "rewards/margins") == logged(whole, "rewards/margins")


def test_an_adapter_called_ref_by_its_owner_is_not_overwritten(tmp_path, tokenizer):
    model = with_trained_adapters(tokenizer)
    model.add_adapter("ref", LoraConfig(**LORA, init_lora_weights=False))
    before = {n: p.clone() for n, p in model.named_parameters() if ".ref." in n}
    make_trainer(tmp_path, tokenizer, model=model).train()
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name


def test_no_adapter_is_copied_that_no_one_asks(tmp_path, tokenizer):
    model = with_trained_adapters(tokenizer)
    make_trainer(tmp_path, tokenizer, model=model, rows=scored_rows())
    assert list(model.peft_config) == ["default"]


def test_what_the_user_froze_of_an_adapter_stays_frozen(tmp_path, tokenizer):
    model = with_trained_adapters(tokenizer)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.clone() for n, p in model.named_parameters() if n not in trainable}
    make_trainer(tmp_path, tokenizer, model=model).train()
    now = dict(model.named_parameters())
    assert {name for name, p in now.items() if p.requires_grad} == trainable
    assert all(torch.equal(now[name], before) for name, before in frozen.items())


def test_a_reference_whose_head_is_not_known_is_refused(tmp_path, tokenizer):
    other = tiny.model("llama", len(tokenizer), seed=1)
    other.lm_head.register_forward_hook(lambda module, args, logits: 3 * logits)
    with pytest.raises(ValueError, match=r"ref_model \(LlamaForCausalLM\): want the model's own"):
        make_trainer(tmp_path, tokenizer, ref_model=other)


@pytest.mark.parametrize("kind", ["adapters", "ref_model"])
def test_new_rows_are_scored_after_all_others_were(tmp_path, tokenizer, kind):
    def evaluation(**settings):
        more = {"peft_config": LoraConfig(**LORA)}
        if kind == "ref_model":
            more = {"ref_model": tiny.model("llama", len(tokenizer), seed=1)}
        trainer = make_trainer(tmp_path, tokenizer, **more, **settings)
        trainer.train()
        return trainer.evaluate(Dataset.from_list(tiny.rows(5)))["eval_loss"]

    assert evaluation(precompute_ref_log_probs=True) == pytest.approx(evaluation(), abs=1e-6)


def test_new_rows_without_anyone_to_score_them_say_so(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, precompute_ref_log_probs=True)
    trainer.train()
    with pytest.raises(ValueError, match="the policy before training.* is not there to score it"):
        trainer.evaluate(Dataset.from_list(tiny.rows()))


def test_rows_that_are_scored_are_not_scored_again(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, rows=scored_rows(), precompute_ref_log_probs=True)
    assert trainer.train_dataset[0]["ref_rejected_logps"] == -30.0
