"""`fastdpo demo`: fit a small model, teach it a preference, and race the naive way.

    fit (both directions) --DPOTrainer--> trained/ --> score on held-out questions

Then the same updates run with fastdpo and with the naive loop: demo_race.py.
"""

import argparse
import importlib.util
import itertools
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    PrinterCallback,
)

from fastdpo import demo_race
from fastdpo.demo_task import Question, build_tokenizer, make_questions, preference_rows
from fastdpo.run_file import raise_error
from fastdpo.trainer import DPOTrainer

VOCABULARY = 4096  # rows of the embedding and the head; the task's words are a quarter of them
HELD_OUT = 100  # questions that no preference pair is made of
BATCH = 16


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
    parser.add_argument("--race", choices=[*demo_race.WAYS], help=argparse.SUPPRESS)
    parser.error = raise_error
    arguments = parser.parse_args(argv)
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the demo needs matplotlib: pip install 'fastdpo[demo]'")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Run the demo and print what it measured; 1 where the two ways disagree."""
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    race_size = demo_race.TINY if arguments.tiny else demo_race.FULL
    if arguments.race:  # one way's process
        demo_race.WAYS[arguments.race](arguments.output_dir, race_size)
        return 0
    start = time.perf_counter()
    _learn(arguments.output_dir, TINY if arguments.tiny else FULL)
    updates, pairs = race_size.updates, demo_race.BATCH
    print(f"\n{updates} updates of {pairs} pairs of a chat's lengths, both ways ...", flush=True)
    if not demo_race.race(arguments.output_dir, race_size):
        return 1
    print(f"\nAll of it took {time.perf_counter() - start:.0f} s.")
    return 0


def _learn(folder: Path, size: DemoSize) -> None:
    """Fit a model, train it with DPO, and print what it answered before and after."""
    start = time.perf_counter()
    print(
        "Fitting a small model to texts that count up, and twice as many that count down ...",
        flush=True,
    )
    tokenizer, model = fit(size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"  {parameters:,} parameters, {time.perf_counter() - start:.0f} s")
    answers_before = greedy_answers(tokenizer, model)
    trainer = make_trainer(folder / "trained", model, tokenizer, size)
    accuracy = "eval_rewards/accuracies"
    before = trainer.evaluate()[accuracy]
    start = time.perf_counter()
    print(f"DPO with fastdpo: {size.dpo_steps} updates of {BATCH} pairs ...", flush=True)
    trainer.train()
    print(f"  {time.perf_counter() - start:.0f} s")
    after = trainer.evaluate()[accuracy]
    trainer.save_model()
    print(_report((before, answers_before), (after, greedy_answers(tokenizer, model))))
    plot([entry for entry in trainer.state.log_history if "loss" in entry], folder / "curves.png")
    print(f"\nCurves: {folder / 'curves.png'}   model: {folder / 'trained'}")


def held_out() -> list[Question]:
    return make_questions()[:HELD_OUT]


def train_rows(size: DemoSize) -> Dataset:
    """The pairs of all updates, in order; the questions come again when all were seen."""
    questions = make_questions()[HELD_OUT:]
    drawn = itertools.islice(itertools.cycle(questions), size.dpo_steps * BATCH)
    return Dataset.from_list(preference_rows(list(drawn)))


def make_trainer(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, size: DemoSize
) -> DPOTrainer:
    trainer = DPOTrainer(
        model=model,
        args=demo_race.short_run(
            folder,
            per_device_train_batch_size=BATCH,
            max_steps=size.dpo_steps,
            learning_rate=2e-5,
        ),
        train_dataset=train_rows(size),
        eval_dataset=Dataset.from_list(preference_rows(held_out())),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)  # a dictionary for each update
    return trainer


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


def _report(before: tuple[float, list[str]], after: tuple[float, list[str]]) -> str:
    """Of each the reward accuracy, and the answers to held_out's questions."""
    questions = held_out()
    (accuracy_before, answers_before), (accuracy_after, answers_after) = before, after

    def right(answers: list[str]) -> float:
        return sum(q.is_right(a) for q, a in zip(questions, answers, strict=True)) / len(questions)

    lines = ["", f"On {len(questions)} held-out questions        before     after"]
    lines.append(f"  reward accuracy             {accuracy_before:8.0%}  {accuracy_after:8.0%}")
    lines.append(
        f"  counted up, exactly         {right(answers_before):8.0%}  {right(answers_after):8.0%}"
    )
    lines.append("  (before DPO no completion has a reward yet, so none is higher)")
    lines.append("")
    for question, a, b in list(zip(questions, answers_before, answers_after, strict=True))[:3]:
        lines += [f"  {question.prompt}", f"      before  {a}", f"      after   {b}"]
    return "\n".join(lines)


def plot(steps: list[dict[str, float]], path: Path) -> None:
    """Loss, margin and accuracy of each update, one under the other, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    curves = {"loss": "loss", "rewards/margins": "reward margin", "rewards/accuracies": "accuracy"}
    figure, axes = pyplot.subplots(len(curves), sharex=True, figsize=(7, 7), layout="constrained")
    for axis, (name, label) in zip(axes, curves.items(), strict=True):
        axis.plot([step["step"] for step in steps], [step[name] for step in steps])
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_title("DPO on the demo's training pairs")
    axes[-1].set_xlabel("update")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
