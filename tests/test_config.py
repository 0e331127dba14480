"""DPOConfig: TRL's defaults, what each setting reaches, and what is refused."""

import logging
import math
import re
import warnings

import pytest
import torch

from fastdpo import DPOConfig
from fastdpo.columns import Cut
from fastdpo.losses import F_DIVERGENCES, LOSS_TYPES, WITH_F_DIVERGENCE
from fastdpo.parser import TrainParser

# TRL 1.16's DPOConfig, where it differs from transformers.TrainingArguments or adds to it
TRL_DEFAULTS = {
    "learning_rate": 1e-6,
    "logging_steps": 10,
    "gradient_checkpointing": True,
    "model_init_kwargs": None,
    "trust_remote_code": False,
    "router_aux_loss_coef": None,
    "disable_dropout": True,
    "dataset_num_proc": None,
    "max_length": 1024,
    "truncation_mode": "keep_start",
    "padding_free": False,
    "pad_to_multiple_of": None,  # what "auto" comes to on a CPU or a GPU
    "precompute_ref_log_probs": False,
    "precompute_ref_batch_size": None,
    "loss_type": ["sigmoid"],
    "loss_weights": None,
    "ld_alpha": None,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "label_smoothing": 0.0,
    "beta": 0.1,
    "use_weighting": False,
    "discopop_tau": 0.05,
    "activation_offloading": False,
    "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6,
    "ref_model_sync_steps": 512,
    "pad_token": None,
}


def config(tmp_path, **settings):
    defaults = {"output_dir": tmp_path, "report_to": "none", "use_cpu": True}
    return DPOConfig(**defaults | settings)


def test_defaults_are_trls(tmp_path):
    made = config(tmp_path)
    assert {name: getattr(made, name) for name in TRL_DEFAULTS} == TRL_DEFAULTS
    assert made.loss_type is not config(tmp_path).loss_type


def test_ranks_have_a_batch_each_or_share_one(tmp_path, monkeypatch):
    monkeypatch.setattr(DPOConfig, "world_size", 2)
    sharing = {"accelerator_config": {"split_batches": True}}
    made = [config(tmp_path, per_device_train_batch_size=8, **more) for more in ({}, sharing)]
    assert [each.over_ranks(8) for each in made] == [16, 8]


def test_defaults_of_its_own_hide_no_nan_and_end_no_run(tmp_path):
    made = config(tmp_path)
    assert made.logging_nan_inf_filter is False and made.strict_layout is False
    assert made.layout == "auto" and made.max_tokens_per_forward is None


def test_every_setting_reaches_its_stage(tmp_path):
    loss = {
        "beta": 0.3,
        "loss_type": ("robust", "discopop"),
        "loss_weights": (0.5, 2.0),
        "label_smoothing": 0.2,
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.7,
        "discopop_tau": 0.4,
        "ld_alpha": 0.6,
    }
    lists = {name: list(loss[name]) for name in ("loss_type", "loss_weights")}
    made = config(
        tmp_path,
        **(loss | lists),
        max_length=99,
        truncation_mode="keep_end",
        on_bad_rows="skip",
        dataset_num_proc=2,
        train_sampling_strategy="group_by_length",
        pad_to_multiple_of=8,
        head_cache_bytes=7,
        head_skip_below=0.1,
        use_weighting=True,
        remove_unused_columns=False,
    )
    assert made.loss_settings == loss
    assert made.head_settings == {"head_cache_bytes": 7, "skip_below": 0.1}
    cut = Cut(max_length=99, truncation_mode="keep_end")
    assert made.collator_settings == {"cut": cut, "pad_to_multiple_of": 8}
    assert made.data_settings == {
        "max_length": 99,
        "truncation_mode": "keep_end",
        "on_bad_rows": "skip",
        "num_proc": 2,
        "length_column": "length",
        "keep_columns": True,
    }
    assert "log_sum_p2" in made.token_stats
    assert "log_sum_p2" not in config(tmp_path).token_stats


