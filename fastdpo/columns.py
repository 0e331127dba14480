"""The columns of a pair: its token ids, how they are cut, and a reference's log-probabilities."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Pair = Mapping[str, Any]  # tokenised: ID_COLUMNS, and REFERENCE_COLUMNS where it was scored
ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")  # ints, a list or an array
REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """How a sequence longer than max_length is cut; None: not at all.

    truncation_mode: keep_start cuts at its end, keep_end at its beginning.
    """

    max_length: int | None = None
    truncation_mode: str = "keep_start"

    def __call__(self, prompt: Sequence, completion: Sequence) -> tuple[Sequence, Sequence]:
        """What is left of a prompt and of its completion."""
        if self.max_length is None:
            return prompt, completion
        if self.truncation_mode == "keep_start":
            prompt = prompt[: self.max_length]
            return prompt, completion[: self.max_length - len(prompt)]
        completion = completion[max(0, len(completion) - self.max_length) :]
        return prompt[max(0, len(prompt) + len(completion) - self.max_length) :], completion

    def lengths(self, pair: Pair) -> tuple[int, int]:
        """The lengths of `pair`'s chosen and rejected sequences, once cut."""
        limit = self.max_length or sys.maxsize
        prompt = len(pair["prompt_ids"])
        return (
            min(limit, prompt + len(pair["chosen_ids"])),
            min(limit, prompt + len(pair["rejected_ids"])),
        )

    def may_cut_start(self, length: int) -> bool:
        """Whether a sequence that is left with this length may have lost its beginning."""
        return self.truncation_mode == "keep_end" and length == self.max_length
