"""DPOTrainer: transformers.Trainer wired to the stages of a DPO step, and no more.

    rows --prepare_pairs--> pairs --collator--> PairBatch --score--> token logps --\\
                                    reference.logps --> reference logps ------------> loss

The loop, checkpoints, mixed precision and distribution are transformers' and accelerate's.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

from fastdpo.batch import PairBatch, TokensRun
from fastdpo.collate import (
    REFERENCE_COLUMNS,
    Cut,
    PackedCollator,
    PaddedCollator,
    make_collator,
)
from fastdpo.config import DPOConfig
from fastdpo.data import PairCounts, prepare_pairs
from fastdpo.layout import Layout, choose_layout
from fastdpo.layout_check import LayoutCheck, longest_rows
from fastdpo.losses import PairLoss, pair_loss, pair_weights
from fastdpo.metrics import MetricSums, pair_metrics
from fastdpo.model import (
    ScoredOutput,
    attach_scorer,
    aux_loss_weight,
    check_head,
    score,
)
from fastdpo.pack_trainer import PackTrainer
from fastdpo.policy import (
    load_policy,
    load_tokenizer,
    make_ready,
    model_name,
    with_adapters,
)
from fastdpo.reference import (
    AdaptersOff,
    FrozenModel,
    RowLogps,
    add_reference_adapter,
    frozen_copy,
    with_reference_logps,
)
from fastdpo.start_check import check_start
from fastdpo.summary import describe_run
from fastdpo.trainer_check import check_arguments

PAIR_COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids"]

OWN_LAYOUT = Layout("its own", "what the data_collator makes of a batch")

Rows = Dataset | IterableDataset


class DPOTrainer(PackTrainer):
    """Direct Preference Optimization (arXiv:2305.18290) of a decoder-only language model.

    The arguments are TRL 1.16's:

    model: the policy, a transformers or PEFT model, or the name `from_pretrained` takes.
    ref_model: the reference; None for the policy as it is now: its new adapters switched off, a
        frozen copy of adapters that were trained before, or a frozen copy of all of it.
    args: DPOConfig; None for the defaults and a folder named after the model.
    data_collator: None for what args.layout asks for (collate.py); one of your own pads: it returns
        what PaddedCollator does, or input_ids, attention_mask and completion_mask, chosen first.
    train_dataset, eval_dataset: preference rows as data.prepare_pairs reads them; several
        evaluation sets as a dictionary.
    processing_class: the tokenizer; None for the one beside the model.
    compute_metrics: called with the logits of an evaluation, which cost one more forward.
    callbacks, optimizers: as in transformers.Trainer.
    quantization_config: for `from_pretrained`, when model is a name.
    peft_config: adapters to put on the policy.

    ValueError or TypeError for what does not go together, before any compute is spent.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole update
    counted = ("metric_sums", "num_train_tokens", "tokens")

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ):
        args = args or DPOConfig(output_dir=f"{model_name(model).split('/')[-1]}-DPO")
        check_arguments(model, ref_model, args, data_collator, train_dataset, quantization_config)
        init_kwargs = {
            "trust_remote_code": args.trust_remote_code,
            **(args.model_init_kwargs or {}),
        }
        tokenizer = load_tokenizer(
            processing_class,
            model,
            revision=init_kwargs.get("revision"),
            trust_remote_code=init_kwargs["trust_remote_code"],
        )
        tokenizer.pad_token = args.pad_token or tokenizer.pad_token

        self.pair_counts: dict[str, PairCounts | None] = {}
        self._data_settings = {
            "tokenizer": tokenizer,
            "max_length": args.max_length,
            "truncation_mode": args.truncation_mode,
            "on_bad_rows": args.on_bad_rows,
            "num_proc": args.dataset_num_proc,
            "length_column": args.length_column,
        }
        train_dataset = self._prepare(train_dataset, "train")
        if eval_dataset is not None:
            eval_dataset = self._prepare(eval_dataset, "eval")
        # batches move to the GPU from pinned memory while the CPU goes on
        args.accelerator_config.non_blocking = args.dataloader_pin_memory
        # ranks' batches differ in width, and a packed row is no batch of rows to share out
        args.accelerator_config.dispatch_batches = False

        set_seed(args.seed)  # new adapters start at random
        if isinstance(model, str):
            model = load_policy(model, quantization_config=quantization_config, **init_kwargs)
        if peft_config is not None:
            model = with_adapters(model, peft_config)
        elif isinstance(model, PeftModel) and ref_model is None:
            add_reference_adapter(model)
        make_ready(
            model,
            ref_model,
            pad_token_id=tokenizer.pad_token_id,
            without_dropout=args.disable_dropout,
            reentrant_checkpoints=(args.gradient_checkpointing_kwargs or {}).get("use_reentrant"),
        )

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if args.n_gpu > 1:
            raise ValueError(
                f"want one process per GPU (accelerate launch, torchrun), got {args.n_gpu} GPUs in "
                "one process: launch it so, or show it one GPU with CUDA_VISIBLE_DEVICES"
            )
        self.model_accepts_loss_kwargs = True  # what loss_is_scaled_for_ga says, before 5.18
        self.metric_sums = {"train": MetricSums(), "eval": MetricSums()}
        self.num_train_tokens = torch.zeros((), dtype=torch.int64, device=args.device)
        self.tokens = TokensRun()
        self._start_checked = False
        self.aux_loss_weight = aux_loss_weight(self.model, args.router_aux_loss_coef)
        head_settings = {
            "head_cache_bytes": args.head_cache_bytes,
            "skip_below": args.head_skip_below,
        }
        attach_scorer(self.model, **head_settings)
        self.reference = self._choose_reference(ref_model)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):  # weights in one piece
            first = next(iter(train_dataset))
            check_head(self.model, (first["prompt_ids"] + first["chosen_ids"])[:32])
        self.layout = OWN_LAYOUT
        if data_collator is None:
            self._choose_layout()
        self.budget = self.choose_budget()
        if args.precompute_ref_log_probs:
            self._precompute_reference()
        self.model.add_model_tags(["fastdpo", "dpo"])

    def summary(self) -> str:
        """What is about to run: model, pairs, dropped rows, layout, kernels, reference, updates."""
        return describe_run(self)

    # The data

    def _prepare(self, dataset: Rows | dict[str, Rows], name: str) -> Rows | dict[str, Rows]:
        """`dataset` as token ids, its rows counted under `name`; token ids stay as they are."""
        if isinstance(dataset, dict):
            return {key: self._prepare(each, f"{name}_{key}") for key, each in dataset.items()}
        pairs, self.pair_counts[name] = prepare_pairs(dataset, name=name, **self._data_settings)
        return pairs

    def _set_signature_columns_if_needed(self):
        self._signature_columns = [*PAIR_COLUMNS, *REFERENCE_COLUMNS, self.args.length_column]

    def _remove_unused_columns(self, dataset, description=None):
        pairs = super()._remove_unused_columns(dataset, description)
        return pairs.with_format("numpy") if isinstance(pairs, Dataset) else pairs

    def get_eval_dataloader(self, eval_dataset=None):
        """As transformers.Trainer's; padded where compute_metrics wants each sequence's logits."""
        needs_logits = self.compute_metrics is not None and self.layout is not OWN_LAYOUT
        with self.collating_with(self._collator("padded") if needs_logits else None):
            return super().get_eval_dataloader(eval_dataset)

    def _collator(self, layout: str) -> PaddedCollator | PackedCollator:
        args = self.args
        return make_collator(
            layout,
            Cut(max_length=args.max_length, truncation_mode=args.truncation_mode),
            pad_token_id=self.processing_class.pad_token_id,
            pad_to_multiple_of=args.pad_to_multiple_of,
        )

    def _choose_layout(self):
        """Settle how pairs are laid out, once the models are where they will run."""
        check = LayoutCheck(
            row=longest_rows(self.train_dataset)[0],
            padded=self._collator("padded"),
            device=self.args.device,
            autocast=self.accelerator.autocast,
        )
        models = [self.model]
        if isinstance(self.reference, FrozenModel) and self.reference.model is not self.model:
            models.append(self.reference.model)
        are_sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        self.layout = choose_layout(
            self.args.layout,
            models,
            None if are_sharded else lambda m, name: check.difference(m, self._collator(name)),
            strict=self.args.strict_layout,
        )
        self.data_collator = self._collator(self.layout.name)

    # The reference

    def _choose_reference(self, ref_model: PreTrainedModel | None):
        in_rows = set(REFERENCE_COLUMNS) <= set(self.train_dataset.column_names or ())
        if in_rows and ref_model is not None:
            raise ValueError(
                f"want one reference, got ref_model and {REFERENCE_COLUMNS} in the rows"
            )
        if in_rows:
            return RowLogps()
        if ref_model is not None:
            return self._placed(ref_model.requires_grad_(False).eval(), "ref_model")
        if isinstance(self.model, PeftModel):
            return AdaptersOff(self.model)
        if self.args.precompute_ref_log_probs:
            return FrozenModel(self.model, "the policy before training")
        return self._placed(frozen_copy(self.model), "a frozen copy of the policy")

    def _placed(self, model: nn.Module, source: str) -> FrozenModel:
        attach_scorer(model)
        if getattr(model, "hf_device_map", None) is None:
            model.to(self.args.device)
        return FrozenModel(model, source)

    def _reference_logps(self, policy: nn.Module, batch: PairBatch) -> Tensor:
        with self.accelerator.autocast():  # as the policy's forward has it
            return self.reference.logps(policy, batch, self.args.ld_alpha)

    def _precompute_reference(self):
        """Score all data now; from here on the reference is a column of the rows."""
        args = self.args

        def scored(dataset: Rows, batch_size: int) -> Dataset:
            return with_reference_logps(
                dataset,
                functools.partial(self._reference_logps, self.model),
                collator=self.data_collator,
                batch_size=args.precompute_ref_batch_size or batch_size,
                accelerator=self.accelerator,
            )

        self.train_dataset = scored(self.train_dataset, args.per_device_train_batch_size)
        if isinstance(self.eval_dataset, dict):
            for name, dataset in self.eval_dataset.items():
                self.eval_dataset[name] = scored(dataset, args.per_device_eval_batch_size)
        elif self.eval_dataset is not None:
            self.eval_dataset = scored(self.eval_dataset, args.per_device_eval_batch_size)
        self.reference = RowLogps(f"{self.reference.source}, all rows scored before training")

    # The step

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ):
        """The mean loss of `inputs`, or its share of an update of num_items_in_batch pairs."""
        batch = PairBatch.from_inputs(inputs)
        # before the policy, whose activations would otherwise wait beside the reference's
        reference_logps_S = self._reference_logps(model, batch)
        scored = score(model, batch, stats=self.args.token_stats, aux_loss=self.aux_loss_weight > 0)
        losses = pair_loss(
            scored.token_logps_C, batch.cu_seqlens, reference_logps_S, **self.args.loss_settings
        )
        if self.args.use_weighting:
            weight_B = pair_weights(scored.token_logps_C, scored.log_sum_p2_C, batch.cu_seqlens)
            losses = losses._replace(loss_B=losses.loss_B * weight_B)
        loss = losses.loss_B.sum()
        if self.aux_loss_weight:
            loss = loss + batch.num_pairs * self.aux_loss_weight * scored.aux_loss
        loss = loss / (num_items_in_batch or batch.num_pairs)
        if "is_filler" in inputs:  # it runs for FSDP's and DDP's count of forwards
            return 0.0 * loss
        self._count(batch, scored, losses, "train" if model.training else "eval")
        if model.training:
            self.tokens = self.tokens + inputs.get("tokens", TokensRun(batch.token_counts.numel()))
            if not self._start_checked and self.state.global_step == 0:
                check_start(losses, reference_logps_S, self.model, self.args, self.reference.source)
            self._start_checked = True
        return (loss, scored) if return_outputs else loss

    def _count(self, batch: PairBatch, scored: ScoredOutput, losses: PairLoss, mode: str) -> None:
        """Add a forward's metrics to those of this logging interval, on the device."""
        metrics = pair_metrics(batch, scored, losses)
        if self.aux_loss_weight:
            metrics["aux_loss",] = (scored.aux_loss.detach(), 1)
        self.metric_sums[mode].add(metrics)
        if mode == "train":
            self.num_train_tokens += batch.num_tokens

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, and, where compute_metrics wants them, logits and token ids of every sequence."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs)
            if prediction_loss_only:
                return loss, None, None
            batch = PairBatch.from_inputs(inputs)
            logits = model(**batch.model_inputs, use_cache=False).logits
        return loss, logits, inputs["input_ids"]

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """As transformers.Trainer's; rows passed here are prepared as those of the constructor."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add this interval's metrics to `logs`: the one moment that waits for the device."""
        prefixes = [
            n.removesuffix("loss") for n in logs if n.endswith("_loss") and n != "train_loss"
        ]
        mode, prefix = ("eval", prefixes[0]) if prefixes else ("train", "")
        for name, value in self.metric_sums[mode].read(self.accelerator).items():
            logs[prefix + name] = value
        if "loss" in logs:
            tokens = self.accelerator.reduce(self.num_train_tokens.clone(), "sum")
            logs["num_tokens"] = tokens.item()
        if "train_runtime" in logs:
            logs |= self.tokens.over_ranks(self.accelerator)
        super().log(logs, start_time)
