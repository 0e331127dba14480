"""bench/work_bound.py: what it counts is what the products of a step do."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from watches import counting_flops

from fastdpo.attention import attend_along_trees
from fastdpo.batch import PairBatch
from fastdpo.collate import make_collator
from fastdpo.columns import Cut
from fastdpo.model import attach_scorer, score

ROOT = Path(__file__).parents[1]


def flops_of_weights(run):
    """Without attention's, and bmm's: transformers 5.11 and 5.17 make rotary frequencies by it."""
    with counting_flops() as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    others = ("attention", "bmm")
    return sum(n for op, n in counts.items() if not any(name in str(op) for name in others))


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench import naive_loop, tasks, work_bound

    return SimpleNamespace(**{**vars(naive_loop), **vars(tasks), **vars(work_bound)})


def test_needed_work_is_what_a_step_of_fastdpo_does(bench):
    task = bench.task_of("tiny", adapters=False)
    pairs = task.timed_batches[0]
    model = bench.random_model("tiny")
    products = replace(bench.Products.of(model.config), key=0)
    ended = [
        pair | {side: [*pair[side], 1] for side in ("chosen_ids", "rejected_ids")} for pair in pairs
    ]
    batch = PairBatch.from_inputs(make_collator("shared", Cut(), 0, None)(ended))
    attach_scorer(model)
    attend_along_trees(model)
    rows = sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in ended)
    body = bench.needed_body(products, pairs)
    wanted = 2 * 3 * (body + products.row * rows)
    assert flops_of_weights(lambda: score(model, batch).token_logps_C.sum().backward()) == wanted


def test_padded_work_is_what_a_padded_forward_does(bench):
    task = bench.task_of("tiny", adapters=True)
    pairs = task.timed_batches[0]
    model = bench.random_model("tiny").base_model
    batch = bench.padded(pairs, 0, 1)
    del batch["completion_mask"]
    products = replace(bench.Products.of(model.config), key=0)
    with torch.no_grad():
        ran = flops_of_weights(lambda: model(**batch, use_cache=False))
    assert ran == 2 * bench.padded_body(products, pairs)


def test_attention_counts_the_keys_that_a_token_sees(bench):
    pair = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
    products = bench.Products(token=0, key=1, row=0)
    prompt, chosen, rejected = 1 + 2, 3 + 4, 3 + 4 + 5
    assert bench.needed_body(products, [pair]) == prompt + chosen + rejected
    assert bench.padded_body(products, [pair]) == 2 * (1 + 2 + 3 + 4 + 5)


def test_the_bound_is_of_all_timed_batches(bench):
    pair = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
    task = bench.Task(model="tiny", pairs=[pair] * 14, batch=2, adapters=True)
    products = bench.Products.of(bench.MODELS["tiny"])
    padded, needed = bench.padded_body(products, [pair]), bench.needed_body(products, [pair])
    head = 5 * products.row
    wanted = (3 * padded + 4 * head) / (3 * needed + 3 * head)
    assert bench.work_bound(task) == pytest.approx(wanted)
