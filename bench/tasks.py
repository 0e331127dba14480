"""What every contender of a comparison is given: a model, pairs of token ids, settings.

Nothing here is fastdpo's, so that a peer's own interpreter can run it (llamafactory_steps.py).
"""

import copy
import tempfile
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from bench.length_profiles import DATASETS, TINY, TYPICAL, Pair, random_pairs, real_pairs
from bench.measure import CUDA, DEVICE

PAD_ID, END_ID = 0, 1
BETA, LEARNING_RATE, MAX_GRAD_NORM = 0.1, 1e-3, 1.0
LORA_RANK = 16
WARMUP_STEPS, TIMED_STEPS = 2, 4
MODELS = {
    "tiny": LlamaConfig(
        vocab_size=997,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    ),
    "4 layers, D=256, V=32000": LlamaConfig(
        vocab_size=32000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
    ),
    "SmolLM2-135M": LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
    "Qwen2.5-0.5B": Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "Llama-3-8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        dtype="bfloat16",  # adapters on it are float32
    ),
}
LARGE_MODEL = "Llama-3-8B" if CUDA else "SmolLM2-135M"
REAL_MODEL = "Qwen2.5-0.5B" if CUDA else "4 layers, D=256, V=32000"


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """What every contender of one comparison does: a step on each B pairs in turn."""

    model: str
    pairs: list[Pair]
    batch: int
    adapters: bool

    @property
    def steps(self) -> int:
        return len(self.pairs) // self.batch

    @property
    def timed_steps(self) -> int:
        """All but the warm-up, and the last: it begins where the one before it ends."""
        return self.steps - WARMUP_STEPS - 1

    @property
    def timed_batches(self) -> list[list[Pair]]:
        first = WARMUP_STEPS * self.batch
        starts = range(first, first + self.timed_steps * self.batch, self.batch)
        return [self.pairs[start : start + self.batch] for start in starts]


def task_of(profile: str, *, adapters: bool, model: str = REAL_MODEL) -> Task:
    """The task of a length profile by its name, of "tiny" (a model too), or of "real pairs".

    Batches are of 8 pairs for chat, long prompt and short prompt, else of 4, as those of a large
    model on a CPU are. "real pairs" are the first of the data set, 28 in all.
    """
    steps = WARMUP_STEPS + TIMED_STEPS + 1
    if profile == "tiny":
        pairs = random_pairs(TINY, 4 * steps, vocab_size=MODELS["tiny"].vocab_size)
        return Task(model="tiny", pairs=pairs, batch=4, adapters=adapters)
    vocab_size = MODELS[model].vocab_size
    # fewer where the naive loop's logits or a deep model's activations would fill the memory
    batch = 8 if profile in TYPICAL and (CUDA or model == REAL_MODEL) else 4
    if profile == "real pairs":
        pairs = real_pairs(batch * steps, vocab_size=vocab_size)
    else:
        lengths = (TYPICAL | DATASETS)[profile]
        pairs = random_pairs(lengths, batch * steps, vocab_size=vocab_size)
    return Task(model=model, pairs=pairs, batch=batch, adapters=adapters)


def random_model(name: str) -> nn.Module:
    """A model of MODELS with random weights, always the same: float32, or its config's dtype."""
    torch.manual_seed(0)
    config = copy.deepcopy(MODELS[name])
    config.update({"pad_token_id": PAD_ID, "bos_token_id": None, "eos_token_id": END_ID})
    with DEVICE:  # drawing half a billion weights on a CPU is slow
        return AutoModelForCausalLM.from_config(config)


def lora() -> LoraConfig:
    return LoraConfig(r=LORA_RANK, target_modules="all-linear", lora_dropout=0.0)


def start_adapters_alike(model: nn.Module) -> None:
    """Give the first matrices of all adapters the same random values in every contender."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.normal_(std=parameter.shape[1] ** -0.5)


def random_policy(task: Task) -> nn.Module:
    """The task's random_model, with the adapters that it asks for."""
    policy = random_model(task.model)
    if task.adapters:
        policy = get_peft_model(policy, lora())
        start_adapters_alike(policy)
    return policy


def trainer_settings(task: Task) -> dict:
    """The TrainingArguments that all trainers share."""
    return {
        "output_dir": f"{tempfile.gettempdir()}/fastdpo-bench",  # nothing is saved
        "max_steps": task.steps,
        "per_device_train_batch_size": task.batch,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": MAX_GRAD_NORM,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,  # the losses of every step are compared
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": CUDA,
        "use_cpu": not CUDA,
    }


def word_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Token i is the word wi: any pair of token ids is a text, for trainers that take only text."""
    words = {f"w{i}": i for i in range(2, vocab_size)}
    tokenizer = Tokenizer(WordLevel({"<pad>": PAD_ID, "</s>": END_ID, **words}))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
