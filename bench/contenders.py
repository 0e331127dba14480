"""Who takes part in a comparison of training steps: same model, pairs, seed, optimizer, precision.

    CONTENDERS[name](task) -> an object with step(), log and close()
    started(name, task)    -> the same, where it is to be timed

LLaMA-Factory takes part where LLAMAFACTORY_PYTHON names an interpreter that has it, as it wants
older versions of transformers, TRL and PEFT than fastdpo (llamafactory_steps.py).

TRL runs as it comes, at its fastest, and on a GPU with Liger's layers too. On a CPU its head scores
every position, prompts and padding too, where a GPU's scores the completions alone; no setting
changes that, so there it runs a third time, with that decision replaced. What makes it faster is
gradient_checkpointing=False and, on a GPU, use_liger_kernel. Its other candidates: padding_free is
ignored by 1.16, its head is always the chunked one, model_init_kwargs={"use_kernels": True} is for
models loaded by name and fetches its kernels over the network, flash_attention_2 (which would leave
padding out of its attention) wants a package of its own, precompute_ref_log_probs takes work
out of the step instead of doing it faster (bench_train_step.py gives that question a test of its
own), and torch_compile took 3 to 10 % off its steps on a CPU after 41 s of compiling (4 layers,
D=256, V=32000, chat, LoRA, 2 pairs a step), which a race of four steps leaves out.
"""

import os
import sys
from collections.abc import Callable
from importlib.util import find_spec

import torch
from datasets import Dataset, disable_progress_bars
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, Trainer, TrainingArguments

from bench.length_profiles import Pair
from bench.measure import CUDA
from bench.naive_loop import NaiveLoop, padded
from bench.other_process import OtherProcess, serve
from bench.stepped_trainer import SteppedTrainer
from bench.tasks import (
    BETA,
    END_ID,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    MODELS,
    PAD_ID,
    Task,
    lora,
    random_model,
    random_policy,
    start_adapters_alike,
    trainer_settings,
    word_tokenizer,
)
from fastdpo import DPOConfig, DPOTrainer

disable_progress_bars()
LLAMAFACTORY_PYTHON = os.environ.get("LLAMAFACTORY_PYTHON")


def _as_text(pairs: list[Pair]) -> Dataset:
    """Rows of text; the trainers end each completion with </s>."""
    names = ("prompt", "chosen", "rejected")
    rows = [{n: "".join(f" w{i}" for i in pair[f"{n}_ids"]) for n in names} for pair in pairs]
    return Dataset.from_list(rows)


def naive(task: Task) -> NaiveLoop:
    B = task.batch
    return NaiveLoop(
        random_policy(task),
        [task.pairs[i * B : (i + 1) * B] for i in range(task.steps)],
        optimizer=lambda trained: torch.optim.AdamW(
            trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True
        ),
        beta=BETA,
        max_grad_norm=MAX_GRAD_NORM,
        autocast=CUDA,
        pad_id=PAD_ID,
        end_id=END_ID,
    )


def _dpo(
    library_trainer: type, library_config: type, ref_model: nn.Module | None, task: Task, **settings
):
    trainer = library_trainer(
        model=random_model(task.model),
        ref_model=ref_model,
        args=library_config(**trainer_settings(task), beta=BETA, max_length=None, **settings),
        train_dataset=_as_text(task.pairs),
        processing_class=word_tokenizer(MODELS[task.model].vocab_size),
        peft_config=lora() if task.adapters else None,
    )
    start_adapters_alike(trainer.model)
    return SteppedTrainer(trainer)


def fastdpo(task: Task, **settings) -> SteppedTrainer:
    return _dpo(DPOTrainer, DPOConfig, None, task, **settings)


def trl(task: Task, **settings) -> SteppedTrainer:
    from trl import DPOConfig, DPOTrainer

    # without one TRL reads the policy's folder again, and this policy has none
    ref_model = None if task.adapters else random_model(task.model)
    return _dpo(DPOTrainer, DPOConfig, ref_model, task, **settings)


