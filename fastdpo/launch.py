"""Flags of `accelerate launch`: which of a command's are, and a run in the processes they ask for.

accelerate is imported in functions alone, so that `fastdpo --help` answers at once.
"""

import os
import subprocess
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from fastdpo.run_file import raise_error

MODULE = "fastdpo.cli"  # what `accelerate launch --module` runs

# `trl dpo --accelerate_config NAME`, as flags of `accelerate launch`
_FSDP = (
    "--use_fsdp --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP "
    "--fsdp_state_dict_type FULL_STATE_DICT --fsdp_cpu_ram_efficient_loading true "
)
ACCELERATE_CONFIGS = {
    "single_gpu": "--num_processes 1",
    "multi_gpu": "--multi_gpu",
    "fsdp1": _FSDP + "--fsdp_version 1 --fsdp_sync_module_states true --fsdp_use_orig_params true",
    "fsdp2": _FSDP + "--fsdp_version 2 --fsdp_reshard_after_forward true",
    "zero1": "--use_deepspeed --zero_stage 1",
    "zero2": "--use_deepspeed --zero_stage 2",
    "zero3": "--use_deepspeed --zero_stage 3 --zero3_init_flag true --zero3_save_16bit_model true",
}


def is_launched() -> bool:
    """Whether `accelerate launch`, torchrun or deepspeed has started this process."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def launch_flags(unknown: list[str]) -> list[str]:
    """Flags of `accelerate launch`, `--accelerate_config` written out, those that are off left out.

    ValueError for what accelerate does not know either.
    """
    if not unknown:
        return []
    parser = _launch_parser()
    finder = ArgumentParser(add_help=False, allow_abbrev=False)
    finder.error = raise_error
    finder.add_argument("--accelerate_config")
    known = parser._option_string_actions | finder._option_string_actions
    tokens = chain.from_iterable(_written_out(token, known) for token in unknown)
    given, flags = finder.parse_known_args([*tokens])
    if given.accelerate_config is not None:
        flags = [*_accelerate_config(given.accelerate_config), *flags]
    command, stray = parser.parse_known_args([*flags, "--module", MODULE])
    if stray or command.training_script != MODULE:  # where a value without its flag ends up
        raise ValueError(f"unknown flag: {' '.join(stray) or command.training_script}")
    return flags


def _written_out(token: str, known: dict[str, Action]) -> list[str]:
    """`--flag=true`, `=false` or `=null` as `accelerate launch` has it: some of its flags have no
    value, and are off where they are missing; others want true, false or no as a text."""
    name, _, value = token.partition("=")
    if name not in known or value not in ("true", "false", "null"):
        return [token]
    is_switch = known[name].nargs == 0
    if value == "null" or (value == "false" and (is_switch or known[name].type is bool)):
        return []
    if value == "false" and "no" in (known[name].choices or ()):
        return [f"{name}=no"]  # which YAML 1.1 reads as false
    return [name] if is_switch else [token]


def _launch_parser() -> ArgumentParser:
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    parser.error = raise_error
    return parser


def _accelerate_config(name: str) -> list[str]:
    """A name of ACCELERATE_CONFIGS, or a file of accelerate's, as flags of `accelerate launch`."""
    if name in ACCELERATE_CONFIGS:
        return ACCELERATE_CONFIGS[name].split()
    if not Path(name).is_file():
        raise ValueError(
            f"accelerate_config: want a file or one of {[*ACCELERATE_CONFIGS]}, got {name!r}"
        )
    return ["--config_file", name]


def launch(flags: list[str], argv: Sequence[str]) -> int:
    """`fastdpo train <argv>` in as many processes as `accelerate launch` makes of the flags.

    The exit code of the first process that failed; 128 + the signal where one was killed, or all
    were told to end.
    """
    from accelerate.commands.launch import launch_command
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    command = [*flags, "--module", MODULE, "train", *argv]
    arguments = _launch_parser().parse_args(command)
    _check_num_processes(arguments)
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:  # of a single process
        code = error.returncode
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except SignalException as error:  # Ctrl-C, of several processes
        code = -error.sigval
    else:
        return 0
    return code if code > 0 else 128 - code


def _check_num_processes(arguments: Namespace) -> None:
    """ValueError for several processes of which accelerate would start one, without a word."""
    import torch
    from accelerate.commands.config.config_args import default_config_file

    wanted, gpus = arguments.num_processes or 1, torch.cuda.device_count()
    kinds = ("multi_gpu", "use_deepspeed", "use_fsdp", "use_megatron_lm", "tpu", "mpirun_hostfile")
    is_left_to_accelerate = (
        any(getattr(arguments, name) for name in kinds)
        or arguments.config_file is not None
        or (Path(default_config_file).is_file() and not arguments.cpu)
    )
    if wanted > 1 and not is_left_to_accelerate and (arguments.cpu or gpus < 2):
        raise ValueError(
            f"want --multi_gpu, not --cpu, with --num_processes {wanted} where there are {gpus} "
            "GPUs: accelerate would start one process"
        )
