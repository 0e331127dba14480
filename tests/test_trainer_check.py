"""What DPOTrainer refuses, and that it does so before it has spent anything; models and adapters
are in test_model_check.py."""

import pytest
import tiny
import torch
from datasets import Dataset
from peft import (
    AdaptionPromptConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch.optim import SGD
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Trainer,
    TrainingArguments,
)

from fastdpo import DPOConfig, DPOTrainer, trainer_check

LORA = LoraConfig(r=2, target_modules="all-linear")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """A Trainer makes its output_dir."""
    monkeypatch.chdir(tmp_path)


def args(**settings):
    return DPOConfig(**{"output_dir": "run", "report_to": "none", "use_cpu": True} | settings)


def build(tokenizer, settings=None, **arguments):
    defaults = {
        "model": tiny.model("llama", len(tokenizer)),
        "args": args(**(settings or {})),
        "train_dataset": Dataset.from_list(tiny.rows()),
        "processing_class": tokenizer,
    }
    return DPOTrainer(**(defaults | arguments))


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"train_dataset": None}, TypeError, "train_dataset, got none"),
        ({"train_dataset": tiny.rows()}, TypeError, "train_dataset, got list"),
        ({"args": "run"}, TypeError, "want a fastdpo.DPOConfig as args, got builtins.str"),
        (
            {"args": TrainingArguments(output_dir="run", report_to="none", use_cpu=True)},
            TypeError,
            "want a fastdpo.DPOConfig as args, got transformers.training_args.TrainingArguments",
        ),
        ({"model": None}, TypeError, "want model as a name or a loaded model, got NoneType"),
        ({"model": None, "args": None}, TypeError, "want model as a name or a loaded model"),
        ({"ref_model": "gpt2"}, TypeError, "want ref_model as a loaded model, got str"),
        ({"quantization_config": object()}, ValueError, "already loaded"),
        ({"peft_config": {"r": 8}}, TypeError, "want a peft.PeftConfig as peft_config, got dict"),
        (
            {"peft_config": PromptTuningConfig(num_virtual_tokens=2)},
            ValueError,
            "want task_type='CAUSAL_LM' in a peft_config of PROMPT_TUNING, got None",
        ),
        (
            {
                "peft_config": AdaptionPromptConfig(
                    task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1
                )
            },
            ValueError,
            "want peft_config with adapters on layers or .*, got ADAPTION_PROMPT",
        ),
        (
            {"peft_config": LORA, "model": get_peft_model(tiny.model("llama", 300), LORA)},
            ValueError,
            "got both",
        ),
        ({"settings": {"router_aux_loss_coef": 0.1}}, ValueError, "without experts, got 0.1"),
        ({"settings": {"report_to": ["dagger"]}}, ValueError, "dagger is not supported"),
        (
            {"settings": {"gradient_checkpointing_kwargs": {"foo": 1}}},
            ValueError,
            "gradient_checkpointing_kwargs that torch can take, got .*'foo': 1}: .*unexpected",
        ),
        (
            {
                "settings": {"train_sampling_strategy": "group_by_length", "max_steps": 1},
                "train_dataset": Dataset.from_list(tiny.rows()).to_iterable_dataset(),
            },
            ValueError,
            "want a map-style dataset with train_sampling_strategy='group_by_length'",
        ),
        (
            {"train_dataset": Dataset.from_list(tiny.rows()).to_iterable_dataset()},
            ValueError,
            "want max_steps with a streamed train_dataset",
        ),
        ({"settings": {"eval_strategy": "epoch"}}, ValueError, "want an eval_dataset, or eval_"),
        ({"eval_dataset": {"a": tiny.rows()}}, TypeError, "eval_a dataset: want .*, got list"),
        (
            {"settings": {"batch_eval_metrics": True}, "compute_metrics": lambda predicted: {}},
            ValueError,
            r"parameter compute_result under batch_eval_metrics, got \(predicted\)",
        ),
        (
            {"peft_config": LORA, "optimizers": (SGD(tiny.model("llama", 300).parameters()), None)},
            ValueError,
            "want optimizers of what trains, got peft_config",
        ),
        (
            {"model": "some/model", "optimizers": (SGD([torch.zeros(1)]), None)},
            ValueError,
            "want optimizers of what trains, got model as a name",
        ),
    ],
    ids=lambda value: None if isinstance(value, type) else str(value)[:30],
)
def test_arguments_that_do_not_fit_are_refused(tokenizer, nothing_spent, wrong, error, message):
    with pytest.raises(error, match=message):
        build(tokenizer, **wrong)


@pytest.mark.parametrize("is_anothers", [False, True])
def test_an_optimizer_of_what_does_not_train_is_refused(tokenizer, nothing_spent, is_anothers):
    """Made before the adapters, or of another model."""
    model = tiny.model("llama", len(tokenizer))
    optimizer = SGD((tiny.model("llama", 300) if is_anothers else model).parameters())
    model = model if is_anothers else get_peft_model(model, LORA)
    with pytest.raises(ValueError, match="trains, got one that holds no parameter of model with"):
        build(tokenizer, model=model, optimizers=(optimizer, None))


