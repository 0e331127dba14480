"""The command line: `trl dpo`'s flags and YAML, runs and resuming, help."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from accelerate import PartialState
from command_line import flags, folder_with_model_and_rows, one_line, settings, train
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo import DPOConfig, cli, run_folder
from fastdpo.arguments import DatasetMixtureConfig, ModelConfig, ScriptArguments
from fastdpo.pack_trainer import PackTrainer
from fastdpo.parser import TrainParser
from fastdpo.run_folder import RunFolder, locked
from fastdpo.trainer import DPOTrainer

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return folder_with_model_and_rows(tmp_path_factory.mktemp("here"))


def losses(output_dir, step=4):
    state = json.loads((output_dir / f"checkpoint-{step}/trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def weights(output_dir):
    return AutoModelForCausalLM.from_pretrained(output_dir).state_dict()


@pytest.fixture(scope="module")
def whole_run(here):
    """The folder of a run that nobody disturbed."""
    assert train(here, here / "whole") == 0
    return here / "whole"


# Runs


def test_a_run_ends_in_a_model_that_loads(here, whole_run):
    trained, start = weights(whole_run), weights(here / "model")
    assert trained.keys() == start.keys()
    assert not torch.equal(trained["lm_head.weight"], start["lm_head.weight"])
    assert AutoTokenizer.from_pretrained(whole_run).chat_template
    assert sorted(losses(whole_run)) == [1, 2, 3, 4]
    assert losses(whole_run)[1] == pytest.approx(0.6931, abs=1e-4)


def test_a_run_that_ran_out_of_memory_goes_on_with_less(here, tmp_path, capsys):
    train(here, tmp_path / "out", max_steps=2)
    (tmp_path / "out/run.json").write_text(
        (tmp_path / "out/run.json").read_text().replace('"finished": true', '"finished": false')
    )
    less = {"max_tokens_per_forward": 64, "head_cache_bytes": 0, "strict_layout": True}
    assert train(here, tmp_path / "out", max_steps=2, **less) == 0
    assert "resuming from" in capsys.readouterr().out


def test_what_was_skipped_and_what_was_cut_is_in_the_summary(here, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    cut = {"prompt": "Two and two ma", "chosen": "ke four.", "rejected": "ke five"}
    tiny.write_rows(rows, [*tiny.rows(7), cut])
    rows.write_text(rows.read_text() + '{"prompt": 3}\n{\n')
    skip = {"dataset_name": rows, "on_bad_rows": "skip", "max_length": 30, "max_steps": 1}
    assert train(here, tmp_path / "out", **skip) == 0
    told = "8 of 10 rows; 2 dropped: malformed; 1 without the end of their prompt; "
    assert told + "3 cut to max_length; " in capsys.readouterr().out


def test_a_run_says_what_it_will_do_and_where_it_saved(here, tmp_path, capsys):
    lora = {"lora_r": 4, "lora_target_modules": "all-linear"}
    assert train(here, tmp_path / "out", "--use_peft", max_steps=1, **lora) == 0
    out = capsys.readouterr().out
    for told in ("16 of 16 rows", "layout", "kernels", "reference"):
        assert told in out
    assert f"saved adapters and tokenizer to {tmp_path / 'out'}" in out
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.peft_config["default"].r == 4
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_a_yaml_file_runs_as_the_same_flags_do(here, whole_run, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings(here, tmp_path / "out", max_steps=99)))
    assert cli.main(["dpo", "--config", str(config), "--max_steps", "4"]) == 0
    assert losses(tmp_path / "out") == losses(whole_run)


def test_an_interruption_that_another_error_covers_is_one(here, tmp_path, capsys, monkeypatch):
    def interrupted(run):
        try:
            raise KeyboardInterrupt
        finally:  # as in Dataset.map, which waits for its workers there
            raise RuntimeError("a worker has not ended")

    monkeypatch.setattr(cli, "_build_trainer", interrupted)
    assert train(here, tmp_path / "out", dataset_num_proc=2) == 130
    assert capsys.readouterr().err.strip() == "fastdpo: interrupted"


def test_an_interrupted_run_resumes_and_continues_exactly(
    here, whole_run, tmp_path, capsys, monkeypatch
):
    step, calls = PackTrainer.training_step, []

    def stop_in_the_fourth(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PackTrainer, "training_step", stop_in_the_fourth)
        assert train(here, tmp_path / "out") == 130
    assert not (tmp_path / "out/checkpoint-4").exists()
    assert train(here, tmp_path / "out", save_steps=4) == 0
    assert f"resuming from {tmp_path / 'out/checkpoint-2'}, step 2" in capsys.readouterr().out
    assert losses(tmp_path / "out") == losses(whole_run)
    resumed, whole = weights(tmp_path / "out"), weights(whole_run)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_a_finished_run_is_not_run_again(here, whole_run, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole_run.rglob("*")}
    assert train(here, whole_run) == 0
    assert "complete" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in whole_run.rglob("*")} == before


def test_a_home_folder_is_found_in_a_yaml_file(here, whole_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    checkpoint = whole_run / "checkpoint-2"
    values = {"model_name_or_path": "~/model", "dataset_name": "~/rows.jsonl"}
    values["resume_from_checkpoint"] = f"~/{checkpoint.relative_to(here)}"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(here, tmp_path / "out") | values))
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    assert losses(tmp_path / "out") == losses(whole_run)


def test_another_beta_is_refused_and_fresh_starts_beside(here, whole_run, capsys):
    assert train(here, whole_run, beta=0.2) == 2
    assert "beta is 0.1 there, 0.2 here" in one_line(capsys)
    before = {p: p.stat().st_mtime_ns for p in whole_run.rglob("*")}
    assert train(here, whole_run, "--fresh", beta=0.2, max_steps=1) == 0
    assert {p: p.stat().st_mtime_ns for p in whole_run.rglob("*")} == before
    beside = whole_run.with_name("whole-2")
    assert str(beside) in capsys.readouterr().out
    assert (beside / "model.safetensors").exists()


def test_fresh_leaves_no_folder_of_a_run_that_never_was(here, whole_run, tmp_path):
    tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    before = sorted(here.iterdir())
    assert train(here, whole_run, "--fresh", dataset_name=tmp_path / "rows.jsonl") == 2
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize("was_there", [True, False])
def test_a_run_that_never_was_leaves_its_folder_as_it_found_it(here, tmp_path, was_there):
    tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    if was_there:
        (tmp_path / "out").mkdir()
    assert train(here, tmp_path / "out", dataset_name=tmp_path / "rows.jsonl") == 2
    assert (tmp_path / "out").exists() == was_there


@pytest.fixture
def nothing_trained(monkeypatch):
    """A run of no model and no step."""
    trainer = SimpleNamespace(summary=lambda: "what will run")
    monkeypatch.setattr(cli, "_build_trainer", lambda run: trainer)
    for name in ("_train", "_save"):
        monkeypatch.setattr(cli, name, lambda *_: None)


def test_a_run_keeps_others_out_of_its_folder_until_it_ends(
    here, tmp_path, monkeypatch, nothing_trained
):
    def another_run(*_):
        with pytest.raises(ValueError, match="no other run is writing to"):
            locked(tmp_path / "out").__enter__()
        tried.append(True)

    tried = []
    monkeypatch.setattr(run_folder, "PATIENCE_S", 0)
    for name in ("_train", "_save"):
        monkeypatch.setattr(cli, name, another_run)
    assert train(here, tmp_path / "out") == 0 and len(tried) == 2


def test_the_first_process_alone_prints_and_writes_for_all(
    here, tmp_path, monkeypatch, nothing_trained, capsys
):
    folder = RunFolder(path=tmp_path / "out", notes=("resuming",))
    monkeypatch.setattr("fastdpo.ranks.from_main_process", lambda *_: (folder, {}))
    monkeypatch.setattr("fastdpo.config.DPOConfig.process_index", 1)
    monkeypatch.setattr(run_folder, "PATIENCE_S", 0)
    with locked(tmp_path / "out"):  # by the first
        assert train(here, tmp_path / "out") == 0
    assert capsys.readouterr().out == "" and not any((tmp_path / "out").iterdir())


def test_a_run_is_saved_with_the_name_of_its_dataset(here, tmp_path, monkeypatch, nothing_trained):
    saved = []
    monkeypatch.setattr(cli, "_save", lambda _, path, name, say: saved.append((path, name)))
    assert train(here, tmp_path / "out") == 0
    assert saved == [(tmp_path / "out", str(here / "rows.jsonl"))]


def test_a_run_whose_model_was_not_saved_is_not_complete(
    here, tmp_path, monkeypatch, nothing_trained, capsys
):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fastdpo.run_folder.mark_started", full)
        assert train(here, tmp_path / "out") == 2 and "No space left" in one_line(capsys)
        assert not (tmp_path / "out").exists()
    monkeypatch.setattr(cli, "_save", full)
    with pytest.raises(OSError, match="No space left"):
        train(here, tmp_path / "out")
    assert not json.loads((tmp_path / "out/run.json").read_text())["finished"]


def test_an_eval_split_is_scored(here, tmp_path, capsys):
    mixture = tmp_path / "run.yaml"
    values = settings(here, tmp_path / "out", max_steps=1, test_split_size=0.25)
    values["datasets"] = [{"path": values.pop("dataset_name")}]
    mixture.write_text(yaml.safe_dump({**values, "eval_strategy": "steps", "eval_steps": 1}))
    assert cli.main(["train", "--config", str(mixture)]) == 0
    out = capsys.readouterr().out
    assert "eval_loss" in out and "12 of 12 rows" in out and "4 of 4 rows" in out


def test_a_runs_end_finds_no_wrapper_of_the_model(here, tmp_path, monkeypatch):
    """DDP's, while its process group is destroyed, hung at times."""
    ends = []

    def end(trainer):
        ends.append((trainer.model_wrapped is trainer.model, trainer.accelerator._models))

    def train_wrapped(trainer, checkpoint):
        trainer.model_wrapped = torch.nn.Sequential(trainer.model)
        trainer.accelerator._models.append(trainer.model_wrapped)

    monkeypatch.setattr(DPOTrainer, "end", end, raising=False)
    monkeypatch.setattr(cli, "_train", train_wrapped)
    assert train(here, tmp_path / "out", max_steps=1) == 0
    assert ends == [(True, [])]


