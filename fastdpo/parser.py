"""The command line and YAML files of `fastdpo train` -> its arguments, one object per dataclass."""

import argparse
import os
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from transformers import HfArgumentParser

from fastdpo.arguments import ModelConfig, ScriptArguments
from fastdpo.config import DPOConfig
from fastdpo.mixture import DatasetMixtureConfig


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
        unknown = []
        if path is not None:
            values, environment = _read_yaml(path)
            os.environ.update(environment)
            unknown = self._take_values(values)
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


class _EachOnce(yaml.SafeLoader):
    """Refuses a mapping that has a name twice: YAML would keep the last of the values."""

    def construct_mapping(self, node, deep=False):
        names = [self.construct_object(name, deep=True) for name, _ in node.value]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                problem=f"{twice[0]!r} twice, {node.start_mark}"
            )
        return super().construct_mapping(node, deep)


def _read_yaml(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in a YAML file without its `env`, and that: environment variables."""
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.load(file, _EachOnce)
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: want a mapping of flags to values, got {values!r}")
    environment = values.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise ValueError(f"{path}: want a mapping as env, got {environment!r}")
    return values, {str(name): str(value) for name, value in environment.items()}


def _checked(action: argparse.Action, value: Any) -> Any:
    """A YAML value as the flag takes it; argparse converts text, and checks nothing else."""
    if value is False and action.choices and "no" in action.choices:
        value = "no"  # what YAML 1.1 makes of a bare no
    if value is not None and action.choices and value not in action.choices:
        raise ValueError(f"{action.dest}: want one of {[*action.choices]}, got {value!r}")
    wants_number = getattr(action.type, "__name__", None) in ("int", "float")
    if wants_number and action.nargs == "+" and isinstance(value, list):
        return [action.type(str(each)) for each in value]
    one_number = action.nargs in (None, "?") and action.type is not str and not action.choices
    if one_number and isinstance(value, (list, dict)):
        raise ValueError(f"{action.dest}: want one value, got {value!r}")
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if (one_number and wants_number) or (is_number and action.type is str):
        return str(value)  # as the command line has it, for argparse to convert
    return value


def _tokens(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--{name}=false"]
    return [f"--{name}", str(value)]
