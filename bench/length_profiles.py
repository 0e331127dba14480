"""Pairs of token ids whose lengths are like those of real preference data.

Prompt and completion lengths are log-normal about their medians. Prompts and completions are
random tokens, so no two begin alike.
"""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer

REAL_PAIRS = Path(__file__).parents[2] / "shared/data/preferences_en.jsonl"
SPECIAL_IDS = 2  # of bench.tasks.word_tokenizer: padding and end
MAX_PROMPT, MAX_COMPLETION = 768, 512  # tokens: what the naive loop's logits leave room for

Pair = dict[str, list[int]]  # prompt_ids, chosen_ids, rejected_ids


@dataclass(frozen=True, slots=True)
class LengthProfile:
    """Medians in tokens, and the standard deviation of the lengths' logarithms."""

    prompt_median: int
    completion_median: int
    sigma: float = 0.7


TINY = LengthProfile(12, 8)
TYPICAL = {
    "chat": LengthProfile(31, 71),
    "long prompt": LengthProfile(225, 24),
    "short prompt": LengthProfile(8, 75),
}
# median length and ratio of prompt to completion from arXiv:2410.20305, table 1: the median is
# taken to be of one prompt with one completion
DATASETS = {
    "UltraFeedback": LengthProfile(121, 288),
    "HH": LengthProfile(127, 59),
    "MetaMath": LengthProfile(694, 178),
    "HelpSteer": LengthProfile(669, 106),
    "TL;DR": LengthProfile(382, 34),
}


def random_pairs(profile: LengthProfile, count: int, *, vocab_size: int) -> list[Pair]:
    """`count` pairs of `profile`, always the same."""
    draw = random.Random(0)

    def tokens(median: int, longest: int) -> list[int]:
        length = round(draw.lognormvariate(math.log(median), profile.sigma))
        length = min(max(length, 1), longest)
        return [draw.randrange(SPECIAL_IDS, vocab_size) for _ in range(length)]

    pairs = []
    for _ in range(count):
        prompt_ids = tokens(profile.prompt_median, MAX_PROMPT)
        chosen_ids = tokens(profile.completion_median, MAX_COMPLETION)
        rejected_ids = tokens(profile.completion_median, MAX_COMPLETION)
        pairs.append(
            {"prompt_ids": prompt_ids, "chosen_ids": chosen_ids, "rejected_ids": rejected_ids}
        )
    return pairs


def real_pairs(count: int, *, vocab_size: int) -> list[Pair]:
    """The first `count` pairs of REAL_PAIRS, in the tokens of a byte-level BPE of all of them."""
    rows = [json.loads(line) for line in REAL_PAIRS.read_text("utf-8").splitlines()]
    texts = [
        {side: "\n".join(message["content"] for message in row[side]) for side in row}
        for row in rows
    ]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        (text for row in texts for text in row.values()),
        vocab_size=vocab_size - SPECIAL_IDS,
        show_progress=False,
    )

    def tokens(text: str, longest: int) -> list[int]:
        return [SPECIAL_IDS + token for token in tokenizer.encode(text).ids[:longest]]

    return [
        {
            "prompt_ids": tokens(row["prompt"], MAX_PROMPT),
            "chosen_ids": tokens(row["chosen"], MAX_COMPLETION),
            "rejected_ids": tokens(row["rejected"], MAX_COMPLETION),
        }
        for row in texts[:count]
    ]
