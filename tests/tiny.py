"""Tokenizers and models small enough to train in a test, built on the spot."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCAB = 97
ID_PAIRS = [  # of token ids below VOCAB
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 2], "rejected_ids": [11, 2]},
    {"prompt_ids": [12, 13], "chosen_ids": [14, 2], "rejected_ids": [15, 16, 17, 18, 2]},
]
SPECIAL = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tokenizer(texts: Iterable[str] = (), vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `texts`: every string can be written with it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=CHAT_TEMPLATE,
    )


def config(family: str, vocab_size: int):
    """A tiny config of `family`: each differs in what a trainer has to get right."""
    sizes = {**SIZES, "vocab_size": vocab_size}
    if family == "llama":  # a head of its own
        return LlamaConfig(**sizes)
    if family == "qwen2":  # head tied to the embedding, biases in the attention
        return Qwen2Config(**sizes, tie_word_embeddings=True)
    if family == "gemma2":  # logits and attention soft-capped, sliding windows, tied head
        capped = {"final_logit_softcapping": 3.0, "attn_implementation": "eager"}
        return Gemma2Config(**sizes, head_dim=8, sliding_window=48, **capped)
    if family == "mixtral":  # experts, and a loss that balances them
        return MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    raise ValueError(f"want a family this file knows, got {family!r}")


def model(family: str, vocab_size: int, dtype=torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model of `family` with large weights, so that its probabilities are not all alike."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family, vocab_size)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)
    return model


PAIRS = [
    ("The capital of France is", " Paris, on the Seine.", " a large city."),
    ("Two and two make", " four.", " five, as everybody knows."),
    ("Water boils at", " 100 degrees at sea level.", " noon."),
    ("A triangle has", " three sides.", " no sides to speak of, and no corners."),
    ("The sun rises in the", " east.", " west."),
    ("A year has", " twelve months.", " ten months, more or less."),
    ("Ice is", " frozen water.", " hot."),
    ("Bees make", " honey.", " bread and butter."),
]


def rows(count: int = len(PAIRS)) -> list[dict[str, str]]:
    """Preference rows of plain text; no two alike up to 8, then again from the first."""
    names = ("prompt", "chosen", "rejected")
    return [dict(zip(names, PAIRS[i % len(PAIRS)], strict=True)) for i in range(count)]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A .jsonl file of `rows`."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
