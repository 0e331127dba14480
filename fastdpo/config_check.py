"""The settings of a DPOConfig against each other, before anything is read or loaded.

ValueError names the setting, what was wanted and what came.
"""

import json
import math
from dataclasses import fields
from typing import Any, get_args

from transformers import IntervalStrategy, TrainingArguments
from transformers.training_args import OptimizerNames

from fastdpo.losses import BATCH_LOSSES, LOSS_TYPES, SMOOTHED, WITH_F_DIVERGENCE

# settings of transformers, which checks the choices of these
TRANSFORMERS = {each.name for each in fields(TrainingArguments)} - {"train_sampling_strategy"}


def want(condition: bool, wanted: str, came: Any) -> None:
    """ValueError unless `condition`; `wanted` names the setting."""
    if not condition:
        raise ValueError(f"DPOConfig: want {wanted}, got {came!r}")


def count_or_auto(name: str, value: int | str | None) -> int | str | None:
    """The number in `value`, which the command line hands over as text; "auto"; or None."""
    text = str(value).lower()
    if text in ("none", "null", "auto"):
        return "auto" if text == "auto" else None
    want(text.isdecimal() and int(text) > 0, f"{name} auto or a count", value)
    return int(text)


def check_numbers(args: TrainingArguments) -> None:
    """ValueError for a number as text, such as PyYAML makes of 5e-7."""
    for each in fields(args):
        kinds = set(get_args(each.type) or [each.type])
        if kinds <= {int, float, type(None)}:
            value = getattr(args, each.name)
            wanted = f"{each.name} as a number (in YAML with a point, 5.0e-7)"
            want(not isinstance(value, str), wanted, value)


def check_mappings(args: TrainingArguments) -> None:
    """ValueError for a mapping that is none; the command line hands one over as JSON text."""
    for name in args._VALID_DICT_FIELDS:
        value = getattr(args, name)
        if isinstance(value, str) and value.startswith("{"):
            try:
                json.loads(value)
            except ValueError as error:
                raise ValueError(f"DPOConfig: want {name} as JSON: {error}") from error
        elif name.endswith("_kwargs"):
            want(isinstance(value, dict | None), f"{name} as a mapping", value)


def check_settings(args: TrainingArguments) -> None:
    """ValueError for what a run with `args`, a DPOConfig, would stumble over."""
    _check_loop(args)
    _check_choices(args)
    _check_values(args)
    _check_loss(args)
    _check_unsupported(args)


def _check_loop(args: TrainingArguments) -> None:
    """Values that transformers would refuse late, or train no step with."""
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size")
    for name in (*sizes, "gradient_accumulation_steps"):
        want(getattr(args, name) >= 1, f"{name} >= 1", getattr(args, name))
    counts = ("num_train_epochs", "dataloader_num_workers")
    for name in ("learning_rate", "weight_decay", "warmup_steps", *counts):
        value = getattr(args, name)
        want(0 <= value < math.inf, f"{name} >= 0", value)
    for name in ("eval_accumulation_steps", "dataloader_prefetch_factor"):
        value = getattr(args, name)
        want(value is None or value >= 1, f"{name} >= 1", value)
    for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context"):
        value = getattr(args, name, None)  # the latter is not in every version of transformers
        want(
            not value or args.dataloader_num_workers > 0,
            f"{name} unset with dataloader_num_workers 0",
            value,
        )
    if args.save_strategy == "best":  # after an evaluation alone, transformers looks for the best
        evaluates = IntervalStrategy(args.eval_strategy).value
        want(evaluates != "no", "eval_strategy steps or epoch with save_strategy best", evaluates)
        metric = args.metric_for_best_model
        want(metric is not None, "metric_for_best_model with save_strategy best", metric)
    norm, alpha = args.max_grad_norm, args.neftune_noise_alpha
    # inf measures, and clips none; 0 does neither
    want(norm is not None and norm >= 0, "max_grad_norm >= 0", norm)
    want(alpha is None or 0 <= alpha < math.inf, "neftune_noise_alpha >= 0", alpha)
    counted, known = args.include_num_input_tokens_seen, ("all", "non_padding", "no")
    want(counted in known, f"include_num_input_tokens_seen in {known}", counted)


def _check_choices(args: TrainingArguments) -> None:
    for each in fields(args):
        choices, value = each.metadata.get("choices"), getattr(args, each.name)
        if choices and each.name not in TRANSFORMERS:
            want(value in choices, f"{each.name} in {choices}", value)


