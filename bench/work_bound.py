"""How much work is there to save in a training step? `python -m bench.work_bound` prints it.

A step that pads nothing and runs each prompt once has fewer multiply-adds than one of TRL's, or of
another trainer's, on the same pairs. Counted are those of the products, attention's among them; not
gradient checkpointing, and not the thin products of adapters.

    passes         with LoRA   all weights
    body             1 + 2        1 + 3       the reference's forward, the policy's both ways
    attention        1 + 3        1 + 3       of whose products both factors get a gradient
    head             1 + 2        1 + 3
    head in TRL      1 + 3        1 + 4       which makes its tiles of logits twice
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from bench.length_profiles import TYPICAL, Pair, random_pairs
from bench.tables import Table
from bench.tasks import MODELS, Task

SIDES = ("chosen_ids", "rejected_ids")


@dataclass(frozen=True, slots=True)
class Products:
    """Multiply-adds of one forward: a token's in the body, a key's that a query sees, a row's in
    the head."""

    token: int
    key: int
    row: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Products":
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        linears = [m for m in model.base_model.modules() if isinstance(m, nn.Linear)]
        return cls(
            token=sum(linear.weight.numel() for linear in linears),
            key=2 * config.num_hidden_layers * config.hidden_size,
            row=model.get_output_embeddings().weight.numel(),
        )


class Way(NamedTuple):
    """How a trainer lays out the sequences of pairs, each with its prompt, and runs the head."""

    is_padded: bool  # to the longest, or end to end
    has_all_logits: bool  # at once; or in tiles made twice
    scores_all: bool  # prompts and padding too; or the completions alone


WAYS = {  # results/peers.md says where each is to be seen
    "TRL": Way(is_padded=True, has_all_logits=False, scores_all=False),
    "TRL on a CPU": Way(is_padded=True, has_all_logits=False, scores_all=True),
    "LLaMA-Factory, OpenRLHF, NeMo-RL": Way(is_padded=True, has_all_logits=True, scores_all=True),
    "OpenRLHF, packing_samples": Way(is_padded=False, has_all_logits=True, scores_all=True),
}


def work_bound(task: Task, way: Way) -> float:
    """How many times the multiply-adds that its pairs need the timed steps have this way."""
    once, passes = Products.of(MODELS[task.model]), 3 if task.adapters else 4
    step = Products(token=passes * once.token, key=4 * once.key, row=passes * once.row)
    row_run = step.row if way.has_all_logits else step.row + once.row
    ran = needed = 0
    for pairs in task.timed_batches:
        ran += body(step, lengths_run(pairs, way)) + row_run * rows_run(pairs, way)
        needed += needed_body(step, pairs) + step.row * needed_rows(pairs)
    return ran / needed


def lengths_run(pairs: list[Pair], way: Way) -> list[int]:
    """Of 2B sequences, each with its prompt and the token that ends it."""
    lengths = [len(pair["prompt_ids"]) + len(pair[side]) + 1 for pair in pairs for side in SIDES]
    return [max(lengths)] * len(lengths) if way.is_padded else lengths


def rows_run(pairs: list[Pair], way: Way) -> int:
    """Of the head: a sequence's last position, which has no label, is in all logits alone."""
    lengths = lengths_run(pairs, way)
    if not way.scores_all:
        return needed_rows(pairs)
    return sum(lengths) if way.has_all_logits else sum(lengths) - len(lengths)


def needed_rows(pairs: list[Pair]) -> int:
    return sum(len(pair[side]) + 1 for pair in pairs for side in SIDES)


def body(products: Products, lengths: list[int]) -> int:
    """A forward's multiply-adds below the head: sequences of these lengths."""
    return sum(_segment(products, length) for length in lengths)


def needed_body(products: Products, pairs: list[Pair]) -> int:
    """The same of each prompt once, and each completion, which ends with a token, after it."""
    total = 0
    for pair in pairs:
        prompt = len(pair["prompt_ids"])
        total += _segment(products, prompt)
        for side in SIDES:
            total += _segment(products, len(pair[side]) + 1, after=prompt)
    return total


def _segment(products: Products, length: int, after: int = 0) -> int:
    """`length` tokens that see `after` others, each other's beginning and themselves."""
    keys = length * after + length * (length + 1) // 2
    return products.token * length + products.key * keys


def report(model: str) -> Table:
    """Each way's bound with LoRA at 8 pairs a step, and the most that its float32 logits take."""
    found, V = Table(f"{model}: multiply-adds, in those needed"), MODELS[model].vocab_size
    for profile, lengths in TYPICAL.items():
        pairs = random_pairs(lengths, 8 * 28, vocab_size=V)
        task = Task(model=model, pairs=pairs, batch=8, adapters=True)
        for name, way in WAYS.items():
            cells = {profile: work_bound(task, way)}
            if way.has_all_logits:
                most = max(sum(lengths_run(each, way)) for each in task.timed_batches)
                cells[f"{profile}, GiB of logits"] = 4 * V * most / 2**30
            found.put(name, cells)
    return found


if __name__ == "__main__":
    print(report("Qwen2.5-0.5B").markdown(), report("Llama-3-8B").markdown(), sep="\n\n")
