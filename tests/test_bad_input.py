"""What the command line is given wrong: one line on stderr and exit code 2."""

import os
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from command_line import (
    flags,
    folder_with_model_and_rows,
    last_line,
    one_line,
    settings,
    train,
)

from fastdpo import cli
from fastdpo.trainer import DPOTrainer

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return folder_with_model_and_rows(tmp_path_factory.mktemp("here"))


@pytest.mark.parametrize(
    "argv, told",
    [
        (["tarin"], "tarin"),
        (["train"], "--model_name_or_path"),
        (["train", "--model_name_or_path", "m"], "--dataset_name"),
        (["train", "--model_name_or_path", "m", "--dataset_name", ""], "--dataset_name"),
        (["train", "--model_name_or_path", "m", "--output_dir", ""], "--output_dir"),
        (["train", "--bata", "0.1"], "--bata"),
        (["train", "stray"], "stray"),
        (["train", "--beta", "much"], "much"),
        (["train", "--beta", "-1"], "beta > 0"),
        (["train", "--dtype", "float8"], "float8"),
        (["train", "--load_in_4bit", "--load_in_8bit"], "load_in_4bit"),
        (["train", "--config"], "--config"),
        (["train", "--conf", "run.yaml"], "in full"),
        (["train", "--config", "a.yaml", "--config=b.yaml"], "--config once"),
        (["train", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--num_processes", "two"], "two"),
        (["train", "--loss_weights", "none"], "loss-weights: invalid float value"),
        (["train", "--max_length", "two"], "max-length: invalid int value: 'two'"),
        (["train", "--accelerate_config", "zero9"], "zero9"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags_end_with_one_line(argv, told, capsys):
    assert cli.main(argv) == 2
    assert told in one_line(capsys)


@pytest.mark.parametrize(
    "text, told",
    [
        ("- beta\n- 0.2\n", "mapping"),
        ("beta: [0.1\n", "not YAML"),
        ("bata: 0.2\n", "--bata"),
        ("disable_dropuot: false\n", "--disable_dropuot"),
        ("beta: [0.1, 0.2]\n", "one value"),
        ("dtype: float8\n", "float8"),
        ("env: HOME\n", "env"),
        ("datasets: rows.jsonl\n", "list"),
        ("datasets: [{name: rows}]\n", "no path, only ['name']"),
        ("datasets: [{path: ''}]\n", "no path, only []"),
        ("datasets: [{path: rows, weight: 1}]\n", "weight"),
        ("beta: 0.1\nbeta: 0.2\n", "'beta' twice"),
        ("beta: null\n", "invalid float value"),
        ("max_steps: 2.5\n", "invalid int value"),
        ("max_steps: true\n", "invalid int value"),
        ("model_name_or_path: m\ndataset_name: a\ndatasets: [{path: b}]\n", "got both"),
        ("datasets: [{path: 5}]\n", "want path as str, got 5"),
        ("datasets: [{path: a, fraction: true}]\n", "want fraction as float | None, got True"),
        ("datasets: [{path: null}]\n", "want path as str, got None"),
        ("datasets: [{path: a, columns: prompt}]\n", "columns as list[str] | None, got 'prompt'"),
        ("datasets: [{path: a, columns: [b, 1]}]\n", "columns as list[str] | None, got ['b', 1]"),
        ("datasets: [{path: [a]}]\n", "want path as str, got ['a']"),
        ("dataset_name: [a, b]\n", "dataset_name: want one value"),
        ("dataset_name: true\n", "dataset_name: want one value"),
        ("dataset_train_split: null\n", "dataset_train_split: want one value"),
        ("model_name_or_path: [a]\n", "model_name_or_path: want one value"),
        ("output_dir: 2026-01-01\n", "output_dir: want one value"),
        ("output_dir: false\n", "output_dir: want one value"),
        ("use_cpu: [true]\n", "use_cpu: want one value"),
        ("gradient_checkpointing: 5\n", "5"),
        ("fresh: 'no'\n", "fresh: want true or false, got 'no'"),
        ("model_init_kwargs: [1]\n", "model_init_kwargs: want one value"),
        ("loss_weights: [1, a]\n", "loss_weights: want numbers, got 'a'"),
        ("model_init_kwargs: '{1'\n", "model_init_kwargs as JSON"),
        ("model_init_kwargs: some\n", "model_init_kwargs as a mapping, got 'some'"),
        ("gradient_checkpointing_kwargs: [1]\n", "gradient_checkpointing_kwargs: want one value"),
        ("accelerator_config: {foo: 1}\n", "TypeError: "),
        ("loss_type: [[sigmoid]]\n", "loss_type: want texts"),
        ("datasets: &a [*a]\n", "want mappings with a path"),
        ("model_init_kwargs: &a {a: *a}\nuse_cpu: true\n", "error: "),
        ("? [beta]\n: 0.1\n", "not YAML"),
        ("beta: 2026-13-45\n", "run.yaml is not YAML: month must be"),
        ("beta: \xe9\n", "run.yaml is not YAML: 'utf-8'"),
        ("env: {A=B: 1}\n", "run.yaml: want names and values of variables as env, got 'A=B'"),
        ('env: {A: "b\\0"}\n', "run.yaml: want names and values of variables as env, got 'A'"),
        ('env: {"": b}\n', "run.yaml: want names and values of variables as env, got ''"),
        ('env: {"A\\0": b}\n', "run.yaml: want names and values of variables as env, got 'A"),
        pytest.param(999 * "[", "run.yaml is not YAML: ", id="too deep"),
        ("help: true\n", "want --help on the command line"),
        ("he: true\n", "want --he on the command line"),
        ("config: a.yaml\n", "want --config on the command line"),
    ],
)
def test_a_bad_yaml_file_ends_with_one_line(tmp_path, text, told, capsys):
    (tmp_path / "run.yaml").write_text(text, encoding="latin-1")
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml")]) == 2
    assert told in one_line(capsys)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"test_split_size": 0.5}, "want test_split_size=None with dataset_name"),
        ({"streaming": True}, "want streaming=False with dataset_name"),
        ({"lora_r": 8}, "want lora_r=16 without use_peft, got 8"),
        ({"use_dora": True}, "want use_dora=False without use_peft"),
        ({"use_rslora": True}, "want use_rslora=False without use_peft"),
        ({"dataset_config": "a"}, "want none of ['config_name', 'data_files', 'data_dir']"),
        ({"eval_on_start": True}, "want an eval_strategy with eval_on_start"),
        ({"use_peft": True, "lora_target_modules": ("q_proj", "proj")}, "got 'proj'"),
        ({"use_peft": True, "lora_modules_to_save": ("lm_head", "score")}, "got 'score'"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 17}, "17 rows"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value)[:40],
)
def test_settings_that_would_be_ignored_or_fail_late_are_refused(
    here, tmp_path, changes, told, capsys
):
    argv = []
    for name, value in settings(here, tmp_path / "out", **changes).items():
        argv += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    assert cli.main(["train", *argv]) == 2
    assert told in last_line(capsys)


def test_settings_that_datasets_say_themselves_are_refused_beside_them(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    for setting, told in {
        "dataset_streaming: true": "want dataset_streaming=False with datasets",
        "dataset_train_split: a": "want dataset_train_split=train with datasets",
    }.items():
        config.write_text(f"model_name_or_path: m\ndatasets: [{{path: rows.jsonl}}]\n{setting}\n")
        assert cli.main(["train", "--config", str(config), "--use_cpu", "true"]) == 2
        assert told in one_line(capsys)


def test_rows_of_which_too_few_are_left_for_a_batch_are_refused(here, tmp_path, capsys):
    tiny.write_rows(tmp_path / "rows.jsonl", [*tiny.rows(3), {"prompt": "a"}])
    changes = {"dataset_name": tmp_path / "rows.jsonl", "on_bad_rows": "skip"}
    changes |= {"dataloader_drop_last": True, "per_device_train_batch_size": 4}
    assert train(here, tmp_path / "out", **changes) == 2
    assert "want at least one batch of 4 rows" in last_line(capsys)


@pytest.mark.parametrize("file, told", [("tokenizer.json", "tokenizer"), ("config.json", "onfig")])
def test_a_broken_file_of_a_model_ends_with_one_line(here, tmp_path, file, told, capsys):
    shutil.copytree(here / "model", tmp_path / "model")
    (tmp_path / "model" / file).write_text("{}" if file == "tokenizer.json" else '{"a": ')
    assert train(here, tmp_path / "out", model_name_or_path=tmp_path / "model") == 2
    assert told in one_line(capsys)


def test_an_error_of_another_kind_is_reported_with_its_kind(here, tmp_path, capsys, monkeypatch):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(cli, "_build_trainer", fail)
    error = KeyError("rope")
    assert train(here, tmp_path / "out") == 2
    told = "fastdpo: error: KeyError: 'rope' (FASTDPO_DEBUG=1 shows where)"
    assert one_line(capsys) == told
    error = torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError):
        train(here, tmp_path / "out")


def test_debugging_shows_where_bad_input_was_found(capsys, monkeypatch):
    monkeypatch.setenv("FASTDPO_DEBUG", "0")
    assert cli.main(["train", "--beta", "-1"]) == 2
    one_line(capsys)
    monkeypatch.setenv("FASTDPO_DEBUG", "1")
    assert cli.main(["train", "--beta", "-1"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and any("in _check_loss" in line for line in lines)
    assert lines[-1].startswith("fastdpo: error: ") and "beta > 0" in lines[-1]


def test_a_stream_of_which_no_row_is_left_ends_with_one_line(here, tmp_path, capsys):
    tiny.write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}] * 3)
    skip = {"dataset_name": tmp_path / "rows.jsonl", "on_bad_rows": "skip"}
    assert train(here, tmp_path / "out", "--dataset_streaming", **skip) == 2
    assert "train dataset: want at least one row" in one_line(capsys)


