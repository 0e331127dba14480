"""DPOTrainer as a user sees it: it learns, logs, saves and says what is wrong."""

import copy
import inspect
import logging
import math

import pytest
import tiny
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from processes import run_ranks
from trainers import LORA, logged, make_trainer
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from watches import Watch

from fastdpo import DPOTrainer

TRL_METRICS = [
    "loss",
    "grad_norm",
    "learning_rate",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
    "num_tokens",
    "epoch",
]


def test_training_starts_at_ln_2_and_learns(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=12, per_device_train_batch_size=8)
    trainer.train()
    losses = logged(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < 0.3
    assert logged(trainer, "rewards/accuracies")[-1] == 1.0


def test_metrics_have_trls_names_and_agree_with_each_other(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, logging_steps=2)
    trainer.train()
    entry = trainer.state.log_history[1]
    assert set(TRL_METRICS) <= set(entry)
    margin = entry["rewards/chosen"] - entry["rewards/rejected"]
    assert entry["rewards/margins"] == pytest.approx(margin, abs=1e-6)
    tokens = logged(trainer, "num_tokens")
    pairs = trainer.pair_counts["train"]
    # 4 updates of 4 are two epochs over 8 rows; a prompt runs once per completion
    assert tokens[-1] == 2 * (2 * pairs.prompt_tokens + pairs.completion_tokens)


# padded, transformers looks in each forward whether rows are one sequence each
@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_a_step_makes_the_cpu_wait_for_nothing(layout, tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, gradient_checkpointing=False, layout=layout)
    trainer.train()  # the first step's start is checked, with one read
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    with Watch():
        trainer.compute_loss(trainer.model, inputs, num_items_in_batch=4).backward()


def test_pairs_weigh_the_same_however_they_are_cut_into_microbatches(tmp_path, tokenizer):
    whole = make_trainer(tmp_path, tokenizer, rows=tiny.rows(6), per_device_train_batch_size=6)
    cut = make_trainer(
        tmp_path,
        tokenizer,
        rows=tiny.rows(6),
        per_device_train_batch_size=4,  # 4 and 2 pairs
        gradient_accumulation_steps=2,
    )
    whole.train()
    cut.train()
    assert logged(whole) == pytest.approx(logged(cut), abs=1e-5)
    assert logged(whole, "rewards/margins") == pytest.approx(
        logged(cut, "rewards/margins"), abs=1e-5
    )


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["not-reentrant", "reentrant"])
def test_checkpointing_changes_no_loss(tmp_path, tokenizer, adapters, reentrant):
    losses = []
    for checkpointing in (False, True):
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
            peft_config=LoraConfig(**LORA) if adapters else None,
        )
        trainer.train()
        losses.append(logged(trainer))
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert losses[0][-1] < losses[0][0]


def test_some_of_the_layers_may_be_checkpointed(tmp_path, tokenizer):
    if "every_n_layers" not in inspect.getsource(Trainer):
        pytest.skip("no every_n_layers in this version of transformers")
    some = {"gradient_checkpointing_kwargs": {"every_n_layers": 2}, "max_steps": 1}
    trainer = make_trainer(tmp_path, tokenizer, **some)
    trainer.train()
    assert [layer.gradient_checkpointing for layer in trainer.model.model.layers] == [True, False]


@pytest.mark.parametrize("precompute", [False, True], ids=["frozen-copy", "precomputed"])
def test_under_autocast_policy_and_reference_agree_before_any_step(tmp_path, tokenizer, precompute):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        bf16=True,
        precompute_ref_log_probs=precompute,
        eval_dataset=Dataset.from_list(tiny.rows()),
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_what_is_saved_loads_again(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    trainer.train()
    trainer.save_model(tmp_path / "full")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, trainer.model.get_parameter(name)), name

    base = tiny.model("llama", len(tokenizer))
    trainer = make_trainer(tmp_path, tokenizer, model=base, peft_config=LoraConfig(**LORA))
    trainer.train()
    trainer.save_model(tmp_path / "lora")
    loaded = PeftModel.from_pretrained(tiny.model("llama", len(tokenizer)), tmp_path / "lora")
    ids = torch.tensor([[5, 6, 7]])
    trainer.model.eval()
    assert torch.equal(loaded(ids).logits, trainer.model(ids).logits)


