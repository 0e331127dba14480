"""The load-balancing loss of a mixture of experts, for a batch that may run in packs.

    loss = E * sum_e f_e P_e        Switch Transformers, arXiv:2101.03961, equation 4, over layers

f_e is the share of tokens routed to expert e (each token goes to k experts), P_e the router's mean
probability of e; a token counts once for each sequence that contains it. f_e carries no gradient:
with the whole batch's f_e and number of tokens, the packs' losses add up to the batch's, and so do
their gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel


class ExpertCounts(NamedTuple):
    """Where tokens were routed, in all layers. chosen_E: how often to each expert; tokens: ()."""

    chosen_E: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class BatchExperts:
    """A batch in packs: where all its tokens were routed, and how many pairs it has.

    (No NamedTuple: a Trainer would rebuild it on its way to compute_loss.)
    """

    counts: ExpertCounts
    num_pairs: int


def experts_per_token(causal_lm: PreTrainedModel) -> int | None:
    """How many experts a token goes to; None where transformers' names do not say so."""
    for holder in (causal_lm, causal_lm.config.get_text_config()):
        if hasattr(holder, "num_experts"):
            return holder.num_experts_per_tok
    return None


def aux_loss_weight(causal_lm: PreTrainedModel, router_aux_loss_coef: float | None) -> float:
    """Weight of a mixture-of-experts model's load-balancing loss; 0 for any other model.

    router_aux_loss_coef: None for the model's own. ValueError where it asks for a loss that the
    model does not have, or that fastdpo cannot make for it.
    """
    config = causal_lm.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        if router_aux_loss_coef:
            raise ValueError(
                "want router_aux_loss_coef unset for a model without experts, got "
                f"{router_aux_loss_coef} for {config.model_type}"
            )
        return 0.0
    weight = router_aux_loss_coef
    if weight is None:
        weight = getattr(config, "router_aux_loss_coef", None) or 0.0
    top_k = experts_per_token(causal_lm)
    if top_k == 0:  # a dense model of a family that may have experts
        return 0.0
    if weight and top_k is None:
        raise ValueError(
            f"want router_aux_loss_coef=0 for {type(causal_lm).__name__}, whose experts fastdpo "
            f"cannot count, got {weight}"
        )
    return weight


def balancing_loss(
    router_logits: tuple[Tensor, ...],
    top_k: int,
    token_uses: Tensor,
    batch_counts: ExpertCounts | None = None,
) -> tuple[Tensor, ExpertCounts]:
    """The loss, or with batch_counts this pack's part of the batch's; and where its tokens went.

    router_logits: (tokens, E) for each layer with experts. token_uses: how often each token
    weighs, in the tokens' order. float32, under autocast too.
    """
    device = router_logits[0].device
    probs_NE = torch.cat([layer.to(device) for layer in router_logits]).float().softmax(-1)
    weights_N = token_uses.flatten().to(device, probs_NE.dtype).repeat(len(router_logits))
    chosen_NK = probs_NE.topk(top_k, dim=-1).indices
    chosen_E = probs_NE.new_zeros(probs_NE.shape[1])
    chosen_E.index_add_(0, chosen_NK.flatten(), weights_N.repeat_interleave(top_k))
    own = ExpertCounts(chosen_E, weights_N.sum())
    counts = own if batch_counts is None else batch_counts
    share_E = counts.chosen_E / counts.tokens
    # no product of matrices, which autocast would have in 16 bits
    mean_E = (weights_N[:, None] * probs_NE).sum(0) / counts.tokens
    return len(chosen_E) * (share_E * mean_E).sum(), own


def with_batch_experts(
    packs: list[dict[str, Any]],
    count: Callable[[dict[str, Any]], ExpertCounts],
    num_pairs: int,
) -> list[dict[str, Any]]:
    """Each pack's inputs and, as "experts", what its part of the batch's loss needs to know."""
    counts = [count(pack) for pack in packs]  # fillers too: ranks run as many forwards
    real = [each for each, pack in zip(counts, packs, strict=True) if "is_filler" not in pack]
    whole = ExpertCounts(*(torch.stack(each).sum(0) for each in zip(*real, strict=True)))
    return [pack | {"experts": BatchExperts(whole, num_pairs)} for pack in packs]
