"""The demo's task: of six words, name those of one kind. A program can tell right from wrong.

    Which of these are animals: pear, fox, hammer, owl, plum, saw?      right: fox, owl
                                                                        wrong: pear, hammer, plum, saw

A model fitted to answers of both manners, half and half, knows the kinds and does not know which
manner is wanted. That is what the preference pairs teach it.
"""

import random
from dataclasses import dataclass

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

KINDS = {
    "animals": "fox owl bear wolf deer goat horse sheep mouse otter crow swan duck frog toad hare "
    "lion tiger zebra camel moose whale seal shark trout eagle hawk robin ant bee wasp spider",
    "fruits": "pear plum apple fig kiwi grape peach lemon lime mango melon papaya cherry orange "
    "banana date guava apricot quince currant raisin olive coconut lychee pomelo damson medlar "
    "nectarine tangerine blueberry cranberry raspberry",
    "tools": "hammer saw drill chisel pliers wrench file rasp level clamp vise shovel rake hoe axe "
    "spade trowel anvil lathe plane awl mallet crowbar ladder wedge pulley winch scissors tongs "
    "tweezers screwdriver sander",
}
KINDS = {kind: words.split() for kind, words in KINDS.items()}
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
WORDS_IN_A_QUESTION = 6


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and its right answer; `other` names the words that were not asked for."""

    prompt: str
    answer: str
    other: str


def make_questions(count: int, seed: int) -> list[Question]:
    """`count` different questions, the same for the same seed."""
    draw = random.Random(seed)
    questions: dict[str, Question] = {}
    while len(questions) < count:
        kind = draw.choice(list(KINDS))
        wanted = set(draw.sample(KINDS[kind], draw.randint(2, 4)))
        others = [word for other in KINDS if other != kind for word in KINDS[other]]
        words = [*wanted, *draw.sample(others, WORDS_IN_A_QUESTION - len(wanted))]
        words.sort()  # a set's order is no seed's
        draw.shuffle(words)
        prompt = f"Which of these are {kind} : {' , '.join(words)} ?"
        questions[prompt] = Question(
            prompt=prompt,
            answer=" " + " , ".join(word for word in words if word in wanted),
            other=" " + " , ".join(word for word in words if word not in wanted),
        )
    return list(questions.values())


def is_right(question: Question, answer: str) -> bool:
    return answer.split() == question.answer.split()


def preference_rows(questions: list[Question]) -> list[dict[str, str]]:
    """The right answer chosen, the other words rejected."""
    return [{"prompt": q.prompt, "chosen": q.answer, "rejected": q.other} for q in questions]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word; a BOS before every text."""
    words = [word for kind in KINDS.values() for word in kind]
    vocabulary = [*SPECIAL, *"Which of these are : , ?".split(), *KINDS, *words]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocabulary.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )
