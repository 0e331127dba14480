"""Tokenised pairs -> the inputs of one forward, as PairBatch.from_inputs reads them.

    PaddedCollator                  a sequence a row, padded on the right
    PackedCollator(share=False)     sequences end to end in one row, no padding
    PackedCollator(share=True)      the same, with common beginnings of sequences there once

Pairs have the columns of columns.py. B of them become S = 2B sequences, prompt + completion, chosen
0..B-1, then rejected, each cut to max_length.
"""

import functools
import itertools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray

from fastdpo.batch import TokensRun, cu_seqlens_of, scored_positions
from fastdpo.columns import ID_COLUMNS, REFERENCE_COLUMNS, Cut, Pair
from fastdpo.tree import Branch, Tree, Trunk, ranges

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
        name: torch.tensor([float(pair[name]) for pair in pairs])
        for name in REFERENCE_COLUMNS
        if name in pairs[0]
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedCollator:
    """Pads to the longest sequence, or to the next multiple of pad_to_multiple_of."""

    pad_token_id: int
    cut: Cut = field(default_factory=Cut)
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


class _Group:
    """Sequences that are laid out together: one prompt, and the completions that follow it."""

    def __init__(self, prompt: ndarray):
        self.prompt = prompt
        self.completions: list[ndarray] = []  # no two alike
        self.uses: list[int] = []  # how many sequences have each of them
        self._places: dict[bytes, int] = {}

    def add(self, completion: ndarray) -> int:
        """The place of `completion` among this group's."""
        place = self._places.setdefault(completion.tobytes(), len(self.completions))
        if place == len(self.completions):
            self.completions.append(completion)
            self.uses.append(0)
        self.uses[place] += 1
        return place

    # what follows is read once all completions are there

    @functools.cached_property
    def shared_completion(self) -> int:
        """How many tokens all completions begin with alike."""
        return _common_prefix(self.completions)

    @functools.cached_property
    def shared(self) -> int:
        """How many tokens all sequences begin with alike, from the prompt's first."""
        return len(self.prompt) + self.shared_completion

    @functools.cached_property
    def first(self) -> int:
        """The place of the completion that continues the shared beginning in the trunk."""
        lengths = map(len, self.completions)
        # one that ends with the shared beginning has nothing to continue it with
        return next((i for i, n in enumerate(lengths) if n > self.shared_completion), 0)