class Replacing:
    """A trainer during whose steps a module has others of its functions and classes.

    Between them it has its own: other contenders never see the others.
    """

    def __init__(self, stepped: SteppedTrainer, module: dict, others: dict):
        self._stepped, self._module, self._others = stepped, module, others
        self._own = {name: module[name] for name in others}
        self.log = stepped.log

    def step(self) -> None:
        self._module.update(self._others)
        self._stepped.step()
        self._module.update(self._own)

    def close(self) -> None:
        self._stepped.close()


def trl_with_liger(task: Task) -> Replacing:
    """TRL at its fastest with Liger's layers, which Liger puts in place for all models at once."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(MODELS[task.model])]
    module = vars(sys.modules[model_class.__module__])
    before = dict(module)
    stepped = trl(task, **FASTEST, use_liger_kernel=True)
    ligers = {name: x for name, x in module.items() if x is not before.get(name)}
    module.update({name: before[name] for name in ligers})
    return Replacing(stepped, module, ligers)


def trl_of_completions(task: Task) -> Replacing:
    """TRL at its fastest on a CPU, its head told to leave out what is no completion."""
    from trl.trainer import utils

    return Replacing(trl(task, **FASTEST), vars(utils), {"_use_triton": lambda device: True})


def supervised(task: Task) -> SteppedTrainer:
    """transformers' own trainer on the same 2B padded sequences: cross-entropy of completions."""

    def collate(pairs: list[Pair]) -> dict:
        batch = padded(pairs, PAD_ID, END_ID)
        is_completion = batch.pop("completion_mask").bool()
        return batch | {"labels": batch["input_ids"].masked_fill(~is_completion, -100)}

    args = TrainingArguments(**trainer_settings(task), remove_unused_columns=False)
    dataset = Dataset.from_list(task.pairs)
    model = random_policy(task)
    return SteppedTrainer(Trainer(model, args, data_collator=collate, train_dataset=dataset))


def llamafactory(task: Task) -> OtherProcess:
    return OtherProcess(task, "bench.llamafactory_steps", python=LLAMAFACTORY_PYTHON)


def _with(contender: Callable, **settings) -> Callable:
    return lambda task: contender(task, **settings)


FASTEST = {"gradient_checkpointing": False}
LAYOUTS = {f"fastdpo, {name}": {"layout": name} for name in ("shared", "packed", "padded")}
CONTENDERS: dict[str, Callable] = {
    "naive": naive,
    "fastdpo": fastdpo,
    "fastdpo, fastest": _with(fastdpo, **FASTEST),
    "fastdpo, reference precomputed": _with(fastdpo, **FASTEST, precompute_ref_log_probs=True),
    **{name: _with(fastdpo, **FASTEST, **layout) for name, layout in LAYOUTS.items()},
    "supervised": supervised,
}
if LLAMAFACTORY_PYTHON:
    CONTENDERS["LLaMA-Factory"] = llamafactory
PEERS: dict[str, Callable] = {}
if find_spec("trl"):
    PEERS |= {"TRL": trl, "TRL, fastest": _with(trl, **FASTEST)}
    if not CUDA:
        PEERS["TRL, fastest, completions alone"] = trl_of_completions
    elif find_spec("liger_kernel"):
        PEERS["TRL, fastest, Liger's layers"] = trl_with_liger
CONTENDERS |= PEERS


def started(name: str, task: Task):
    """The contender, on a CPU in a process of its own: what fresh pages cost then depends on no
    other's memory. (A tiny model has no large tensors.)"""
    if CUDA or task.model == "tiny" or name == "LLaMA-Factory":
        return CONTENDERS[name](task)
    return OtherProcess(task, "bench.contenders", name)


if __name__ == "__main__":
    serve(CONTENDERS[sys.argv[1]])
