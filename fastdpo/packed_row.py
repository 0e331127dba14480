"""Sequences end to end in one row, those of a group as a trunk and branches of it.

Two completions 7 8 2 and 7 9 2 of the prompt 5 6 are one group:

    tokens             5 6 7 8 2 | 9 2      the trunk; a branch, which sees the trunk's first 3
    positions          0 1 2 3 4 | 3 4
    scored_rows        1   2 3   2 5        the rows that predict 7, which both have; 8 2; 9 2
    labels             7   8 2   9 2
    completion_rows    0 1 2, 0 3 4         of both completions, among the 5 scored rows
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy import ndarray

from fastdpo.batch import cu_seqlens_of
from fastdpo.tree import Branch, Tree, Trunk, ranges


class Piece(NamedTuple):
    """A run of scored tokens: what a completion has beyond its group's shared beginning, or, with
    None for the completion's place, that beginning."""

    group: int
    completion: int | None


class Group:
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


def _grouped(
    sequences: list[tuple[ndarray, ndarray]], *, share: bool
) -> tuple[list[Group], list[tuple[int, int]]]:
    """Groups, and of each sequence its group and its completion's place there.

    share: whether sequences of one prompt are one group.
    """
    groups: list[Group] = []
    members, numbers = [], {}
    for s, (prompt, completion) in enumerate(sequences):
        g = numbers.setdefault(prompt.tobytes() if share else s, len(groups))
        if g == len(groups):
            groups.append(Group(prompt))
        members.append((g, groups[g].add(completion)))
    return groups, members


class PackedRow:
    """Where everything is: trunks first, the other branches of all groups behind them.

    sequences: a prompt and a completion each. share: whether those of one prompt are one group. A
    segment is a run of tokens at consecutive positions that belong to the same number of sequences.
    """

    def __init__(self, sequences: list[tuple[ndarray, ndarray]], *, share: bool):
        self.groups, self._members = _grouped(sequences, share=share)
        self.trunks: list[Trunk] = []
        self.branches: list[Branch] = []
        self.starts: dict[tuple[int, int], int] = {}  # (group, completion) -> where its rest starts
        self.size = 0
        self._tokens: list[ndarray] = []  # of each segment; then its first position, its uses
        self._positions: list[int] = []
        self._uses: list[int] = []
        for g, group in enumerate(self.groups):
            shared, rest = np.split(group.completions[group.first], [group.shared_completion])
            start = self._lay(group.prompt, 0, sum(group.uses))
            self._lay(shared, len(group.prompt), sum(group.uses))
            self.starts[g, group.first] = self._lay(rest, group.shared, group.uses[group.first])
            self.trunks.append(Trunk(start, self.size))
        for g, group in enumerate(self.groups):
            for c, completion in enumerate(group.completions):
                if c != group.first:
                    rest = completion[group.shared_completion :]
                    start = self.starts[g, c] = self._lay(rest, group.shared, group.uses[c])
                    if len(rest):
                        branch = Branch(start, self.size, self.trunks[g].start, group.shared)
                        self.branches.append(branch)

    def _lay(self, tokens: ndarray, position: int, uses: int) -> int:
        """Lay a segment behind those before it; where its first token is."""
        start, self.size = self.size, self.size + len(tokens)
        self._tokens.append(tokens)
        self._positions.append(position)
        self._uses.append(uses)
        return start

    def inputs(self) -> dict[str, Any]:
        """Token ids, positions, how many sequences each token belongs to, and the tree."""
        lengths = [len(tokens) for tokens in self._tokens]
        uses_T = np.repeat(np.array(self._uses, np.int64), lengths)
        return {
            "input_ids": torch.from_numpy(np.concatenate(self._tokens))[None],
            "position_ids": torch.from_numpy(ranges(self._positions, lengths))[None],
            "attention_mask": torch.from_numpy(uses_T)[None],
            "tree": Tree.of(self.trunks, self.branches),
        }

    def scored(self) -> dict[str, Any]:
        """Scored rows and labels, each once, and where each completion's tokens are among them.

        A completion is two pieces, of which others of its group may have either, too.
        """
        numbers: dict[Piece, int] = {}  # of each piece, in the order they are met
        row_ranges, labels = [], []  # of each, in that order
        pieces = []  # both of each completion, by their numbers
        for g, c in self._members:
            for piece in (Piece(g, None), Piece(g, c)):
                if piece not in numbers:
                    numbers[piece] = len(numbers)
                    its_ranges, its_labels = self._scored_piece(piece)
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

    def _scored_piece(self, piece: Piece) -> tuple[list[tuple[int, int]], ndarray]:
        """The rows that predict its tokens, as ranges (first row, length), and the tokens. A
        sequence's first token has none that predicts it."""
        g, c = piece
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
