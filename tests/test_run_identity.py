"""run_identity: what decides a run's numbers is in its identity, and nothing else."""

import json
from pathlib import Path

import pytest
import tiny
from datasets import Dataset

from fastdpo.arguments import (
    DatasetConfig,
    DatasetMixtureConfig,
    ModelConfig,
    RunArguments,
    ScriptArguments,
)
from fastdpo.config import DPOConfig
from fastdpo.data import prepare_pairs
from fastdpo.run_folder import mark_started
from fastdpo.run_identity import NOT_IDENTITY, run_identity


def identity_of(tmp_path, *, script=None, model=None, mixture=None, **training):
    run = RunArguments(
        script or ScriptArguments(dataset_name="org/rows"),
        DPOConfig(output_dir=str(tmp_path), **training),
        model or ModelConfig(model_name_or_path="org/model"),
        mixture or DatasetMixtureConfig(),
    )
    return run_identity(run)


def test_what_cannot_change_the_numbers_is_no_part_of_the_identity(tmp_path):
    plain = identity_of(tmp_path)
    told = identity_of(
        tmp_path / "elsewhere", logging_steps=1, save_steps=7, eval_strategy="steps", run_name="x"
    )
    assert told == plain
    assert {
        *DPOConfig.__dataclass_fields__,
        *ScriptArguments.__dataclass_fields__,
        *("log_on_each_node", "trackio_bucket_id", "trackio_static_space_id"),
        *("eval_use_gather_object", "hub_revision", "project", "enable_jit_checkpoint"),
        *("activation_checkpointing", "activation_checkpointing_kwargs"),
        *("dataloader_multiprocessing_context", "attn_implementation"),
    } >= NOT_IDENTITY


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens_per_forward": 512},
        {"head_cache_bytes": 0},
        {"gradient_checkpointing": False},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"strict_layout": True},
        {"layout": "padded"},
        {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 1},
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"use_liger_kernel": True, "liger_kernel_config": {"rope": False}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_run_may_go_on_with_less_memory(tmp_path, change):
    assert identity_of(tmp_path, **change) == identity_of(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"beta": 0.2},
        {"seed": 1},
        {"max_steps": 5},
        {"pad_token": "<pad>"},
        {"model": ModelConfig(model_name_or_path="org/model", use_peft=True)},
        {"model": ModelConfig(model_name_or_path="org/other")},
        {"script": ScriptArguments(dataset_name="org/rows", dataset_train_split="train[:9]")},
        {"mixture": DatasetMixtureConfig(datasets=[DatasetConfig(path="org/rows")])},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_changes_the_numbers_changes_the_identity(tmp_path, change):
    assert identity_of(tmp_path, **change) != identity_of(tmp_path)


def test_the_number_of_processes_counts(tmp_path, monkeypatch):
    alone = identity_of(tmp_path)
    monkeypatch.setattr(DPOConfig, "world_size", 2)
    assert identity_of(tmp_path)["num_processes"] == 2 != alone["num_processes"]


def test_nested_settings_differ_by_their_full_name(tmp_path):
    config = {"lr_scheduler_type": "cosine_with_restarts"}
    two = identity_of(tmp_path, **config, lr_scheduler_kwargs={"num_cycles": 2})
    three = identity_of(tmp_path, **config, lr_scheduler_kwargs={"num_cycles": 3})
    assert [name for name in two if two[name] != three[name]] == ["lr_scheduler_kwargs.num_cycles"]


def test_data_counts_by_content_and_not_by_place(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"chosen": 1}\n')
    (tmp_path / "a/rows.jsonl").write_text('{"chosen": 1}\n')

    def identity(path):
        return identity_of(tmp_path, script=ScriptArguments(dataset_name=str(path)))

    first = identity(tmp_path / "rows.jsonl")
    assert identity(tmp_path / "a/rows.jsonl") == first
    (tmp_path / "rows.jsonl").write_text('{"chosen": 2}\n')
    assert identity(tmp_path / "rows.jsonl") != first
    first = identity(tmp_path / "a")
    (tmp_path / "a/rows.jsonl").rename(tmp_path / "a/train.jsonl")  # a split's name
    assert identity(tmp_path / "a") != first
    (tmp_path / "a").rename(tmp_path / "train")  # another's
    first = identity(tmp_path)
    (tmp_path / "train").rename(tmp_path / "validation")
    assert identity(tmp_path) != first


