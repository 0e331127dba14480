"""Scoring under FSDP2: the head's weight is whole when the scorer reads it, in both directions."""

import pytest
from processes import run_ranks

SHARDED_AS_WHOLE = """
import copy, sys
import tiny, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastdpo.batch import PairBatch
from fastdpo.collate import make_collator
from fastdpo.columns import Cut
from fastdpo.attention import attend_along_trees
from fastdpo.model import attach_scorer, score

dist.init_process_group("gloo")
whole = tiny.model("llama", 100)
attend_along_trees(whole)
sharded = copy.deepcopy(whole)
for model in (whole, sharded):
    attach_scorer(model)
for layer in sharded.model.layers:
    fully_shard(layer)
if sys.argv[1] == "alone":  # as accelerate does where it finds no norm before it: under PEFT
    fully_shard(sharded.lm_head, reshard_after_forward=False)
fully_shard(sharded)
assert isinstance(sharded.lm_head.weight, DTensor)

cut = Cut(max_length=None, truncation_mode="keep_start")
collator = make_collator("shared", cut, pad_token_id=0, pad_to_multiple_of=None)
first = 10 * dist.get_rank()  # ranks have pairs of their own
rows = [
    {"prompt_ids": [first + 3, 4], "chosen_ids": [5, *range(6, 6 + n)], "rejected_ids": [5, 9]}
    for n in (3, 20)
]
batch = PairBatch.from_inputs(collator(rows))
for _ in range(2):
    whole.zero_grad()
    sharded.zero_grad()
    logps = [score(model, batch).token_logps_C for model in (whole, sharded)]
    torch.testing.assert_close(*logps, atol=1e-5, rtol=0)
    for logps_C in logps:
        logps_C.mean().backward()
for name, parameter in sharded.named_parameters():
    expected = whole.get_parameter(name).grad
    dist.all_reduce(expected)  # fully_shard's gradients are the ranks' mean
    torch.testing.assert_close(
        parameter.grad.full_tensor(), expected / 2, atol=1e-6, rtol=1e-4, msg=name
    )
print("SAME")
"""


@pytest.mark.parametrize("head", ["with-the-body", "alone"])
def test_sharded_weights_score_and_train_as_whole_ones(tmp_path, head):
    assert run_ranks(tmp_path, SHARDED_AS_WHOLE, head, world_size=2).count("SAME") == 2
