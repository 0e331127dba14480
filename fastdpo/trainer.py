"""DPOTrainer: transformers.Trainer wired to the stages of a DPO step, and no more.

    rows --prepare_pairs--> pairs --collator--> inputs --from_inputs--> batch
    batch --score--> token logps        batch --reference.logps--> reference logps
    token logps, reference logps --pair_loss--> losses

The classes it is made of, each overriding those below it, in files of their names:

    DPOTrainer          models, reference and layout set up; the loss of a batch or pack
    TRLNames            loss settings, the reference, tags and card by the names TRL has for them
    RowTrainer          rows -> pairs -> data loaders, to train, evaluate and predict
    MeasuringTrainer    what is logged and evaluated
    PackTrainer         a batch in packs, within a token budget
    ResumingTrainer     checkpoints
    transformers.Trainer, with accelerate: the loop, saving, mixed precision, distribution

README.md has a step in the order of its calls.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import is_caching_enabled
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from fastdpo.batch import PairBatch, TokensRun, count_pairs
from fastdpo.batch_loss import PackLogps, PackLoss, with_pack_losses
from fastdpo.collate import PackedCollator, first_pairs_longest_first
from fastdpo.columns import Pair
from fastdpo.config import DPOConfig
from fastdpo.experts import ExpertCounts, aux_loss_weight, with_batch_experts
from fastdpo.following_reference import FollowPolicy
from fastdpo.layout import Layout, choose_layout, padded_layout
from fastdpo.layout_check import LayoutCheck
from fastdpo.losses import PairLoss, pair_loss
from fastdpo.metrics import first_pairs
from fastdpo.model import (
    ScoredOutput,
    attach_scorer,
    causal_lm_of,
    inference,
    score,
    token_logps_without_grad,
)
from fastdpo.model_check import check_models
from fastdpo.overrides import check_overrides, own_names, returns_means
from fastdpo.pair_check import check_pairs
from fastdpo.policy import load_tokenizer, make_policy, make_ready, model_name, with_quantization
from fastdpo.precompute import after_precompute, have_reference_logps, with_reference_logps
from fastdpo.ranks import one_rank_first, pairs_not_repeated
from fastdpo.reference_cache import ReferenceCache, probe_pairs
from fastdpo.reference_logps import FrozenModel, RowLogps, make_reference, once_training, scorer_of
from fastdpo.resuming_trainer import ResumingTrainer
from fastdpo.row_trainer import CUSTOM_LAYOUT, RowTrainer, by_name, map_datasets
from fastdpo.rows import Rows
from fastdpo.scorer_check import check_scorer
from fastdpo.start_check import check_start
from fastdpo.summary import describe_run
from fastdpo.trainer_check import (
    check_arguments,
    check_enough_rows,
    check_evaluation,
    check_gradient_checkpointing,
)
from fastdpo.trl_names import TRLNames

WHY_NEFTUNE_PADS = (
    "neftune_noise_alpha scales its noise by the length of a row, and only the padded layout has "
    "one sequence in a row"
)


class DPOTrainer(TRLNames, RowTrainer, ResumingTrainer):
    """Direct Preference Optimization (arXiv:2305.18290) of a decoder-only language model.

    The arguments are TRL 1.16's:

    model: the policy, a transformers or PEFT model, or the name `from_pretrained` takes.
    ref_model: the reference; None for the policy as it is now: its new adapters switched off, or a
        frozen copy of what trains in it.
    args: DPOConfig; None for the defaults and a folder named after the model.
    data_collator: None for what args.layout asks for (collate.py); one of your own cuts and pads as
        it likes: it returns what PaddedCollator does, or input_ids, attention_mask and
        completion_mask, chosen first.
    train_dataset, eval_dataset: preference rows as data.prepare_pairs reads them; several
        evaluation sets as a dictionary.
    processing_class: the tokenizer; None for the one beside the model.
    compute_metrics: called with the logits of an evaluation, which cost one more forward.
    callbacks, optimizers: as in transformers.Trainer.
    quantization_config: for `from_pretrained`, when model is a name.
    peft_config: adapters to put on the policy.

    ValueError or TypeError for what does not go together: as far as it shows without the rows and
    the weights, before either is read (model_check.py, trainer_check.py).
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the pairs of the whole update

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
        check_models(model, ref_model, peft_config)
        args = args or DPOConfig(output_dir=f"{Path(model_name(model)).name}-DPO")
        check_arguments(
            args, model, train_dataset, data_collator, optimizers, quantization_config, peft_config
        )
        has_own_loop = bool(self._own_names() & {"evaluate", "evaluation_loop"})
        check_evaluation(args, eval_dataset, compute_metrics, has_own_loop=has_own_loop)
        check_overrides(type(self).__name__, self._own_names(), args)
        init_kwargs = {"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
        init_kwargs = with_quantization(init_kwargs, quantization_config)
        tokenizer = load_tokenizer(processing_class, model, pad_token=args.pad_token, **init_kwargs)
        self.pair_counts = {}
        tokenize = functools.partial(self._make_pairs, tokenizer=tokenizer, args=args)
        with one_rank_first(args):
            train_dataset = tokenize(train_dataset, "train")
            eval_dataset = map_datasets(tokenize, eval_dataset)
        if counts := self.pair_counts["train"]:
            check_enough_rows(args, counts.pairs)
        model = make_policy(model, peft_config, seed=args.seed, **init_kwargs)
        make_ready(
            model,
            ref_model,
            pad_token_id=tokenizer.pad_token_id,
            without_dropout=args.disable_dropout,
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
        self._heed_overrides()
        self._start_checked = False
        pair = first_pairs_longest_first(train_dataset)[0]
        self._set_up_models(ref_model, pair, has_new_adapters=peft_config is not None)
        self.layout = CUSTOM_LAYOUT
        if data_collator is None:
            self.layout = self._choose_layout(pair)
            self.data_collator = self._make_collator(self.layout.name)
        if args.precompute_ref_log_probs and not isinstance(self.reference, RowLogps):
            self._precompute_reference()
        self.model.add_model_tags(self._tag_names)

    def _own_names(self) -> set[str]:
        return own_names(self, DPOTrainer, DEFINED)

    def _heed_overrides(self) -> None:
        own = self._own_names()
        check_overrides(type(self).__name__, own, self.args)
        if returns_means(own):
            self.loss_is_scaled_for_ga = False  # Trainer divides
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga  # its name before 5.18
        reason = self._reason_to_pad()
        if reason and isinstance(self.data_collator, PackedCollator):  # not yet in the constructor
            self.layout, self.data_collator = padded_layout(reason), self._make_collator("padded")

    @property
    def has_own_loss(self) -> bool:
        return bool(self._own_names() & {"compute_loss", "prediction_step"})

    def _set_up_models(
        self, ref_model: PreTrainedModel | None, pair: Pair, *, has_new_adapters: bool
    ) -> None:
        """Make the reference, let policy and reference score, and check both against the data."""
        args = self.args
        attach_scorer(self.model, **args.head_settings)
        self.router_aux_loss_coef = aux_loss_weight(
            causal_lm_of(self.model), args.router_aux_loss_coef
        )
        check_gradient_checkpointing(self.model, args, aux_loss=self.aux_loss_enabled)
        datasets = {"train": self.train_dataset, **by_name(self.eval_dataset)}
        self.reference = make_reference(
            self.model,
            ref_model,
            in_rows=have_reference_logps(datasets, precompute=args.precompute_ref_log_probs),
            has_new_adapters=has_new_adapters,
            precompute=args.precompute_ref_log_probs,
            is_sharded=self.is_sharded,
            device=args.device,
        )
        if args.sync_ref_model:
            self.follower = FollowPolicy(self.model, self.reference, is_sharded=self.is_sharded)
            self.add_callback(self.follower)
        self._check_models_on_data(datasets, pair)

    def _check_models_on_data(self, datasets: dict[str, Rows], pair: Pair) -> None:
        """ValueError for token ids that a model lacks, or logits that are not hidden @ headᵀ."""
        check_pairs(datasets, self.models().values(), self.args)
        if self.is_sharded:
            return
        ids = pair["prompt_ids"] + pair["chosen_ids"]
        autocast = self.accelerator.autocast
        for name, model in self.models().items():
            is_balanced = name == "model" and self.aux_loss_enabled
            check_scorer(model, ids, name=name, aux_loss=is_balanced, autocast=autocast)

    def models(self) -> dict[str, nn.Module]:
        """The policy, and the reference where it is a model of its own, by its argument's name."""
        models = super().models()
        scorer = scorer_of(self.reference)
        if isinstance(scorer, FrozenModel) and scorer.model is not self.model:
            models["ref_model"] = scorer.model
        return models

    def _inner_training_loop(self, *args, **kwargs):
        self._heed_overrides()  # a script may have put some into the trainer
        if not self.is_sharded:
            self.reference = once_training(self.model, self.reference)
        return super()._inner_training_loop(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        self._heed_overrides()
        return super().evaluate(*args, **kwargs)

    def summary(self) -> str:
        """What is about to run: model, pairs, dropped rows, layout, kernels, reference, updates."""
        return describe_run(
            self.model,
            self.args,
            pair_counts=self.pair_counts,
            layout=self.layout,
            budget=self.budget,
            reference=self.reference.source,
        )

    def _choose_layout(self, pair: Pair) -> Layout:
        """Settle how pairs are laid out, once the models are where they will run."""
        check = LayoutCheck(
            pair=pair,
            make_collator=self._make_collator,
            device=self.args.device,
            autocast=self.accelerator.autocast,
        )
        return choose_layout(
            self.args.layout,
            list(self.models().values()),
            None if self.is_sharded else check.difference,
            strict=self.args.strict_layout,
            reason_to_pad=self._reason_to_pad(),
        )

    def _reason_to_pad(self) -> str | None:
        """Why the run itself needs the padded layout."""
        if self.args.neftune_noise_alpha:
            return WHY_NEFTUNE_PADS
        steps = {"training_step", "compute_loss", "prediction_step"}
        if self.args.layout == "auto" and self._own_names() & steps:
            return f"{type(self).__name__} may run the model on a batch by itself"
        return None

    def _reference_logps(self, policy: nn.Module, batch: PairBatch) -> Tensor:
        with self.accelerator.autocast():  # as the policy's forward has it
            return self.reference.logps(policy, batch, self.args.ld_alpha)

    def _precompute_reference(self) -> None:
        """Score all data now; from here on the reference is a column of the rows."""
        args = self.args
        cache = self._reference_cache()
        scored = functools.partial(
            with_reference_logps,
            reference_logps=functools.partial(self._reference_logps, self.model),
            collator=self.data_collator,
            accelerator=self.accelerator,
            cache=cache,
        )
        train_size = args.precompute_ref_batch_size or args.per_device_train_batch_size
        eval_size = args.precompute_ref_batch_size or args.per_device_eval_batch_size
        self.train_dataset = scored(self.train_dataset, batch_size=train_size)
        self.eval_dataset = map_datasets(
            lambda pairs, _: scored(pairs, batch_size=eval_size), self.eval_dataset
        )
        self.reference = after_precompute(
            self.reference, self.model, cache, is_sharded=self.is_sharded
        )

    def _reference_cache(self) -> ReferenceCache | None:
        """The main process's, unless a collator of the user's own cuts the pairs."""
        is_none = self.is_sharded or self.layout is CUSTOM_LAYOUT or not is_caching_enabled()
        if is_none or not self.is_world_process_zero():
            return None
        pairs = probe_pairs(causal_lm_of(self.ref_model or self.model))
        inputs = self.to_device(self.data_collator(pairs))
        logps_S = self._reference_logps(self.model, PairBatch.from_inputs(inputs))
        return self.reference.cache(self.args.cut, logps_S, ld_alpha=self.args.ld_alpha)

    def before_packs(self, model: nn.Module, packs: list[dict]) -> list[dict]:
        """The packs, each with what its part of the batch's loss needs to know of the others."""
        if len(packs) == 1:
            return packs
        if self.args.mixes_pairs:
            score_pack = functools.partial(self._pack_logps, model)
            packs = with_pack_losses(packs, score_pack, **self.args.loss_settings)
        if self.aux_loss_enabled:
            num_pairs = sum(count_pairs(pack) for pack in packs if "is_filler" not in pack)
            count = functools.partial(self._expert_counts, model)
            packs = with_batch_experts(packs, count, num_pairs)
        return packs

    def _expert_counts(self, model: nn.Module, inputs: dict) -> ExpertCounts:
        # without dropout, where the pack's own forward may have it
        with self.compute_loss_context_manager(), inference(model):
            return score(model, PairBatch.from_inputs(inputs), aux_loss=True).expert_counts

    def _pack_logps(self, model: nn.Module, inputs: dict) -> PackLogps:
        batch = PairBatch.from_inputs(inputs)
        reference_logps_S = self._reference_logps(model, batch)
        with self.compute_loss_context_manager():
            token_logps_C = token_logps_without_grad(model, batch)
        return PackLogps(token_logps_C, batch.cu_seqlens, reference_logps_S)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: int | None = None,
    ) -> Tensor | tuple[Tensor, ScoredOutput]:
        """The mean loss of `inputs`, or its share of an update of num_items_in_batch pairs.

        For a subclass with a compute_loss of its own it is always the mean, unless the class has
        loss_is_scaled_for_ga=True.
        """
        batch = PairBatch.from_inputs(inputs)
        pack_loss, experts = inputs.get("pack_loss"), inputs.get("experts")  # before_packs'
        # before the policy, whose activations would otherwise wait beside the reference's
        reference_logps_S = (
            pack_loss.reference_logps_S if pack_loss else self._reference_logps(model, batch)
        )
        outputs = scored = score(
            model,
            batch,
            stats=self.args.token_stats,
            aux_loss=self.aux_loss_enabled,
            batch_counts=experts and experts.counts,
        )
        if not model.training:  # without pairs that another rank has: losses may mix pairs
            num_new = pairs_not_repeated(batch.num_pairs, self.accelerator)
            batch, scored, reference_logps_S = first_pairs(
                batch, scored, reference_logps_S, max(num_new, 1)
            )
        losses = self._pair_losses(batch, scored, reference_logps_S, pack_loss)
        aux_loss = scored.aux_loss
        if aux_loss is not None:
            if experts:  # added to each of B pairs and divided by the batch's N, it counts once
                aux_loss = aux_loss * experts.num_pairs / batch.num_pairs
            losses = losses._replace(loss_B=losses.loss_B + self.router_aux_loss_coef * aux_loss)
        num_pairs = num_items_in_batch if self.loss_is_scaled_for_ga else None
        loss = losses.loss_B.sum() / (num_pairs or batch.num_pairs)
        if "is_filler" in inputs:  # it runs for FSDP's count of forwards
            return 0.0 * loss
        if model.training:
            if not self._start_checked and self.state.global_step == 0:
                check_start(self.model, losses, reference_logps_S, self.reference, self.args)
            self._start_checked = True
            tokens = inputs.get("tokens", TokensRun(batch.token_uses.numel()))
            self.count_training(batch, scored, losses, tokens, aux_loss)
        else:
            self.count_evaluation(batch, scored, losses, aux_loss, num_new)
        return (loss, outputs) if return_outputs else loss

    def _pair_losses(
        self,
        batch: PairBatch,
        scored: ScoredOutput,
        reference_logps_S: Tensor,
        pack_loss: PackLoss | None,
    ) -> PairLoss:
        """The losses of the batch's pairs; with pack_loss, of a pack whose batch mixes pairs."""
        if pack_loss:
            return pack_loss.with_gradient(scored.token_logps_C, batch.cu_seqlens)
        return pair_loss(
            scored.token_logps_C,
            batch.cu_seqlens,
            reference_logps_S,
            log_sum_p2_C=scored.log_sum_p2_C,  # None without use_weighting
            **self.args.loss_settings,
        )


DEFINED = {**vars(DPOTrainer)}  # to tell what a script has put in its place
