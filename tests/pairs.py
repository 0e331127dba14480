"""A conversation, rows made to tokenised pairs, and those read back as texts; two tokenizers."""

import copy

import tiny
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from fastdpo.data import prepare_pairs


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


CHAT = {
    "prompt": [user("Two and two?")],
    "chosen": [assistant("Four.")],
    "rejected": [assistant("Five.")],
}


def chat(**changes):
    return CHAT | changes


def merging_tokenizer():
    """One in which some words' letters are merged."""
    return tiny.tokenizer(["Two and two make four."] * 9)


def with_ends(tokenizer):
    """A copy that itself adds <s> before a text and </s> after it."""
    ending = copy.deepcopy(tokenizer)
    ending._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return ending


def pairs_of(rows, tokenizer, **settings):
    pairs, counts = prepare_pairs(Dataset.from_list(rows), tokenizer, **settings)
    return list(pairs), counts


def decoded(tokenizer, pair):
    return [tokenizer.decode(pair[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")]
