"""The flags of a run, those of `trl dpo`, and what DPOTrainer takes for those of the model.

ModelConfig --peft_config, quantization_config, init_kwargs--> what DPOTrainer takes
"""

import os
from dataclasses import dataclass
from types import UnionType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from peft import LoraConfig
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from fastdpo.config import DPOConfig
from fastdpo.setting import setting


@dataclass
class ScriptArguments:
    """One dataset by its name, in place of `datasets` in a YAML file."""

    dataset_name: str | None = setting(
        None, "Preference rows: a file, a folder, or a dataset on the Hub."
    )
    dataset_config: str | None = setting(None, "Which configuration of the dataset.")
    dataset_train_split: str = setting("train", "The split to train on.")
    dataset_test_split: str = setting("test", "The split to evaluate on, where eval_strategy asks.")
    dataset_streaming: bool = setting(False, "Read the rows while training instead of before.")
    ignore_bias_buffers: bool = setting(
        False, "Leave boolean buffers out of DDP's broadcasts (old models' causal masks)."
    )


@dataclass
class DatasetConfig:
    """One dataset of a mixture: what `datasets.load_dataset` takes, then which part to keep."""

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    split: str = "train"
    columns: list[str] | None = None  # None: all
    fraction: float | None = None  # this dataset's share of the mixture


@dataclass
class DatasetMixtureConfig:
    """Several datasets, one after the other, from a YAML file's `datasets:`."""

    datasets: list[DatasetConfig] = setting(
        [],
        "Several datasets instead of dataset_name: in a YAML file a list of mappings with path "
        "and, where needed, name, data_dir, data_files, split, columns, fraction.",
    )
    streaming: bool = setting(False, "As dataset_streaming, for `datasets`.")
    test_split_size: float | None = setting(
        None, "Rows of the mixture held out for evaluation: a share below 1, or a count."
    )

    def __post_init__(self):
        if not isinstance(self.datasets, list):
            raise ValueError(f"want a list as datasets, got {self.datasets!r}")
        self.datasets = [_dataset_config(each) for each in self.datasets]


def _dataset_config(entry: DatasetConfig | dict[str, Any]) -> DatasetConfig:
    if isinstance(entry, DatasetConfig):
        return entry
    if not isinstance(entry, dict):
        raise ValueError(f"datasets: want mappings with a path, got {entry!r}")
    names = DatasetConfig.__dataclass_fields__
    unknown = [name for name in entry if name not in names]
    if unknown or entry.get("path", "") == "":
        others = [name for name in entry if name != "path"]
        got = f"unknown {unknown}" if unknown else f"no path, only {others}"
        raise ValueError(f"datasets: want path and any of {list(names)[1:]}, got {got}")
    for name, hint in get_type_hints(DatasetConfig).items():
        if name in entry and not _is_a(entry[name], hint):
            kind = hint if isinstance(hint, UnionType) else hint.__name__
            raise ValueError(f"datasets: want {name} as {kind}, got {entry[name]!r}")
    return DatasetConfig(**entry)


