"""Models and adapters that DPOTrainer refuses, before a row is read or a weight is loaded."""

from typing import Any

from accelerate.utils import is_compiled_module
from peft import PeftConfig, PeftModel, PeftType, TaskType
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from fastdpo.model import causal_lm_of, has_adapters

PROMPT_LEARNING = (PeftType.PREFIX_TUNING, PeftType.PROMPT_TUNING, PeftType.P_TUNING)
FORWARD_REPLACERS = (PeftType.ADAPTION_PROMPT, PeftType.XLORA)


def check_models(model: Any, ref_model: Any, peft_config: Any) -> None:
    """TypeError or ValueError unless these are models and adapters that go together."""
    for name, each in {"model": model, "ref_model": ref_model}.items():
        if is_compiled_module(each):
            raise TypeError(
                f"want {name} as a loaded model, got one of torch.compile({name}): "
                f"{name}.compile() compiles it in place, torch_compile=True the policy"
            )
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise TypeError(f"want model as a name or a loaded model, got {type(model).__name__}")
    if not isinstance(ref_model, PreTrainedModel | PeftModel | None):
        raise TypeError(f"want ref_model as a loaded model, got {type(ref_model).__name__}")
    for name, each in {"model": model, "ref_model": ref_model}.items():
        if isinstance(each, PreTrainedModel | PeftModel):
            _check_kind(causal_lm_of(each), name)
        if isinstance(each, PeftModel):
            _check_adapters(each.active_peft_config, name)
    weights = () if isinstance(model, str) else model.parameters()
    trained = {parameter for parameter in weights if parameter.requires_grad}
    theirs = () if ref_model is None else ref_model.parameters()
    if ref_model is model or not trained.isdisjoint(theirs):
        raise ValueError(
            "want ref_model apart from model, got one with weights that train in both; leave it "
            "out for the model as it is now"
        )
    _check_bare_layers(model, ref_model, peft_config)
    if not isinstance(model, str):
        _check_unmerged(model)
    if peft_config is not None:
        _check_peft_config(peft_config, model)
    elif not trained and not isinstance(model, str):
        raise ValueError(
            "want a model with something to train, got none of its parameters with requires_grad "
            "(PeftModel.from_pretrained wants is_trainable=True)"
        )


def _check_kind(model: PreTrainedModel, name: str) -> None:
    kind = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"want {name} as a decoder-only model, got {kind}")
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"want {name} with a head that predicts tokens (AutoModelForCausalLM), got {kind}"
        )


def _check_bare_layers(model: Any, ref_model: Any, peft_config: Any) -> None:
    """ValueError for adapters in the layers of a model that is no PeftModel.

    New ones would take their place or train beside them, and a checkpoint would not hold them; but
    those that transformers put there, it trains and saves.
    """
    for name, each in {"model": model, "ref_model": ref_model}.items():
        if not isinstance(each, PreTrainedModel) or not has_adapters(each):
            continue
        are_kept = getattr(each, "_hf_peft_config_loaded", False)
        if not are_kept or (name == "model" and peft_config is not None):
            raise ValueError(
                f"want {name} without adapters, got {type(each).__name__} with some in its layers, "
                "of its folder (adapter_config.json) or from an earlier peft_config or "
                "get_peft_model: load it again, merge them into it, or give the PeftModel itself"
            )


def _check_unmerged(model: PreTrainedModel | PeftModel) -> None:
    """ValueError for merged adapters: their layers run without them, so that they would not move,
    and with gradient checkpointing torch would not say so."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    if merged := sorted({name for layer in layers for name in layer.merged_adapters}):
        raise ValueError(
            f"want model with adapters beside its weights, got {', '.join(merged)} merged into "
            "them: unmerge_adapter() lets them train"
        )


def _check_peft_config(config: Any, model: str | PreTrainedModel | PeftModel) -> None:
    if not isinstance(config, PeftConfig):
        raise TypeError(f"want a peft.PeftConfig as peft_config, got {type(config).__name__}")
    if isinstance(model, PeftModel):
        raise ValueError(
            "want peft_config or a model with adapters, got both: merge the model's adapters "
            "first, or leave peft_config out to train them on"
        )
    _check_adapters(config, "peft_config")
    if config.is_prompt_learning and config.task_type != TaskType.CAUSAL_LM:
        raise ValueError(
            f"want task_type='CAUSAL_LM' in a peft_config of {config.peft_type.value}, got "
            f"{config.task_type!r}"
        )


def _check_adapters(config: PeftConfig, name: str) -> None:
    is_unknown = config.is_prompt_learning and config.peft_type not in PROMPT_LEARNING
    if is_unknown or config.peft_type in FORWARD_REPLACERS:
        names = ", ".join(kind.value for kind in PROMPT_LEARNING)
        raise ValueError(
            f"want {name} with adapters on layers or {names}, got {config.peft_type.value}"
        )