@pytest.mark.parametrize("name", ["model_name_or_path", "dataset_name"])
def test_a_missing_model_or_dataset_ends_with_one_line(here, tmp_path, name, capsys):
    changes = {name: str(tmp_path / "nowhere")}
    assert train(here, tmp_path / "out", **changes) == 2
    assert "nowhere is not there" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_to_is_reported_before_all_else(
    here, tmp_path, capsys, monkeypatch
):
    (tmp_path / "file").write_text("mine")
    nowhere = {"model_name_or_path": "./nowhere"}
    assert train(here, tmp_path / "file/out", **nowhere) == 2
    assert "want a folder as output_dir" in one_line(capsys)
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    assert train(here, tmp_path / "out", **nowhere) == 2
    assert f"{tmp_path} is read-only" in one_line(capsys)


def test_a_metric_that_no_evaluation_has_is_reported_before_all_else(here, tmp_path, capsys):
    (tmp_path / "rows").mkdir()
    for split in ("train", "test"):
        tiny.write_rows(tmp_path / f"rows/{split}.jsonl", tiny.rows(2))
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    best |= {"dataset_name": tmp_path / "rows", "model_name_or_path": "./nowhere"}
    assert train(here, tmp_path / "out", metric_for_best_model="margin", **best) == 2
    told = last_line(capsys)
    assert "'eval_rewards/margins'" in told and "got 'margin'" in told


