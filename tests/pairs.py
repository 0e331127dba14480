"""A conversation, rows made to tokenised pairs, and those read back as texts."""

from datasets import Dataset

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


def pairs_of(rows, tokenizer, **settings):
    pairs, counts = prepare_pairs(Dataset.from_list(rows), tokenizer, **settings)
    return list(pairs), counts


def decoded(tokenizer, pair):
    return [tokenizer.decode(pair[f"{side}_ids"]) for side in ("prompt", "chosen", "rejected")]
