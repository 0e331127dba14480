"""PairBatch: what one forward takes of a batch of pairs, whatever its layout.

A layout is a collator (collate.py, or a user's own): it may lay tokens out as it likes, as long as
it says which rows of the hidden states predict which completion tokens. What its dictionary holds:

    input_ids            (S, L) padded, (1, T) packed
    attention_mask       as input_ids: how many sequences a token belongs to, 0 for padding. It
                         becomes PairBatch's token_uses; transformers counts tokens by this name
    scored_rows, completion_labels, cu_seqlens, completion_rows    as PairBatch has them
    completion_mask      (S, L), 1 on a completion's tokens: of the padded layout, and of collators
                         written for TRL, which give it in place of the line above
    position_ids, tree   packed
    ref_chosen_logps, ref_rejected_logps    (B,), where the pairs have them
    tokens               TokensRun

With a token budget (packs.py) it holds `packs`, such a dictionary each, and `pairs`, what they were
made of. A pack may have three keys more: is_filler (pack_trainer.py), pack_loss (batch_loss.py) and
experts (experts.py).
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

# keys of a collator's dictionary that the model does not take
NOT_FOR_THE_MODEL = ("completion_mask", "ref_chosen_logps", "ref_rejected_logps", "tokens")


@dataclass(frozen=True, slots=True)
class TokensRun:
    """Tokens that the body ran, padding and all, and tokens that it did not have to.

    shared: run once instead of once for each sequence that has them. padding_avoided: what the
    same sequences in the padded layout would have had. `to` is for loops that move a batch value by
    value.
    """

    run: int = 0
    shared: int = 0
    padding_avoided: int = 0

    def __add__(self, other: "TokensRun") -> "TokensRun":
        return TokensRun(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TokensRun":
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class PairBatch:
    """B pairs as S = 2B completions, chosen 0..B-1 then rejected B..2B-1, with C tokens in all.

    model_inputs: what the model's body takes; token ids are (S, L) padded, or (1, T) packed.
    token_uses: int64 like the token ids: how many of the S sequences a token belongs to; 0 for
        padding.
    scored_rows_N: int64, the rows of the (S * L, D) or (T, D) hidden states that predict a
        completion token. labels_N: int64, the tokens they predict.
    completion_rows_C: int64, for each token of the S completions, end to end, which of the N rows
        predicts it; None where that is the N rows as they are. A row serves several completions
        that begin alike.
    cu_seqlens: int32 (S + 1,): completion s has the tokens cu_seqlens[s] to cu_seqlens[s + 1].
    reference_logps_S: float32, or None where the reference is yet to be asked.
    """

    model_inputs: dict[str, Any]
    token_uses: Tensor
    scored_rows_N: Tensor
    labels_N: Tensor
    completion_rows_C: Tensor | None
    cu_seqlens: Tensor
    reference_logps_S: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        return (len(self.cu_seqlens) - 1) // 2

    @property
    def num_tokens(self) -> Tensor:
        """Tokens of the S sequences, padding aside, shared or not: an int64 scalar, on the device.

        (What TRL counts as num_tokens; a layout that shares prompts runs fewer.)
        """
        return self.token_uses.sum()

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any]) -> "PairBatch":
        """The batch that a collator's dictionary describes.

        The padded collator pads on the right, where causal attention never looks from a token: the
        model needs no mask and runs its fastest attention. (transformers waits for the device once
        in such a forward, to see that no row holds several sequences.) A collator written for TRL
        gives input_ids, attention_mask and completion_mask: the mask is then passed on, with all
        else that it gives, and the scored rows are looked up on the device, which makes the CPU
        wait. ValueError for a batch in packs, which is no one forward.
        """
        if "packs" in inputs:
            raise ValueError(
                "want the inputs of one forward, got a batch in packs (max_tokens_per_forward): "
                "each of its 'packs' is one, and their losses, with the batch's pairs as "
                "num_items_in_batch, add up to its own"
            )
        input_ids = inputs["input_ids"]
        if "scored_rows" not in inputs:  # of a collator written for TRL
            model_inputs = {name: x for name, x in inputs.items() if name not in NOT_FOR_THE_MODEL}
            inputs = {**inputs, **scored_positions(input_ids, inputs["completion_mask"])}
        elif "tree" in inputs:  # packed or shared
            model_inputs = {name: inputs[name] for name in ("input_ids", "position_ids", "tree")}
            model_inputs["attention_mask"] = _empty_mask(input_ids)
        else:  # padded
            model_inputs = {"input_ids": input_ids}
        reference_logps_S = None
        if "ref_chosen_logps" in inputs:
            logps = (inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
            reference_logps_S = torch.cat(logps).float()
        return cls(
            model_inputs=model_inputs,
            token_uses=inputs["attention_mask"],
            scored_rows_N=inputs["scored_rows"],
            labels_N=inputs["completion_labels"],
            completion_rows_C=inputs.get("completion_rows"),
            cu_seqlens=inputs["cu_seqlens"],
            reference_logps_S=reference_logps_S,
        )


def _empty_mask(input_ids: Tensor) -> Tensor:
    """A 4-D mask, which transformers passes on instead of building one: a Tree says who sees whom.

    It is empty, so that a model which drops `tree` on the way to attention fails instead of
    attending without it.
    """
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=input_ids.device)


def count_pairs(inputs: Mapping[str, Any]) -> int:
    """B of a collator's dictionary, without a look at any tensor's values."""
    if "packs" in inputs:
        return sum(count_pairs(pack) for pack in inputs["packs"])
    if "cu_seqlens" in inputs:
        return (len(inputs["cu_seqlens"]) - 1) // 2
    return len(inputs["input_ids"]) // 2


def scored_positions(input_ids_SL: Tensor, completion_mask_SL: Tensor) -> dict[str, Tensor]:
    """Scored rows, labels and running lengths. A first token has no row that predicts it."""
    mask_SL = completion_mask_SL.bool().clone()
    mask_SL[:, 0] = False
    positions_C = mask_SL.flatten().nonzero().squeeze(1)
    lengths_S = mask_SL.sum(1)
    return {
        "scored_rows": positions_C - 1,
        "completion_labels": input_ids_SL.flatten()[positions_C],
        "cu_seqlens": cu_seqlens_of(lengths_S),
    }


def cu_seqlens_of(lengths_S: Tensor | ArrayLike) -> Tensor:
    """Where sequences of these lengths start when laid end to end, and where the last one ends."""
    if not isinstance(lengths_S, Tensor):
        lengths_S = torch.from_numpy(np.asarray(lengths_S))  # on the CPU, whatever torch's default
    return torch.nn.functional.pad(lengths_S.cumsum(0), (1, 0)).int()
