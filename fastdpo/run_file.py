"""The YAML file of a run: flags' values, and under `env` the environment variables that it sets.

Nothing here imports torch or transformers, which read some of those variables as they are imported
(OMP_NUM_THREADS, HF_HOME).
"""

import argparse
import contextlib
import os
from collections.abc import Sequence
from typing import Any, NoReturn

import yaml


def set_environment(argv: Sequence[str]) -> None:
    """Set the variables of the file that --config names.

    What is wrong with it is left to the parser, which reads it again.
    """
    with contextlib.suppress(ValueError, OSError):
        if (path := config_path(argv)) is not None:
            os.environ.update(read_yaml(path)[1])


def config_path(argv: Sequence[str]) -> str | None:
    """What --config names; ValueError where it comes twice, as one would hide the other."""
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.error = raise_error
    finder.add_argument("--config", action="append", default=[])
    paths = finder.parse_known_args(argv)[0].config
    if len(paths) > 1:
        raise ValueError(f"want --config once, got {paths}")
    return paths[0] if paths else None


def raise_error(message: str) -> NoReturn:
    """An argparse parser's `error`, where it must not exit."""
    raise ValueError(message)


def read_yaml(path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in a YAML file without its `env`, and that."""
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


class _EachOnce(yaml.SafeLoader):
    """Refuses a mapping that has a name twice: YAML would keep the last of the values."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        names = [name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode)]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise yaml.composer.ComposerError(problem=f"{twice[0]!r} twice, {node.start_mark}")
        return node
