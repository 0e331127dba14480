"""Does a model score as its own logits say? Checked on a short sequence, before it is trained.

What a model does between its body and its logits can be more than model.py knows, and would then be
silently left out of every log-probability; and a model that looks at later tokens would look at
padding.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.model import ScoredOutput, causal_lm_of, inference

MOST_TOKENS = 32  # of a sequence
LEAST_MOVE = 0.1  # nats: the length of a forward alone moves bitsandbytes' int8 layers by less


def check_scorer(
    model: nn.Module,
    input_ids: list[int],
    *,
    name: str = "model",
    aux_loss: bool = False,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> None:
    """ValueError unless scoring `input_ids` agrees with the log-softmax of the model's own logits.

    And unless they stay as they are without the tokens that follow. Three forwards, of MOST_TOKENS
    at most. With aux_loss, the load-balancing loss is compared with the model's own too. name: the
    model's, for the error. autocast: the run's. It rounds, so it is left out unless weights of
    several dtypes need it.
    """
    name = f"{name} ({type(causal_lm_of(model)).__name__})"
    ids_L = torch.tensor(input_ids[:MOST_TOKENS], device=model.device)
    has_one_dtype = len({weight.dtype for weight in model.parameters()}) == 1
    with nullcontext() if has_one_dtype else autocast():
        _check_logps(model, ids_L, name)
        if aux_loss:
            _check_aux_loss(model, ids_L, name)


def _check_logps(model: nn.Module, ids_L: Tensor, name: str) -> None:
    with inference(model):
        own = model(input_ids=ids_L[None], use_cache=False)
        token_logps_L = _scored_alone(model, ids_L).token_logps_C
        beginning_L = _scored_alone(model, ids_L[: 1 + len(ids_L) // 2]).token_logps_C
    logits_LV = own.logits[0, -len(ids_L) : -1]  # after the virtual tokens of prompt tuning
    own_L = logits_LV.float().log_softmax(-1).gather(1, ids_L[1:, None]).squeeze(1)
    difference = (own_L - token_logps_L.to(own_L.device)).abs().max().item()
    if math.isnan(difference):
        raise ValueError(f"{name}: want finite log-probabilities, got nan: look at its weights")
    # logits rounded to a dtype are off by half its spacing: eps * |logit| / 2, here and in the lse
    allowed = max(1e-3, 2 * torch.finfo(logits_LV.dtype).eps * logits_LV.abs().max().item())
    if not difference <= allowed:
        raise ValueError(
            f"{name}: want the model's own log-probabilities within {allowed:.1e} nats, got "
            f"{difference:.1e}: its logits are not hidden states times the output embedding, "
            "scaled or capped as its config says and in a way fastdpo knows"
        )
    moved = (token_logps_L[: len(beginning_L)] - beginning_L).abs().max().item()
    if not moved <= max(LEAST_MOVE, allowed):
        raise ValueError(
            f"{name}: want a causal model, got log-probabilities that move by {moved:.1e} nats "
            "with the tokens that follow"
        )


def _scored_alone(model: nn.Module, ids_L: Tensor, **router: Any) -> ScoredOutput:
    """A sequence's log-probabilities, or with `router` its load-balancing loss."""
    rows = torch.arange(len(ids_L) - 1, device=ids_L.device)
    inputs = {"input_ids": ids_L[None], "use_cache": False, **router}
    return model(**inputs, scored_rows=rows, scored_labels=ids_L[1:])


def _check_aux_loss(model: nn.Module, ids_L: Tensor, name: str) -> None:
    router = {"output_router_logits": True}
    try:
        with inference(model):
            own = model(input_ids=ids_L[None], use_cache=False, **router).aux_loss
            counts = torch.ones_like(ids_L)[None]
            scored = _scored_alone(model, ids_L, **router, token_uses=counts).aux_loss
    except (AttributeError, IndexError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"{name}: its load-balancing loss cannot be made ({error}): set router_aux_loss_coef=0"
        ) from error
    if not isinstance(own, Tensor):
        raise ValueError(
            f"{name}: want its own load-balancing loss, got {own!r} from this version of "
            "transformers: set router_aux_loss_coef=0"
        )
    rtol = max(1e-2, 4 * torch.finfo(own.dtype).eps)  # its own is made in the router's dtype
    if not torch.allclose(own.float(), scored, rtol=rtol):
        raise ValueError(
            f"{name}: want its own load-balancing loss, {own.item():.4g}, got "
            f"{scored.item():.4g} by Mixtral's formula: set router_aux_loss_coef=0"
        )
