"""The constructor's arguments and what they say: each is used, or refused in words."""

import inspect
import math

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig
from trainers import LORA, TRL_ARGUMENTS, logged, make_trainer, weights
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainerCallback

from fastdpo import DPOConfig, DPOTrainer, policy
from fastdpo.collate import PackedCollator
from fastdpo.trainer_check import check_arguments


def test_the_constructor_takes_trls_arguments():
    parameters = list(inspect.signature(DPOTrainer.__init__).parameters)
    assert parameters == ["self", *TRL_ARGUMENTS]


def test_a_packed_collator_is_asked_for_by_layout(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="want layout='shared' or 'packed' in place"):
        make_trainer(tmp_path, tokenizer, data_collator=PackedCollator(share=True))


def test_a_collator_written_for_trl_trains_alike(tmp_path, tokenizer):
    plain = make_trainer(tmp_path, tokenizer, layout="padded")
    plain.train()

    def trl_collator(rows):
        inputs = plain.data_collator(rows)
        return {k: inputs[k] for k in ("input_ids", "attention_mask", "completion_mask")}

    given = make_trainer(tmp_path, tokenizer, data_collator=trl_collator)
    given.train()
    assert logged(given) == pytest.approx(logged(plain), abs=1e-5)
    assert given.counts.tokens == plain.counts.tokens


@pytest.mark.parametrize(
    "setting", [{"layout": "shared"}, {"max_tokens_per_forward": 100}], ids=str
)
def test_what_a_custom_collator_decides_is_not_asked_for(tmp_path, tokenizer, setting):
    with pytest.raises(ValueError, match="with a data_collator of your own"):
        make_trainer(tmp_path, tokenizer, data_collator=lambda rows: {}, **setting)


@pytest.mark.parametrize(
    "arguments, told",
    [
        ({"train_dataset": DatasetDict({"train": Dataset.from_list(tiny.rows())})}, r"\['train'\]"),
        ({"processing_class": None}, "want a tokenizer as processing_class for a model without"),
        ({"model": "./nowhere"}, r"\./nowhere is not there"),
        ({"model": "nowhere/run/model", "processing_class": None}, "run/model is not there"),
    ],
    ids=["all splits", "no tokenizer", "no model", "no model and tokenizer"],
)
def test_a_forgotten_argument_is_named(tmp_path, tokenizer, arguments, told):
    given = {
        "model": tiny.model("llama", len(tokenizer)),
        "train_dataset": Dataset.from_list(tiny.rows()),
        "processing_class": tokenizer,
        "args": DPOConfig(output_dir=tmp_path, report_to="none", use_cpu=True),
    }
    with pytest.raises((TypeError, ValueError), match=told):
        DPOTrainer(**(given | arguments))


def test_a_model_name_is_loaded_with_its_tokenizer(tmp_path, tokenizer):
    tiny.model("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = make_trainer(
        tmp_path, None, model=str(tmp_path / "model"), model_init_kwargs={"dtype": "bfloat16"}
    )
    trainer.train()
    assert trainer.model.dtype == torch.bfloat16
    assert logged(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_a_quantization_config_is_given_either_way_and_once(tmp_path, tokenizer, monkeypatch):
    config, given = BitsAndBytesConfig(load_in_4bit=True), []

    def load(name, **init_kwargs):
        given.append(init_kwargs["quantization_config"])
        return tiny.model("llama", len(tokenizer))

    monkeypatch.setattr(policy, "load_policy", load)
    as_argument = {"model": "some/model", "quantization_config": config}
    in_kwargs = {"model": "some/model", "model_init_kwargs": {"quantization_config": config}}
    make_trainer(tmp_path, tokenizer, **as_argument)
    make_trainer(tmp_path, tokenizer, **in_kwargs)
    assert given == [config, config]
    with pytest.raises(ValueError, match="want quantization_config once"):
        make_trainer(tmp_path, tokenizer, **(as_argument | in_kwargs))


def test_callbacks_and_optimizers_are_those_given(tmp_path, tokenizer):
    class Counts(TrainerCallback):
        steps = 0

        def on_step_end(self, args, state, control, **_):
            self.steps += 1

    model, counts = tiny.model("llama", len(tokenizer)), Counts()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    start = weights(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    given = {"callbacks": [counts], "optimizers": (optimizer, scheduler)}
    make_trainer(tmp_path, tokenizer, model=model, **given).train()
    assert counts.steps == 4
    assert all(torch.equal(now, start[name]) for name, now in weights(model).items())


@pytest.mark.parametrize("disable_dropout", [True, False])
def test_dropout_is_off_in_both_models_unless_overridden(tmp_path, tokenizer, disable_dropout):
    models = [tiny.model("llama", len(tokenizer)) for _ in range(2)]
    for model in models:
        model.config.attention_dropout = 0.5
    settings = {"ref_model": models[1], "disable_dropout": disable_dropout}
    make_trainer(tmp_path, tokenizer, model=models[0], **settings)
    rates = [model.config.attention_dropout for model in models]
    assert rates == ([0.0, 0.0] if disable_dropout else [0.5, 0.5])


def test_new_adapters_start_from_the_seed(tmp_path, tokenizer):
    def adapters(seed):
        lora = LoraConfig(**LORA)
        model = make_trainer(tmp_path, tokenizer, peft_config=lora, seed=seed).model
        return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])

    assert torch.equal(adapters(1), adapters(1)) and not torch.equal(adapters(1), adapters(2))


def test_the_pad_token_is_the_one_asked_for_and_the_model_is_tagged(tmp_path):
    tokenizer = tiny.tokenizer()
    model = make_trainer(tmp_path, tokenizer, pad_token="</s>").model
    assert tokenizer.pad_token_id == model.config.pad_token_id == 2
    assert set(model.model_tags) == {"fastdpo", "dpo"}


