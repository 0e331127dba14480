"""The flags of `fastdpo train`, which are those of `trl dpo`: names, defaults, YAML files.

command line, YAML --TrainParser--> ScriptArguments, DPOConfig, ModelConfig, DatasetMixtureConfig
ScriptArguments, DatasetMixtureConfig --load_datasets--> preference rows
ModelConfig --peft_config, quantization_config, init_kwargs--> what DPOTrainer takes
"""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import LoraConfig
from transformers import BitsAndBytesConfig, HfArgumentParser
from transformers.utils import is_bitsandbytes_available

from fastdpo.config import DPOConfig
from fastdpo.rows import load_rows

Rows = Dataset | IterableDataset


def _flag(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class ScriptArguments:
    """One dataset by its name. `datasets` in a YAML file takes its place."""

    dataset_name: str | None = _flag(
        None, "Preference rows: a file, a folder, or a dataset on the Hub."
    )
    dataset_config: str | None = _flag(None, "Which configuration of the dataset.")
    dataset_train_split: str = _flag("train", "The split to train on.")
    dataset_test_split: str = _flag("test", "The split to evaluate on, where eval_strategy asks.")
    dataset_streaming: bool = _flag(False, "Read the rows while training instead of before.")
    ignore_bias_buffers: bool = _flag(
        False, "Leave boolean buffers out of DDP's broadcasts (old models' causal masks)."
    )


@dataclass
class ModelConfig:
    """The policy, its adapters and its quantisation. ValueError for 8 and 4 bits at once."""

    model_name_or_path: str | None = _flag(None, "The policy: a folder or a model on the Hub.")
    model_revision: str = _flag("main", "Branch, tag or commit of the model on the Hub.")
    dtype: str | None = _flag(
        "float32",
        "The dtype the weights are loaded in; auto: as they were saved.",
        choices=["auto", "bfloat16", "float16", "float32"],
    )
    attn_implementation: str | None = _flag(None, "The attention transformers is to use.")
    use_peft: bool = _flag(False, "Train LoRA adapters and leave the model as it is.")
    lora_r: int = _flag(16, "Rank of the adapters.")
    lora_alpha: int = _flag(32, "Adapters count lora_alpha / lora_r.")
    lora_dropout: float = _flag(0.05, "Dropout before the adapters (disable_dropout wins).")
    lora_target_modules: list[str] | None = _flag(
        None, "Layers that get an adapter, or all-linear; unset: peft's choice for the model."
    )
    lora_target_parameters: list[str] | None = _flag(
        None, "Parameters that get an adapter where they belong to no linear layer (experts)."
    )
    lora_modules_to_save: list[str] | None = _flag(None, "Layers to train whole, and save.")
    lora_task_type: str = _flag("CAUSAL_LM", "peft's name of the task.")
    use_rslora: bool = _flag(False, "Adapters count lora_alpha / sqrt(lora_r) (arXiv:2312.03732).")
    use_dora: bool = _flag(False, "Train magnitude apart from direction (arXiv:2402.09353).")
    load_in_8bit: bool = _flag(False, "Quantise the frozen model to 8 bits.")
    load_in_4bit: bool = _flag(False, "Quantise the frozen model to 4 bits (QLoRA).")
    bnb_4bit_quant_type: str = _flag("nf4", "The 4-bit number format.", choices=["fp4", "nf4"])
    use_bnb_nested_quant: bool = _flag(False, "Quantise the 4-bit scales too.")
    bnb_4bit_quant_storage: str | None = _flag(None, "The dtype 4-bit weights are stored in.")

    def __post_init__(self):
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("want load_in_8bit or load_in_4bit, got both")
        if isinstance(self.lora_target_modules, list) and len(self.lora_target_modules) == 1:
            self.lora_target_modules = self.lora_target_modules[0]  # all-linear, or a pattern


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

    datasets: list[DatasetConfig] = field(
        default_factory=list,
        metadata={
            "help": "Several datasets instead of dataset_name: in a YAML file a list of mappings "
            "with path and, where needed, name, data_dir, data_files, split, columns, fraction."
        },
    )
    streaming: bool = _flag(False, "As dataset_streaming, for `datasets`.")
    test_split_size: float | None = _flag(
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
    if unknown or "path" not in entry:
        got = f"unknown {unknown}" if unknown else f"no path, only {list(entry)}"
        raise ValueError(f"datasets: want path and any of {list(names)[1:]}, got {got}")
    return DatasetConfig(**entry)


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


def load_datasets(
    script_args: ScriptArguments,
    dataset_args: DatasetMixtureConfig,
    *,
    with_eval: bool,
    on_bad_rows: str,
    seed: int,
) -> tuple[Rows, Rows | None]:
    """The rows to train on, and those to evaluate on where `with_eval`, else None.

    `seed` decides which rows of a mixture are held out. RowError for a malformed row, ValueError
    or OSError for a dataset that is not there or does not fit the others.
    """
    if dataset_args.datasets:
        return _load_mixture(dataset_args, with_eval=with_eval, on_bad_rows=on_bad_rows, seed=seed)
    if script_args.dataset_name is None:
        raise ValueError("want --dataset_name, or `datasets:` in a YAML file, got neither")

    def load(split: str) -> Rows:
        return load_rows(
            script_args.dataset_name,
            config_name=script_args.dataset_config,
            split=split,
            streaming=script_args.dataset_streaming,
            on_bad_rows=on_bad_rows,
        )

    train = load(script_args.dataset_train_split)
    return train, load(script_args.dataset_test_split) if with_eval else None


def _load_mixture(
    dataset_args: DatasetMixtureConfig, *, with_eval: bool, on_bad_rows: str, seed: int
) -> tuple[Rows, Rows | None]:
    held_out = dataset_args.test_split_size
    if with_eval and held_out is None:
        raise ValueError("want test_split_size with `datasets` and an eval_strategy, got none")
    if held_out is not None and dataset_args.streaming:
        raise ValueError("want test_split_size or streaming, got both: a stream cannot be split")

    parts = []
    for each in dataset_args.datasets:
        rows = load_rows(
            each.path,
            config_name=each.name,
            split=each.split,
            streaming=dataset_args.streaming,
            data_files=each.data_files,
            data_dir=each.data_dir,
            on_bad_rows=on_bad_rows,
        )
        parts.append(rows if each.columns is None else rows.select_columns(each.columns))
    fractions = [each.fraction for each in dataset_args.datasets]
    if any(fraction is not None for fraction in fractions):
        if dataset_args.streaming:
            raise ValueError("want fraction or streaming, got both: a stream has no length")
        parts = _in_proportion(parts, fractions)
    rows = concatenate_datasets(parts)
    if held_out is None:
        return rows, None
    halves = rows.train_test_split(test_size=held_out, seed=seed)
    return halves["train"], halves["test"] if with_eval else None


def _in_proportion(parts: list[Dataset], fractions: list[float | None]) -> list[Dataset]:
    """The first rows of each part, as many as give the largest mixture in these proportions."""
    if any(fraction is None or fraction < 0 for fraction in fractions) or not sum(fractions):
        raise ValueError(f"want a fraction >= 0 for every dataset or for none, got {fractions}")
    shares = [fraction / sum(fractions) for fraction in fractions]
    total = min(len(part) / share for part, share in zip(parts, shares, strict=True) if share)
    return [
        part.select(range(round(share * total))) for part, share in zip(parts, shares, strict=True)
    ]


class TrainParser(HfArgumentParser):
    """transformers' parser of dataclasses, with `--config run.yaml` and `--max_length none`.

    A YAML file sets flags' values, which the command line overrides; its `env:` mapping sets
    environment variables. Whatever is wrong raises ValueError: nothing is printed, nothing exits.
    """

    def __init__(self, prog: str):
        super().__init__((ScriptArguments, DPOConfig, ModelConfig, DatasetMixtureConfig), prog=prog)
        self._let_none_through()
        self.add_argument("--config", help="A YAML file with values for these flags.")
        self._own_flag = self._add_own_flag().dest

    def _add_own_flag(self) -> argparse.Action:
        """The flag of this command alone."""
        return self.add_argument(
            "--fresh",
            action="store_true",
            help="Start over in the next free folder beside output_dir, never on top of a run.",
        )

    def parse(self, argv: Sequence[str]) -> tuple[tuple[Any, ...], list[str]]:
        """The arguments, one object per dataclass and the command's own flag; then unknown flags.

        Those may be flags of `accelerate launch`, from the command line or the YAML file.
        """
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.error = self.error
        finder.add_argument("--config")
        path = finder.parse_known_args(argv)[0].config
        unknown = self._take_values(_read_yaml(path)) if path is not None else []
        *arguments, others, remaining = self.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        if others.config != path:
            raise ValueError("want --config written in full")
        return (*arguments, getattr(others, self._own_flag)), unknown + remaining

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def _let_none_through(self) -> None:
        """Accept none and null as values of numbers that may be None, as TRL's parser does."""
        hints = {k: v for each in self.dataclass_types for k, v in get_type_hints(each).items()}
        for action in self._actions:
            if action.type in (int, float) and NoneType in get_args(hints[action.dest]):
                action.type = _or_none(action.type)

    def _take_values(self, values: dict[str, Any]) -> list[str]:
        """Make `values` the defaults; those that are no flag of this parser come back as tokens."""
        actions = {a.dest: a for a in self._actions if a.dest not in ("help", "config")}
        unknown = []
        for name, value in values.items():
            if name not in actions:
                unknown += _tokens(name, value)
                continue
            for action in self._actions:  # --flag and --no_flag are two actions of one name
                if action.dest == name:
                    action.default = _checked(actions[name], value)
        return unknown


class VerifyParser(TrainParser):
    """The flags of a run, and --max_pairs in place of --fresh."""

    def _add_own_flag(self) -> argparse.Action:
        return self.add_argument(
            "--max_pairs", type=int, default=8, help="Compare this many rows, the first ones."
        )


def _or_none(number: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text.lower() in ("none", "null") else number(text)

    parse.__name__ = number.__name__  # for argparse's "invalid float value"
    return parse


def _read_yaml(path: str) -> dict[str, Any]:
    """The mapping in a YAML file, its `env` set in this process's environment and left out."""
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.safe_load(file)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: want a mapping of flags to values, got {values!r}")
    environment = values.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise ValueError(f"{path}: want a mapping as env, got {environment!r}")
    os.environ.update({str(name): str(value) for name, value in environment.items()})
    return values


def _checked(action: argparse.Action, value: Any) -> Any:
    """A YAML value as the flag takes it; argparse itself converts text and checks nothing else."""
    if value is False and action.choices and "no" in action.choices:
        value = "no"  # what YAML 1.1 makes of a bare no
    if value is not None and action.choices and value not in action.choices:
        raise ValueError(f"{action.dest}: want one of {[*action.choices]}, got {value!r}")
    one_number = action.nargs in (None, "?") and action.type is not str and not action.choices
    if one_number and isinstance(value, (list, dict)):
        raise ValueError(f"{action.dest}: want one value, got {value!r}")
    return value


def _tokens(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}"] if value else []
    return [f"--{name}", str(value)]
