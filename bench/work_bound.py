"""How much work is there to save in a training step?

A step that pads nothing and runs each prompt once has fewer multiply-adds than one of TRL's on the
same pairs. Counted are those of the products, attention's among them; not gradient checkpointing,
and not the thin products of adapters.

    passes         with LoRA   all weights
    body             1 + 2        1 + 3       the reference's forward, the policy's both ways
    head             1 + 2        1 + 3
    head in TRL      1 + 3        1 + 4       which makes its tiles of logits twice
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from bench.length_profiles import Pair
from bench.tasks import MODELS, Task


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


def work_bound(task: Task) -> float:
    """How many times the multiply-adds that its pairs need TRL's timed steps have."""
    products = Products.of(MODELS[task.model])
    passes = 3 if task.adapters else 4
    padded = needed = 0
    for pairs in task.timed_batches:
        rows = sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) + 2 for pair in pairs)
        head, padded_head = passes * products.row * rows, (passes + 1) * products.row * rows
        padded += passes * padded_body(products, pairs) + padded_head
        needed += passes * needed_body(products, pairs) + head
    return padded / needed


def padded_body(products: Products, pairs: list[Pair]) -> int:
    """A forward's multiply-adds below the head: 2B sequences as long as the longest."""
    longest = max(
        len(pair["prompt_ids"]) + len(pair[side]) + 1
        for pair in pairs
        for side in ("chosen_ids", "rejected_ids")
    )
    return 2 * len(pairs) * _segment(products, longest)


def needed_body(products: Products, pairs: list[Pair]) -> int:
    """The same of each prompt once, and each completion, which ends with a token, after it."""
    total = 0
    for pair in pairs:
        prompt = len(pair["prompt_ids"])
        total += _segment(products, prompt)
        for side in ("chosen_ids", "rejected_ids"):
            total += _segment(products, len(pair[side]) + 1, after=prompt)
    return total


def _segment(products: Products, length: int, after: int = 0) -> int:
    """`length` tokens that see `after` others, each other's beginning and themselves."""
    keys = length * after + length * (length + 1) // 2
    return products.token * length + products.key * keys
