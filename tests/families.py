"""A tiny model of every family whose attention goes through transformers' interface."""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = {"sliding_window": 6}
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
# by default, transformers 5.17 runs Gemma 2 with sdpa, which leaves the cap out
CAPPED_SCORES = {"attn_logit_softcapping": 5.0, "attn_implementation": "eager"}
FAMILIES = {  # what each adds to what a layout has to get right
    "llama": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, **WINDOW},  # biases, one window
    "qwen3": {},  # norms of queries and keys
    "mistral": WINDOW,  # a window in every layer
    "gemma": {},  # scaled embeddings
    "gemma2": {**WINDOW, "final_logit_softcapping": 3.0, **CAPPED_SCORES},
    "gemma3_text": WINDOW,  # two rotary bases
    "phi3": WINDOW,  # fused projections
    "olmo2": {},  # norms after the layers
    "smollm3": {},  # layers without positions
    "granite": {"logits_scaling": 4.0, "attention_multiplier": 0.5},
    "granitemoehybrid": {  # of its two kinds of layers attention alone, and no experts
        "layer_types": ["attention"] * 2,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "mamba_n_heads": 8,
    },
    "cohere": {"logit_scale": 0.25},  # parallel attention and feed-forward
    "mixtral": {"num_local_experts": 4, **EXPERTS},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, **EXPERTS},
}


def model(family: str, dtype: torch.dtype = torch.float64, **settings) -> PreTrainedModel:
    """A model with large weights, so that every token it attends to is felt."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES.get(family, {}) | settings))
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model


class _AllInFloat64(TorchFunctionMode):
    """float32 asked for by name is float64: the models' norms and softmaxes round otherwise."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            return args[0].double()  # integers too: some versions multiply positions as floats
        tensor = args[0] if args else None
        if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def all_in_float64() -> contextlib.AbstractContextManager:
    """Within, a float64 model computes in float64 throughout."""
    return _AllInFloat64()