def test_a_malformed_row_ends_the_process_with_one_line(here, tmp_path):
    tiny.write_rows(tmp_path / "rows.jsonl", [*tiny.rows(3), {"prompt": "Two and two make"}])
    values = settings(here, tmp_path / "out", dataset_name=tmp_path / "rows.jsonl")
    process = subprocess.run(
        [sys.executable, "-m", "fastdpo.cli", "train", *flags(values)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert process.returncode == 2
    assert process.stderr.startswith("fastdpo: error: ") and process.stderr.count("\n") == 1
    assert "line 4" in process.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_a_malformed_row_late_in_a_stream_ends_with_one_line(here, tmp_path, workers, capsys):
    tiny.write_rows(tmp_path / "rows.jsonl", [*tiny.rows(150), {"prompt": "Two and two make"}])
    changes = {"dataset_name": tmp_path / "rows.jsonl", "max_steps": 99, "save_steps": 99}
    code = train(
        here,
        tmp_path / "out",
        "--dataset_streaming",
        **changes,
        per_device_train_batch_size=8,
        dataloader_num_workers=workers,
    )
    assert code == 2
    told = capsys.readouterr().err.rpartition("fastdpo: error: ")[2].partition("\n")[0]
    assert told.startswith(f"{tmp_path / 'rows.jsonl'}, line 151, field 'chosen': want a text")


def test_a_missing_package_ends_with_one_line(here, tmp_path, capsys):
    if quantization_installed():
        pytest.skip("bitsandbytes is installed")
    assert train(here, tmp_path / "out", "--use_peft", "--load_in_4bit") == 2
    assert "pip install bitsandbytes" in one_line(capsys)


def quantization_installed():
    from transformers.utils import is_bitsandbytes_available

    return is_bitsandbytes_available()


def test_a_bug_keeps_its_traceback(here, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise ValueError("a bug in the loop")

    monkeypatch.setattr(DPOTrainer, "training_step", fail)
    with pytest.raises(ValueError, match="a bug in the loop"):
        train(here, tmp_path / "out")
