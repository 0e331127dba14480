"""bench/other_process.py: a contender in an interpreter of its own, LLaMA-Factory's among them."""

import math
import os
import sys
from contextlib import closing
from dataclasses import replace
from textwrap import dedent

import pytest

from bench import contenders, step_race
from bench.measure import Seconds
from bench.other_process import OtherProcess
from bench.tasks import REAL_MODEL, task_of

# of LLaMA-Factory what llamafactory_steps.py imports, its trainer in a few lines
STAND_IN = {
    "__init__": "",
    "data": """
        import torch

        def get_template_and_fix_tokenizer(tokenizer, data_args):
            return data_args.template

        class PairwiseDataCollatorWithPadding:
            def __init__(self, *, pad_to_multiple_of, label_pad_token_id, tokenizer, **_):
                self.multiple = pad_to_multiple_of
                self.padding = {
                    "input_ids": tokenizer.pad_token_id,
                    "attention_mask": 0,
                    "labels": label_pad_token_id,
                }

            def __call__(self, features):
                longest = max(len(row[f"{s}_labels"]) for row in features for s in SIDES)
                length = -(-longest // self.multiple) * self.multiple

                def padded(name, value):
                    rows = [row[f"{side}_{name}"] for side in SIDES for row in features]
                    return torch.tensor([row + [value] * (length - len(row)) for row in rows])

                return {name: padded(name, value) for name, value in self.padding.items()}

        SIDES = ("chosen", "rejected")
        """,
    "hparams": """
        from types import SimpleNamespace as DataArguments, SimpleNamespace as FinetuningArguments
        """,
    "train": """
        import torch
        import torch.nn.functional as F
        from torch.utils.data import SequentialSampler
        from transformers import Trainer

        def logps(model, labels, **inputs):
            logps = model(**inputs).logits[:, :-1].log_softmax(-1)
            labels = labels[:, 1:, None]
            taken = logps.gather(2, labels.clamp(min=0)).where(labels >= 0, 0.0)
            return taken.sum((1, 2))

        class CustomDPOTrainer(Trainer):
            def __init__(self, *, ref_model, finetuning_args, processor, tokenizer, **arguments):
                super().__init__(processing_class=tokenizer, **arguments)
                self.reference, self.settings = ref_model, finetuning_args
                self.model_accepts_loss_kwargs = False

            def _get_train_sampler(self, dataset=None):
                assert self.settings.disable_shuffling
                return SequentialSampler(self.train_dataset)

            def compute_loss(self, model, inputs, **_):
                with torch.no_grad():
                    if self.reference is None:
                        with model.disable_adapter():
                            reference = logps(model, **inputs)
                    else:
                        reference = logps(self.reference, **inputs)
                chosen, rejected = (logps(model, **inputs) - reference).chunk(2)
                return -F.logsigmoid(self.settings.pref_beta * (chosen - rejected)).mean()
        """,
}


@pytest.fixture
def python(tmp_path):
    """An interpreter that has a package llamafactory."""
    package = tmp_path / "llamafactory"
    (package / "train" / "dpo").mkdir(parents=True)
    files = {"train": "train/dpo/trainer"}
    for name, source in STAND_IN.items():
        (package / f"{files.get(name, name)}.py").write_text(dedent(source))
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize("adapters", [True, False], ids=["lora", "full"])
def test_a_contender_in_another_process_trains_as_the_plain_loop(adapters, python, offline):
    task = task_of("tiny", adapters=adapters)
    naive = contenders.CONTENDERS["naive"](task)
    other = OtherProcess(task, "bench.llamafactory_steps", python=python)
    for _ in range(4):
        naive.step()
        taken = other.step()
        assert isinstance(taken, Seconds) and taken.cpu > 0
    other.close()
    step_race.assert_same_losses({"naive": naive.log, "other": other.log})


def test_a_contender_that_is_timed_has_a_process_of_its_own(offline):
    tiny = task_of("tiny", adapters=True)
    task = replace(tiny, model=REAL_MODEL, pairs=tiny.pairs[:3], batch=1)
    with closing(contenders.started("fastdpo, fastest", task)) as contender:
        assert contender.step().cpu > 0 and contender.pid != os.getpid()
        assert step_race.losses(contender.log) == [pytest.approx(math.log(2))]


def test_a_process_that_ends_is_no_contender(capfd):
    with pytest.raises(ChildProcessError, match="want .* to answer, got its end"):
        OtherProcess(task_of("tiny", adapters=True), "bench.no_such_module")
    assert "no_such_module" in capfd.readouterr().err
