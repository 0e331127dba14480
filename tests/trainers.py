"""Small trainers on the CPU, and what several tests ask of one."""

import peft
import pytest
import tiny
import torch
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers.integrations.peft import MIN_PEFT_VERSION

from fastdpo import DPOConfig, DPOTrainer

TRL_ARGUMENTS = [
    "model",
    "ref_model",
    "args",
    "data_collator",
    "train_dataset",
    "eval_dataset",
    "processing_class",
    "compute_metrics",
    "callbacks",
    "optimizers",
    "quantization_config",
    "peft_config",
]
LORA = {"r": 4, "lora_dropout": 0.0, "target_modules": "all-linear"}
TWO_BATCHES_IN_ORDER = {
    "train_sampling_strategy": "sequential",
    "gradient_accumulation_steps": 2,
}
BEST_OF_EVERY_STEP = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "load_best_model_at_end": True,
}


def rows_with_a_longer_one():
    """Batches of 221 and 243 tokens: the first has run when memory runs out in the second."""
    rows = tiny.rows()
    rows[6]["chosen"] *= 8
    return rows


def make_trainer(tmp_path, tokenizer, model=None, rows=None, kind=DPOTrainer, **settings):
    """A trainer of a tiny Llama on tiny.rows(), unless said otherwise; settings: arguments of
    `kind`, or of its DPOConfig."""
    arguments = {name: settings.pop(name) for name in list(settings) if name in TRL_ARGUMENTS}
    arguments.setdefault("train_dataset", Dataset.from_list(tiny.rows() if rows is None else rows))
    defaults = {
        "output_dir": tmp_path,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return kind(
        model=tiny.model("llama", len(tokenizer)) if model is None else model,
        args=DPOConfig(**(defaults | settings)),
        processing_class=tokenizer,
        **arguments,
    )


def with_transformers_adapter(model, name="default"):
    """`model` with an adapter that transformers put on it; the test is skipped where transformers
    wants a later peft than there is."""
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        pytest.skip(f"transformers wants peft {MIN_PEFT_VERSION}")
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(**LORA), name)
    return model


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class RunsOutOfMemory:
    """Raises CUDA's error where a forward has more tokens than fit, in forward or in backward."""

    def __init__(self, model, most, in_backward):
        self.most, self.raised, self.tokens = most, 0, []
        embedding = model.get_input_embeddings()
        if in_backward:
            embedding.register_full_backward_hook(lambda _, __, grads: self._check(grads[0]))
        else:
            embedding.register_forward_hook(lambda _, __, output: self._check(output))

    def _check(self, x_BTD):
        self.tokens.append(x_BTD.shape[0] * x_BTD.shape[1])
        if self.tokens[-1] > self.most:
            self.raised += 1
            raise torch.OutOfMemoryError("pretended")


def trained_before(tokenizer, peft_config, name="default"):
    """A model with adapters that are not what they were at their start."""
    model = get_peft_model(tiny.model("qwen2", len(tokenizer)), peft_config, adapter_name=name)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model
