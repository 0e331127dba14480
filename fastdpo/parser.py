"""The command line and YAML file of a run -> its arguments, one object per dataclass."""

import argparse
import contextlib
import json
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from fastdpo.arguments import (
    DatasetMixtureConfig,
    ModelConfig,
    RunArguments,
    ScriptArguments,
)
from fastdpo.config import DPOConfig
from fastdpo.run_file import config_path, raise_error, read_yaml

OR_BOOLEAN = ("resume_from_checkpoint", "trackio_static_space_id")  # texts, or true or false


class TrainParser(HfArgumentParser):
    """transformers' parser of dataclasses, with `--config run.yaml` and `--max_length none`.

    A YAML file sets flags' values, which the command line overrides (its `env` is set before: see
    run_file.py). Whatever is wrong raises ValueError: nothing is printed, nothing exits.
    """

    error = staticmethod(raise_error)

    def __init__(self, prog: str):
        super().__init__((ScriptArguments, DPOConfig, ModelConfig, DatasetMixtureConfig), prog=prog)
        self._hints = {
            k: v for each in self.dataclass_types for k, v in get_type_hints(each).items()
        }
        self._widen_types()
        name = "logging_nan_inf_filter"  # off by default, so HfArgumentParser adds no `--no_` to it
        self.add_argument(
            f"--no_{name}", f"--no-{name.replace('_', '-')}", action="store_false", dest=name
        )
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
        path = config_path(argv)
        unknown = [] if path is None else self._take_values(read_yaml(path)[0])
        *arguments, others, remaining = self.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
        if others.config != path:
            raise ValueError("want --config written in full")
        return RunArguments(*arguments), getattr(others, self._own_flag), unknown + remaining

    def _widen_types(self) -> None:
        """Let flags take what HfArgumentParser would refuse: none and null for numbers that may be
        None, as TRL's parser does; texts, where they may be booleans too; and mappings, as JSON."""
        for action in self._actions:
            kinds = get_args(self._hints.get(action.dest))
            is_number = action.type in (int, float) and action.nargs != "+"
            if is_number and NoneType in kinds:
                action.type = _or_none(action.type)
            elif set(kinds) == {str, bool}:
                action.type = _boolean_or_text
            elif get_origin(action.type) is dict:
                action.type = _mapping

    def _take_values(self, values: dict[str, Any]) -> list[str]:
        """Make `values` the defaults; those without a flag of this parser come back as tokens."""
        unknown = []
        for name, value in values.items():
            # --flag and --no_flag are two actions of one name
            actions = [action for action in self._actions if action.dest == name]
            if name == "config" or "help".startswith(str(name)):
                raise ValueError(f"want --{name} on the command line, got it in the YAML file")
            if not actions:
                unknown.append(_token(name, value))
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


def _boolean_or_text(text: str) -> bool | str:
    try:
        return string_to_bool(text)
    except argparse.ArgumentTypeError:
        return text


def _mapping(text: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        value = json.loads(text)
        if isinstance(value, dict):
            return value
    raise argparse.ArgumentTypeError(f"want a JSON object, got {text!r}")


def _checked(action: argparse.Action, value: Any, hint: Any) -> Any:
    """A YAML value as the flag takes it; argparse converts text, and checks nothing else.

    hint: the type of the setting, which may be more than one word of the command line.
    """
    if action.nargs == 0 and not isinstance(value, bool | None):  # --fresh
        raise ValueError(f"{action.dest}: want true or false, got {value!r}")
    if value is False and action.choices and "no" in action.choices:
        value = "no"  # what YAML 1.1 makes of a bare no
    if value is not None and action.choices and value not in action.choices:
        raise ValueError(f"{action.dest}: want one of {[*action.choices]}, got {value!r}")
    wants_number = getattr(action.type, "__name__", None) in ("int", "float")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    is_word = is_number or isinstance(value, str)
    if action.nargs == "+" and is_word and (wants_number or action.type is str):
        value = [value]  # as of one word on the command line; a text is no list of its letters
    if wants_number and action.nargs == "+" and isinstance(value, list):
        return [_number(action, each) for each in value]
    if action.nargs in (None, "?") and not action.choices:
        if not _is_one(action, value, hint):
            raise ValueError(f"{action.dest}: want one value, got {value!r}")
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


def _token(name: str, value: Any) -> str:
    """What launch.launch_flags takes for a YAML value of a flag that is not of this parser."""
    if value is None or isinstance(value, bool):
        value = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, list):
        value = ",".join(map(str, value))  # as accelerate has its lists
    return f"--{name}={value}"
