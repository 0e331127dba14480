"""The command line and YAML file of a run -> its arguments, one object per dataclass."""

import argparse
import os
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from fastdpo.arguments import (
    DatasetMixtureConfig,
    ModelConfig,
    RunArguments,
    ScriptArguments,
)
from fastdpo.config import DPOConfig

OR_BOOLEAN = ("resume_from_checkpoint", "trackio_static_space_id")  # texts, or true or false


class TrainParser(HfArgumentParser):
    """transformers' parser of dataclasses, with `--config run.yaml` and `--max_length none`.

    A YAML file sets flags' values, which the command line overrides; its `env:` mapping sets
    environment variables. Whatever is wrong raises ValueError: nothing is printed, nothing exits.
    """

    def __init__(self, prog: str):
        super().__init__((ScriptArguments, DPOConfig, ModelConfig, DatasetMixtureConfig), prog=prog)
        self._hints = {
            k: v for each in self.dataclass_types for k, v in get_type_hints(each).items()
        }
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

    def parse(self, argv: Sequence[str]) -> tuple[RunArguments, Any, list[str]]:
        """The arguments, the value of the command's own flag, and unknown flags.

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
        return RunArguments(*arguments), getattr(others, self._own_flag), unknown + remaining

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def _let_none_through(self) -> None:
        """Accept none and null as values of numbers that may be None, as TRL's parser does."""
        for action in self._actions:
            is_number = action.type in (int, float) and action.nargs != "+"
            if is_number and NoneType in get_args(self._hints[action.dest]):
                action.type = _or_none(action.type)

    def _take_values(self, values: dict[str, Any]) -> list[str]:
        """Make `values` the defaults; those without a flag of this parser come back as tokens."""
        unknown = []
        for name, value in values.items():
            # --flag and --no_flag are two actions of one name
            actions = [action for action in self._actions if action.dest == name]
            if name == "config" or "help".startswith(str(name)):
                raise ValueError(f"want --{name} on the command line, got it in the YAML file")
            if not actions:
                unknown += _tokens(name, value)
            for action in actions:
                action.default = _checked(actions[0], value, self._hints.get(name))
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

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        names = [name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode)]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise yaml.composer.ComposerError(problem=f"{twice[0]!r} twice, {node.start_mark}")
        return node


def _read_yaml(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in a YAML file without its `env`, and that: environment variables."""
    with open(path, encoding="utf-8") as file:
        try:
            values = yaml.load(file, _EachOnce)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: want a mapping of flags to values, got {values!r}")
    environment = values.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise ValueError(f"{path}: want a mapping as env, got {environment!r}")
    environment = {str(name): str(value) for name, value in environment.items()}
    for name, value in environment.items():
        if not name or "=" in name or "\0" in name + value:
            raise ValueError(f"{path}: want names and values of variables as env, got {name!r}")
    return values, environment


def _checked(action: argparse.Action, value: Any, hint: Any) -> Any:
    """A YAML value as the flag takes it; argparse converts text, and checks nothing else.

    hint: the type of the setting, which may be more than one word of the command line.
    """
    if value is False and action.choices and "no" in action.choices:
        value = "no"  # what YAML 1.1 makes of a bare no
    if value is not None and action.choices and value not in action.choices:
        raise ValueError(f"{action.dest}: want one of {[*action.choices]}, got {value!r}")
    wants_number = getattr(action.type, "__name__", None) in ("int", "float")
    if wants_number and action.nargs == "+" and isinstance(value, list):
        return [_number(action, each) for each in value]
    if action.nargs in (None, "?") and not action.choices:
        if not _is_one(action, value, hint):
            raise ValueError(f"{action.dest}: want one value, got {value!r}")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if wants_number or is_number:
            return str(value)  # as the command line has it, for argparse to convert
    elif action.type is str and not action.choices:
        texts = value if isinstance(value, list) else [value]
        if not all(isinstance(each, str | None) for each in texts):
            raise ValueError(f"{action.dest}: want texts, got {value!r}")
    return value


def _number(action: argparse.Action, value: Any) -> int | float:
    try:
        return action.type(str(value))
    except ValueError:
        raise ValueError(f"{action.dest}: want numbers, got {value!r}") from None


def _is_one(action: argparse.Action, value: Any, hint: Any) -> bool:
    """Whether a YAML value is one word of the command line, or more where the hint says so."""
    kinds = {get_origin(each) or each for each in (hint, *get_args(hint))}
    if value is None:
        return action.type is not str or NoneType in kinds
    if isinstance(value, bool):
        return action.type is not str or action.nargs == "?" or action.dest in OR_BOOLEAN
    if isinstance(value, list | dict):
        return type(value) in kinds
    return isinstance(value, str | int | float)


def _tokens(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--{name}=false"]
    return [f"--{name}", str(value)]
