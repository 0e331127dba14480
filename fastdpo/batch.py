"""Pairs -> PairBatch: padded token ids, and which of their positions are scored (the collator).

    input_ids   chosen 0      prompt 0 | chosen 0   | padding
                chosen 1      prompt 1 | chosen 1   | padding
                rejected 0    prompt 0 | rejected 0 | padding
                rejected 1    prompt 1 | rejected 1 | padding

A layout is a collator: another one may lay the same pairs out differently, as long as it says
in `scored_rows_C`, `labels_C` and `cu_seqlens` where each completion's predictions are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class PairBatch:
    """B pairs as S = 2B sequences, chosen 0..B-1 then rejected B..2B-1, with C scored tokens.

    model_inputs: what the model's body takes, each int64 (S, L). token_mask_SL: 1 where there is
    a token, 0 where there is padding. scored_rows_C: int64, the rows of the (S * L, D) hidden
    states that predict a completion token. labels_C: int64, the tokens they predict.
    cu_seqlens: int32 (S + 1,), completion s has rows cu_seqlens[s] to cu_seqlens[s + 1] of the
    former two. reference_logps_S: float32, or None where the reference is yet to be asked.
    """

    model_inputs: dict[str, Tensor]
    token_mask_SL: Tensor
    scored_rows_C: Tensor
    labels_C: Tensor
    cu_seqlens: Tensor
    reference_logps_S: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        return (len(self.cu_seqlens) - 1) // 2

    @property
    def num_tokens(self) -> Tensor:
        """Tokens that run through the body, padding aside: an int64 scalar on the device."""
        return self.token_mask_SL.sum()

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Tensor]) -> "PairBatch":
        """The batch that a collator's dictionary describes.

        PaddedCollator pads on the right, where causal attention never looks from a token: the
        model needs no mask, runs its fastest attention, and does not wait for the device to see
        whether one is needed. A collator written for TRL gives input_ids, attention_mask and
        completion_mask alone: the mask is then passed on, and the scored rows are looked up on
        the device, which makes the CPU wait.
        """
        model_inputs = {"input_ids": inputs["input_ids"]}
        if "scored_rows" not in inputs:
            inputs = {**inputs, **_scored(inputs["input_ids"], inputs["completion_mask"])}
            model_inputs["attention_mask"] = inputs["attention_mask"]
        reference_logps_S = None
        if "ref_chosen_logps" in inputs:
            logps = (inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
            reference_logps_S = torch.cat(logps).float()
        return cls(
            model_inputs=model_inputs,
            token_mask_SL=inputs["attention_mask"],
            scored_rows_C=inputs["scored_rows"],
            labels_C=inputs["completion_labels"],
            cu_seqlens=inputs["cu_seqlens"],
            reference_logps_S=reference_logps_S,
        )


def count_pairs(inputs: Mapping[str, Tensor]) -> int:
    """B of a collator's dictionary, without a look at any tensor's values."""
    if "cu_seqlens" in inputs:
        return (len(inputs["cu_seqlens"]) - 1) // 2
    return len(inputs["input_ids"]) // 2


def _scored(input_ids_SL: Tensor, completion_mask_SL: Tensor) -> dict[str, Tensor]:
    """Scored rows, labels and running lengths. A first token has no row that predicts it."""
    mask_SL = completion_mask_SL.bool().clone()
    mask_SL[:, 0] = False
    positions_C = mask_SL.flatten().nonzero().squeeze(1)
    lengths_S = mask_SL.sum(1)
    return {
        "scored_rows": positions_C - 1,
        "completion_labels": input_ids_SL.flatten()[positions_C],
        "cu_seqlens": torch.nn.functional.pad(lengths_S.cumsum(0), (1, 0)).int(),
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedCollator:
    """Tokenised pairs -> the inputs of one padded forward, as PairBatch.from_inputs reads them.

    Rows hold prompt_ids, chosen_ids and rejected_ids (lists of int), and, where the reference
    has scored them, ref_chosen_logps and ref_rejected_logps. Each prompt + completion is cut to
    max_length, at its end (keep_start) or at its beginning (keep_end), then padded on the right
    to the longest of the batch, or to the next multiple of pad_to_multiple_of.
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        sequences, masks = [], []
        for side in ("chosen_ids", "rejected_ids"):
            for row in rows:
                kept = self._kept(len(row["prompt_ids"]) + len(row[side]))
                sequences.append((row["prompt_ids"] + row[side])[kept])
                masks.append(([0] * len(row["prompt_ids"]) + [1] * len(row[side]))[kept])
        width = max(map(len, sequences))
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        input_ids = _padded(sequences, width, self.pad_token_id)
        completion_mask = _padded(masks, width, 0)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": _padded([[1] * len(ids) for ids in sequences], width, 0),
            "completion_mask": completion_mask,
            **_scored(input_ids, completion_mask),
        }
        for name in ("ref_chosen_logps", "ref_rejected_logps"):
            if name in rows[0]:
                inputs[name] = torch.tensor([row[name] for row in rows], dtype=torch.float32)
        return inputs

    def _kept(self, length: int) -> slice:
        if self.max_length is None or length <= self.max_length:
            return slice(None)
        if self.truncation_mode == "keep_start":
            return slice(self.max_length)
        return slice(length - self.max_length, None)


def _padded(rows: list[list[int]], width: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])