def _check_values(args: TrainingArguments) -> None:
    # one token cannot be predicted and predict
    want(args.max_length is None or args.max_length >= 2, "max_length >= 2", args.max_length)
    want(args.head_cache_bytes >= 0, "head_cache_bytes >= 0", args.head_cache_bytes)
    want(0 <= args.head_skip_below < 1, "head_skip_below in [0, 1)", args.head_skip_below)
    coef, batch_size = args.router_aux_loss_coef, args.precompute_ref_batch_size
    want(coef is None or 0 <= coef < math.inf, "router_aux_loss_coef >= 0", coef)
    want(batch_size is None or batch_size > 0, "precompute_ref_batch_size > 0", batch_size)
    share, steps = args.ref_model_mixup_alpha, args.ref_model_sync_steps
    want(0 < share <= 1, "ref_model_mixup_alpha in (0, 1]", share)
    want(steps >= 1, "ref_model_sync_steps >= 1", steps)
    want(
        not (args.sync_ref_model and args.precompute_ref_log_probs),
        "precompute_ref_log_probs=False with sync_ref_model (the reference changes)",
        args.precompute_ref_log_probs,
    )
    weights, alpha = args.loss_weights, args.f_alpha_divergence_coef
    want(weights is None or _are_finite(weights), "loss_weights as finite numbers", weights)
    want(_are_finite([alpha]), "a finite f_alpha_divergence_coef", alpha)
    want(
        args.max_tokens_per_forward is None or args.include_num_input_tokens_seen == "no",
        "include_num_input_tokens_seen no with max_tokens_per_forward (num_tokens is logged)",
        args.include_num_input_tokens_seen,
    )
    optim = OptimizerNames(args.optim).value
    in_backward = "lomo" in optim or optim.endswith("layerwise")
    want(
        args.max_tokens_per_forward is None or not in_backward,
        f"max_tokens_per_forward unset with optim {optim} (it updates within each backward, and "
        "every pack has one)",
        args.max_tokens_per_forward,
    )


def _check_loss(args: TrainingArguments) -> None:
    are_known = bool(args.loss_type) and set(args.loss_type) <= set(LOSS_TYPES)
    want(are_known, f"loss_type some of {LOSS_TYPES}", args.loss_type)
    count = len(args.loss_type)
    want(
        args.loss_weights is None or len(args.loss_weights) == count,
        f"loss_weights with {count} weights, as loss_type has",
        args.loss_weights,
    )
    want(0 < args.beta < math.inf, "beta > 0", args.beta)
    want(args.discopop_tau > 0, "discopop_tau > 0", args.discopop_tau)
    smoothing = args.label_smoothing
    want(0 <= smoothing < 0.5, "label_smoothing in [0, 0.5)", smoothing)
    if "exo_pair" in args.loss_type:
        want(smoothing > 0, "label_smoothing > 0 with loss_type exo_pair (1e-3)", smoothing)
    want(
        not smoothing or set(args.loss_type) & set(SMOOTHED),
        f"label_smoothing 0 with loss_type {args.loss_type} (it is read by {SMOOTHED})",
        smoothing,
    )
    alpha = args.ld_alpha
    want(alpha is None or 0 <= alpha <= 1, "ld_alpha in [0, 1]", alpha)
    divergence = args.f_divergence_type
    want(
        divergence == "reverse_kl" or set(args.loss_type) <= set(WITH_F_DIVERGENCE),
        f"f_divergence_type reverse_kl with loss_type {args.loss_type} (others go with "
        f"{WITH_F_DIVERGENCE})",
        divergence,
    )
    want(
        not (args.mixes_pairs and args.use_weighting),
        f"use_weighting=False with loss_type {args.loss_type} (in {BATCH_LOSSES}, no pair has "
        "a loss of its own to weigh)",
        args.use_weighting,
    )
    is_noisy = not args.disable_dropout or args.neftune_noise_alpha
    want(
        not (args.mixes_pairs and is_noisy) or args.max_tokens_per_forward is None,
        f"max_tokens_per_forward unset with loss_type {args.loss_type} and noise, of dropout "
        "or neftune_noise_alpha (a pack is run twice, and two forwards have different noise)",
        args.max_tokens_per_forward,
    )


def _check_unsupported(args: TrainingArguments) -> None:
    """What fastdpo does not run: refused where it is switched on."""
    # accelerate would train in float32, and say fp16
    half_on_cpu = args.fp16 and args.device.type == "cpu"
    want(not half_on_cpu, "fp16=False on a CPU, whose autocast is bf16", args.fp16)
    want(
        not args.label_smoothing_factor,
        "label_smoothing_factor 0 (a DPO loss's is label_smoothing)",
        args.label_smoothing_factor,
    )
    offloading = args.activation_offloading
    want(not offloading, "activation_offloading=False (True is not there yet)", offloading)
    dispatch = args.accelerator_config.dispatch_batches
    want(not dispatch, "dispatch_batches=False in accelerator_config", dispatch)
    liger = (args.liger_kernel_config or {}).get("fused_linear_cross_entropy")
    want(not liger, "fused_linear_cross_entropy=False in liger_kernel_config", liger)


def _are_finite(values: Any) -> bool:
    """Whether `values` is a list of finite numbers."""
    is_list = isinstance(values, (list, tuple))
    return is_list and all(isinstance(x, (int, float)) and math.isfinite(x) for x in values)
