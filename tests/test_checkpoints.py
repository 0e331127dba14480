"""checkpoints: which of a folder's are whole, told by what the others lack."""

import json

import pytest
import torch
from safetensors.torch import save_file
from saved import save_checkpoint

from fastdpo.checkpoints import checkpoints_in, last_checkpoint, why_torn


def test_the_last_whole_checkpoint_is_found_and_each_later_one_named(tmp_path):
    whole = save_checkpoint(tmp_path, 5)
    torn = [save_checkpoint(tmp_path, step, state=None) for step in (15, 10)]
    checkpoint, notes = last_checkpoint(tmp_path)
    assert checkpoint == whole and why_torn(whole) is None
    why = "no trainer_state.json, it was not saved to the end"
    assert notes == tuple(f"skipping {each}: {why}" for each in torn)
    (whole / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path) == (None, (*notes, f"skipping {whole}: {why}"))


def test_deepspeeds_shards_are_weights_and_an_optimizer(tmp_path):
    checkpoint = save_checkpoint(tmp_path, 10, optimizer=False)
    (checkpoint / "global_step10").mkdir()
    (checkpoint / "model.safetensors").unlink()
    assert last_checkpoint(tmp_path) == (checkpoint, ())


@pytest.mark.parametrize("state", [None, "", '{"global_st', "{}", "null"])
def test_a_checkpoint_without_all_of_its_state_is_torn(tmp_path, state):
    assert "trainer_state.json" in why_torn(save_checkpoint(tmp_path, 10, state=state))


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "model.safetensors"])
@pytest.mark.parametrize("left", [0, 60, -1])
def test_a_file_cut_short_is_named(tmp_path, name, left):
    file = save_checkpoint(tmp_path, 10) / name
    file.write_bytes(file.read_bytes()[:left])
    assert why_torn(file.parent) == f"half a {name}"


def test_weights_in_torchs_format_cut_short_are_named(tmp_path):
    file = save_checkpoint(tmp_path, 10) / "adapter_model.bin"
    torch.save({}, file)
    (file.parent / "model.safetensors").unlink()
    assert why_torn(file.parent) is None
    file.write_bytes(file.read_bytes()[:-1])
    assert why_torn(file.parent) == "half a adapter_model.bin"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_configuration_cut_short_is_named(tmp_path, name):
    checkpoint = save_checkpoint(tmp_path, 10)
    (checkpoint / "notes.json").write_text("")  # somebody's, who knows
    assert why_torn(checkpoint) is None
    (checkpoint / name).write_text('{"model_ty')
    assert why_torn(checkpoint) == f"half a {name}"


@pytest.mark.parametrize("name", ["scheduler.pt", "rng_state*.pth"])
def test_what_transformers_would_go_on_without_is_missed(tmp_path, name):
    checkpoint = save_checkpoint(tmp_path, 10)
    for file in checkpoint.glob(name):
        file.unlink()
    assert why_torn(checkpoint) == f"no {name}"
    assert why_torn(save_checkpoint(tmp_path, 11, optimizer=False)) is None


def test_a_shard_or_the_index_that_is_not_there_is_named(tmp_path):
    checkpoint = save_checkpoint(tmp_path, 10)
    (checkpoint / "model.safetensors").unlink()
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for shard in shards:
        save_file({shard: torch.zeros(2)}, checkpoint / shard)
    assert why_torn(checkpoint) == "no model.safetensors.index.json"
    (checkpoint / "model.safetensors.index.json").write_text("[]")
    assert why_torn(checkpoint) == "no weight_map in model.safetensors.index.json"
    index = {"weight_map": {shard: shard for shard in shards}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert why_torn(checkpoint) is None
    (checkpoint / shards[1]).unlink()
    assert why_torn(checkpoint) == f"no {shards[1]}"


def test_a_shard_in_torchs_format_that_is_not_there_is_named(tmp_path):
    checkpoint = save_checkpoint(tmp_path, 10)
    shards = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    torch.save({}, checkpoint / shards[0])
    index = {"weight_map": {shard: shard for shard in shards}}
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert why_torn(checkpoint) == f"no {shards[1]}"


def test_a_folder_that_no_number_ends_and_a_file_are_no_checkpoints(tmp_path):
    (tmp_path / "checkpoint-\u00b2").mkdir()
    (tmp_path / "checkpoint-5").write_text("")
    assert checkpoints_in(tmp_path) == []