@pytest.mark.parametrize(
    "kwargs", [{"every_n_layers": 0}, {"every_n_layers": None}, {"offload": True}], ids=str
)
def test_checkpoints_that_cannot_run_are_refused(tokenizer, nothing_spent, kwargs):
    # by name, or where transformers does not know them, as torch's
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))}.* in gradient_checkp|that torch"):
        build(tokenizer, {"gradient_checkpointing_kwargs": kwargs})


def test_experts_are_balanced_with_no_reentrant_checkpoints(tokenizer):
    model = tiny.model("mixtral", len(tokenizer))
    settings = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="want use_reentrant=False .* with experts, got True"):
        build(tokenizer, model=model, settings=settings)
    build(tokenizer, model=model, settings=settings | {"router_aux_loss_coef": 0.0})


def test_prefixes_under_gradient_checkpointing_are_refused(tokenizer, nothing_spent):
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(tiny.model("llama", len(tokenizer)), config)
    with pytest.raises(ValueError, match="want gradient_checkpointing=False with PREFIX_TUNING"):
        build(tokenizer, model=model)


def test_a_model_that_lies_on_several_gpus_is_allowed(tokenizer, monkeypatch):
    monkeypatch.setattr(DPOConfig, "n_gpu", 2)
    model, rows = tiny.model("llama", len(tokenizer)), Dataset.from_list(tiny.rows())
    model.hf_device_map = {"model": 0, "lm_head": 0}
    with pytest.raises(ValueError, match="want one process per GPU"):
        trainer_check.check_arguments(args(), model, rows, None)
    model.hf_device_map["lm_head"] = 1
    trainer_check.check_arguments(args(), model, rows, None)


def test_a_model_that_will_lie_on_several_gpus_is_allowed(monkeypatch):
    monkeypatch.setattr(DPOConfig, "n_gpu", 2)
    placed = args(model_init_kwargs={"device_map": "auto"})
    rows = Dataset.from_list(tiny.rows())
    trainer_check.check_arguments(placed, "some/model", rows, None)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("device", torch.device("mps"), "want a CUDA GPU, or use_cpu=True, got device 'mps'"),
        ("n_gpu", 2, "want one process per GPU"),
    ],
)
def test_machines_that_it_does_not_run_on_are_refused(
    tokenizer, nothing_spent, monkeypatch, name, value, message
):
    monkeypatch.setattr(DPOConfig, name, value)
    with pytest.raises(ValueError, match=message):
        build(tokenizer)


def test_a_report_to_a_package_that_is_not_there_is_refused(tokenizer, nothing_spent, monkeypatch):
    monkeypatch.setattr(trainer_check, "get_available_reporting_integrations", lambda: ["mlflow"])
    with pytest.raises(ValueError, match=r"want report_to of .* installed, got \['wandb'\]"):
        build(tokenizer, settings={"report_to": ["mlflow", "wandb"]})