def _common_prefix(arrays: list[ndarray]) -> int:
    """How many elements all arrays begin with alike."""
    first, *others = arrays
    length = len(first)
    for other in others:
        length = min(length, len(other))
        differs = first[:length] != other[:length]
        if differs.any():
            length = int(differs.argmax())
    return length


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedCollator:
    """Lays sequences end to end in one row; with `share`, those of one prompt as a tree."""

    share: bool
    cut: Cut = field(default_factory=Cut)

    def __call__(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        sequences = _sequences(pairs, self.cut)
        groups, members = self._groups(sequences)
        packed = _PackedRow(groups)
        lengths = [len(prompt) + len(completion) for prompt, completion in sequences]
        return {
            **packed.inputs(),
            **packed.scored(members),
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
        if self.share and not self.cut.may_split_prompt(longest):
            prompt = min(len(pairs[0]["prompt_ids"]), self.cut.max_length or sys.maxsize)
            tokens -= prompt * (len(lengths) - 1)
        return Size(len(lengths), longest, tokens)

    def tokens(self, size: Size) -> int | ndarray:
        """Tokens in a forward of this size."""
        return size.tokens

    def _groups(
        self, sequences: list[tuple[ndarray, ndarray]]
    ) -> tuple[list[_Group], list[tuple[int, int]]]:
        """Groups, and for each sequence its group and its completion's place there."""
        groups: list[_Group] = []
        members, places = [], {}
        for s, (prompt, completion) in enumerate(sequences):
            place = places.setdefault(prompt.tobytes() if self.share else s, len(groups))
            if place == len(groups):
                groups.append(_Group(prompt))
            members.append((place, groups[place].add(completion)))
        return groups, members


class _PackedRow:
    """Where everything is: trunks first, the other branches of all groups behind them.

    A segment is a run of tokens at consecutive positions that belong to as many sequences each.
    """

    def __init__(self, groups: list[_Group]):
        self.groups = groups
        self.trunks: list[Trunk] = []
        self.branches: list[Branch] = []
        self.starts: dict[tuple[int, int], int] = {}  # (group, completion) -> where its rest starts
        self.size = 0
        self._tokens: list[ndarray] = []  # of each segment; then its first position, its uses
        self._positions: list[int] = []
        self._uses: list[int] = []
        for g, group in enumerate(groups):
            shared, rest = np.split(group.completions[group.first], [group.shared_completion])
            start = self._take(group.prompt, 0, sum(group.uses))
            self._take(shared, len(group.prompt), sum(group.uses))
            self.starts[g, group.first] = self._take(rest, group.shared, group.uses[group.first])
            self.trunks.append(Trunk(start, self.size))
        for g, group in enumerate(groups):
            for c, completion in enumerate(group.completions):
                if c != group.first:
                    rest = completion[group.shared_completion :]
                    start = self.starts[g, c] = self._take(rest, group.shared, group.uses[c])
                    if len(rest):
                        branch = Branch(start, self.size, self.trunks[g].start, group.shared)
                        self.branches.append(branch)

    def _take(self, tokens: ndarray, position: int, uses: int) -> int:
        """Lay a segment behind those before it; where its first token is."""
        start, self.size = self.size, self.size + len(tokens)
        self._tokens.append(tokens)
        self._positions.append(position)
        self._uses.append(uses)
        return start

    def inputs(self) -> dict[str, Any]:
        """Token ids, positions, how many sequences each token belongs to, and the tree."""
        lengths = [len(tokens) for tokens in self._tokens]
        counts_T = np.repeat(np.array(self._uses, np.int64), lengths)
        return {
            "input_ids": torch.from_numpy(np.concatenate(self._tokens))[None],
            "position_ids": torch.from_numpy(ranges(self._positions, lengths))[None],
            # no mask: PairBatch's token_uses, by the name that transformers counts tokens by
            "attention_mask": torch.from_numpy(counts_T)[None],
            "tree": Tree.of(self.trunks, self.branches),
        }

    def scored(self, members: list[tuple[int, int]]) -> dict[str, Any]:
        """Scored rows and labels, each once, and where each completion's tokens are among them.

        A completion is two pieces: (its group, None), what all of the group begin with, and (its
        group, its place), the rest. A piece that several completions have is scored once.
        """
        numbers: dict[tuple, int] = {}  # of each piece, in the order they are met
        row_ranges, labels = [], []  # of each, in that order
        pieces = []  # both of each completion, by their numbers
        for group, place in members:
            for piece in ((group, None), (group, place)):
                if piece not in numbers:
                    numbers[piece] = len(numbers)
                    its_ranges, its_labels = self._scored_piece(*piece)
                    row_ranges += its_ranges
                    labels.append(its_labels)
                pieces.append(numbers[piece])
        counts = np.array([len(its_labels) for its_labels in labels])
        inputs = {
            "scored_rows": torch.from_numpy(ranges(*np.array(row_ranges).T)),
            "completion_labels": torch.from_numpy(np.concatenate(labels)),
            "cu_seqlens": cu_seqlens_of(counts[pieces].reshape(-1, 2).sum(1)),
        }
        if counts[pieces].sum() != counts.sum():  # else every row is read once, in this very order
            starts = np.cumsum(counts) - counts
            inputs["completion_rows"] = torch.from_numpy(ranges(starts[pieces], counts[pieces]))
        return inputs

    def _scored_piece(self, g: int, c: int | None) -> tuple[list[tuple[int, int]], ndarray]:
        """The shared beginning's completion tokens (c None) or c's rest, and the rows that predict
        them, as ranges: (first row, length). A sequence's first token has none that predicts it."""
        group, trunk = self.groups[g], self.trunks[g]
        if c is None:
            labels = group.completions[0][: group.shared_completion]
            if not len(group.prompt):
                return [(trunk.start, max(0, len(labels) - 1))], labels[1:]
            return [(trunk.start + len(group.prompt) - 1, len(labels))], labels
        labels = group.completions[c][group.shared_completion :]
        own = (self.starts[g, c], max(0, len(labels) - 1))
        if not group.shared:
            return [own], labels[1:]
        return [(trunk.start + group.shared - 1, min(1, len(labels))), own], labels


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