@pytest.mark.parametrize("report_to", ["none", None])
def test_logging_may_be_set_by_args_own_method(tmp_path, tokenizer, report_to):
    args = DPOConfig(output_dir=tmp_path, use_cpu=True, save_strategy="no", max_steps=2)
    args.set_logging(steps=1, report_to=report_to)
    rows = Dataset.from_list(tiny.rows())
    model = tiny.model("llama", len(tokenizer))
    trainer = DPOTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert len(logged(trainer)) == 2


@pytest.mark.parametrize(
    ("name", "value"), [("truncation_mode", "end"), ("beta", 0.0), ("learning_rate", -1.0)]
)
def test_a_setting_changed_since_is_checked_again(tmp_path, name, value):
    args = DPOConfig(output_dir=tmp_path, use_cpu=True, report_to="none")
    setattr(args, name, value)
    with pytest.raises(ValueError, match=rf"DPOConfig: want {name} .*, got {value!r}"):
        check_arguments(args, "some/model", Dataset.from_list(tiny.rows()), None)


def test_a_choice_changed_since_may_be_its_text(tmp_path):
    args = DPOConfig(output_dir=tmp_path, use_cpu=True, report_to="none")
    args.eval_strategy = "steps"
    args.save_strategy, args.metric_for_best_model = "best", "eval_loss"
    check_arguments(args, "some/model", Dataset.from_list(tiny.rows()), None)


def test_a_run_may_report_to_all_that_is_installed(tmp_path):
    args = DPOConfig(output_dir=tmp_path, use_cpu=True)
    args.set_logging(report_to="all")
    check_arguments(args, "some/model", Dataset.from_list(tiny.rows()), None)


def test_rows_of_an_evaluation_that_would_all_be_dropped_are_refused(tmp_path, tokenizer):
    settings = {"dataloader_drop_last": True, "per_device_eval_batch_size": 4}
    whole = Dataset.from_list(tiny.rows(4))
    make_trainer(tmp_path, tokenizer, eval_dataset=whole, eval_strategy="epoch", **settings)
    settings["eval_dataset"] = {"all": whole, "few": whole.select(range(3))}
    make_trainer(tmp_path, tokenizer, **settings)  # evaluates nothing
    with pytest.raises(ValueError, match="at least one batch of 4 .*, got 3 in the eval_few data"):
        make_trainer(tmp_path, tokenizer, eval_strategy="epoch", **settings)


def test_an_evaluation_set_may_have_any_name(tmp_path, tokenizer):
    rows = Dataset.from_list(tiny.rows(3))
    trainer = make_trainer(tmp_path, tokenizer, eval_dataset={"train": rows})
    counted = {name: counts.pairs for name, counts in trainer.pair_counts.items()}
    assert counted == {"train": 8, "eval_train": 3}


def test_a_tokenizer_is_loaded_of_the_models_revision(tmp_path, monkeypatch):
    asked = {}

    def load_tokenizer(*_, **kwargs):
        asked.update(kwargs)
        raise InterruptedError

    monkeypatch.setattr("fastdpo.trainer.load_tokenizer", load_tokenizer)
    with pytest.raises(InterruptedError):
        make_trainer(
            tmp_path,
            None,
            model="some/model",
            model_init_kwargs={"revision": "v1"},
            trust_remote_code=True,
        )
    assert (asked["revision"], asked["trust_remote_code"]) == ("v1", True)


@pytest.mark.skipif(
    not hasattr(PreTrainedModel, "activation_checkpointing_enable"), reason="transformers is older"
)
def test_activations_may_be_offloaded_from_a_gpu_alone(tmp_path, monkeypatch):
    args = DPOConfig(
        output_dir=tmp_path,
        report_to="none",
        use_cpu=True,
        gradient_checkpointing_kwargs={"offload": True},
    )
    rows = Dataset.from_list(tiny.rows())
    with pytest.raises(ValueError, match="want offload=False .* on a CPU"):
        check_arguments(args, "some/model", rows, None)
    monkeypatch.setattr(DPOConfig, "device", torch.device("cuda"))
    check_arguments(args, "some/model", rows, None)


def test_a_run_without_args_has_a_folder_named_after_the_model(monkeypatch):
    made = []

    def check_arguments(args, *_):
        made.append(args.output_dir)
        raise InterruptedError

    monkeypatch.setattr("fastdpo.trainer.check_arguments", check_arguments)
    with pytest.raises(InterruptedError):
        DPOTrainer("some/model", train_dataset=Dataset.from_list(tiny.rows()))
    assert made == ["model-DPO"]


class Tagging(DPOTrainer):
    _tag_names = ["dpo", "my-method"]


def test_a_subclass_may_have_tags_of_its_own_as_under_trl(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, kind=Tagging)
    trainer.create_model_card()
    assert "tags:\n- dpo\n- my-method\n" in (tmp_path / "README.md").read_text("utf-8")
    assert set(trainer.model.model_tags) == {"dpo", "my-method"}


def test_a_model_card_names_the_dataset_that_trls_scripts_push_with(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    trainer.create_model_card("a model", dataset_name="some/pairs", tags="mine")
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "a model" in card and "datasets:\n- some/pairs" in card
    assert all(f"- {tag}" in card for tag in ("mine", "fastdpo", "dpo"))
    trainer.create_model_card(tags=["dpo"])  # as push_to_hub, with the model's
    assert (tmp_path / "README.md").read_text("utf-8").count("- dpo\n") == 1
    trainer.create_model_card(dataset="a", dataset_tags="some/others")  # transformers' own names
    assert "datasets:\n- some/others" in (tmp_path / "README.md").read_text("utf-8")
