"""DPOConfig: transformers.TrainingArguments plus DPO's own settings; checks itself.

Names, meanings and defaults are those of TRL 1.16's DPOConfig, so that a script or a YAML file
moves over unchanged. Two defaults differ, and both are written beside the field: `bf16` where
there is no GPU, and `logging_nan_inf_filter`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available, logging

logger = logging.get_logger(__name__)

LOSS_TYPES = ("sigmoid",)


def _setting(default: Any, text: str, **metadata: Any) -> Any:
    metadata["help"] = text
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DPOConfig(TrainingArguments):
    """Every setting of a DPO run; ValueError names the field, what was wanted and what came.

    Only DPO's own settings stand here: the rest are transformers.TrainingArguments. A field that
    TRL has and fastdpo does not run yet is accepted at its default and refused at any other
    value, so that no setting is silently ignored.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]

    # TrainingArguments' fields with another default
    learning_rate: float = _setting(1e-6, "The initial learning rate.")
    logging_steps: float = _setting(
        10, "Log every this many optimizer steps; below 1, a share of all steps."
    )
    gradient_checkpointing: bool = _setting(
        True, "Recompute activations in the backward: less memory, about a third more time."
    )
    bf16: bool | None = _setting(
        None,
        "bfloat16 autocast. Unset: on where a GPU can do it and fp16 is off, else float32 "
        "(TRL turns it on without a GPU too, and then stops or trains in bfloat16 on the CPU).",
    )
    logging_nan_inf_filter: bool = _setting(
        False,
        "Replace NaN and Inf losses in the log. Off: the log shows what happened, and no step "
        "waits for the GPU to look (TRL keeps transformers' True).",
    )

    # The model
    model_init_kwargs: dict[str, Any] | str | None = _setting(
        None, "Arguments of `from_pretrained`, when the model is given as a string (a JSON object)."
    )
    trust_remote_code: bool = _setting(False, "Run model and tokenizer code from the Hub.")
    router_aux_loss_coef: float | None = _setting(
        None,
        "Weight of a mixture-of-experts model's load-balancing loss; unset: the model's own, "
        "0: none.",
    )
    disable_dropout: bool = _setting(True, "Set every dropout of policy and reference to 0.")

    # The data
    dataset_num_proc: int | None = _setting(None, "Processes that tokenise.")
    max_length: int | None = _setting(
        1024,
        "Longest prompt + completion, in tokens; longer ones are cut as truncation_mode says.",
    )
    truncation_mode: str = _setting(
        "keep_start",
        "Which end of a too long sequence stays.",
        choices=["keep_start", "keep_end"],
    )
    padding_free: bool = _setting(False, "Accepted for TRL's sake; it pads too, and says so.")
    pad_to_multiple_of: int | str | None = _setting(
        "auto", "Pad to a multiple of this many tokens; auto: no further than the longest."
    )
    on_bad_rows: Literal["raise", "skip"] = _setting(
        "raise", "A malformed row ends the run before it starts, or is left out and counted."
    )

    # The reference
    precompute_ref_log_probs: bool = _setting(
        False, "Score all data with the reference before training and keep no reference after."
    )
    precompute_ref_batch_size: int | None = _setting(
        None, "Pairs per forward while doing so; unset: the train or eval batch size."
    )
    sync_ref_model: bool = _setting(False, "TR-DPO: let the reference follow. Not there yet.")
    ref_model_mixup_alpha: float = _setting(0.6, "Used by sync_ref_model.")
    ref_model_sync_steps: int = _setting(512, "Used by sync_ref_model.")

    # The loss
    loss_type: list[str] = _setting(["sigmoid"], f"The loss; so far one of {LOSS_TYPES}.")
    loss_weights: list[float] | None = _setting(None, "Weights of a mix of losses. Not there yet.")
    beta: float = _setting(0.1, "How strongly the policy is held to the reference.")
    label_smoothing: float = _setting(
        0.0,
        "Probability that a preference is the wrong way round (conservative DPO), in [0, 0.5). "
        "TRL's sigmoid loss ignores it.",
    )
    ld_alpha: float | None = _setting(None, "LD-DPO. Not there yet.")
    f_divergence_type: str = _setting("reverse_kl", "f-DPO. Only reverse_kl so far.")
    f_alpha_divergence_coef: float = _setting(0.5, "Used by f_divergence_type alpha_divergence.")
    use_weighting: bool = _setting(False, "WPO. Not there yet.")
    discopop_tau: float = _setting(0.05, "Used by loss_type discopop.")
    activation_offloading: bool = _setting(False, "Activations to CPU memory. Not there yet.")

    pad_token: str | None = _setting(None, "Deprecated in TRL: set tokenizer.pad_token instead.")

    def __post_init__(self):
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        if getattr(self, "activation_checkpointing", False) is None:
            # transformers 5.18 renamed the field and warns at every use of the old name
            self.activation_checkpointing = self.gradient_checkpointing
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self.pad_to_multiple_of = _pad_multiple(self.pad_to_multiple_of)
        super().__post_init__()
        self._check_values()
        self._check_unsupported()
        if self.padding_free:
            logger.warning("padding_free=True changes nothing: batches are padded, as in TRL 1.16.")

    def _check_values(self):
        _want(self.beta > 0, "beta > 0", self.beta)
        _want(0 <= self.label_smoothing < 0.5, "label_smoothing in [0, 0.5)", self.label_smoothing)
        # one token cannot be predicted and predict
        _want(self.max_length is None or self.max_length >= 2, "max_length >= 2", self.max_length)
        modes = ("keep_start", "keep_end")
        _want(self.truncation_mode in modes, f"truncation_mode in {modes}", self.truncation_mode)
        _want(self.on_bad_rows in ("raise", "skip"), "on_bad_rows raise or skip", self.on_bad_rows)

    def _check_unsupported(self):
        """TRL's settings that fastdpo does not run yet: refused, never ignored."""
        _want(
            len(self.loss_type) == 1 and self.loss_type[0] in LOSS_TYPES,
            f"loss_type one of {LOSS_TYPES} (others are not there yet)",
            self.loss_type,
        )
        for name, default in {
            "loss_weights": None,
            "ld_alpha": None,
            "f_divergence_type": "reverse_kl",
            "use_weighting": False,
            "sync_ref_model": False,
            "activation_offloading": False,
        }.items():
            value = getattr(self, name)
            _want(value == default, f"{name}={default!r} (others are not there yet)", value)


def _want(condition: bool, wanted: str, came: Any):
    if not condition:
        raise ValueError(f"DPOConfig: want {wanted}, got {came!r}")


def _pad_multiple(value: int | str | None) -> int | None:
    """The number in `value`, which the command line hands over as text; None for no multiple."""
    if value is None or str(value).lower() in ("auto", "none", "null"):
        return None
    _want(str(value).isdigit() and int(value) > 0, "pad_to_multiple_of auto or a count", value)
    return int(value)
