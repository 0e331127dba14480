"""The trainer's `model` argument -> the policy to train, and its tokenizer."""

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from fastdpo.model import causal_lm_of
from fastdpo.quantised import forbid_repacking

HAS_ADAPTERS = (
    "want a model by its name, got {}, which has adapters (adapter_config.json): merge them into "
    "it first (merge_and_unload), or load it with AutoPeftModelForCausalLM for DPOTrainer"
)

# of from_pretrained's arguments, those that say where a model, its configuration and tokenizer are
WHERE = {"revision", "subfolder", "cache_dir", "token", "local_files_only", "trust_remote_code"}


def make_policy(
    model: str | PreTrainedModel | PeftModel,
    peft_config: PeftConfig | None,
    *,
    seed: int,
    **init_kwargs: Any,
) -> PreTrainedModel | PeftModel:
    """`model`, loaded where it is a name, with the adapters that peft_config asks for.

    init_kwargs: as load_policy has them.
    """
    set_seed(seed)  # new adapters start at random
    if isinstance(model, str):
        model = load_policy(model, **init_kwargs)
    return model if peft_config is None else with_adapters(model, peft_config)


def with_quantization(init_kwargs: dict[str, Any], quantization_config: Any) -> dict[str, Any]:
    """init_kwargs with quantization_config among them, if there is one; ValueError for two."""
    if quantization_config is None:
        return init_kwargs
    if "quantization_config" in init_kwargs:
        raise ValueError(
            "want quantization_config once, got it as an argument and in model_init_kwargs"
        )
    return init_kwargs | {"quantization_config": quantization_config}


def load_policy(name: str, **init_kwargs: Any) -> PreTrainedModel:
    """The causal language model in the folder or Hub repository `name`, in float32 by default.

    init_kwargs go to `from_pretrained`; dtype may be a torch.dtype, its name, or "auto". Attention
    with soft-capping is eager unless they say otherwise: sdpa would leave the cap out. A quantised
    model is placed on the current GPU, any other is left for the trainer to place. ValueError for
    weights that cannot be read or are not all there, and for adapters beside or in place of them.
    """
    if Path(name, init_kwargs.get("subfolder") or "", "adapter_config.json").is_file():
        raise ValueError(HAS_ADAPTERS.format(name))
    old_name = init_kwargs.pop("torch_dtype", None)
    dtype = init_kwargs.pop("dtype", None) or old_name or "float32"
    if isinstance(dtype, str) and dtype != "auto":
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"want dtype auto or the name of a torch.dtype, got {dtype!r}")
        dtype = getattr(torch, dtype)
    if init_kwargs.get("quantization_config") is not None and torch.cuda.is_available():
        init_kwargs.setdefault("device_map", {"": torch.cuda.current_device()})
    config = _read(AutoConfig, "a model's configuration", name, **init_kwargs)
    if config.is_encoder_decoder:
        raise ValueError(f"want a decoder-only language model, got {name} ({config.model_type})")
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        # asked for nothing, transformers 5.17 takes sdpa, 5.23 no longer
        init_kwargs["attn_implementation"] = init_kwargs.get("attn_implementation") or "eager"
    try:
        model, loaded = _model_class(config).from_pretrained(
            name, dtype=dtype, output_loading_info=True, **init_kwargs
        )
    except (SafetensorError, RuntimeError, TypeError) as error:
        # a torn file, weights of another shape, an argument it does not know
        raise ValueError(f"want a model that loads, got {name}: {error}") from error
    if getattr(model, "peft_config", None):  # of a repository on the Hub
        raise ValueError(HAS_ADAPTERS.format(name))
    missing = sorted(loaded["missing_keys"])
    if missing and not _is_quantized(model):
        raise ValueError(
            f"want all weights of {type(model).__name__} in {name}, got none for {missing[:3]} "
            f"({len(missing)} in all), which would start at random"
        )
    return model


def _model_class(config: PreTrainedConfig) -> type:
    """AutoModelForCausalLM; for a vision-language model that it does not know, the model's own."""
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)


