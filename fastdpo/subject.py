"""What `fastdpo verify` looks at: a policy and a few pairs, loaded as `fastdpo train` loads them.

Adapter weights that start at zero get small random values: otherwise half of the adapters'
gradients would be zero, and prove nothing.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastdpo.arguments import (
    RunArguments,
    check_layers_named,
    init_kwargs,
    peft_config,
    quantization_config,
)
from fastdpo.columns import Pair
from fastdpo.config import DPOConfig
from fastdpo.data import prepare_pairs
from fastdpo.head import check_head_module
from fastdpo.layout import why_padded
from fastdpo.mixture import load_datasets
from fastdpo.model import causal_lm_of
from fastdpo.pair_check import check_pairs
from fastdpo.policy import load_tokenizer, make_policy, make_ready, with_quantization
from fastdpo.rows import Rows, as_dataset


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is verified: a policy on its device, and the pairs among the first num_rows rows."""

    policy: nn.Module
    tokenizer: PreTrainedTokenizerBase
    pairs: list[Pair]
    num_rows: int
    args: DPOConfig

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.policy.named_parameters() if p.requires_grad}

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the layers' products are rounded to."""
        if self.args.bf16 or self.args.fp16:
            return torch.bfloat16 if self.args.bf16 else torch.float16
        return self.policy.dtype

    def autocast(self) -> AbstractContextManager:
        enabled = self.args.bf16 or self.args.fp16
        return torch.autocast(self.args.device.type, self.compute_dtype, enabled=enabled)

    def take_gradients(self) -> dict[str, torch.Tensor | None]:
        """Each trained parameter's gradient by name, None where it has none; it has none then."""
        gradients = {name: parameter.grad for name, parameter in self.trained.items()}
        self.policy.zero_grad()  # sets to None, so that these stay as they are
        return gradients

    def place(self, b: int, side: str, t: int) -> str:
        """A completion's t-th scored token, in words."""
        ids = self.pairs[b][f"{side}_ids"]
        prompt, completion = self.args.cut(self.pairs[b]["prompt_ids"], ids)
        if self.args.truncation_mode == "keep_end":
            t += len(ids) - len(completion)
        t += not prompt  # nothing predicts a sequence's first token
        return f"pair {b}, {side}, token {t} ({self.tokenizer.decode([ids[t]])!r})"


def load_subject(run: RunArguments, max_pairs: int) -> Subject:
    """The model and the first max_pairs rows, as `fastdpo train` would load them.

    ValueError for what cannot be compared: a weight that is not finite, a pair that the model
    cannot embed, nothing to train, a layout that it cannot run. RowError and OSError as in
    training.
    """
    if max_pairs < 1:
        raise ValueError(f"want max_pairs >= 1, got {max_pairs}")
    args = run.training
    rows, _ = load_datasets(
        run.script, run.mixture, with_eval=False, on_bad_rows=args.on_bad_rows, seed=args.seed
    )
    kwargs = with_quantization(init_kwargs(args, run.model), quantization_config(run.model))
    name = run.model.model_name_or_path
    tokenizer = load_tokenizer(None, name, pad_token=args.pad_token, **kwargs)
    pairs, counts = prepare_pairs(_first(rows, max_pairs), tokenizer, **args.data_settings)
    if counts.equal == counts.pairs:
        raise ValueError(
            f"want pairs whose gradient can be compared, got {counts.pairs} with chosen equal to "
            "rejected"
        )
    policy = make_policy(name, peft_config(run.model), seed=args.seed, **kwargs)
    check_layers_named(policy, run.model)
    make_ready(
        policy,
        None,
        pad_token_id=tokenizer.pad_token_id,
        without_dropout=True,  # two forwards would drop different things
    )
    if getattr(policy, "hf_device_map", None) is None:
        policy.to(args.device)
    policy.eval()
    subject = Subject(
        policy=policy, tokenizer=tokenizer, pairs=list(pairs), num_rows=counts.rows, args=args
    )
    check_head_module(causal_lm_of(policy))
    _check_weights(subject)
    check_pairs({"train": pairs}, [policy], args)
    if args.layout not in ("auto", "padded") and (reason := why_padded(policy)) is not None:
        raise ValueError(f"want layout={args.layout!r} for a model that can run it: {reason}")
    if isinstance(policy, PeftModel):
        _fill_zero_adapters(subject)
    return subject


def _first(rows: Rows, count: int) -> Dataset:
    if isinstance(rows, Dataset):
        return rows.select(range(min(count, len(rows))))
    return as_dataset(islice(rows, count))


def _check_weights(subject: Subject) -> None:
    if not subject.trained:
        raise ValueError("want parameters to train, got none: quantised weights need --use_peft")
    for name, parameter in subject.policy.named_parameters():
        if parameter.is_floating_point() and not (finite := parameter.isfinite()).all():
            bad = parameter.numel() - int(finite.sum())
            raise ValueError(f"want finite weights, got {bad:,} NaN or Inf in {name}")


def _fill_zero_adapters(subject: Subject) -> None:
    """Small values for the adapters' parameters that are all zero."""
    for parameter in subject.trained.values():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
