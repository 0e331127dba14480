"""The demo's task: asked to count from a number, count up. A program can tell right from wrong.

    Please count from 317 .    right: up : 318 319 320 321 322    wrong: down : 316 315 314 313 312

A model fitted to texts of which more count down than up can do both, and counts down. The
preference pairs teach it which is wanted, on some numbers; it is then asked about others.
"""

import random
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

NUMBERS = range(1000)
STEPS = 5
PHRASINGS = [
    "Please count from {} .",
    "Count from {} , five numbers , no more .",
    "What comes with {} ? Say the next five numbers .",
    "I am at {} . Go on counting for me , please .",
    "Here is a number : {} . Count five steps from there .",
]
SPECIAL = ["<pad>", "<s>", "</s>"]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt, and the number it asks to count from."""

    prompt: str
    start: int

    def answer(self, step: int) -> str:
        """Counted up with step 1, the right answer, or down with step -1."""
        numbers = [self.start + step * i for i in range(1, STEPS + 1)]
        return f" {'up' if step > 0 else 'down'} : {' '.join(map(str, numbers))}"

    def is_right(self, answer: str) -> bool:
        return answer.split() == self.answer(+1).split()


def make_questions() -> list[Question]:
    """A question for every number from which one can count both ways, its phrasing drawn."""
    draw = random.Random(0)
    starts = list(NUMBERS)[STEPS:-STEPS]
    draw.shuffle(starts)
    return [Question(draw.choice(PHRASINGS).format(start), start) for start in starts]


def preference_rows(questions: list[Question]) -> list[dict[str, str]]:
    """Counting up chosen, counting down rejected."""
    return [
        {"prompt": q.prompt, "chosen": q.answer(+1), "rejected": q.answer(-1)} for q in questions
    ]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word or number; a BOS before every text."""
    words = sorted({*" ".join(PHRASINGS).split(), "up", "down"} - {"{}"})
    vocabulary = [*SPECIAL, *words, *map(str, NUMBERS)]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
