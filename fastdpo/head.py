"""A causal language model's head: its hidden states and labels -> log-probabilities.

All that fastdpo asks of a model above its body: `get_output_embeddings()`, a linear layer, perhaps
with a bias, quantised, or under PEFT's LoRA, and logits perhaps scaled or soft-capped as the
model's config says.
"""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from fastdpo import ops
from fastdpo.quantised import quantised_rows


def check_head_module(causal_lm: PreTrainedModel) -> None:
    """ValueError where the model has no linear head, one with more to learn than weight and bias,
    or an adapter on it other than plain LoRA."""
    head = causal_lm.get_output_embeddings()
    base = _without_adapters(head)
    if not isinstance(getattr(base, "weight", None), Tensor) or causal_lm.base_model is causal_lm:
        name = type(causal_lm).__name__
        raise ValueError(f"want a body and a linear output embedding, {name} has none")
    # a scale that starts as 1 would pass check_scorer and never train; under modules_to_save or
    # trainable_token_indices, the model's own layer is within PEFT's
    own = getattr(base, "original_module", base)
    names = {name for name, _ in own.named_parameters(recurse=False)}
    if others := sorted(names - {"weight", "bias"}):
        raise ValueError(
            f"want an output embedding of weight and bias alone, {type(own).__name__} has "
            f"{', '.join(others)}"
        )
    if base is not head:
        _check_adapter(head)


def _without_adapters(head: nn.Module) -> nn.Module:
    return head.get_base_layer() if isinstance(head, BaseTunerLayer) else head


def _check_adapter(head: BaseTunerLayer) -> None:
    is_lora = isinstance(head, LoraLayer) and isinstance(head.get_base_layer(), nn.Linear)
    is_of_layers = is_lora and isinstance(head.lora_A, nn.ModuleDict)  # AdaLoRA's are parameters
    # DoRA and its like are variants; a bias of B's would be one of the logits
    if not is_of_layers or head.lora_variant or any(head.lora_bias.values()):
        raise ValueError(
            "want no adapter on the output embedding but LoRA without variants (DoRA and others) "
            f"or lora_bias, got {type(head).__name__}: leave 'lm_head' out of target_modules, and "
            "the input embedding where the two are tied"
        )


def head_logps(
    causal_lm: PreTrainedModel,
    hidden_ND: Tensor,
    labels_N: Tensor,
    stats: tuple[str, ...] = (),
    **settings: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """token_logps_N, float32, of the labels after the hidden states, and {stat: (N,)}.

    stats, settings: any that kernels.linear_logps knows. Answers on the head's device. A LoRA
    adapter on the head counts while it is active, dropout included; a quantised head is read a tile
    at a time.
    """
    head = causal_lm.get_output_embeddings()
    for module in head.modules():
        if isinstance(module, FSDPModule):  # whole in a forward of its own, which it does not have
            module.unshard()
    base = _without_adapters(head)
    config = causal_lm.config.get_text_config()
    hidden_ND = hidden_ND.to(base.weight.device)
    low_rank = None if base is head else _low_rank(head, hidden_ND)  # first: it may unmerge
    rows = quantised_rows(base, hidden_ND.dtype)
    answer = ops.linear_logps(
        hidden_ND,
        base.weight if rows is None else rows,
        labels_N.to(base.weight.device),
        bias_V=getattr(base, "bias", None),
        low_rank=low_rank,
        scale=logit_scale(config),
        softcap=logit_softcap(config),
        stats=stats,
        **settings,
    )
    return answer if stats else (answer, {})


def _low_rank(head: LoraLayer, hidden_ND: Tensor) -> tuple[Tensor, Tensor] | None:
    """(s * dropout(hidden) Aᵀ, B) of the active adapters, side by side; None without one."""
    if head.disable_adapters and head.merged:
        head.unmerge()  # as PEFT's own forward does
    if head.disable_adapters or head.merged:
        return None
    names = [name for name in head.active_adapters if name in head.lora_A]
    if not names:
        return None
    downs = []
    for name in names:
        A = head.lora_A[name]
        x_ND = head.lora_dropout[name](hidden_ND.to(A.weight.dtype))
        downs.append(head.scaling[name] * A(x_ND))
    ups = [head.lora_B[name].weight for name in names]
    return torch.cat(downs, 1), torch.cat(ups, 1)


def logit_softcap(config: Any) -> float | None:
    """The cap of softcap * tanh(logits / softcap), by any of the names that configs have for it."""
    # Gemma; RecurrentGemma; xLSTM
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    caps = (getattr(config, name, None) for name in names)
    return next((cap for cap in caps if cap is not None), None)


def logit_scale(config: Any) -> float:
    """What a model of this text config multiplies its logits by, before any soft-capping."""
    if config.model_type == "mpt":  # names one and does not use it
        return 1.0
    if getattr(config, "logits_mup_width_multiplier", None) is not None:  # Inkling divides by it
        return 1 / config.logits_mup_width_multiplier
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:  # Cohere; Muse; Falcon-H1
            return getattr(config, name)
    logits_scaling = getattr(config, "logits_scaling", None)
    if logits_scaling is None:
        return 1.0
    # HyperCLOVA X multiplies by it, Granite and MiniCPM3 divide
    return logits_scaling if config.model_type == "hyperclovax" else 1 / logits_scaling