def test_a_large_file_of_data_counts_to_its_end(tmp_path):
    rows, content = tmp_path / "rows.jsonl", b" " * 2**21

    def identity(last):
        rows.write_bytes(content + last)
        return identity_of(tmp_path / "out", script=ScriptArguments(dataset_name=str(rows)))

    assert identity(b"1") != identity(b"2")


def test_a_model_counts_by_its_folders_name_from_within_it_too(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "model")
    paths = (".", str(tmp_path / "model"))
    here, there = (
        identity_of(tmp_path / "out", model=ModelConfig(model_name_or_path=path)) for path in paths
    )
    assert here == there


@pytest.mark.parametrize(
    "where",
    [
        lambda folder: {"path": "json", "data_files": {"train": str(folder / "rows.jsonl")}},
        lambda folder: {"path": "json", "data_dir": str(folder)},
        lambda folder: {"path": str(folder)},
    ],
    ids=["data_files", "data_dir", "path"],
)
def test_files_of_a_mixture_count_by_content(tmp_path, where):
    rows = tmp_path / "rows.jsonl"

    def identity(text):
        rows.write_text(text)
        part = DatasetConfig(**where(tmp_path))
        return identity_of(tmp_path / "out", mixture=DatasetMixtureConfig(datasets=[part]))

    assert identity("{}\n") == identity("{}\n") != identity("{}\n{}\n")


@pytest.mark.parametrize(
    "pattern", ["parts/*.jsonl", "parts/**/*.jsonl", "~/parts", "~/parts/a.jsonl"]
)
def test_a_pattern_and_a_home_count_by_their_files(tmp_path, monkeypatch, pattern):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts").mkdir()

    def identity(text):
        (tmp_path / "parts/a.jsonl").write_text(text)
        part = DatasetConfig(path="json", data_files=pattern)
        return identity_of(tmp_path / "out", mixture=DatasetMixtureConfig(datasets=[part]))

    assert identity("{}\n") == identity("{}\n") != identity("{}\n{}\n")


def test_what_is_cached_beside_data_and_what_the_run_writes_are_no_data(tmp_path, monkeypatch):
    rows = tmp_path / "rows"
    Dataset.from_list(tiny.rows()).save_to_disk(rows)
    script = ScriptArguments(dataset_name=str(rows))
    before = identity_of(rows / "out", script=script)
    prepare_pairs(Dataset.load_from_disk(rows), tiny.tokenizer())
    assert any(rows.glob("cache-*.arrow"))
    (rows / "tmp1a2b3c4d").write_text("half a cache")
    mark_started(rows / "out", before)
    assert identity_of(rows / "out", script=script) == before
    monkeypatch.chdir(rows)
    assert identity_of(Path("out"), script=script) == before
    for name in ("cache-friendly.jsonl", "tmp.jsonl", "state.json"):  # the user's, but for the last
        (rows / name).write_text("{}")
        after = identity_of(rows / "out", script=script)
        assert after != before
        before = after


def test_who_reads_a_stream_counts_as_the_order_of_its_rows_does(tmp_path):
    def identity(streaming, workers):
        script = ScriptArguments(dataset_name="org/rows", dataset_streaming=streaming)
        return identity_of(tmp_path, script=script, dataloader_num_workers=workers)

    assert identity(False, 0) == identity(False, 2)
    assert identity(True, 0) != identity(True, 2)
    parts = DatasetMixtureConfig(datasets=[DatasetConfig(path="org/rows")], streaming=True)
    mixed = [identity_of(tmp_path, mixture=parts, dataloader_num_workers=n) for n in (0, 2)]
    assert mixed[0] != mixed[1]


def test_a_local_model_counts_by_its_weights(tmp_path):
    weights = bytes(3 * 2**20)

    def identity(content):
        (tmp_path / "model.safetensors").write_bytes(content)
        return identity_of(tmp_path, model=ModelConfig(model_name_or_path=str(tmp_path)))

    first = identity(weights)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "README.md").write_text("another card")
    assert identity(weights) == first
    for other in (weights[:-1] + b"1", b"1" + weights[1:], weights[1:]):
        assert identity(other) != first
    middle = len(weights) // 2
    assert identity(weights[:middle] + b"1" + weights[middle + 1 :]) == first  # which is not read
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert identity(weights) != first


def test_an_identity_survives_being_written(tmp_path):
    identity = identity_of(tmp_path, script=ScriptArguments(dataset_name="org/rows"))
    mark_started(tmp_path, identity)
    assert json.loads((tmp_path / "run.json").read_text())["identity"] == identity
