"""Where the reference's log-probabilities come from, and that they stay what they were."""

import math
import operator
from types import SimpleNamespace

import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from peft import (
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    VeraConfig,
)
from trainers import LORA, logged, make_trainer, trained_before, weights

from fastdpo import DPOTrainer
from fastdpo.batch import PairBatch
from fastdpo.precompute import after_precompute
from fastdpo.reference_logps import AdaptersOff, FrozenModel, frozen_copy, make_reference

SCORED = {"ref_chosen_logps": -1.0, "ref_rejected_logps": -30.0}


def scored_rows():
    return [row | SCORED for row in tiny.rows()]


def stream(rows):
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("adapters", [None, {}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_the_reference_stays_where_the_policy_started(tmp_path, tokenizer, adapters):
    lora = None if adapters is None else LoraConfig(**LORA, **adapters)
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


def test_every_set_of_rows_is_scored_before_training(tmp_path, tokenizer):
    rows = Dataset.from_list(tiny.rows(5))
    for given in (rows, {"one": rows, "other": rows}):
        trainer = make_trainer(
            tmp_path, tokenizer, eval_dataset=given, precompute_ref_log_probs=True
        )
        evaluated = trainer.eval_dataset
        several = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
        for dataset in (trainer.train_dataset, *several):
            assert set(SCORED) <= set(dataset.column_names)


def test_an_explicit_reference_is_used_and_not_trained(tmp_path, tokenizer):
    other = tiny.model("llama", len(tokenizer), seed=1).train()
    start = weights(other)
    trainer = make_trainer(tmp_path, tokenizer, ref_model=other)
    trainer.train()
    assert abs(logged(trainer)[0] - math.log(2)) > 1e-3
    assert not other.training  # its dropout would be on
    for name, parameter in other.named_parameters():
        assert torch.equal(parameter, start[name]), name


Q_AND_V = ["q_proj", "v_proj"]
BEFORE = {  # what adapters can have been trained before, and where they keep it
    "lora": LoraConfig(**LORA),
    "lora of the embedding": LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "lora with biases": LoraConfig(r=4, target_modules=Q_AND_V, bias="lora_only"),
    "whole modules": LoraConfig(r=4, target_modules=Q_AND_V, modules_to_save=["lm_head"]),
    "tokens": LoraConfig(r=4, target_modules=Q_AND_V, trainable_token_indices=[20, 50, 90]),
    "lora of parameters": LoraConfig(r=4, target_modules=[], target_parameters=["up_proj.weight"]),
    "ia3": IA3Config(target_modules=["v_proj", "up_proj"], feedforward_modules=["up_proj"]),
    "loha": LoHaConfig(r=4, target_modules=Q_AND_V),
    "lokr": LoKrConfig(r=4, target_modules=Q_AND_V),
    "vera": VeraConfig(r=4, target_modules=["q_proj"]),
}


def assert_it_stays(trainer):
    """Training starts at the reference, and leaves it where it is."""
    batch = PairBatch.from_inputs(next(iter(trainer.get_train_dataloader())))
    before = trainer.reference.logps(trainer.model, batch)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(logged(trainer)[-1] - math.log(2)) > 1e-4
    assert torch.equal(before, trainer.reference.logps(trainer.model, batch))


@pytest.mark.parametrize("name", ["default", "model"])  # "model" is in every parameter's name
@pytest.mark.parametrize("kind", BEFORE)
def test_trained_adapters_are_held_against_themselves(tmp_path, tokenizer, kind, name):
    model = trained_before(tokenizer, BEFORE[kind], name)
    trainer = make_trainer(tmp_path, tokenizer, model=model, learning_rate=1e-2)
    assert_it_stays(trainer)
    assert [*model.peft_config] == model.active_adapters == [name]


def test_an_adapter_on_top_of_another_is_trained_and_both_stay_active(tmp_path, tokenizer):
    model = trained_before(tokenizer, LoraConfig(**LORA), "sft")
    model.add_adapter("dpo", LoraConfig(**LORA))
    model.base_model.set_adapter(["sft", "dpo"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".dpo." in name)
    assert_it_stays(make_trainer(tmp_path, tokenizer, model=model, learning_rate=1e-2))
    assert model.active_adapters == ["sft", "dpo"]


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_what_trains_beside_new_adapters_is_not_in_the_reference(tmp_path, tokenizer, bias):
    lora = LoraConfig(r=4, target_modules=Q_AND_V, bias=bias)
    model = tiny.model("qwen2", len(tokenizer))
    assert_it_stays(
        make_trainer(tmp_path, tokenizer, model=model, peft_config=lora, learning_rate=1e-2)
    )


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_adapters_that_change_their_base_start_at_their_reference(tmp_path, tokenizer, start):
    lora = LoraConfig(**LORA, init_lora_weights=start)
    trainer = make_trainer(tmp_path, tokenizer, peft_config=lora)
    assert isinstance(trainer.reference, FrozenModel)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal"])
def test_adapters_that_leave_their_base_as_it_is_are_switched_off(tmp_path, tokenizer, start):
    lora = LoraConfig(**LORA, init_lora_weights=start)
    assert isinstance(make_trainer(tmp_path, tokenizer, peft_config=lora).reference, AdaptersOff)


def test_adapters_are_on_again_after_a_reference_that_failed(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, peft_config=LoraConfig(**LORA))
    layer = trainer.model.base_model.model.model.layers[0]

    def fail(*_):
        raise torch.OutOfMemoryError("pretended")

    layer.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="pretended"):
        trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert not layer.self_attn.q_proj.disable_adapters


def test_adapters_that_were_off_are_off_after_the_reference(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, peft_config=LoraConfig(**LORA))
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    inputs = next(iter(trainer.get_train_dataloader()))
    with trainer.model.disable_adapter():
        trainer.compute_loss(trainer.model, inputs)
        assert layer.disable_adapters


def test_what_the_user_froze_of_new_adapters_stays_frozen(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, peft_config=LoraConfig(**LORA))
    assert isinstance(trainer.reference, AdaptersOff)
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert parameter.requires_grad == ("lora_B" in name), name


def test_a_copy_has_in_common_with_the_policy_what_does_not_train(tokenizer):
    policy = trained_before(tokenizer, LoraConfig(**LORA))
    policy.get_input_embeddings().weight.requires_grad_(True)
    int8 = policy.base_model.model.model.layers[0].mlp.up_proj
    int8.state = SimpleNamespace(SCB=None)  # as bitsandbytes has it before the first forward
    copied = frozen_copy(policy)
    for (name, ours), theirs in zip(policy.named_parameters(), copied.parameters(), strict=True):
        assert (ours is theirs) == (not ours.requires_grad), name
        assert not theirs.requires_grad
    assert all(map(operator.is_, policy.buffers(), copied.buffers()))
    assert copied.base_model.model.model.layers[0].mlp.up_proj.state is int8.state
    assert policy.training and not copied.training


def test_a_reference_that_would_follow_the_policy_is_refused(tmp_path, tokenizer):
    model = tiny.model("llama", len(tokenizer))
    model.model.requires_grad_(False)
    trainer = make_trainer(tmp_path, tokenizer, model=model)
    trainer.model.model.norm.requires_grad_(True)
    with pytest.raises(ValueError, match="got 1 parameters that were frozen then"):
        trainer.train()
    trainer.model.model.norm.requires_grad_(False)
    trainer.train()
    assert logged(trainer)[-1] < 0.69


def test_a_layer_that_adapters_and_their_reference_share_is_not_trained(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, peft_config=LoraConfig(**LORA))
    norm = trainer.model.get_base_model().model.norm
    norm.requires_grad_(True)
    with pytest.raises(ValueError, match="got 1 parameters that were frozen then"):
        trainer.train()
    norm.requires_grad_(False)
    trainer.train()
    assert logged(trainer)[-1] < 0.69


def test_a_policy_that_will_be_cut_up_has_no_tensor_in_common_with_its_reference(tokenizer):
    policy = trained_before(tokenizer, LoraConfig(**LORA))
    apart = make_reference(
        policy,
        None,
        in_rows=False,
        has_new_adapters=False,
        precompute=False,
        is_sharded=True,
        device=torch.device("cpu"),
    )
    tensors, copies = ([*m.parameters(), *m.buffers()] for m in (policy, apart.model))
    assert not any(map(operator.is_, tensors, copies))


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


@pytest.mark.parametrize("name", ["train", "eval"])
def test_no_row_is_scored_where_a_streams_could_not_be_kept(tmp_path, tokenizer, monkeypatch, name):
    monkeypatch.setattr("fastdpo.trainer.with_reference_logps", None)
    rows = {"train": Dataset.from_list(tiny.rows()), "eval": Dataset.from_list(tiny.rows())}
    rows[name] = stream(tiny.rows())
    settings = {"train_dataset": rows["train"], "eval_dataset": rows["eval"]}
    with pytest.raises(ValueError, match=f"want map-style datasets .* got streamed ones: {name}"):
        make_trainer(tmp_path, tokenizer, precompute_ref_log_probs=True, **settings)


@pytest.mark.parametrize("wrap", [Dataset.from_list, stream], ids=["kept", "streamed"])
@pytest.mark.parametrize("scored", ["train", "eval"])
def test_reference_logps_in_some_data_sets_alone_are_refused(tmp_path, tokenizer, scored, wrap):
    rows = {"train": tiny.rows(), "eval": tiny.rows(), scored: scored_rows()}
    other = "eval" if scored == "train" else "train"
    with pytest.raises(ValueError, match=rf"in all datasets or in none.*{scored}.*not in {other}"):
        make_trainer(tmp_path, tokenizer, rows=rows["train"], eval_dataset=wrap(rows["eval"]))


def test_rows_that_bring_another_reference_to_an_evaluation_are_refused(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    with pytest.raises(ValueError, match="got a batch with them"):
        trainer.evaluate(Dataset.from_list(scored_rows()))


def test_a_second_trainer_on_adapters_starts_where_the_first_ended(tmp_path, tokenizer):
    first = make_trainer(tmp_path, tokenizer, model=trained_before(tokenizer, LoraConfig(**LORA)))
    first.train()
    second = make_trainer(tmp_path, tokenizer, model=first.model)
    second.train()
    assert logged(second)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(second)[-1] < 0.69


def test_what_the_user_froze_of_an_adapter_stays_frozen(tmp_path, tokenizer):
    model = trained_before(tokenizer, LoraConfig(**LORA))
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


def test_new_rows_are_checked_against_the_model_that_scores_them(tmp_path, tokenizer):
    small = tiny.model("llama", len(tokenizer) - 1, seed=1)
    trainer = make_trainer(tmp_path, tokenizer, ref_model=small, precompute_ref_log_probs=True)
    assert trainer.ref_model is small
    too_large = {"prompt_ids": [5], "chosen_ids": [len(tokenizer) - 1, 2], "rejected_ids": [6, 2]}
    with pytest.raises(ValueError, match="eval dataset, pair 0, chosen_ids: want token ids in"):
        trainer.evaluate(Dataset.from_list([too_large]))


def test_the_policy_scores_new_rows_until_it_trains(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, precompute_ref_log_probs=True)
    metrics = trainer.evaluate(Dataset.from_list(tiny.rows(5)))
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)
    trainer.train()
    with pytest.raises(ValueError, match="the policy before training.* is not there to score it"):
        trainer.evaluate(Dataset.from_list(tiny.rows()))


def test_a_reference_that_begins_to_train_scores_no_new_rows(tmp_path, tokenizer):
    lora = LoraConfig(**LORA)
    trainer = make_trainer(tmp_path, tokenizer, peft_config=lora, precompute_ref_log_probs=True)
    trainer.model.get_input_embeddings().requires_grad_(True)
    trainer.train()
    with pytest.raises(ValueError, match="is not there to score it"):
        trainer.evaluate(Dataset.from_list(tiny.rows(5)))


def test_a_ref_model_may_go_on_to_train(tmp_path, tokenizer):
    policy = make_trainer(tmp_path, tokenizer)
    make_trainer(tmp_path, tokenizer, ref_model=policy.model)
    before = weights(policy.model)
    policy.train()
    assert any(not torch.equal(w, before[n]) for n, w in weights(policy.model).items())


@pytest.mark.parametrize("adapters", [False, True])
def test_scoring_ahead_draws_nothing_from_torchs_generator(tmp_path, tokenizer, adapters):
    def state(**settings):
        if adapters:
            settings["peft_config"] = LoraConfig(**LORA)
        make_trainer(tmp_path, tokenizer, **settings)
        return torch.get_rng_state()

    assert torch.equal(state(precompute_ref_log_probs=True), state())


@pytest.mark.parametrize("is_sharded", [False, True])
def test_weights_that_will_be_sharded_score_no_new_rows(is_sharded):
    policy = tiny.model("llama", tiny.VOCAB)
    reference = FrozenModel(policy, "the policy")
    in_rows = after_precompute(reference, policy, None, is_sharded=is_sharded)
    assert (in_rows.for_others is None) is is_sharded


def test_rows_that_are_scored_are_not_scored_again(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, rows=scored_rows(), precompute_ref_log_probs=True)
    assert trainer.train_dataset[0]["ref_rejected_logps"] == -30.0
