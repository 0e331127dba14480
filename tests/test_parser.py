"""Flags and YAML files -> arguments, with the names and defaults of `trl dpo`."""

import dataclasses
import math
from types import SimpleNamespace

import pytest

from fastdpo.arguments import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    init_kwargs,
    peft_config,
    quantization_config,
)
from fastdpo.parser import TrainParser, VerifyParser

TRL_DEFAULTS = {  # of TRL 1.16
    ScriptArguments: {
        "dataset_name": None,
        "dataset_config": None,
        "dataset_train_split": "train",
        "dataset_test_split": "test",
        "dataset_streaming": False,
        "ignore_bias_buffers": False,
    },
    ModelConfig: {
        "model_name_or_path": None,
        "model_revision": "main",
        "dtype": "float32",
        "attn_implementation": None,
        "use_peft": False,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target_modules": None,
        "lora_target_parameters": None,
        "lora_modules_to_save": None,
        "lora_task_type": "CAUSAL_LM",
        "use_rslora": False,
        "use_dora": False,
        "load_in_8bit": False,
        "load_in_4bit": False,
        "bnb_4bit_quant_type": "nf4",
        "use_bnb_nested_quant": False,
        "bnb_4bit_quant_storage": None,
    },
    DatasetMixtureConfig: {"datasets": [], "streaming": False, "test_split_size": None},
}


@pytest.mark.parametrize("arguments", TRL_DEFAULTS, ids=lambda each: each.__name__)
def test_names_and_defaults_are_trls(arguments):
    assert dataclasses.asdict(arguments()) == TRL_DEFAULTS[arguments]


def parse(*argv):
    return TrainParser(prog="fastdpo train").parse(argv)


def test_flags_are_written_as_trl_takes_them():
    (_, training, model, _), fresh, unknown = parse(
        *("--lora-r", "8", "--use_peft", "--lora_target_modules", "all-linear"),
        *("--max_length", "none", "--save_total_limit", "NULL"),
        *("--no_gradient_checkpointing", "--bf16", "false"),
        *("--loss_type", "sigmoid", "--model_init_kwargs", '{"use_cache": false}'),
    )
    assert (model.lora_r, model.use_peft, model.lora_target_modules) == (8, True, "all-linear")
    assert (training.max_length, training.gradient_checkpointing) == (None, False)
    assert (training.bf16, training.loss_type) == (False, ["sigmoid"])
    assert training.model_init_kwargs == {"use_cache": False}
    assert (fresh, unknown) == (False, [])


@pytest.mark.parametrize(
    "name, choices",
    [
        ("dtype", ["auto", "bfloat16", "float16", "float32"]),
        ("bnb_4bit_quant_type", ["fp4", "nf4"]),
    ],
)
def test_choices_are_trls(name, choices):
    chosen = [getattr(parse("--use_cpu", f"--{name}", each)[0].model, name) for each in choices]
    assert chosen == choices


@pytest.mark.parametrize("flag", ["--no_logging_nan_inf_filter", "--no-logging-nan-inf-filter"])
def test_a_filter_that_only_trl_has_on_may_be_switched_off(flag):
    (_, training, *_), _, unknown = parse("--use_cpu", flag)
    assert (training.logging_nan_inf_filter, unknown) == (False, [])
    assert parse("--use_cpu", "--logging_nan_inf_filter")[0].training.logging_nan_inf_filter


def test_eight_rows_are_verified_unless_flags_say_otherwise():
    counts = [
        VerifyParser("fastdpo verify").parse(["--use_cpu", *flags])[1]
        for flags in ([], ["--max_pairs", "2"])
    ]
    assert counts == [8, 2]


def test_yaml_sets_values_and_flags_override(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "env:\n"
        "beta: 0.3\n"
        "learning_rate: 5e-7\n"  # text, says YAML 1.1
        "eval_strategy: no\n"  # False, says YAML 1.1
        "max_length: null\n"
        "dtype: null\n"
        "gradient_checkpointing: false\n"
        "lora_target_modules: [q_proj, v_proj]\n"
        "lora_modules_to_save: null\n"
        "model_init_kwargs: {dtype: bfloat16}\n"
        "num_processes: 2\n"
        "multi_gpu: true\n"
        "use_fsdp: false\n"
    )
    (_, training, model, _), _, unknown = parse(
        *(f"--config={config}", "--beta", "0.4", "--num_processes", "1")
    )
    assert (training.beta, training.learning_rate, training.max_length) == (0.4, 5e-7, None)
    assert (training.eval_strategy, training.gradient_checkpointing) == ("no", False)
    assert training.model_init_kwargs == {"dtype": "bfloat16"}
    assert model.lora_target_modules == ["q_proj", "v_proj"]
    assert (model.lora_modules_to_save, model.dtype) == (None, None)
    from_yaml = ["--num_processes=2", "--multi_gpu=true", "--use_fsdp=false"]
    assert unknown == [*from_yaml, "--num_processes", "1"]  # accelerate takes the last


@pytest.mark.parametrize("files", ["a", ["a", "b"], {"train": "a"}])
def test_files_of_a_dataset_are_one_or_several_or_each_splits(files):
    (dataset,) = DatasetMixtureConfig(datasets=[{"path": "json", "data_files": files}]).datasets
    assert dataset.data_files == files


def test_peft_and_quantisation_are_off_unless_asked_for():
    assert peft_config(ModelConfig(lora_r=8)) is None
    assert quantization_config(ModelConfig()) is None
    adapters = peft_config(ModelConfig(use_peft=True, lora_r=8, use_rslora=True))
    assert (adapters.r, adapters.lora_alpha, adapters.use_rslora) == (8, 32, True)