def test_a_streamed_dataset_trains_like_one_in_memory(tmp_path, tokenizer):
    kept = make_trainer(tmp_path, tokenizer, train_sampling_strategy="sequential")
    kept.train()
    streamed = DPOTrainer(
        model=tiny.model("llama", len(tokenizer)),
        args=kept.args,
        train_dataset=IterableDataset.from_generator(lambda: iter(tiny.rows())),
        processing_class=tokenizer,
    )
    streamed.train()
    assert logged(streamed) == pytest.approx(logged(kept), abs=1e-6)


def test_weighted_pairs_cost_their_share(tmp_path, tokenizer):
    """WPO: a weight of a pair is the mean of log p - log sum p² over each completion, exp of it."""
    trainer = make_trainer(
        tmp_path, tokenizer, per_device_train_batch_size=8, max_steps=1, use_weighting=True
    )
    rows, logits_of = [*trainer.train_dataset], tiny.model("llama", len(tokenizer))
    weights = []
    for row in rows:
        logs = []
        for side in ("chosen_ids", "rejected_ids"):
            ids_L = torch.tensor([*row["prompt_ids"], *row[side]])
            logps_CV = logits_of(ids_L[None]).logits[0, len(row["prompt_ids"]) - 1 : -1]
            logps_CV = logps_CV.detach().log_softmax(-1)
            labels_C = ids_L[len(row["prompt_ids"]) :, None]
            logs.append(logps_CV.gather(1, labels_C)[:, 0] - (2 * logps_CV).logsumexp(-1))
        weights.append((logs[0].mean() + logs[1].mean()).exp().item())
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(math.log(2) * sum(weights) / 8, rel=1e-4)


def test_experts_whose_loss_is_made_otherwise_are_refused(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("fastdpo.model.balancing_loss", lambda *_: (torch.tensor(0.0), None))
    model = tiny.model("mixtral", len(tokenizer))
    with pytest.raises(ValueError, match="want its own load-balancing loss"):
        make_trainer(tmp_path, tokenizer, model=model)
    trainer = make_trainer(tmp_path, tokenizer, model=model, router_aux_loss_coef=0.0)
    assert not trainer.aux_loss_enabled


def test_experts_are_balanced_as_the_model_says(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, model=tiny.model("mixtral", len(tokenizer)))
    assert trainer.aux_loss_enabled  # TRL's name
    trainer.train()
    aux_loss = logged(trainer, "aux_loss")[0]
    weight = trainer.model.config.router_aux_loss_coef
    assert logged(trainer)[0] == pytest.approx(math.log(2) + weight * aux_loss, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"ref_seed": 1}, "another model"),
        ({"peft_config": LoraConfig(**LORA, init_lora_weights=False)}, "not initialised to zero"),
        ({"neftune_noise_alpha": 50}, "NEFTune adds noise"),
    ],
    ids=["another-reference", "adapters-not-zero", "neftune"],
)
def test_a_start_elsewhere_is_explained(tmp_path, tokenizer, settings, reason, caplog):
    settings = dict(settings)
    if seed := settings.pop("ref_seed", None):
        settings["ref_model"] = tiny.model("llama", len(tokenizer), seed=seed)
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, tokenizer, gradient_accumulation_steps=2, **settings).train()
    messages = [record.getMessage() for record in caplog.records]
    [message] = [each for each in messages if "does not start" in each]
    assert reason in message and "ln 2" not in message  # which is the sigmoid loss's alone


def test_the_summary_says_what_will_run(tmp_path, tokenizer):
    rows = [*tiny.rows(), tiny.rows(1)[0] | {"prompt": "word " * 90}]
    trainer = make_trainer(tmp_path, tokenizer, rows=rows, max_length=64)
    text = trainer.summary()
    assert "8 of 9 rows" in text and "1 dropped: their prompt alone fills max_length" in text
    assert "a frozen copy of the policy" in text and "shared: each prompt once" in text
    assert "4 updates of 4 pairs" in text


