"""How a batch is laid out for the forward, and whether the model computes the same in it.

`auto` is shared where the model can run it, else padded, which every model can. Whether a model
does anything across tokens besides attention is tested in layout_check.py: one real pair is scored
in both layouts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from peft import PeftModel
from torch import nn
from transformers.utils import logging

from fastdpo.attention import attend_along_trees, attend_as_before
from fastdpo.model import causal_lm_of

logger = logging.get_logger(__name__)

DESCRIPTIONS = {
    "shared": "each prompt once with its completions as branches, no padding",
    "packed": "whole sequences end to end, no padding",
    "padded": "chosen and rejected in one padded forward",
}
# attention along a tree is all that these layers do across tokens
LAYER_TYPES = {"full_attention", "sliding_attention", "attention"}

Probe = Callable[[nn.Module, str], str | None]


class Layout(NamedTuple):
    """A run's layout, and a line that describes it or says why the run fell back to it."""

    name: str
    line: str


def why_padded(model: nn.Module) -> str | None:
    """Why `model` can run the padded layout alone; None if it may run any."""
    causal_lm = causal_lm_of(model)
    name, config = type(causal_lm).__name__, causal_lm.config.get_text_config()
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        return f"{model.active_peft_config.peft_type.value} puts tokens of its own before each row"
    adapters = model.peft_config.values() if isinstance(model, PeftModel) else ()
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters):
        return "aLoRA looks for its invocation once in each row"
    layer_types = set(getattr(config, "layer_types", None) or ())
    others = sorted(layer_types - LAYER_TYPES)
    if causal_lm._is_stateful and (others or not layer_types):
        return f"{name} carries a state from token to token"
    if others:
        return f"{name} has layers of type {', '.join(others)}"
    if not causal_lm._supports_attention_backend:
        return f"{name} does not use transformers' attention interface"
    if any(parameter.endswith(("sinks", "sink")) for parameter, _ in causal_lm.named_parameters()):
        return f"{name} has attention sinks"
    is_capped = getattr(config, "attn_logit_softcapping", None) is not None
    if is_capped and config._attn_implementation == "sdpa":  # Gemma 2, before transformers refused
        return f"{name} leaves its soft-capping out: load it with attn_implementation='eager'"
    return None


def choose_layout(
    wanted: str,
    models: Sequence[nn.Module],
    probe: Probe | None,
    *,
    strict: bool,
    reason_to_pad: str | None = None,
) -> Layout:
    """Pick a layout that all `models` can run, and switch their attention to it.

    wanted: "auto" or one of collate.LAYOUTS. probe(model, layout): how the two layouts differ on a
    real pair, None for not at all; None where the weights are sharded. reason_to_pad: why the run
    itself needs the padded layout. ValueError where a layout asked for by name cannot run, or, when
    `strict`, where the probe finds a difference or there is none.
    """
    if wanted == "padded":
        return Layout("padded", DESCRIPTIONS["padded"])
    name = "shared" if wanted == "auto" else wanted
    is_error = wanted != "auto"
    reason = reason_to_pad or next(filter(None, map(why_padded, models)), None)
    if reason is None:
        if probe is None and strict:
            raise ValueError("want strict_layout=False with sharded weights, which go unchecked")
        is_error = is_error or strict
        reason = _switch_attention(name, models, probe)
    if reason is None:
        unchecked = "" if probe else " (not checked: the weights are sharded)"
        return Layout(name, DESCRIPTIONS[name] + unchecked)
    if is_error:
        raise ValueError(f"want layout={wanted!r} for a model that can run it: {reason}")
    return padded_layout(reason)


def padded_layout(reason: str) -> Layout:
    """The layout to fall back to, told in a warning."""
    logger.warning(f"layout padded: {reason}")
    return Layout("padded", f"{DESCRIPTIONS['padded']}: {reason}")


def _switch_attention(name: str, models: Sequence[nn.Module], probe: Probe | None) -> str | None:
    """Let all models attend along trees. Undone, and why, where one's numbers differ in `name`."""
    for model in models:
        attend_along_trees(causal_lm_of(model))
    differences = (probe(model, name) for model in models) if probe else ()
    reason = next(filter(None, differences), None)
    if reason is not None:
        for model in models:
            attend_as_before(causal_lm_of(model))
    return reason
