"""A causal language model's head: its hidden states and labels -> log-probabilities.

All that fastdpo asks of a model above its body: `get_output_embeddings()`, with a weight (V, D)
and perhaps a bias, and logits perhaps scaled or soft-capped as its config says.
"""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from fastdpo import ops


def check_head_module(causal_lm: PreTrainedModel) -> None:
    """ValueError where the model has no linear head, or an adapter on it (not there yet)."""
    head = causal_lm.get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), Tensor) or causal_lm.base_model is causal_lm:
        name = type(causal_lm).__name__
        raise ValueError(f"want a body and a linear output embedding, {name} has none")
    if isinstance(head, BaseTunerLayer):
        raise ValueError(
            "want no adapter on the output embedding (not there yet): leave "
            "'lm_head' out of target_modules"
        )


def head_logps(
    causal_lm: PreTrainedModel, hidden_CD: Tensor, labels_C: Tensor, stats: tuple[str, ...] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """token_logps_C, float32, of the labels after the hidden states, and {stat: (C,)}.

    stats: any that kernels.linear_logps knows. Answers on the head's device.
    """
    head = causal_lm.get_output_embeddings()
    config = causal_lm.config.get_text_config()
    token_logps_C, found = ops.linear_logps(
        hidden_CD.to(head.weight.device),
        head.weight,
        labels_C.to(head.weight.device),
        bias_V=getattr(head, "bias", None),
        scale=logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
        stats=("lse", *stats),
    )
    return token_logps_C, {name: found[name] for name in stats}


def logit_scale(config: Any) -> float:
    """What a model of this text config multiplies its logits by, before any soft-capping."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:  # Cohere; Muse; Falcon-H1
            return getattr(config, name)
    logits_scaling = getattr(config, "logits_scaling", None)
    if logits_scaling is None:
        return 1.0
    # HyperCLOVA X multiplies by it, Granite and MiniCPM3 divide
    return logits_scaling if config.model_type == "hyperclovax" else 1 / logits_scaling