def test_a_second_trainer_on_the_same_model_starts_where_the_first_ended(tmp_path, tokenizer):
    first = make_trainer(tmp_path, tokenizer)
    first.train()
    second = make_trainer(tmp_path, tokenizer, model=first.model)
    second.train()
    assert logged(second)[0] == pytest.approx(math.log(2), abs=1e-6)


FIRST = {  # a trainer that leaves weights as they are, in bfloat16 or not
    "sft-16": (Trainer, True),
    "dpo-16": (DPOTrainer, True),
    "dpo-32": (DPOTrainer, False),
}


@pytest.mark.parametrize(("kind", "in_16"), FIRST.values(), ids=FIRST)
@pytest.mark.parametrize("bf16", [False, True])
def test_another_trainer_leaves_no_trace_on_a_model(tmp_path, tokenizer, kind, in_16, bf16):
    model, still = tiny.model("llama", len(tokenizer)), {"learning_rate": 0.0, "bf16": in_16}
    if kind is Trainer:
        settings = {"output_dir": tmp_path, "use_cpu": True, "max_steps": 1, "report_to": "none"}
        rows = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}])
        Trainer(model, TrainingArguments(**settings, **still), train_dataset=rows).train()
    else:
        make_trainer(tmp_path, tokenizer, model=model, max_steps=1, **still).train()
    again, fresh = (
        make_trainer(tmp_path, tokenizer, model=each, bf16=bf16) for each in (model, None)
    )
    again.train()
    fresh.train()
    assert logged(again) == logged(fresh)
    assert logged(again, "logps/chosen") == logged(fresh, "logps/chosen")


RUN_PICKLE = """
import sys
import torch
from fastdpo import DPOTrainer  # which registers the model's attention

model = torch.load(sys.argv[1], weights_only=False)
print(model(torch.tensor([[5, 6, 7]])).logits.sum().item())
"""