def test_a_run_that_is_complete_ends_its_process_group(here, whole_run, monkeypatch, capsys):
    """gloo's threads, left in one, aborted the process at times."""
    ended = []
    monkeypatch.setattr(PartialState, "destroy_process_group", lambda *_: ended.append(True))
    assert train(here, whole_run) == 0
    assert "this run is complete" in capsys.readouterr().out and ended == [True]


def test_launch_flags_go_through_accelerate(here, tmp_path, capfd):
    code = train(here, tmp_path / "out", "--num_processes", "1", "--num_machines", "1", max_steps=1)
    assert code == 0
    assert f"saved model and tokenizer to {tmp_path / 'out'}" in capfd.readouterr().out
    assert (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize("more, ignored", [((), None), (("--ignore_bias_buffers",), ["mask"])])
def test_ddp_ignores_boolean_buffers_where_asked(here, tmp_path, monkeypatch, more, ignored):
    model = tiny.model("llama", 300)
    model.register_buffer("mask", torch.ones(2, 2, dtype=torch.bool))
    model.register_buffer("steps", torch.zeros(2, dtype=torch.long))
    monkeypatch.setattr("fastdpo.trainer.DPOTrainer", lambda **_: SimpleNamespace(model=model))
    argv = [*flags(settings(here, tmp_path / "out")), *more]
    cli._build_trainer(TrainParser(prog="fastdpo train").parse(argv)[0])
    assert getattr(model, "_ddp_params_and_buffers_to_ignore", None) == ignored


def test_flags_reach_the_rows_and_the_trainer(here, tmp_path, monkeypatch):
    def load_datasets(*_, **how):
        given.update(how)
        return "train", "eval"

    def make_trainer(**how):
        given.update(how)
        raise KeyboardInterrupt

    given = {}
    monkeypatch.setattr("fastdpo.mixture.load_datasets", load_datasets)
    monkeypatch.setattr("fastdpo.trainer.DPOTrainer", make_trainer)
    monkeypatch.setattr("fastdpo.arguments.quantization_config", lambda model_args: "4 bits")
    how = {"seed": 7, "dtype": "bfloat16", "eval_strategy": "epoch"}
    assert train(here, tmp_path / "out", **how) == 130
    assert (given["seed"], given["with_eval"], given["quantization_config"]) == (7, True, "4 bits")
    assert (given["train_dataset"], given["eval_dataset"]) == ("train", "eval")
    assert given["args"].model_init_kwargs["dtype"] == "bfloat16"


def test_the_environment_is_set_before_torch_reads_it(tmp_path):
    (tmp_path / "run.yaml").write_text("env: {OMP_NUM_THREADS: 1, ABOVE: 3}\n")
    code = (
        "import os, sys; from fastdpo import cli\n"
        "def command(*_, **__): print(os.environ.pop('ABOVE'), 'torch' in sys.modules)\n"
        "cli.train = cli.verify = command\n"
        "for name in ('train', 'dpo', 'verify'): cli.main([name, '--config', sys.argv[1]])\n"
        "import torch; print(torch.get_num_threads())"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run.yaml")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "2"},
    )
    assert process.stdout == 3 * "3 False\n" + "1\n", process.stderr


def test_a_pushed_model_names_the_dataset_of_the_hub_that_it_was_trained_on(tmp_path):
    pushed = []
    trainer = SimpleNamespace(
        args=SimpleNamespace(push_to_hub=True),
        hub_model_id="org/model",
        save_model=lambda path: None,
        push_to_hub=lambda **kwargs: pushed.append(kwargs),
    )
    for name in ("org/pairs", str(tmp_path), None):
        cli._save(trainer, tmp_path, name, print)
    assert pushed == [{"dataset_name": "org/pairs"}, *[{"dataset_name": None}] * 2]


# Help


def test_help_and_version_do_not_wait_for_torch():
    code = (
        "import sys; from fastdpo import cli; "
        "codes = [cli.main(argv) for argv in ([], ['-h'], ['--help'], ['--version'])]; "
        "sys.exit(any(codes) or 'torch' in sys.modules)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "train" in process.stdout and "demo" in process.stdout


def test_train_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["train", "--help"])
    assert exit.value.code == 0
    listed = set(re.findall(r"--\w+", capsys.readouterr().out))
    kinds = (ScriptArguments, DPOConfig, ModelConfig, DatasetMixtureConfig)
    settings = [field.name for kind in kinds for field in fields(kind) if field.init]
    assert {f"--{name}" for name in (*settings, "config", "fresh")} <= listed
