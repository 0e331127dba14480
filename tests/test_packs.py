import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trainer import logged, make_trainer, weights

from fastdpo.collate import Cut, PackedCollator, make_collator
from fastdpo.packs import split


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def row(prompt, chosen, rejected):
    return {"prompt_ids": [1] * prompt, "chosen_ids": [2] * chosen, "rejected_ids": [3] * rejected}


lengths = st.integers(1, 12)


@settings(deadline=None, derandomize=True)
@given(
    rows=st.lists(st.builds(row, lengths, lengths, lengths), min_size=1, max_size=12),
    max_tokens=st.integers(1, 80),
    layout=st.sampled_from(["shared", "packed", "padded"]),
)
def test_packs_hold_every_pair_once_and_keep_to_the_budget(rows, max_tokens, layout):
    collator = make_collator(layout, Cut(), pad_token_id=0, pad_to_multiple_of=None)
    packs = split(rows, max_tokens, collator.tokens)
    assert sorted(map(str, rows)) == sorted(str(r) for pack in packs for r in pack)
    for pack in packs:
        assert collator(pack)["tokens"].run <= max_tokens or len(pack) == 1


def test_pairs_of_one_prompt_stay_together_while_they_fit():
    rows = [row(9, 2, 3), row(5, 2, 2), row(9, 4, 1), row(5, 1, 3)]
    packs = split(rows, 20, PackedCollator(share=True).tokens)
    assert [[len(r["prompt_ids"]) for r in pack] for pack in packs] == [[9, 9], [5, 5]]


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_packs_train_as_whole_batches_do(tmp_path, tokenizer, layout, loss_type):
    common = {"layout": layout, "loss_type": loss_type, "gradient_accumulation_steps": 2}
    whole = make_trainer(tmp_path, tokenizer, **common)
    whole.train()
    packed = make_trainer(tmp_path, tokenizer, max_tokens_per_forward=120, **common)
    packs = next(iter(packed.get_train_dataloader()))["packs"]
    assert len(packs) > 1
    packed.train()
    for name in ("loss", "grad_norm", "rewards/margins", "num_tokens", "entropy"):
        assert logged(packed, name) == pytest.approx(logged(whole, name), rel=1e-5, abs=1e-6), name
    for name, weight in weights(whole.model).items():
        torch.testing.assert_close(weights(packed.model)[name], weight, rtol=0, atol=1e-6)


class RunsOutOfMemory:
    """Raises CUDA's error where a forward has more tokens than fit, in forward or in backward."""

    def __init__(self, model, most, in_backward):
        self.most, self.raised = most, 0
        embedding = model.get_input_embeddings()
        if in_backward:
            embedding.register_full_backward_hook(self.check_backward)
        else:
            embedding.register_forward_hook(self.check)

    def check(self, module, inputs, output):
        self.check_backward(module, None, (output,))

    def check_backward(self, module, _, outputs):
        if torch.is_grad_enabled() or outputs[0].requires_grad is False:
            tokens = outputs[0].shape[0] * outputs[0].shape[1]
            if tokens > self.most:
                self.raised += 1
                raise torch.OutOfMemoryError("pretended")


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
def test_an_update_that_runs_out_of_memory_is_run_again_in_smaller_packs(
    tmp_path, tokenizer, in_backward
):
    rows = tiny.rows()
    rows[6]["chosen"] *= 4  # not in the first batch: what ran before it has to be kept
    common = {"rows": rows, "gradient_accumulation_steps": 2, "max_steps": 3}
    plain = make_trainer(tmp_path, tokenizer, **common)
    plain.train()
    trainer = make_trainer(tmp_path, tokenizer, max_tokens_per_forward="auto", **common)
    memory = RunsOutOfMemory(trainer.model, 190, in_backward)
    trainer.train()
    assert memory.raised and trainer.budget.max_tokens <= 190
    for name in ("loss", "grad_norm", "rewards/margins", "num_tokens"):
        assert logged(trainer, name) == pytest.approx(logged(plain, name), rel=1e-4, abs=1e-5), name
    for name, weight in weights(plain.model).items():
        torch.testing.assert_close(weights(trainer.model)[name], weight, rtol=0, atol=1e-5)


def test_memory_for_less_than_a_pair_ends_the_run(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, max_tokens_per_forward="auto")
    RunsOutOfMemory(trainer.model, 1, in_backward=False)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()


def test_a_budget_asked_for_by_number_is_kept(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, max_tokens_per_forward=100)
    RunsOutOfMemory(trainer.model, 60, in_backward=False)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert trainer.budget.max_tokens == 100


def test_batches_made_before_the_budget_shrank_are_laid_out_anew(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, max_tokens_per_forward="auto")
    inputs = next(iter(trainer.get_train_dataloader()))
    assert len(inputs["packs"]) == 1
    trainer.budget.max_tokens = 90
    packs = trainer._fitting(inputs)["packs"]
    assert len(packs) > 1 and all(pack["tokens"].run <= 90 for pack in packs)


TWO_RANKS = """
import json, os, sys
import tiny, torch
from datasets import Dataset
from fastdpo import DPOConfig, DPOTrainer

out, budget = sys.argv[1], json.loads(sys.argv[2])
tokenizer = tiny.tokenizer()
rows = tiny.rows()
rows[0]["chosen"] *= 6  # one rank has a long pair, and more packs than the other
trainer = DPOTrainer(
    model=tiny.model("llama", len(tokenizer)),
    args=DPOConfig(
        output_dir=out, max_steps=3, learning_rate=1e-3, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=8 // int(os.environ.get("WORLD_SIZE", 1)) // 2,
        max_tokens_per_forward=budget, train_sampling_strategy="sequential",
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
)
trainer.train()
if trainer.is_world_process_zero():
    print("LOGGED", json.dumps([e for e in trainer.state.log_history if "loss" in e]))
trainer.accelerator.wait_for_everyone()
sys.stdout.flush()
os._exit(0)  # gloo's threads now and then abort a process that tears them down
"""


def test_two_ranks_with_unequal_packs_train_as_one(tmp_path):
    def run(world_size, budget):
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parent),
            "OMP_NUM_THREADS": "1",
        }
        script = tmp_path / "train.py"
        script.write_text(TWO_RANKS)
        launcher = [sys.executable]
        if world_size > 1:
            launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={world_size}"]
            launcher += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        done = subprocess.run(
            [*launcher, str(script), str(tmp_path / "run"), budget],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        line = next(line for line in done.stdout.splitlines() if line.startswith("LOGGED"))
        return json.loads(line.removeprefix("LOGGED"))

    for ours, theirs in zip(run(2, "90"), run(1, "null"), strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "num_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
