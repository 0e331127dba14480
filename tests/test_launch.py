"""Which runs accelerate is left to start in several processes, and with which flags."""

import signal
import subprocess
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from command_line import flags, settings, train
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from fastdpo import cli
from fastdpo.launch import ACCELERATE_CONFIGS, is_launched, launch, launch_flags
from fastdpo.parser import TrainParser


@pytest.mark.parametrize("name", ["LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"])
def test_a_process_that_was_launched_launches_no_others(monkeypatch, name):
    for each in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(each, raising=False)
    assert not is_launched()
    monkeypatch.setenv(name, "0")  # a single process of accelerate's has the latter alone
    assert is_launched()


@pytest.mark.parametrize("name", ACCELERATE_CONFIGS)
def test_accelerate_knows_the_flags_of_every_named_config(name):
    assert launch_flags(["--accelerate_config", name]) == ACCELERATE_CONFIGS[name].split()


def test_a_config_may_be_a_file_of_accelerates(tmp_path):
    (tmp_path / "two.yaml").write_text("num_processes: 2\n")
    flags = ["--config_file", str(tmp_path / "two.yaml")]
    assert launch_flags(["--accelerate_config", str(tmp_path / "two.yaml")]) == flags
    with pytest.raises(ValueError, match="--accelerate_config: expected one argument"):
        launch_flags(["--accelerate_config"])


def test_launch_flags_may_be_written_with_an_equals_sign_or_be_off():
    zero2 = ACCELERATE_CONFIGS["zero2"].split()
    assert launch_flags(["--accelerate_config=zero2"]) == zero2
    assert launch_flags(["--multi_gpu=false", "--num_processes", "2"]) == [
        "--num_processes",
        "2",
    ]


@pytest.mark.parametrize(
    "line, flags",
    [
        ("num_processes: null", []),
        ("accelerate_config: null", []),
        ("multi_gpu: null", []),
        ("multi_gpu: true", ["--multi_gpu"]),
        ("multi_gpu: false", []),
        ("fsdp_offload_params: true", ["--fsdp_offload_params=true"]),
        ("fsdp_reshard_after_forward: false", ["--fsdp_reshard_after_forward=false"]),
        ("mixed_precision: no", ["--mixed_precision=no"]),
        ("gpu_ids: [0, 1]", ["--gpu_ids=0,1"]),
        ("monitor_interval: 0.5", ["--monitor_interval=0.5"]),
    ],
)
def test_yaml_values_reach_accelerate_as_it_reads_them(tmp_path, line, flags):
    (tmp_path / "run.yaml").write_text(f"{line}\n")
    _, _, unknown = TrainParser(prog="train").parse(["--config", str(tmp_path / "run.yaml")])
    assert launch_flags(unknown) == flags


def test_what_accelerate_would_take_for_true_in_any_wording_is_left_out_where_it_is_false():
    actions = launch_command_parser()._actions
    names = [action.option_strings[0] for action in actions if action.type is bool]
    assert launch_flags([f"{name}=false" for name in names]) == []  # bool("false") is True


@pytest.mark.parametrize(
    "line, told",
    [
        ("num_processes: true", "--num_processes.*invalid int value: 'true'"),
        ("multi_gpu: 1", "--multi_gpu.*'1'"),
        ("betta: null", "unknown flag: --betta=null"),
    ],
)
def test_a_yaml_value_that_accelerate_cannot_read_is_named(tmp_path, line, told):
    (tmp_path / "run.yaml").write_text(f"{line}\n")
    _, _, unknown = TrainParser(prog="train").parse(["--config", str(tmp_path / "run.yaml")])
    with pytest.raises(ValueError, match=told):
        launch_flags(unknown)


def test_a_flag_overrides_that_of_a_named_config():
    flags = launch_flags(["--zero_stage", "3", "--accelerate_config", "zero2"])
    assert flags == ["--use_deepspeed", "--zero_stage", "2", "--zero_stage", "3"]


