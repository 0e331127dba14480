"""Tokenised pairs -> the inputs of one forward, as PairBatch.from_inputs reads them.

    PaddedCollator                  a sequence a row, padded on the right
    PackedCollator(share=False)     sequences end to end in one row, no padding
    PackedCollator(share=True)      the same, with common beginnings of sequences there once

Pairs have the columns of columns.py. B of them become S = 2B sequences, prompt + completion, chosen
0..B-1, then rejected, each cut to max_length.
"""

import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray

from fastdpo.batch import TokensRun, scored_positions
from fastdpo.columns import ID_COLUMNS, REFERENCE_COLUMNS, Cut, Pair
from fastdpo.packed_row import PackedRow

SAMPLED_PAIRS = 32  # start-up checks take the longest of the first: it reaches past most windows


def first_pairs_longest_first(pairs: Iterable[Pair]) -> list[Pair]:
    """The first SAMPLED_PAIRS pairs, the longest first."""
    few = itertools.islice(pairs, SAMPLED_PAIRS)
    return sorted(few, key=lambda pair: sum(len(pair[name]) for name in ID_COLUMNS), reverse=True)


class Size(NamedTuple):
    """What determines how many tokens a forward has; arrays have one element for each forward."""

    sequences: int | ndarray
    longest: int | ndarray
    tokens: int | ndarray  # of the sequences, what they share in this layout counted once

    def beside(self, other: "Size") -> "Size":
        """The size of both in one forward."""
        return Size(
            self.sequences + other.sequences,
            np.maximum(self.longest, other.longest),
            self.tokens + other.tokens,
        )


def _sequences(pairs: Sequence[Pair], cut: Cut) -> list[tuple[ndarray, ndarray]]:
    """(prompt, completion) of S sequences."""
    prompts = [np.asarray(pair["prompt_ids"], np.int64) for pair in pairs]
    return [
        cut(prompt, np.asarray(pair[side], np.int64))
        for side in ("chosen_ids", "rejected_ids")
        for prompt, pair in zip(prompts, pairs, strict=True)
    ]


def _reference(pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor([float(pair[name]) for pair in pairs], device="cpu")
        for name in REFERENCE_COLUMNS
        if name in pairs[0]
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedCollator:
    """Pads to the longest sequence, or to the next multiple of pad_to_multiple_of."""

    pad_token_id: int
    cut: Cut = Cut()
    pad_to_multiple_of: int | None = None

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        sequences = _sequences(pairs, self.cut)
        width = self._width(max(len(prompt) + len(rest) for prompt, rest in sequences))
        input_ids_SL = np.full((len(sequences), width), self.pad_token_id)
        attention_mask_SL = np.zeros_like(input_ids_SL)
        completion_mask_SL = np.zeros_like(input_ids_SL)
        for s, (prompt, completion) in enumerate(sequences):
            stop = len(prompt) + len(completion)
            input_ids_SL[s, : len(prompt)] = prompt
            input_ids_SL[s, len(prompt) : stop] = completion
            attention_mask_SL[s, :stop] = 1
            completion_mask_SL[s, len(prompt) : stop] = 1
        input_ids, completion_mask = map(torch.from_numpy, (input_ids_SL, completion_mask_SL))
        return {
            "input_ids": input_ids,
            "attention_mask": torch.from_numpy(attention_mask_SL),
            "completion_mask": completion_mask,
            **scored_positions(input_ids, completion_mask),
            **_reference(pairs),
            "tokens": TokensRun(input_ids_SL.size),
        }

    def size(self, pairs: Sequence[Pair]) -> Size:
        """The size of a forward of these pairs."""
        lengths = [n for pair in pairs for n in self.cut.lengths(pair)]
        return Size(len(lengths), max(lengths), sum(lengths))

    def tokens(self, size: Size) -> int | ndarray:
        """Tokens in a forward of this size, padding and all."""
        return size.sequences * self._width(size.longest)

    def _width(self, longest: int | ndarray) -> int | ndarray:
        multiple = self.pad_to_multiple_of or 1
        return -(-longest // multiple) * multiple


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedCollator:
    """Lays sequences end to end in one row; with `share`, those of one prompt as a tree."""

    share: bool
    cut: Cut = Cut()

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        sequences = _sequences(pairs, self.cut)
        packed = PackedRow(sequences, share=self.share)
        lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
        return {
            **packed.inputs(),
            **packed.scored(),
            **_reference(pairs),
            "tokens": TokensRun(
                run=packed.size,
                shared=sum(lengths) - packed.size,
                padding_avoided=len(lengths) * max(lengths) - sum(lengths),
            ),
        }

    def size(self, pairs: Sequence[Pair]) -> Size:
        """At most this, for pairs of one prompt: what else their completions share is not known."""
        lengths = [n for pair in pairs for n in self.cut.lengths(pair)]
        longest, tokens = max(lengths), sum(lengths)
        if self.share and not self.cut.may_cut_start(longest):
            prompt = min(len(pairs[0]["prompt_ids"]), self.cut.max_length or sys.maxsize)
            tokens -= prompt * (len(lengths) - 1)
        return Size(len(lengths), longest, tokens)

    def tokens(self, size: Size) -> int | ndarray:
        """Tokens in a forward of this size."""
        return size.tokens


LAYOUTS = ("shared", "packed", "padded")


def make_collator(
    layout: str, cut: Cut, pad_token_id: int, pad_to_multiple_of: int | None
) -> PaddedCollator | PackedCollator:
    """The collator of a layout: padded, packed or shared."""
    if layout == "padded":
        return PaddedCollator(
            pad_token_id=pad_token_id, cut=cut, pad_to_multiple_of=pad_to_multiple_of
        )
    return PackedCollator(share=layout == "shared", cut=cut)