@pytest.mark.parametrize(
    ("strategy", "column"),
    [("random", None), ("group_by_length", "length"), ("batch_rebalance", "length")],
)
def test_samplers_by_length_have_their_column(tmp_path, strategy, column):
    try:
        made = config(tmp_path, train_sampling_strategy=strategy)
    except ValueError:
        if strategy != "batch_rebalance":
            raise
        pytest.skip(f"no {strategy} in this version of transformers")
    assert made.length_column == column


def test_a_gpu_trains_in_bfloat16_unless_overridden(tmp_path, monkeypatch):
    for module in ("fastdpo.config", "transformers.training_args"):
        monkeypatch.setattr(f"{module}.is_torch_bf16_gpu_available", lambda: True)
    assert DPOConfig(output_dir=tmp_path, report_to="none").bf16 is True
    assert config(tmp_path).bf16 is False  # use_cpu
    with monkeypatch.context() as patch:
        patch.setattr(DPOConfig, "device", torch.device("cuda"))
        assert DPOConfig(output_dir=tmp_path, report_to="none", fp16=True).bf16 is False
    assert config(tmp_path, bf16=False).bf16 is False


def test_no_default_setting_warns_of_a_deprecated_name(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert config(tmp_path).gradient_checkpointing is True


def test_a_token_of_the_hub_is_not_shown(tmp_path):
    made = config(tmp_path, hub_token="hf_secret")
    assert made.hub_token == "hf_secret"
    assert "hf_secret" not in f"{made!r} {made} {made.to_dict()}"


def test_padding_free_is_warned_to_have_no_effect(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        config(tmp_path, padding_free=True)
    assert "padding_free=True changes nothing" in caplog.text


def test_without_a_gpu_training_stays_in_float32_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("fastdpo.config.is_torch_bf16_gpu_available", lambda: False)
    assert DPOConfig(output_dir=tmp_path, report_to="none").bf16 is False
    assert config(tmp_path, bf16=True).bf16 is True


def test_checkpointing_can_be_switched_off(tmp_path):
    made = config(tmp_path, gradient_checkpointing=False)
    assert made.gradient_checkpointing is False
    assert getattr(made, "activation_checkpointing", False) is False


@pytest.mark.parametrize("given", [{"preserve_rng_state": False}, '{"preserve_rng_state": false}'])
def test_checkpoints_are_reentrant_only_where_asked(tmp_path, given):
    made = config(tmp_path, gradient_checkpointing_kwargs=given)
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        told = getattr(made, name, made.gradient_checkpointing_kwargs)
        assert told == {"use_reentrant": False, "preserve_rng_state": False}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_is_accepted_by_name(tmp_path, loss_type):
    smoothing = {"label_smoothing": 1e-3} if loss_type == "exo_pair" else {}
    assert config(tmp_path, loss_type=loss_type, **smoothing).loss_type == [loss_type]


@pytest.mark.parametrize("f_divergence_type", F_DIVERGENCES)
def test_every_f_divergence_goes_with_the_losses_of_trl(tmp_path, f_divergence_type):
    made = config(
        tmp_path,
        loss_type=list(WITH_F_DIVERGENCE),
        label_smoothing=0.1,
        f_divergence_type=f_divergence_type,
    )
    assert made.f_divergence_type == f_divergence_type


def test_one_loss_may_be_a_string(tmp_path):
    assert config(tmp_path, loss_type="sigmoid").loss_type == ["sigmoid"]


@pytest.mark.parametrize(
    ("given", "multiple"), [("auto", None), ("none", None), ("8", 8), (8, 8), (None, None)]
)
def test_pad_to_multiple_of_reads_text_of_the_command_line(tmp_path, given, multiple):
    assert config(tmp_path, pad_to_multiple_of=given).pad_to_multiple_of == multiple


@pytest.mark.parametrize(
    ("given", "most"), [("auto", "auto"), ("none", None), ("800", 800), (800, 800)]
)
def test_max_tokens_per_forward_reads_text_of_the_command_line(tmp_path, given, most):
    assert config(tmp_path, max_tokens_per_forward=given).max_tokens_per_forward == most


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("ld_alpha", 0.0), ("ld_alpha", 1.0), ("head_skip_below", 0.0), ("max_length", 2)),
        *(("max_grad_norm", 0.0), ("ref_model_mixup_alpha", 1.0)),
    ],
)
def test_the_ends_of_a_range_are_in_it(tmp_path, name, value):
    assert getattr(config(tmp_path, **{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("beta", 0.0),
        ("beta", -0.1),
        ("label_smoothing", 0.5),
        ("label_smoothing", -0.1),
        ("discopop_tau", 0.0),
        ("ld_alpha", -0.1),
        ("ld_alpha", 1.1),
        ("loss_type", []),
        ("loss_type", ["sigmoid", "simpo"]),
        ("loss_weights", [1.0, 2.0]),
        ("loss_weights", 0.5),
        ("loss_weights", [math.nan]),
        ("f_divergence_type", "backward_kl"),
        ("max_length", 1),
        ("truncation_mode", "middle"),
        ("on_bad_rows", "ignore"),
        ("pad_to_multiple_of", "some"),
        ("pad_to_multiple_of", 0),
        ("layout", "ragged"),
        ("train_sampling_strategy", "by_length"),
        ("max_tokens_per_forward", 0),
        ("head_cache_bytes", -1),
        ("head_skip_below", 1.0),
        ("router_aux_loss_coef", -0.1),
        ("router_aux_loss_coef", math.nan),
        ("router_aux_loss_coef", math.inf),
        ("f_alpha_divergence_coef", math.nan),
        ("precompute_ref_batch_size", 0),
        ("ref_model_mixup_alpha", 0.0),
        ("ref_model_mixup_alpha", 1.5),
        ("ref_model_sync_steps", 0),
        ("beta", math.inf),
        ("learning_rate", -1e-6),
        ("learning_rate", "5e-7"),  # as yaml.safe_load reads 5e-7
        ("max_steps", "2"),
        ("eval_steps", "2"),
        ("max_length", "64"),
        ("learning_rate", math.nan),
        ("num_train_epochs", -1),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("max_grad_norm", -1),
        ("max_grad_norm", None),
        ("max_grad_norm", math.nan),
        ("warmup_steps", math.nan),
        ("neftune_noise_alpha", -1),
        ("neftune_noise_alpha", math.nan),
        ("neftune_noise_alpha", math.inf),
        ("per_device_train_batch_size", 0),
        ("per_device_eval_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("dataloader_num_workers", -1),
        ("include_num_input_tokens_seen", "some"),
        ("eval_accumulation_steps", 0),
        ("dataloader_persistent_workers", True),  # without workers
    ],
)
def test_a_value_out_of_range_is_refused_by_name(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"{name}.*got {re.escape(repr(value))}"):
        config(tmp_path, **{name: value})


def test_what_is_not_there_yet_is_refused_not_ignored(tmp_path):
    with pytest.raises(ValueError, match=r"activation_offloading.*not there yet"):
        config(tmp_path, activation_offloading=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp16": True}, "fp16=False on a CPU, .* got True"),
        (
            {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 0},
            "dataloader_prefetch_factor >= 1, got 0",
        ),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor 0 .*, got 0.1"),
        (
            {"save_strategy": "best", "metric_for_best_model": "loss"},
            "eval_strategy steps or epoch with save_strategy best, got 'no'",
        ),
        (
            {"save_strategy": "best", "eval_strategy": "epoch"},
            "metric_for_best_model with save_strategy best, got None",
        ),
        ({"loss_type": "exo_pair"}, "label_smoothing > 0 with loss_type exo_pair"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing 0 with .*'ipo'"),
        ({"loss_type": "nca_pair", "f_divergence_type": "forward_kl"}, "reverse_kl with .*'nca"),
        (
            {"loss_type": ["sigmoid", "apo_zero"], "f_divergence_type": "js_divergence"},
            "reverse_kl with .*'apo_zero'",
        ),
        ({"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "loss_weights with 2 weights"),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            "dispatch_batches=False in accelerator_config, got True",
        ),
        (
            {
                "use_liger_kernel": True,
                "liger_kernel_config": {"fused_linear_cross_entropy": True},
            },
            "fused_linear_cross_entropy=False in liger_kernel_config, got True",
        ),
        *(
            ({"loss_type": name, "f_divergence_type": "forward_kl"}, f"reverse_kl with .*'{name}'")
            for name in ("bco_pair", "aot", "aot_unpaired")
        ),
        *(
            ({"loss_type": ["ipo", name], "use_weighting": True}, f"use_weighting=.*'{name}'")
            for name in ("aot", "aot_unpaired", "sft")
        ),
        ({"loss_type": "bco_pair", "label_smoothing": 0.1}, "label_smoothing 0 with .*'bco_pair'"),
        ({"loss_type": "sft", "label_smoothing": 0.1}, "label_smoothing 0 with .*'sft'"),
        (
            {
                "loss_type": ["sigmoid", "aot"],
                "max_tokens_per_forward": 100,
                "disable_dropout": False,
            },
            "max_tokens_per_forward unset with .*'aot'.* noise, of dropout .*got 100",
        ),
        (
            {"loss_type": "sft", "max_tokens_per_forward": "auto", "neftune_noise_alpha": 5.0},
            "max_tokens_per_forward unset with .*'sft'.* noise, .*neftune_noise_alpha .*got 'auto'",
        ),
        (
            {"max_tokens_per_forward": 99, "include_num_input_tokens_seen": True},
            "include_num_input_tokens_seen no with max_tokens_per_forward",
        ),
        *(
            ({"optim": name, "max_tokens_per_forward": 99}, f"unset with optim {name} .*got 99")
            for name in ("lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise")
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


@pytest.mark.parametrize("noise", [{"disable_dropout": False}, {"neftune_noise_alpha": 5.0}])
def test_noise_may_stay_where_no_pack_is_run_twice(tmp_path, noise):
    config(tmp_path, loss_type="aot", max_tokens_per_forward=100)
    config(tmp_path, loss_type="aot", max_tokens_per_forward=100, neftune_noise_alpha=0)
    config(tmp_path, loss_type="aot", **noise)
    config(tmp_path, loss_type="sigmoid", max_tokens_per_forward=100, **noise)


def test_a_mix_is_written_on_the_command_line(tmp_path):
    flags = "--loss_type sigmoid ipo --loss_weights 1 0.5 --f_divergence_type forward_kl"
    flags += " --ld_alpha 0.5 --use_cpu --report_to none"
    (_, made, *_), *_ = TrainParser("fastdpo train").parse(
        [*flags.split(), "--output_dir", str(tmp_path)]
    )
    assert made.loss_settings["loss_type"] == ("sigmoid", "ipo")
    assert made.loss_settings["loss_weights"] == (1.0, 0.5)
    assert (made.f_divergence_type, made.ld_alpha) == ("forward_kl", 0.5)


def test_a_json_object_may_stand_for_model_init_kwargs(tmp_path):
    made = config(tmp_path, model_init_kwargs='{"revision": "v1"}')
    assert made.model_init_kwargs == {"revision": "v1"}


def test_memory_is_pinned_for_copies_that_do_not_wait_unless_overridden(tmp_path):
    assert config(tmp_path, use_cpu=False).accelerator_config.non_blocking is True
    assert config(tmp_path, dataloader_pin_memory=False).accelerator_config.non_blocking is False
    on_cpu = config(tmp_path)  # where transformers pins nothing
    assert on_cpu.accelerator_config.non_blocking is on_cpu.dataloader_pin_memory is False
    given = {"non_blocking": False, "even_batches": False}
    told = config(tmp_path, use_cpu=False, accelerator_config=given)
    assert told.accelerator_config.non_blocking is told.accelerator_config.even_batches is False
    assert told.accelerator_config.dispatch_batches is False