def test_every_flag_of_the_adapters_reaches_peft():
    lora = {"r": 3, "alpha": 5, "dropout": 0.25, "task_type": "TOKEN_CLS"}
    lora |= {"target_modules": ["k_proj", "q_proj"], "target_parameters": ["experts.up"]}
    flags = {f"lora_{name}": value for name, value in lora.items()}
    flags |= {"lora_modules_to_save": ["lm_head"], "use_rslora": True, "use_dora": True}
    adapters = peft_config(ModelConfig(use_peft=True, **flags))
    for name, value in flags.items():
        kept = getattr(adapters, name if hasattr(adapters, name) else name.removeprefix("lora_"))
        assert (sorted(kept) if name == "lora_target_modules" else kept) == value, name


def test_a_model_is_loaded_as_its_flags_and_those_of_training_say(tmp_path):
    (_, training, model, _), *_ = parse(
        *("--use_cpu", "--output_dir", str(tmp_path), "--trust_remote_code", "--model_revision"),
        *("v1", "--dtype", "bfloat16", "--attn_implementation", "eager"),
    )
    wanted = {"revision": "v1", "trust_remote_code": True}
    wanted |= {"attn_implementation": "eager", "dtype": "bfloat16"}
    assert init_kwargs(training, model) == wanted
    training.model_init_kwargs = {"dtype": "float16", "use_cache": False}
    assert init_kwargs(training, model) == wanted | training.model_init_kwargs


def test_a_model_is_quantised_as_its_flags_say(monkeypatch):
    def quantised(**flags):
        return vars(quantization_config(ModelConfig(**flags)))

    monkeypatch.setattr("fastdpo.arguments.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match="pip install bitsandbytes"):
        quantised(load_in_8bit=True)
    monkeypatch.setattr("fastdpo.arguments.is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr("fastdpo.arguments.BitsAndBytesConfig", SimpleNamespace)
    assert quantised(load_in_8bit=True) == {"load_in_8bit": True}
    in_4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "uint8"}
    assert quantised(**in_4, dtype="bfloat16", use_bnb_nested_quant=True) == in_4 | {
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_use_double_quant": True,
    }
    with pytest.raises(ValueError, match="a dtype other than auto with load_in_4bit"):
        quantised(load_in_4bit=True, dtype="auto")


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_a_dropout_that_is_no_share_is_refused(value):
    with pytest.raises(ValueError, match=r"want lora_dropout in \[0, 1\)"):
        ModelConfig(lora_dropout=value)
    assert ModelConfig(lora_dropout=0.0).lora_dropout == 0


def test_numbers_in_a_list_are_read_as_one_is(tmp_path):
    text = "loss_type: [sigmoid, sft]\nloss_weights: [5e-1, 1]\nuse_cpu: true\nreport_to: none\n"
    (tmp_path / "run.yaml").write_text(text)
    run, *_ = TrainParser("fastdpo train").parse(["--config", str(tmp_path / "run.yaml")])
    assert run.training.loss_weights == [0.5, 1.0]


def test_values_that_transformers_parser_would_refuse_are_read(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "include_num_input_tokens_seen: all\nuse_cpu: true\nfsdp: false\n"
    )
    (_, training, *_), *_ = parse("--config", str(tmp_path / "run.yaml"))
    assert training.include_num_input_tokens_seen == "all"
    (_, training, *_), *_ = parse(
        *("--use_cpu", "--include_num_input_tokens_seen", "non_padding"),
        *("--use_liger_kernel", "--liger_kernel_config", '{"rope": false}'),
    )
    assert training.include_num_input_tokens_seen == "non_padding"
    assert training.liger_kernel_config == {"rope": False, "fused_linear_cross_entropy": False}
    for text, counted in {"yes": "all", "no": "no"}.items():
        (_, training, *_), *_ = parse("--use_cpu", "--include_num_input_tokens_seen", text)
        assert training.include_num_input_tokens_seen == counted
    for wrong in ("{rope", "[1]"):
        with pytest.raises(ValueError, match="liger_kernel_config.*want a JSON object, got"):
            parse("--use_cpu", "--liger_kernel_config", wrong)


def test_one_word_in_yaml_is_a_list_where_the_flag_takes_several(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "lora_modules_to_save: lm_head\n"
        "lora_target_parameters: experts.up\n"
        "lora_target_modules: all-linear\n"
        "label_names: labels\n"
        "loss_weights: 0.5\n"
    )
    (_, training, model, _), *_ = parse("--config", str(tmp_path / "run.yaml"), "--use_cpu")
    assert model.lora_modules_to_save == ["lm_head"]
    assert model.lora_target_parameters == ["experts.up"]
    assert model.lora_target_modules == "all-linear"
    assert (training.label_names, training.loss_weights) == (["labels"], [0.5])


def test_yaml_may_merge_mappings_and_override_what_they_say(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "model_init_kwargs: &a {dtype: float32, use_cache: false}\n"
        "lr_scheduler_kwargs: &b {<<: *a, use_cache: true}\n"
        "gradient_checkpointing_kwargs: {<<: [*b, *a], use_reentrant: false}\n"
        "liger_kernel_config: {rope: true}\n"
        "resume_from_checkpoint: true\n"
        "trackio_static_space_id: false\n"
    )
    (_, args, *_), *_ = parse(f"--config={config}", "--use_cpu", "true")
    assert args.lr_scheduler_kwargs == {"dtype": "float32", "use_cache": True}
    merged = {"dtype": "float32", "use_cache": True, "use_reentrant": False}
    assert args.gradient_checkpointing_kwargs == merged
    assert args.resume_from_checkpoint is True and args.trackio_static_space_id is False