@pytest.mark.parametrize("service", ["azure_ml", "flyte"])
def test_a_service_that_transformers_does_not_list_is_allowed(monkeypatch, service):
    monkeypatch.setattr(trainer_check, "get_available_reporting_integrations", lambda: [])
    trainer_check._check_report_to([service])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "adamw_bnb_8bit", "optim_args": "a"}, "want settings that optim=adamw_bnb_8bit"),
        ({"adam_beta1": 2.0}, "optim=adamw_torch.*beta parameter at index 0: 2"),
        ({"adam_epsilon": -1.0}, "optim=adamw_torch.*epsilon value: -1"),
        ({"optim": "adamw_anyprecision", "optim_args": "5"}, "optim=adamw_any"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type=cosine_with_min_lr.*min"),
        (
            {"lr_scheduler_kwargs": {"cycles": 2}},
            "lr_scheduler_type=linear can take, got .'cycles'",
        ),
        (
            {
                "lr_scheduler_type": "polynomial",
                "lr_scheduler_kwargs": {"power": "two"},
                "warmup_steps": 5,  # of which none reads it
            },
            "lr_scheduler_type=polynomial can take, got {'power': 'two'}: TypeError",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_updates_that_transformers_cannot_make_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_check.check_optimizer_and_schedule(args(**settings))


@pytest.mark.parametrize("optim", ["galore_adamw", "apollo_adamw", "lomo"])
@pytest.mark.parametrize("is_there", [True, False])
def test_an_optimizer_that_looks_at_the_model_wants_its_package(monkeypatch, optim, is_there):
    def of_no_model(args, model=None):
        raise ValueError("want a model") if is_there else ImportError(f"want {optim}'s package")

    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", of_no_model)
    settings = {"optim": optim, "lr_scheduler_type": "cosine_with_min_lr"}
    told = "lr_scheduler_type=cosine_with_min_lr.*min" if is_there else f"want {optim}'s package"
    with pytest.raises(ValueError, match=told):
        trainer_check.check_optimizer_and_schedule(args(**settings))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd"])
@pytest.mark.parametrize(
    "kind", ["linear", "cosine", "constant", "inverse_sqrt", "cosine_with_restarts"]
)
def test_updates_that_transformers_can_make_are_allowed(optim, kind):
    trainer_check.check_optimizer_and_schedule(
        args(optim=optim, lr_scheduler_type=kind, warmup_steps=0.1)
    )


def test_too_few_rows_for_a_batch_are_refused_where_it_is_dropped(tokenizer, nothing_spent):
    settings = {"dataloader_drop_last": True, "per_device_train_batch_size": 9}
    with pytest.raises(ValueError, match="at least one batch of 9 rows .* got 8"):
        build(tokenizer, settings)


def test_too_few_rows_left_for_a_batch_are_refused_where_it_is_dropped(tokenizer):
    rows = tiny.rows(4)
    rows[1]["prompt"] *= 9  # alone longer than max_length
    settings = {"dataloader_drop_last": True, "per_device_train_batch_size": 4, "max_length": 40}
    with pytest.raises(ValueError, match="at least one batch of 4 rows .* got 3"):
        build(tokenizer, settings, train_dataset=Dataset.from_list(rows))


def test_too_few_rows_for_a_whole_update_are_refused_where_batches_are_rebalanced():
    settings = {"dataloader_drop_last": True, "per_device_train_batch_size": 4}
    settings |= {"gradient_accumulation_steps": 2}
    trainer_check.check_enough_rows(args(**settings), 4)
    rebalanced = args(**settings)
    rebalanced.train_sampling_strategy = "batch_rebalance"  # transformers 5.11 lacks it
    trainer_check.check_enough_rows(rebalanced, 8)
    with pytest.raises(ValueError, match="at least one update of 8 rows .* got 7"):
        trainer_check.check_enough_rows(rebalanced, 7)


def test_rows_for_just_one_batch_are_enough():
    settings = {"dataloader_drop_last": True, "per_device_train_batch_size": 8}
    trainer_check.check_enough_rows(args(**settings), 8)


def test_ranks_that_share_a_batch_need_rows_for_one(monkeypatch):
    settings = {"dataloader_drop_last": True, "per_device_train_batch_size": 8}
    sharing = args(accelerator_config={"split_batches": True}, **settings)
    monkeypatch.setattr(DPOConfig, "world_size", 2)
    trainer_check.check_enough_rows(sharing, 8)
    with pytest.raises(ValueError, match="at least one batch of 16 rows"):
        trainer_check.check_enough_rows(args(**settings), 8)
    rebalanced = args(**settings)
    rebalanced.train_sampling_strategy = "batch_rebalance"  # transformers 5.11 lacks it
    with pytest.raises(ValueError, match="at least one update of 16 rows"):
        trainer_check.check_enough_rows(rebalanced, 8)
    evaluates = args(eval_strategy="epoch", **settings)
    with pytest.raises(ValueError, match="at least one batch of 16 rows"):
        trainer_check.check_evaluation(
            evaluates, Dataset.from_list(tiny.rows(8)), None, has_own_loop=False
        )


def test_the_best_metric_is_one_that_every_evaluation_has(tokenizer, tmp_path):
    rows = Dataset.from_list(tiny.rows())
    best = {"metric_for_best_model": "rewards/margins", "eval_strategy": "steps"}
    args = DPOConfig(output_dir=tmp_path, use_cpu=True, report_to="none", **best)
    build(tokenizer, args=args, eval_dataset=rows)
    build(tokenizer, args=args, eval_dataset={"a": rows}, compute_metrics=lambda _: {})
    with pytest.raises(ValueError, match="want .* of .*'eval_a_rewards/margins'.*got 'rewards/m"):
        build(tokenizer, args=args, eval_dataset={"a": rows})


@pytest.mark.parametrize(
    ("wanted", "eval_strategy"),
    [("eval_loss", "steps"), ("wins", "no")],
    ids=["with-its-prefix", "without-evaluations"],
)
def test_a_best_metric_that_leads_to_no_error_is_allowed(wanted, eval_strategy):
    best = args(metric_for_best_model=wanted, eval_strategy=eval_strategy)
    trainer_check.check_evaluation(best, Dataset.from_list(tiny.rows()), None, has_own_loop=False)


def test_checkpoints_that_a_model_has_not_are_refused(tokenizer):
    config = AutoConfig.for_model("ctrl", vocab_size=300, n_embd=16, n_layer=1, n_head=2, dff=16)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="gradient_checkpointing=False with CTRLLMHeadModel"):
        build(tokenizer, model=model)
    build(tokenizer, {"gradient_checkpointing": False}, model=model)