def _is_a(value: Any, hint: Any) -> bool:
    """Whether `value` is of a type such as DatasetConfig's fields have."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if isinstance(value, list):
        return list[str] in kinds and all(isinstance(each, str) for each in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return float in kinds
    return any(isinstance(value, get_origin(kind) or kind) for kind in kinds)


@dataclass
class ModelConfig:
    """The policy, its adapters and its quantisation. ValueError for what cannot be, such as 8
    and 4 bits at once."""

    model_name_or_path: str | None = setting(None, "The policy: a folder or a model on the Hub.")
    model_revision: str = setting("main", "Branch, tag or commit of the model on the Hub.")
    dtype: str | None = setting(
        "float32",
        "The dtype the weights are loaded in; auto: as they were saved.",
        choices=["auto", "bfloat16", "float16", "float32"],
    )
    attn_implementation: str | None = setting(None, "The attention transformers is to use.")
    use_peft: bool = setting(False, "Train LoRA adapters and leave the model as it is.")
    lora_r: int = setting(16, "Rank of the adapters.")
    lora_alpha: int = setting(32, "Adapter outputs are scaled by lora_alpha / lora_r.")
    lora_dropout: float = setting(0.05, "Dropout before the adapters (disable_dropout wins).")
    lora_target_modules: list[str] | None = setting(
        None,
        "Layers that get an adapter; all-linear, or one pattern of whole names such as .*q_proj; "
        "unset: peft's choice for the model.",
    )
    lora_target_parameters: list[str] | None = setting(
        None, "Parameters that get an adapter where they belong to no linear layer (experts)."
    )
    lora_modules_to_save: list[str] | None = setting(None, "Layers to train whole, and save.")
    lora_task_type: str = setting("CAUSAL_LM", "peft's name of the task.")
    use_rslora: bool = setting(
        False, "Scale adapter outputs by lora_alpha / sqrt(lora_r) (arXiv:2312.03732)."
    )
    use_dora: bool = setting(False, "Train magnitude apart from direction (arXiv:2402.09353).")
    load_in_8bit: bool = setting(False, "Quantise the frozen model to 8 bits.")
    load_in_4bit: bool = setting(False, "Quantise the frozen model to 4 bits (QLoRA).")
    bnb_4bit_quant_type: str = setting("nf4", "The 4-bit number format.", choices=["fp4", "nf4"])
    use_bnb_nested_quant: bool = setting(False, "Quantise the 4-bit scales too.")
    bnb_4bit_quant_storage: str | None = setting(None, "The dtype 4-bit weights are stored in.")

    def __post_init__(self):
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("want load_in_8bit or load_in_4bit, got both")
        if self.model_name_or_path is not None:
            self.model_name_or_path = os.path.expanduser(self.model_name_or_path)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"want lora_dropout in [0, 1), got {self.lora_dropout}")
        if isinstance(self.lora_target_modules, list) and len(self.lora_target_modules) == 1:
            self.lora_target_modules = self.lora_target_modules[0]  # all-linear, or a pattern


class RunArguments(NamedTuple):
    """All that flags and YAML say of a run."""

    script: ScriptArguments
    training: DPOConfig
    model: ModelConfig
    mixture: DatasetMixtureConfig


def peft_config(model_args: ModelConfig) -> LoraConfig | None:
    """The adapters that `model_args` ask for; None without use_peft."""
    if not model_args.use_peft:
        return None
    return LoraConfig(
        task_type=model_args.lora_task_type,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
    )


def check_layers_named(model: nn.Module, model_args: ModelConfig) -> None:
    """ValueError for a layer that the flags name for an adapter, or to be saved, and `model` has
    not: peft leaves it out."""
    names = {
        "lora_target_modules": getattr(model.base_model, "targeted_module_names", []),
        "lora_modules_to_save": [
            name for name, each in model.named_modules() if isinstance(each, ModulesToSaveWrapper)
        ],
    }
    for flag, found in names.items():
        wanted = getattr(model_args, flag)
        for name in wanted if isinstance(wanted, list) else ():
            if not any(f".{each}".endswith(f".{name}") for each in found):
                raise ValueError(f"want {flag} of layers that the model has, got {name!r}")


def init_kwargs(training_args: DPOConfig, model_args: ModelConfig) -> dict[str, Any]:
    """What both have to say to `from_pretrained`."""
    return {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }


def quantization_config(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """How `model_args` quantise the model; None for not at all.

    ValueError where bitsandbytes is not installed, or 4-bit products have no dtype to run in.
    """
    if not (model_args.load_in_4bit or model_args.load_in_8bit):
        return None
    if not is_bitsandbytes_available():
        raise ValueError(
            "load_in_4bit and load_in_8bit need bitsandbytes: pip install bitsandbytes"
        )
    if model_args.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if model_args.dtype == "auto":
        raise ValueError("want a dtype other than auto with load_in_4bit: its products run in it")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=model_args.dtype,
        bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model_args.bnb_4bit_quant_storage,
    )
