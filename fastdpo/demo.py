"""`fastdpo demo`: fit a small model, teach it a preference, and compare it with the naive way.

    fit (both directions) --> fitted/ --DPOTrainer--> trained/ --> score on held-out questions
                                     \\--naive loop--> the same losses, its time and memory

Each of the two runs in a process of its own, so that neither's time or memory is the other's.
"""

import argparse
import copy
import importlib.util
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from resource import RUSAGE_SELF, getpagesize, getrusage

import datasets
import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from fastdpo.config import DPOConfig
from fastdpo.data import prepare_pairs
from fastdpo.demo_task import Question, build_tokenizer, make_questions, preference_rows
from fastdpo.run_file import raise_error
from fastdpo.trainer import DPOTrainer

VOCABULARY = 4096  # rows of the embedding and the head; the task's words are a quarter of them
HELD_OUT = 100  # questions that no preference pair is made of
BATCH, LEARNING_RATE, BETA = 16, 2e-5, 0.1
SAME_LOSS = 1e-3  # how far the two runs' losses may be apart before their times mean nothing


@dataclass(frozen=True, slots=True)
class DemoSize:
    """How large a demo: of the model, and of its two trainings."""

    hidden_size: int
    fit_steps: int
    dpo_steps: int


FULL = DemoSize(hidden_size=256, fit_steps=280, dpo_steps=55)
TINY = DemoSize(hidden_size=32, fit_steps=3, dpo_steps=4)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The demo's flags, with their folder made; ValueError, OSError or ImportError, in one line,
    for what it cannot run with."""
    parser = argparse.ArgumentParser(prog="fastdpo demo", description="See DPO at work on a CPU.")
    parser.add_argument("--output_dir", type=Path, default=Path("demo_run"))
    parser.add_argument("--tiny", action="store_true", help="seconds, too short to learn anything")
    parser.add_argument("--measure", choices=[*MEASURED], help=argparse.SUPPRESS)
    parser.error = raise_error
    arguments = parser.parse_args(argv)
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the demo needs matplotlib: pip install 'fastdpo[demo]'")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Run the demo and print what it measured; 1 where the two ways disagree."""
    size = TINY if arguments.tiny else FULL
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    if arguments.measure:
        MEASURED[arguments.measure](arguments.output_dir, size)
        return 0
    return _demo(arguments.output_dir, size)


def _demo(folder: Path, size: DemoSize) -> int:
    start = time.perf_counter()
    print(
        "Fitting a small model to texts that count up, and twice as many that count down ...",
        flush=True,
    )
    tokenizer, model = fit(size)
    model.save_pretrained(folder / "fitted")
    tokenizer.save_pretrained(folder / "fitted")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"  {parameters:,} parameters, {time.perf_counter() - start:.0f} s")

    runs = {}
    for name, what in (("fastdpo", "DPO with fastdpo"), ("naive", "DPO with the naive loop")):
        print(f"{what}: {size.dpo_steps} updates of {BATCH} pairs ...", flush=True)
        command = [sys.executable, "-m", "fastdpo.cli", "demo", "--measure", name]
        command += ["--output_dir", str(folder), *(["--tiny"] if size is TINY else [])]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        runs[name] = json.loads((folder / f"{name}.json").read_text())
    apart = max(
        abs(ours - theirs)
        for ours, theirs in zip(runs["fastdpo"]["loss"], runs["naive"]["loss"], strict=True)
    )
    if apart > SAME_LOSS:
        print(f"The losses differ by up to {apart:.1e}: no times are compared.")
        return 1

    trained = AutoModelForCausalLM.from_pretrained(folder / "trained")
    answers = {
        "before": greedy_answers(tokenizer, model),
        "after": greedy_answers(tokenizer, trained),
    }
    print(_report(runs, answers, apart))
    plot(runs["fastdpo"], folder / "curves.png")
    print(f"\nCurves: {folder / 'curves.png'}   model: {folder / 'trained'}")
    print(f"All of it took {time.perf_counter() - start:.0f} s.")
    return 0


def held_out() -> list[Question]:
    return make_questions()[:HELD_OUT]


def train_rows(size: DemoSize) -> Dataset:
    """The pairs of all updates, in order; the questions come again when all were seen."""
    questions = make_questions()[HELD_OUT:]
    drawn = itertools.islice(itertools.cycle(questions), size.dpo_steps * BATCH)
    return Dataset.from_list(preference_rows(list(drawn)))