def with_adapters(model: PreTrainedModel, peft_config: PeftConfig) -> PeftModel:
    """`model` with new adapters, which alone train; on a quantised model in bfloat16."""
    model = get_peft_model(model, peft_config)
    if _is_quantized(model):
        for name, parameter in model.named_parameters():
            # QLoRA trains in bfloat16 (arXiv:2305.14314, section 3); DoRA's magnitudes move by
            # less than its spacing
            if parameter.requires_grad and "lora_magnitude_vector" not in name:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def _is_quantized(model: nn.Module) -> bool:
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def make_ready(
    policy: nn.Module,
    ref_model: nn.Module | None,
    *,
    pad_token_id: int,
    without_dropout: bool,
) -> None:
    """Before the models are moved to a device: pad token, dropout off, 4-bit layers as they are,
    and no traces of an earlier trainer.

    ValueError for a pad token beyond a model's vocabulary.
    """
    models = [policy] if ref_model is None else [policy, ref_model]
    for model in models:
        V = model.config.get_text_config().vocab_size
        if pad_token_id >= V:
            raise ValueError(
                f"want a pad token in [0, {V}), the vocabulary of {type(model).__name__}, got "
                f"{pad_token_id}: it is in the tokenizer, but the model was not resized"
            )
    for model in models:
        forget_trainer(model)
        forbid_repacking(model)
    for config in (policy.config.get_text_config(), getattr(policy, "generation_config", None)):
        if config is not None:
            config.pad_token_id = pad_token_id
    for model in models if without_dropout else ():
        disable_dropout(model)


def forget_trainer(model: nn.Module) -> None:
    """Remove what accelerate leaves on a model that it has prepared.

    That is the autocast around forward, which would still round a model that looks like float32,
    and the mark with which accelerate would neither autocast it nor wrap it in DDP again.
    """
    for each in (model, causal_lm_of(model)):
        vars(each).pop("_is_accelerate_prepared", None)
        if "_original_forward" in vars(each):
            each.forward = vars(each).pop("_original_forward")


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: the layers, and the rates that modules and their configs hold.

    A rate is a number with `drop` in its name: attention_dropout, resid_pdrop, layerdrop; or a
    dictionary of them, as LoHa has them, an adapter each.
    """
    for module in model.modules():
        if "Dropout" in type(module).__name__ and hasattr(module, "p"):  # torch's, and BOFT's
            module.p = 0.0
        config = getattr(module, "config", None)
        for holder in (module, config) if isinstance(config, PreTrainedConfig) else (module,):
            for name, value in vars(holder).items():
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)
                elif "drop" in name and isinstance(value, dict):
                    value |= {key: 0.0 for key, rate in value.items() if isinstance(rate, float)}


def load_tokenizer(
    processing_class: Any,
    model: str | PreTrainedModel | PeftModel,
    *,
    pad_token: str | None = None,
    **init_kwargs: Any,
) -> PreTrainedTokenizerBase:
    """`processing_class`, or the tokenizer beside `model`, able to pad; init_kwargs: as load_policy
    has them.

    It pads with pad_token, or the token of its own, or else its end token. TypeError for anything
    but a tokenizer; ValueError for a pad_token that it lacks, where there is none of the three, and
    where there is no folder to find one in.
    """
    if processing_class is None:
        if not (name := model_name(model)):
            raise ValueError("want a tokenizer as processing_class for a model without a name")
        processing_class = _read(AutoTokenizer, "a tokenizer", name, **init_kwargs)
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(
            "want a tokenizer as processing_class (vision-language processors are not there "
            f"yet), got {type(processing_class).__name__}"
        )
    if pad_token is not None:
        if pad_token not in processing_class.get_vocab():
            raise ValueError(f"want pad_token in the tokenizer's vocabulary, got {pad_token!r}")
        processing_class.pad_token = pad_token
    if processing_class.pad_token is None:
        if processing_class.eos_token is None:
            raise ValueError("want a tokenizer with a pad_token or an eos_token, got neither")
        processing_class.pad_token = processing_class.eos_token
    return processing_class


def _read(reader: type, wanted: str, name: str, **init_kwargs: Any) -> Any:
    """What `reader`, a class of transformers', finds under a name; ValueError, whatever a file
    there may hold instead."""
    _check_found(name)
    where = {each: init_kwargs[each] for each in WHERE & init_kwargs.keys()}
    try:
        return reader.from_pretrained(name, **where)
    except Exception as error:
        detail = f"{type(error).__name__}: {error}"
        raise ValueError(f"want {wanted} in {name}, got none: {detail}") from error


def _check_found(name: str) -> None:
    """ValueError for a path at which there is no folder; a Hub repository's name goes unchecked."""
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():  # the Hub would say that it is no repository's name
        raise ValueError(f"want a folder with a model or a name on the Hub, {name} is not there")


def model_name(model: str | PreTrainedModel | PeftModel) -> str:
    """The folder or Hub repository that `model` is or came from."""
    return model if isinstance(model, str) else model.config._name_or_path
