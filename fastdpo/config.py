"""DPOConfig: transformers.TrainingArguments plus DPO's own settings, checked (config_check.py).

Names, meanings and defaults are those of TRL 1.16's DPOConfig, so that a script or a YAML file
moves over unchanged. Defaults that differ: `bf16` where there is no GPU, `logging_nan_inf_filter`,
and in accelerator_config `non_blocking` and `dispatch_batches`; each place says why.
"""

from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, logging

from fastdpo.collate import LAYOUTS
from fastdpo.columns import Cut
from fastdpo.config_check import check_mappings, check_numbers, check_settings, count_or_auto
from fastdpo.kernels.linear_logps import HEAD_CACHE_BYTES
from fastdpo.losses import BATCH_LOSSES, F_DIVERGENCES, LOSS_TYPES, WITH_F_DIVERGENCE
from fastdpo.model import TOKEN_STATS
from fastdpo.setting import setting

logger = logging.get_logger(__name__)


@dataclass(repr=False)  # TrainingArguments' own hides tokens
class DPOConfig(TrainingArguments):
    """Every setting of a DPO run; ValueError names the field, what was wanted and what came.

    Only DPO's own settings are here; the rest are transformers.TrainingArguments. TRL's features
    that fastdpo does not run yet (activation_offloading) are refused when switched on.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    # TrainingArguments' fields with another default
    learning_rate: float = setting(1e-6, "The initial learning rate.")
    logging_steps: float = setting(
        10, "Log every this many optimizer steps; below 1, a share of all steps."
    )
    gradient_checkpointing: bool = setting(
        True, "Recompute activations in the backward: less memory, about a third more time."
    )
    bf16: bool | None = setting(
        None,
        "bfloat16 autocast. Unset: on where a GPU can do it and fp16 is off, else float32 "
        "(TRL turns it on without a GPU too, and then stops or trains in bfloat16 on the CPU).",
    )
    logging_nan_inf_filter: bool = setting(
        False,
        "Replace NaN and Inf losses in the log. Off: the log shows what happened, and no step "
        "waits for the GPU to look (TRL keeps transformers' True).",
    )

    # The model
    model_init_kwargs: dict[str, Any] | str | None = setting(
        None, "Arguments of `from_pretrained`, when the model is given as a string (a JSON object)."
    )
    trust_remote_code: bool = setting(False, "Run model and tokenizer code from the Hub.")
    router_aux_loss_coef: float | None = setting(
        None,
        "Weight of a mixture-of-experts model's load-balancing loss; unset: the model's own, "
        "0: none.",
    )
    disable_dropout: bool = setting(True, "Set every dropout of policy and reference to 0.")

    # The data
    dataset_num_proc: int | None = setting(None, "Processes that tokenise.")
    max_length: int | None = setting(
        1024,
        "Longest prompt + completion, in tokens; longer ones are cut as truncation_mode says.",
    )
    truncation_mode: str = setting(
        "keep_start",
        "Which end of a too long sequence stays.",
        choices=["keep_start", "keep_end"],
    )
    padding_free: bool = setting(
        False, "Accepted for TRL's sake, with a warning, and without effect: `layout` decides."
    )
    pad_to_multiple_of: int | str | None = setting(
        "auto",
        "Where the layout pads, pad to a multiple of this many tokens; auto: no further than the "
        "longest.",
    )
    layout: str = setting(
        "auto",
        "How pairs are laid out. shared: each prompt once, its completions as branches; packed: "
        "whole sequences end to end; padded: a sequence a row, as in TRL; auto: shared, or padded "
        "for a model that cannot run it.",
        choices=["auto", *LAYOUTS],
    )
    strict_layout: bool = setting(
        False, "End the run, instead of padding, where the layout changes the model's numbers."
    )
    max_tokens_per_forward: int | str | None = setting(
        None,
        "Run a training batch in packs of at most this many tokens, one after the other, with the "
        "loss and gradients of the whole. auto: as the free memory of the GPU allows, and less "
        "after an out-of-memory error. Unset: the batch in one forward. (With loss_type "
        f"{', '.join(BATCH_LOSSES)} each pack has one more forward without gradient, and one more "
        "for the load-balancing loss of a mixture of experts.)",
    )
    on_bad_rows: str = setting(
        "raise",
        "A malformed row ends the run before it starts, or is left out and counted.",
        choices=["raise", "skip"],
    )

    # The head
    head_cache_bytes: int = setting(
        HEAD_CACHE_BYTES,
        "Memory for a trained head's tiles of probabilities, kept for the backward, beside those "
        "that find room where the head's gradient will be; the others are computed again. Affects "
        "speed and memory, not results.",
    )
    head_skip_below: float = setting(
        0.0,
        "Leave out of the hidden states' gradient the part of the vocabulary that is less likely "
        "than this at every position of a tile (Cut Cross-Entropy's filter, 2**-12 there). An "
        "approximation: close where the model is sure of its tokens, and far off where it is not. "
        "0: nothing is left out.",
    )

    # The reference
    precompute_ref_log_probs: bool = setting(
        False,
        "Score all data with the reference before training, which then does without it; ref_model "
        "is kept to score new rows. Pairs that were scored in an earlier run are found in the "
        "cache of `datasets`.",
    )
    precompute_ref_batch_size: int | None = setting(
        None, "Pairs per forward while doing so; unset: the train or eval batch size."
    )
    sync_ref_model: bool = setting(
        False,
        "TR-DPO (arXiv:2404.09656): let the reference follow the policy, in full fine-tuning.",
    )
    ref_model_mixup_alpha: float = setting(
        0.6, "Used by sync_ref_model: the policy's share in the new reference, in (0, 1]."
    )
    ref_model_sync_steps: int = setting(
        512, "Used by sync_ref_model: updates from one to the next."
    )

    # The loss
    loss_type: list[str] = setting(
        ["sigmoid"],
        f"One or more of {', '.join(LOSS_TYPES)}; more than one are summed. What a pair costs in "
        f"{', '.join(BATCH_LOSSES)} depends on the other pairs of its batch, on its own device.",
    )
    loss_weights: list[float] | None = setting(
        None, "A weight for each of loss_type in that sum; unset: 1."
    )
    beta: float = setting(
        0.1, "How strongly the policy is kept near the reference; tau in the IPO paper."
    )
    label_smoothing: float = setting(
        0.0,
        "Probability that a preference is the wrong way round, in [0, 0.5): read by sigmoid "
        "(conservative DPO; TRL's ignores it), robust, aot, aot_unpaired, and exo_pair, which "
        "needs it above 0.",
    )
    ld_alpha: float | None = setting(
        None,
        "LD-DPO: weight, in [0, 1], of tokens past the length of the pair's shorter completion; "
        "unset: 1.",
    )
    f_divergence_type: str = setting(
        "reverse_kl",
        "f-DPO: the divergence between policy and reference. All but reverse_kl need loss_type "
        f"{', '.join(WITH_F_DIVERGENCE)}.",
        choices=[*F_DIVERGENCES],
    )
    f_alpha_divergence_coef: float = setting(
        0.5, "Used by f_divergence_type alpha_divergence: at 0 it is forward_kl, at 1 reverse_kl."
    )
    use_weighting: bool = setting(
        False,
        "WPO (arXiv:2406.11827): weight each pair by how likely the policy is to write its "
        f"completions itself. Not with loss_type {', '.join(BATCH_LOSSES)}.",
    )
    discopop_tau: float = setting(0.05, "Used by loss_type discopop; above 0.")
    activation_offloading: bool = setting(False, "Activations to CPU memory. Not there yet.")

    pad_token: str | None = setting(None, "Deprecated in TRL: set tokenizer.pad_token instead.")

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if getattr(self, "activation_checkpointing", False) is None:
            # transformers 5.18 renamed the field and warns at every use of the old name
            self.activation_checkpointing = self.gradient_checkpointing
        multiple = count_or_auto("pad_to_multiple_of", self.pad_to_multiple_of)
        self.pad_to_multiple_of = None if multiple == "auto" else multiple
        self.max_tokens_per_forward = count_or_auto(
            "max_tokens_per_forward", self.max_tokens_per_forward
        )
        check_numbers(self)
        check_mappings(self)
        has_own_accelerator_config = self.accelerator_config is not None
        super().__post_init__()
        if not has_own_accelerator_config:  # the CPU goes on while batches move from pinned memory
            self.accelerator_config.non_blocking = self.dataloader_pin_memory
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            if given := getattr(self, name, None):
                # transformers' default, which it gives up as soon as anything is given
                setattr(self, name, {"use_reentrant": False} | given)
        check_settings(self)
        # ranks' batches differ in width, and a packed row is no batch of rows to share out
        self.accelerator_config.dispatch_batches = False
        if self.use_liger_kernel:  # its head would take the place of fastdpo's
            given = self.liger_kernel_config or {}
            self.liger_kernel_config = {**given, "fused_linear_cross_entropy": False}
        if self.padding_free:
            logger.warning(
                "padding_free=True changes nothing: `layout` decides how pairs are laid out."
            )

    def __setattr__(self, name: str, value: Any) -> None:
        """Makes a list of a single loss_type, which a script may set between steps, too."""
        is_one_loss = name == "loss_type" and isinstance(value, str)
        super().__setattr__(name, [value] if is_one_loss else value)

    @property
    def length_column(self) -> str | None:
        """The column that transformers' samplers by length read; None where none is asked for."""
        by_length = ("group_by_length", "batch_rebalance")
        return self.length_column_name if self.train_sampling_strategy in by_length else None

    def over_ranks(self, batch_size: int) -> int:
        """Pairs of a batch over all ranks, which with split_batches share one."""
        return batch_size * (1 if self.accelerator_config.split_batches else self.world_size)

    @property
    def mixes_pairs(self) -> bool:
        """Whether what a pair costs depends on the other pairs of its batch."""
        return bool(set(self.loss_type) & set(BATCH_LOSSES))

    @property
    def token_stats(self) -> tuple[str, ...]:
        """The statistics that a training step needs besides log-probabilities."""
        return (*TOKEN_STATS, "log_sum_p2") if self.use_weighting else TOKEN_STATS

    @property
    def cut(self) -> Cut:
        """How sequences that are too long are cut."""
        return Cut(max_length=self.max_length, truncation_mode=self.truncation_mode)

    @property
    def data_settings(self) -> dict[str, Any]:
        """What data.prepare_pairs takes of a config, by its names."""
        return {
            "max_length": self.max_length,
            "truncation_mode": self.truncation_mode,
            "on_bad_rows": self.on_bad_rows,
            "num_proc": self.dataset_num_proc,
            "length_column": self.length_column,
            "keep_columns": not self.remove_unused_columns,
        }

    @property
    def collator_settings(self) -> dict[str, Any]:
        """What collate.make_collator takes of a config, by its names."""
        return {"cut": self.cut, "pad_to_multiple_of": self.pad_to_multiple_of}

    @property
    def head_settings(self) -> dict[str, Any]:
        """What model.attach_scorer takes, by its names."""
        return {"head_cache_bytes": self.head_cache_bytes, "skip_below": self.head_skip_below}

    @property
    def loss_settings(self) -> dict[str, Any]:
        """What losses.pair_loss takes, by its names."""
        return {
            "beta": self.beta,
            "loss_type": tuple(self.loss_type),
            "loss_weights": self.loss_weights and tuple(self.loss_weights),
            "label_smoothing": self.label_smoothing,
            "f_divergence_type": self.f_divergence_type,
            "f_alpha_divergence_coef": self.f_alpha_divergence_coef,
            "discopop_tau": self.discopop_tau,
            "ld_alpha": self.ld_alpha,
        }