@pytest.mark.parametrize(
    "unknown, named",
    [(["--betta", "1"], "--betta"), (["--betta=1"], "--betta=1"), (["1", "--cpu"], "1")],
)
def test_what_accelerate_does_not_know_either_is_refused(unknown, named):
    with pytest.raises(ValueError, match=f"unknown flag: {named}$"):
        launch_flags(unknown)


@pytest.mark.parametrize(
    "more, gpus, has_config, is_refused",
    [
        ((), 2, False, False),
        (("--cpu",), 2, False, True),
        ((), 1, True, False),
        (("--cpu",), 1, True, True),
        (("--config_file", "a.yaml"), 1, False, False),
        (("--use_deepspeed",), 1, False, False),
        (("--use_megatron_lm",), 1, False, False),
        (("--tpu",), 1, False, False),
        (("--cpu", "--mpirun_hostfile", "hosts"), 0, False, False),
    ],
)
def test_accelerate_starts_several_processes_for_gpus_and_as_its_configs_say(
    monkeypatch, tmp_path, more, gpus, has_config, is_refused
):
    launched, config = [], tmp_path / "default_config.yaml"
    if has_config:
        config.write_text("")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", config)
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    if is_refused:
        with pytest.raises(ValueError, match="accelerate would start one process"):
            launch(["--num_processes", "2", *more], [])
    else:
        assert launch(["--num_processes", "2", *more], []) == 0 and launched


def test_accelerate_may_choose_the_number_of_processes(monkeypatch):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    assert launch(["--multi_gpu"], []) == 0
    assert launched[0].num_processes is None


@pytest.mark.parametrize(
    "more, is_refused",
    [((), True), (("--cpu",), True), (("--multi_gpu",), False), (("--use_fsdp",), False)],
)
def test_several_processes_are_not_one(tmp_path, monkeypatch, capsys, more, is_refused):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    code = train(tmp_path, tmp_path / "out", "--num_processes", "2", *more)
    assert (code, not launched) == ((2, True) if is_refused else (0, False))
    assert ("--multi_gpu" in capsys.readouterr().err) == is_refused


@pytest.mark.parametrize("processes", ["1", "2"])
@pytest.mark.parametrize("exitcode, code", [(1, 1), (2, 2), (-9, 137)])
def test_a_process_that_fails_gives_its_exit_code(tmp_path, monkeypatch, processes, exitcode, code):
    failure = SimpleNamespace(exitcode=exitcode, timestamp=0)

    def launch_command(_):
        if processes == "1":
            raise subprocess.CalledProcessError(exitcode, "train")
        raise ChildFailedError("train", {0: failure})

    monkeypatch.setattr(ChildFailedError, "format_msg", lambda *_: "it has failed")
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch_command)
    assert train(tmp_path, tmp_path / "out", "--num_processes", processes, "--multi_gpu") == code


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_several_processes_that_are_interrupted_are_no_bad_input(
    tmp_path, monkeypatch, capsys, sent, code
):
    def launch_command(_):
        raise SignalException("got a signal", sent)

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch_command)
    assert train(tmp_path, tmp_path / "out", "--num_processes", "2", "--multi_gpu") == code
    assert "error" not in capsys.readouterr().err


def test_several_gpus_are_launched_one_process_each(tmp_path, monkeypatch):
    def go_on_alone(*_):
        raise KeyboardInterrupt

    launched = []
    monkeypatch.setattr(cli, "launch", lambda flags, argv: launched.append((flags, argv)) or 0)
    monkeypatch.setattr(cli, "_choose_folder", go_on_alone)
    argv = flags(settings(tmp_path, tmp_path / "out"))
    for gpus, code in ((1, 130), (2, 0)):
        monkeypatch.setattr("fastdpo.config.DPOConfig.n_gpu", gpus)
        assert cli.main(["train", *argv]) == code
    assert launched == [([], argv)]
