"""bench/work_bound.py: what it counts is what the products of a step do."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from watches import counting_flops

from bench.naive_loop import padded
from bench.tasks import MODELS, Task, random_model, task_of
from bench.work_bound import (
    WAYS,
    Products,
    body,
    lengths_run,
    needed_body,
    report,
    rows_run,
    work_bound,
)
from fastdpo.attention import attend_along_trees
from fastdpo.batch import PairBatch
from fastdpo.collate import make_collator
from fastdpo.columns import Cut
from fastdpo.model import attach_scorer, score


def flops_of_weights(run):
    """Without attention's, and bmm's: transformers 5.11 and 5.17 make rotary frequencies by it."""
    with counting_flops() as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    others = ("attention", "bmm")
    return sum(n for op, n in counts.items() if not any(name in str(op) for name in others))


def test_needed_work_is_what_a_step_of_fastdpo_does():
    task = task_of("tiny", adapters=False)
    pairs = task.timed_batches[0]
    model = random_model("tiny")
    products = replace(Products.of(model.config), key=0)
    ended = [
        pair | {side: [*pair[side], 1] for side in ("chosen_ids", "rejected_ids")} for pair in pairs
    ]
    batch = PairBatch.from_inputs(make_collator("shared", Cut(), 0, None)(ended))
    attach_scorer(model)
    attend_along_trees(model)
    rows = sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in ended)
    body = needed_body(products, pairs)
    wanted = 2 * 3 * (body + products.row * rows)
    assert flops_of_weights(lambda: score(model, batch).token_logps_C.sum().backward()) == wanted


def test_padded_work_is_what_a_padded_forward_does():
    task = task_of("tiny", adapters=True)
    pairs = task.timed_batches[0]
    model = random_model("tiny")
    batch = padded(pairs, 0, 1)
    del batch["completion_mask"]
    products = replace(Products.of(model.config), key=0)
    lengths = lengths_run(pairs, WAYS["LLaMA-Factory, OpenRLHF, NeMo-RL"])
    with torch.no_grad():
        ran = flops_of_weights(lambda: model(**batch, use_cache=False))
    assert ran == 2 * (body(products, lengths) + products.row * sum(lengths))


def test_trl_scores_every_position_on_a_cpu():
    trl = pytest.importorskip("trl.trainer.utils")
    pairs, way = task_of("tiny", adapters=True).timed_batches[0], WAYS["TRL on a CPU"]
    model = random_model("tiny")
    trl.add_fused_lm_head(model)
    batch = padded(pairs, 0, 1)
    is_completion = batch.pop("completion_mask").bool()
    batch["labels"] = batch["input_ids"].masked_fill(~is_completion, -100)
    products = replace(Products.of(model.config), key=0)
    with torch.no_grad():
        ran = flops_of_weights(lambda: model(**batch, fused_lm_head=True))
    wanted = body(products, lengths_run(pairs, way)) + products.row * rows_run(pairs, way)
    assert ran == 2 * wanted


def test_packed_work_is_that_of_each_sequence_by_itself():
    pair = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
    lengths = lengths_run([pair], WAYS["OpenRLHF, packing_samples"])
    assert lengths == [4, 5]  # with the token that ends them
    assert body(Products(token=1, key=0, row=0), lengths) == 9


def test_attention_counts_the_keys_that_a_token_sees():
    pair = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
    products = Products(token=0, key=1, row=0)
    prompt, chosen, rejected = 1 + 2, 3 + 4, 3 + 4 + 5
    assert needed_body(products, [pair]) == prompt + chosen + rejected
    assert body(products, lengths_run([pair], WAYS["TRL"])) == 2 * (1 + 2 + 3 + 4 + 5)


def test_attention_gets_two_gradients_a_product_with_frozen_weights_too():
    lora = LoraConfig(r=2, target_modules="all-linear")
    model = get_peft_model(random_model("tiny"), lora)
    model.set_attn_implementation("eager")  # all keys, without a mask's savings
    L, products = 40, Products.of(MODELS["tiny"])

    def of_attention(run):
        with counting_flops() as counter:
            run()
        return counter.get_flop_counts()["Global"][torch.ops.aten.bmm]

    ids = torch.randint(2, 900, (1, L))
    forward = of_attention(lambda: model(input_ids=ids, use_cache=False))
    both = of_attention(lambda: model(input_ids=ids, use_cache=False).logits.sum().backward())
    assert both - forward == 2 * 2 * products.key * L * L


def test_the_bound_is_of_all_timed_batches():
    pair = {"prompt_ids": [5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}
    task = Task(model="tiny", pairs=[pair] * 14, batch=2, adapters=True)
    products = Products.of(MODELS["tiny"])
    step = replace(products, token=3 * products.token, key=4 * products.key)
    padded_ops, needed = body(step, [5, 5]), needed_body(step, [pair])
    head = 5 * products.row
    wanted = (padded_ops + 4 * head) / (needed + 3 * head)
    assert work_bound(task, WAYS["TRL"]) == pytest.approx(wanted)
    on_a_cpu = (padded_ops + 4 * 2 * 4 * products.row) / (needed + 3 * head)
    assert work_bound(task, WAYS["TRL on a CPU"]) == pytest.approx(on_a_cpu)
    all_logits = (padded_ops + 3 * 2 * head) / (needed + 3 * head)
    way = WAYS["LLaMA-Factory, OpenRLHF, NeMo-RL"]
    assert work_bound(task, way) == pytest.approx(all_logits)


def test_the_report_has_every_way():
    found = report("tiny")
    assert [*found.rows] == [*WAYS]
    assert all(1 < float(cells["chat"]) < 10 for cells in found.rows.values())