def test_a_pickle_of_a_trained_model_is_run_and_trained_as_any(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, gradient_checkpointing=False)
    trainer.train()
    torch.save(trainer.model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    printed = run_ranks(tmp_path, RUN_PICKLE, str(tmp_path / "model.pt"), world_size=1)
    logits = loaded(torch.tensor([[5, 6, 7]])).logits
    assert float(printed) == pytest.approx(logits.sum().item(), rel=1e-4)
    again, copied = (
        make_trainer(tmp_path, tokenizer, model=model)
        for model in (loaded, copy.deepcopy(trainer.model))
    )
    again.train()
    copied.train()
    assert logged(again) == logged(copied)


def test_weights_of_two_dtypes_train_under_autocast(tmp_path, tokenizer):
    model = tiny.model("llama", len(tokenizer), torch.bfloat16)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            module.float()
    trainer = make_trainer(tmp_path, tokenizer, model=model, bf16=True)
    trainer.train()
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(trainer)[-1] < 0.69


def test_the_heads_cache_changes_no_number_and_its_filter_does(tmp_path, tokenizer):
    def run(**settings):
        trainer = make_trainer(tmp_path, tokenizer, max_steps=2, **settings)
        trainer.train()
        return logged(trainer, "grad_norm")

    whole = run()
    assert run(head_cache_bytes=0) == pytest.approx(whole, rel=1e-5)
    assert run(head_skip_below=0.9)[0] != pytest.approx(whole[0], rel=1e-3)


def test_a_second_trainer_takes_the_head_settings_of_its_own(tmp_path, tokenizer):
    model = tiny.model("llama", len(tokenizer))

    def grad_norm(**settings):
        trainer = make_trainer(
            tmp_path, tokenizer, model=model, max_steps=1, learning_rate=0.0, **settings
        )
        trainer.train()
        return logged(trainer, "grad_norm")[0]

    whole = grad_norm()
    assert grad_norm(head_skip_below=0.9) != pytest.approx(whole, rel=1e-3)


def test_ligers_kernels_leave_the_head_to_fastdpo(tmp_path, tokenizer, monkeypatch):
    def apply(model, config):
        if config.get("fused_linear_cross_entropy", True):  # liger-kernel's default
            model.forward = None

    monkeypatch.setattr("transformers.trainer.apply_liger_kernel", apply)
    settings = {"liger_kernel_config": {"rope": False}}
    trainer = make_trainer(tmp_path, tokenizer, use_liger_kernel=True, **settings)
    trainer.train()
    assert trainer.args.liger_kernel_config["rope"] is False


def test_a_loss_setting_may_change_between_steps_by_the_name_that_trl_has(tmp_path, tokenizer):
    trainers = [make_trainer(tmp_path, tokenizer, beta=beta) for beta in (0.1, 1.0)]
    assert trainers[0].beta == 0.1 and trainers[0].loss_types == ["sigmoid"]
    trainers[0].beta = 1.0
    for trainer in trainers:
        trainer.train()
    assert logged(trainers[0]) == logged(trainers[1])


def test_a_loss_may_be_set_as_text(tmp_path, tokenizer):
    made, by_args, by_name = (
        make_trainer(tmp_path, tokenizer, **settings) for settings in ({"loss_type": "ipo"}, {}, {})
    )
    by_args.args.loss_type = by_name.loss_types = "ipo"
    for trainer in (made, by_args, by_name):
        trainer.train()
    assert logged(made) == logged(by_args) == logged(by_name)


def test_each_loss_setting_may_be_set_by_the_name_that_trl_has(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, loss_weights=[2.0])
    callers, before = trainer.args, copy.deepcopy(trainer.args.to_dict())
    changed = {
        "label_smoothing": 0.1,
        "ld_alpha": 0.5,
        "f_divergence_type": "forward_kl",
        "f_alpha_divergence_coef": 0.7,
        "use_weighting": True,
    }
    for name, value in changed.items():
        setattr(trainer, name, value)
    trainer.loss_weights[0] = 3.0
    assert {name: getattr(trainer.args, name) for name in changed} == changed
    assert trainer.args.loss_weights == [3.0]
    assert callers.to_dict() == before  # and may make another trainer


def test_a_weight_set_after_the_start_counts_where_none_was_given(tmp_path, tokenizer):
    model = tiny.model("mixtral", len(tokenizer))
    trainer = make_trainer(tmp_path, tokenizer, model=model, loss_type=["sigmoid", "hinge"])
    assert trainer.loss_weights == [1.0, 1.0]
    trainer.loss_types = ["sigmoid", "hinge", "ipo"]  # of 1 each, as before
    assert trainer.loss_weights == [1.0, 1.0, 1.0]
    trainer.loss_types = ["sigmoid", "hinge"]
    trainer.loss_weights[1] = 3.0
    trainer.router_aux_loss_coef = 10.0
    trainer.train()
    expected = math.log(2) + 3.0 + 10.0 * logged(trainer, "aux_loss")[0]
    assert logged(trainer)[0] == pytest.approx(expected, abs=1e-4)


def test_the_reference_is_scored_before_the_policys_activations_are_there(tmp_path, tokenizer):
    trainer, order = make_trainer(tmp_path, tokenizer), []
    for name, model in trainer.models().items():
        model.model.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert order == ["ref_model", "model"]


def test_rows_of_a_later_evaluation_are_counted(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    trainer.evaluate(Dataset.from_list(tiny.rows(3)), metric_key_prefix="held")
    assert trainer.pair_counts.keys() == {"train", "held"}
    assert trainer.pair_counts["held"].pairs == 3
    rows = tiny.rows(4)
    rows[1]["prompt"] *= 99  # alone longer than max_length
    trainer.evaluate({"a": Dataset.from_list(rows), "b": Dataset.from_list(tiny.rows(2))})
    assert (trainer.pair_counts["eval_a"].rows, trainer.pair_counts["eval_a"].too_long) == (4, 1)
    assert trainer.pair_counts["eval_b"].pairs == 2
