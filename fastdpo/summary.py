"""What a run is about to do, in the lines a person reads before it starts."""

from collections.abc import Mapping

import torch
from peft import PeftModel
from torch import nn

from fastdpo import ops
from fastdpo.config import DPOConfig
from fastdpo.layout import Layout
from fastdpo.model import causal_lm_of
from fastdpo.row_report import PairCounts
from fastdpo.token_budget import TokenBudget


def describe_run(
    model: nn.Module,
    args: DPOConfig,
    *,
    pair_counts: Mapping[str, PairCounts | None],
    layout: Layout,
    budget: TokenBudget | None,
    reference: str,
) -> str:
    """Model, data, layout, kernels, reference and steps of a run, a line each.

    pair_counts: by the datasets' names. reference: where its log-probabilities come from.
    """
    lines = {"model": _model_line(model, args)}
    for name, counts in pair_counts.items():
        lines[f"{name} pairs"] = _counts_line(counts)
    lines["layout"] = _layout_line(layout, budget)
    lines["kernels"] = _kernels_line(model, args.device)
    lines["reference"] = reference
    if args.sync_ref_model:
        share, every = args.ref_model_mixup_alpha, args.ref_model_sync_steps
        lines["reference"] += f"; takes {share:g} of the policy in after every {every:,} updates"
    lines["updates"] = _updates_line(args)
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())


def _model_line(model: nn.Module, args: DPOConfig) -> str:
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    how = "adapters" if isinstance(model, PeftModel) else "in full"
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    autocast = f", {precision} autocast" if precision else ""
    return (
        f"{type(causal_lm_of(model)).__name__}, {total:,} parameters in {model.dtype}, "
        f"{trained:,} trained {how}{autocast}"
    )


def _counts_line(counts: PairCounts | None) -> str:
    if counts is None:
        return "streamed, not counted"
    parts = [f"{counts.pairs:,} of {counts.rows:,} rows"]
    if counts.too_long:
        parts.append(f"{counts.too_long:,} dropped: their prompt alone fills max_length")
    if counts.bad:
        parts.append(f"{counts.bad:,} dropped: malformed")
    if counts.equal:
        parts.append(f"{counts.equal:,} with chosen equal to rejected")
    if counts.prompt_end_lost:
        parts.append(f"{counts.prompt_end_lost:,} without the end of their prompt")
    tokens = f"{counts.prompt_tokens:,} prompt and {counts.completion_tokens:,} completion tokens"
    if counts.truncated:
        parts.append(f"{counts.truncated:,} cut to max_length")
        tokens += " before"
    parts.append(tokens)
    return "; ".join(parts)


def _layout_line(layout: Layout, budget: TokenBudget | None) -> str:
    line = f"{layout.name}: {layout.line}"
    if budget is None:
        return line
    if budget.may_shrink:
        return f"{line}; packs as large as memory has room for"
    return f"{line}; packs of {budget.max_tokens:,} tokens"


def _kernels_line(model: nn.Module, device: torch.device) -> str:
    head = causal_lm_of(model).get_output_embeddings()
    is_trained = any(parameter.requires_grad for parameter in head.parameters())
    products = "trained head" if is_trained else "frozen head, two products"
    return f"{ops.backend_for(device)} on {device.type}, {products}"


def _updates_line(args: DPOConfig) -> str:
    per_update = args.over_ranks(args.train_batch_size) * args.gradient_accumulation_steps
    is_counted = args.max_steps >= 0  # 0 trains none
    length = f"{args.max_steps:,} updates" if is_counted else f"{args.num_train_epochs:g} epochs"
    return (
        f"{length} of {per_update} pairs, learning rate {args.learning_rate:g}, beta {args.beta:g}"
    )