def fit(size: DemoSize) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """Tokenizer and a model fitted to answers in both directions, two wrong for each right one."""
    torch.manual_seed(0)
    draw = random.Random(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden_size,
        intermediate_size=2 * size.hidden_size,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model, questions = LlamaForCausalLM(config), make_questions()
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=size.fit_steps, pct_start=0.1
    )
    for _ in range(size.fit_steps):
        texts = [
            f"{question.prompt}{question.answer(draw.choice([1, -1, -1]))} {tokenizer.eos_token}"
            for question in draw.choices(questions, k=96)
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return tokenizer, model.eval()


def greedy_answers(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> list[str]:
    """What the model answers to each held-out question, always taking its likeliest word."""
    prompts = [question.prompt for question in held_out()]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    tokens = model.eval().generate(**batch, max_new_tokens=10, do_sample=False)
    answers = tokens[:, batch["input_ids"].shape[1] :]
    return [" ".join(tokenizer.decode(each, skip_special_tokens=True).split()) for each in answers]


def measure_fastdpo(folder: Path, size: DemoSize) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "fitted")
    trainer = DPOTrainer(
        model=str(folder / "fitted"),
        args=DPOConfig(
            output_dir=str(folder / "trained"),
            per_device_train_batch_size=BATCH,
            max_steps=size.dpo_steps,
            learning_rate=LEARNING_RATE,
            beta=BETA,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=train_rows(size),
        eval_dataset=Dataset.from_list(preference_rows(held_out())),
        processing_class=tokenizer,
    )
    before = trainer.evaluate()
    measured = _measured(trainer.train)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("loss", "rewards/margins", "rewards/accuracies")
    measured |= {name: [step[name] for step in steps] for name in names}
    accuracy = "eval_rewards/accuracies"
    measured |= {"before": before[accuracy], "after": trainer.evaluate()[accuracy]}
    trainer.save_model()
    (folder / "fastdpo.json").write_text(json.dumps(measured))


def measure_naive(folder: Path, size: DemoSize) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "fitted")
    policy = AutoModelForCausalLM.from_pretrained(folder / "fitted")
    reference = copy.deepcopy(policy).eval()
    rows = list(prepare_pairs(train_rows(size), tokenizer)[0])
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    losses = []
    measured = _measured(
        lambda: losses.extend(naive_training(policy, reference, batches, tokenizer.pad_token_id))
    )
    (folder / "naive.json").write_text(json.dumps(measured | {"loss": losses}))


MEASURED = {"fastdpo": measure_fastdpo, "naive": measure_naive}


def _measured(run) -> dict[str, float]:
    """Wall seconds of `run()`, and how far it takes the process's memory beyond what it found."""
    found = getpagesize() * int(Path("/proc/self/statm").read_text().split()[1])  # resident
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    peak = 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "peak_mib": max(0, peak - found) / 2**20}


def naive_training(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    batches: list[list[dict]],
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


def naive_logps(
    model: PreTrainedModel, batch: list[dict], side: str, pad_token_id: int
) -> torch.Tensor:
    """Summed log-probability of each completion: (B,)."""
    ids = [torch.tensor(row["prompt_ids"] + row[side]) for row in batch]
    starts = torch.tensor([[len(row["prompt_ids"])] for row in batch])
    ends = torch.tensor([[len(each)] for each in ids])
    ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_token_id)
    positions = torch.arange(ids.shape[1])
    logits = model(input_ids=ids, attention_mask=(positions < ends).long()).logits.float()
    logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return (logps * ((positions >= starts) & (positions < ends))[:, 1:]).sum(1)


def _report(runs: dict, answers: dict[str, list[str]], apart: float) -> str:
    questions = held_out()
    right = {
        when: sum(q.is_right(a) for q, a in zip(questions, given, strict=True)) / len(questions)
        for when, given in answers.items()
    }
    ours, naive = runs["fastdpo"], runs["naive"]
    lines = ["", f"On {len(questions)} held-out questions        before     after"]
    lines.append(f"  reward accuracy             {ours['before']:8.0%}  {ours['after']:8.0%}")
    lines.append(f"  counted up, exactly         {right['before']:8.0%}  {right['after']:8.0%}")
    lines.append("  (before DPO no completion has a reward yet, so none is higher)")
    lines.append("")
    for question, before, after in list(zip(questions, *answers.values(), strict=True))[:3]:
        lines += [f"  {question.prompt}", f"      before  {before}", f"      after   {after}"]
    lines += ["", "The same batches, each in its own process"]
    lines.append("                                 fastdpo     naive   naive / fastdpo")
    for name, label in (("seconds", "wall time, s"), ("peak_mib", "memory over the start, MiB")):
        a, b = ours[name], naive[name]
        ratio = f"{b / a:.2f}" if a else "-"
        lines.append(f"  {label:<28} {a:9.1f} {b:9.1f}   {ratio}")
    lines.append(f"  loss, first and last         {ours['loss'][0]:.4f} {ours['loss'][-1]:.4f}")
    lines.append(f"  largest difference of a loss {apart:.1e}")
    return "\n".join(lines)


def plot(run: dict, path: Path) -> None:
    """Loss, margin and accuracy of each update, one under the other, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = {"loss": "loss", "rewards/margins": "reward margin", "rewards/accuracies": "accuracy"}
    figure, axes = pyplot.subplots(len(curves), sharex=True, figsize=(7, 7), layout="constrained")
    for axis, (name, label) in zip(axes, curves.items(), strict=True):
        axis.plot(range(1, len(run[name]) + 1), run[name], color="tab:blue")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_title("DPO on the demo's training pairs")
    axes[-1].set_xlabel("update")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
