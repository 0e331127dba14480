"""The demo's race: the same updates with fastdpo and with the loop that one writes first.

A random model, and random tokens whose lengths differ as those of chats do. Each way runs in a
process of its own, so that neither's time or memory is the other's.
"""

import copy
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from fastdpo.config import DPOConfig
from fastdpo.demo_task import SPECIAL, build_tokenizer
from fastdpo.trainer import DPOTrainer

BATCH, LEARNING_RATE, BETA = 4, 1e-5, 0.1
PROMPT_MEDIAN, COMPLETION_MEDIAN = 31, 71  # tokens
SIGMA, LONGEST = 0.7, 256  # of the lengths' logarithms, and the most tokens of either
SAME_LOSS = 1e-3  # how far the two ways' losses may be apart before their times mean nothing

Pair = dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class RaceSize:
    """How large the model is, and how many updates it takes."""

    hidden_size: int
    vocabulary: int
    updates: int


FULL = RaceSize(hidden_size=256, vocabulary=32000, updates=10)
TINY = RaceSize(hidden_size=32, vocabulary=2000, updates=2)


def race(folder: Path, size: RaceSize) -> bool:
    """Run both ways and print their time and memory; False, and neither, where losses differ."""
    ways = {}
    for name in WAYS:
        command = [sys.executable, "-m", "fastdpo.cli", "demo", "--race", name]
        command += ["--output_dir", str(folder), *(["--tiny"] if size is TINY else [])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        ways[name] = json.loads((folder / f"{name}.json").read_text())
    ours, naive = ways["fastdpo"], ways["naive"]
    losses = (torch.tensor(way["loss"], dtype=torch.float64) for way in (ours, naive))
    apart = torch.sub(*losses).abs().max().item()
    if not apart <= SAME_LOSS:  # NaN must not pass
        print(f"The losses differ by up to {apart:.1e}: no times are compared.")
        return False
    print("                                 fastdpo     naive   naive / fastdpo")
    for name, label in (("seconds", "wall time, s"), ("peak_mib", "memory over the start, MiB")):
        a, b = ours[name], naive[name]
        ratio = f"{b / a:.2f}" if a else "-"
        print(f"  {label:<28} {a:9.1f} {b:9.1f}   {ratio}")
    print(f"  loss, first and last         {ours['loss'][0]:.4f} {ours['loss'][-1]:.4f}")
    print(f"  largest difference of a loss {apart:.1e}")
    return True


def random_pairs(tokenizer: PreTrainedTokenizerFast, count: int) -> list[Pair]:
    """`count` pairs of token ids, always the same; their lengths are log-normal."""
    draw, ids = random.Random(0), range(len(SPECIAL), len(tokenizer))

    def tokens(median: int) -> list[int]:
        length = round(draw.lognormvariate(math.log(median), SIGMA))
        return draw.choices(ids, k=min(max(length, 1), LONGEST))

    return [
        {
            "prompt_ids": tokens(PROMPT_MEDIAN),
            "chosen_ids": tokens(COMPLETION_MEDIAN),
            "rejected_ids": tokens(COMPLETION_MEDIAN),
        }
        for _ in range(count)
    ]


def random_model(size: RaceSize) -> LlamaForCausalLM:
    """A Llama of four layers, always the same."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden_size,
        intermediate_size=2 * size.hidden_size,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=2 * LONGEST,
    )
    return LlamaForCausalLM(config)


def short_run(folder: Path, **settings: Any) -> DPOConfig:
    """A few updates on the CPU, in the rows' order, with a log of each and no checkpoint."""
    return DPOConfig(
        output_dir=str(folder),
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )


def run_fastdpo(folder: Path, size: RaceSize) -> None:
    """Write the loss of each update, the time and the memory into fastdpo.json."""
    tokenizer = build_tokenizer()
    trainer = DPOTrainer(
        model=random_model(size),
        args=short_run(
            folder / "race",
            per_device_train_batch_size=BATCH,
            max_steps=size.updates,
            learning_rate=LEARNING_RATE,
            beta=BETA,
        ),
        train_dataset=Dataset.from_list(random_pairs(tokenizer, size.updates * BATCH)),
        processing_class=tokenizer,
    )
    measured = _measured(trainer.train)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (folder / "fastdpo.json").write_text(json.dumps(measured | {"loss": losses}))


def run_naive(folder: Path, size: RaceSize) -> None:
    """The same into naive.json."""
    tokenizer, policy = build_tokenizer(), random_model(size)
    reference = copy.deepcopy(policy).eval()
    pairs = random_pairs(tokenizer, size.updates * BATCH)
    batches = [pairs[i : i + BATCH] for i in range(0, len(pairs), BATCH)]
    losses = []
    measured = _measured(
        lambda: losses.extend(naive_training(policy, reference, batches, tokenizer.pad_token_id))
    )
    (folder / "naive.json").write_text(json.dumps(measured | {"loss": losses}))


WAYS = {"fastdpo": run_fastdpo, "naive": run_naive}


def _measured(run: Callable[[], object]) -> dict[str, float]:
    """Wall seconds of `run()`, and how far it takes the process's memory beyond what it found."""
    found = _resident_mib("VmRSS")
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mib": _resident_mib("VmHWM") - found}


def _resident_mib(field: str) -> float:
    """Memory of this process by Linux's name: VmRSS now, VmHWM at most so far.

    (getrusage's ru_maxrss is at least what the process that started this one had.)
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def naive_training(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    batches: list[list[Pair]],
    pad_token_id: int,
) -> list[float]:
    """DPO as the paper writes it: full logits, padding, a forward for each side of each model."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    policy.train()
    losses = []
    for batch in batches:
        margins = []
        for side in ("chosen_ids", "rejected_ids"):
            logps = naive_logps(policy, batch, side, pad_token_id)
            with torch.no_grad():
                reference_logps = naive_logps(reference, batch, side, pad_token_id)
            margins.append(BETA * (logps - reference_logps))
        loss = -nn.functional.logsigmoid(margins[0] - margins[1]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def naive_logps(model: PreTrainedModel, batch: list[Pair], side: str, pad_token_id: int) -> Tensor:
    """Summed log-probability of each completion: (B,)."""
    ids = [torch.tensor(pair["prompt_ids"] + pair[side]) for pair in batch]
    starts = torch.tensor([[len(pair["prompt_ids"])] for pair in batch])
    ends = torch.tensor([[len(each)] for each in ids])
    ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_token_id)
    positions = torch.arange(ids.shape[1])
    logits = model(input_ids=ids, attention_mask=(positions < ends).long()).logits.float()
    logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return (logps * ((positions >= starts) & (positions < ends))[:, 1:]).sum(1)
