"""run_folder: what a folder holds decides whether a run resumes, is refused, or starts."""

import contextlib
import multiprocessing
import os
import threading
import time
from functools import partial

import pytest
from saved import save_checkpoint

from fastdpo import run_folder
from fastdpo.run_folder import choose_run_folder, locked, mark_finished, mark_started

IDENTITY = {"beta": 0.1, "max_length": None, "datasets": []}


@pytest.fixture
def started(tmp_path):
    """The folder of a run that has begun."""
    mark_started(tmp_path / "out", IDENTITY)
    return tmp_path / "out"


def content(folder):
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Two runs at once


def test_a_folder_that_a_run_writes_to_is_refused_to_another(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE_S", 0)
    with locked(tmp_path / "out"):
        for enter in (lambda: locked(tmp_path / "out").__enter__(), partial(choose, tmp_path)):
            with pytest.raises(ValueError, match="no other run is writing to, got .*out"):
                enter()
        (tmp_path / "out/mine").write_text("")
        assert choose(tmp_path, fresh=True).path == tmp_path / "out-2"
    assert choose(tmp_path).path == tmp_path / "out"
    with locked(tmp_path / "out"):
        pass


def test_a_killed_runs_loaders_are_waited_for(tmp_path):
    with contextlib.ExitStack() as other:
        other.enter_context(locked(tmp_path / "out"))
        threading.Timer(0.5, other.close).start()
        with locked(tmp_path / "out"):
            pass


def test_workers_that_outlive_a_run_do_not_keep_its_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE_S", 0)
    with locked(tmp_path / "out"):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
    try:
        with locked(tmp_path / "out"):
            pass
    finally:
        worker.kill()
        worker.join()


def choose(tmp_path, **how):
    return choose_run_folder(tmp_path / "out", IDENTITY, **how)


def test_a_file_system_without_locks_is_written_to_all_the_same(tmp_path, monkeypatch):
    def flock(folder, how):
        raise OSError("no locks here")

    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    with locked(tmp_path / "new/out"):
        assert (tmp_path / "new/out").is_dir()


# What the folder holds


def test_a_new_folder_is_taken_as_it_is(tmp_path):
    folder = choose_run_folder(tmp_path / "out", IDENTITY)
    assert (folder.path, folder.checkpoint, folder.notes) == (tmp_path / "out", None, ())
    assert not folder.path.exists()


def test_the_same_run_resumes_from_its_last_checkpoint(started):
    for step in (5, 10, 9):  # 10 comes last by number, not by name
        save_checkpoint(started, step)
    folder = choose_run_folder(started, IDENTITY)
    assert folder.checkpoint == started / "checkpoint-10"
    assert "resuming" in folder.notes[0] and "step 10" in folder.notes[0]


def test_a_torn_checkpoint_is_skipped_and_named_and_refused_by_name(started):
    save_checkpoint(started, 5)
    torn = save_checkpoint(started, 10)
    (torn / "model.safetensors").unlink()
    folder = choose_run_folder(started, IDENTITY)
    assert folder.checkpoint == started / "checkpoint-5"
    assert folder.notes[0] == f"skipping {torn}: no weights" and "checkpoint-5" in folder.notes[1]
    with pytest.raises(ValueError, match=f"got {torn}: no weights"):
        choose_run_folder(started, IDENTITY, resume_from=str(torn))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lora_r": 8}, "lora_r is 16 there, 8 here"),
        ({"use_peft": False}, "use_peft is True there, False here"),
        ({"lora_target_modules": ["q_proj"]}, "lora_target_modules"),
        ({"lora_target_parameters": ["experts.down_proj"]}, "lora_target_parameters"),
        ({"lora_modules_to_save": ["lm_head"]}, "lora_modules_to_save"),
        ({"use_dora": True}, "use_dora"),
        ({"model_name_or_path": "m (b1)"}, r"model is \(a0\) there, \(b1\) here"),
        ({"max_steps": 4}, "want max_steps from 5 to resume"),
    ],
    ids=str,
)
def test_a_named_checkpoint_that_does_not_fit_the_run_is_refused(tmp_path, change, told):
    identity = IDENTITY | {"use_peft": True, "lora_r": 16, "lora_target_modules": None}
    identity |= {"model_name_or_path": "m (a0)"}
    mark_started(tmp_path / "out", identity)
    how = {"resume_from": str(save_checkpoint(tmp_path / "out", 5))}
    with pytest.raises(ValueError, match=told):
        choose_run_folder(tmp_path / "new", identity | change, **how)
    other = identity | {"learning_rate": 1.0, "max_steps": 5}
    for model in ("m (a0)", "moved (a0)", "org/m"):
        other["model_name_or_path"] = model
        assert choose_run_folder(tmp_path / "new", other, **how).checkpoint


def test_torn_checkpoints_alone_start_the_run_again_in_place(started):
    save_checkpoint(started, 5, state=None)
    folder = choose_run_folder(started, IDENTITY)
    assert (folder.path, folder.checkpoint) == (started, None)
    assert "step 0" in folder.notes[-1]


def test_a_run_without_a_checkpoint_starts_again_in_place(started):
    folder = choose_run_folder(started, IDENTITY)
    assert (folder.path, folder.checkpoint, folder.finished) == (started, None, False)


def test_a_finished_run_is_left_as_it_is(started):
    checkpoint = save_checkpoint(started, 5)
    mark_finished(started)
    before = content(started)
    for resume_from in (None, True, str(checkpoint)):
        folder = choose_run_folder(started, IDENTITY, resume_from=resume_from)
        assert folder.finished and "complete" in folder.notes[0]
    assert content(started) == before


@pytest.mark.parametrize("finished", [False, True], ids=["with a checkpoint", "finished"])
def test_another_run_is_refused_with_both_values(started, finished):
    mark_finished(started) if finished else save_checkpoint(started, 5)
    before = content(started)
    with pytest.raises(ValueError, match=r"beta is 0.1 there, 0.2 here; .*--output_dir.*--fresh"):
        choose_run_folder(started, {**IDENTITY, "beta": 0.2})
    assert content(started) == before


def test_a_setting_that_one_side_lacks_is_a_difference(started):
    save_checkpoint(started, 5)
    with pytest.raises(ValueError, match="new is unset there, 1 here"):
        choose_run_folder(started, {**IDENTITY, "new": 1})
    mark_started(started, {**IDENTITY, "datasets.1.path": "more.jsonl"})
    with pytest.raises(ValueError, match=r"datasets.1.path is more.jsonl there, unset here"):
        choose_run_folder(started, IDENTITY)


def test_another_run_that_left_nothing_is_no_obstacle(started):
    assert choose_run_folder(started, {**IDENTITY, "beta": 0.2}).path == started


def test_checkpoints_of_an_unknown_run_are_refused_unless_named(tmp_path, monkeypatch):
    checkpoint = save_checkpoint(tmp_path, 5)
    with pytest.raises(ValueError, match=r"no run\.json.*--resume_from_checkpoint"):
        choose_run_folder(tmp_path, IDENTITY)
    assert choose_run_folder(tmp_path, IDENTITY, resume_from=str(checkpoint)).checkpoint
    assert choose_run_folder(tmp_path, IDENTITY, resume_from="true").checkpoint == checkpoint
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choose_run_folder(".", IDENTITY, resume_from=str(checkpoint)).checkpoint == checkpoint
    home = choose_run_folder(tmp_path, IDENTITY, resume_from="~/checkpoint-5")
    assert home.checkpoint == checkpoint
    elsewhere = save_checkpoint(tmp_path / "other", 5)
    with pytest.raises(ValueError, match=r"no run\.json"):
        choose_run_folder(tmp_path, IDENTITY, resume_from=str(elsewhere))


def test_a_model_that_no_run_wrote_is_never_overwritten(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"holds a model and no run\.json"):
        choose_run_folder(tmp_path, IDENTITY)


def test_a_checkpoint_without_its_optimizer_is_no_place_to_go_on_from(started):
    checkpoint = save_checkpoint(started, 5, optimizer=False)
    with pytest.raises(ValueError, match="save_only_model"):
        choose_run_folder(started, IDENTITY)
    named = choose_run_folder(started, IDENTITY, resume_from=str(checkpoint))
    assert named.checkpoint == checkpoint


def test_a_named_checkpoint_wins_over_the_last_one(started):
    save_checkpoint(started, 5)
    save_checkpoint(started, 10)
    folder = choose_run_folder(started, IDENTITY, resume_from=str(started / "checkpoint-5"))
    assert folder.checkpoint == started / "checkpoint-5"


def test_a_checkpoint_to_resume_from_has_to_be_there(started):
    with pytest.raises(ValueError, match="no such folder"):
        choose_run_folder(started, IDENTITY, resume_from=str(started / "checkpoint-5"))
    with pytest.raises(ValueError, match="got none"):
        choose_run_folder(started, IDENTITY, resume_from=True)


def test_fresh_takes_the_next_free_name_and_leaves_the_rest(started):
    save_checkpoint(started, 5)
    (started.parent / "out-2").mkdir()
    before = content(started)
    folder = choose_run_folder(started, IDENTITY, fresh=True)
    assert (folder.path, folder.checkpoint) == (started.parent / "out-3", None)
    assert str(folder.path) in folder.notes[-1]
    assert content(started) == before
    assert choose_run_folder(started, IDENTITY, fresh=True).path == started.parent / "out-4"


@pytest.mark.parametrize("name", [".", "sub/.."])
def test_fresh_goes_beside_a_folder_that_is_not_called_by_its_name(started, monkeypatch, name):
    save_checkpoint(started, 5)
    (started / "sub").mkdir()
    monkeypatch.chdir(started)
    assert choose_run_folder(name, IDENTITY, fresh=True).path == started.parent / "out-2"


def test_fresh_and_the_last_checkpoint_are_one_too_many(started):
    save_checkpoint(started, 5)
    with pytest.raises(ValueError, match="want --fresh or the last checkpoint"):
        choose_run_folder(started, IDENTITY, fresh=True, resume_from=True)
    assert not (started.parent / "out-2").exists()


def test_fresh_in_a_free_place_stays_there(tmp_path):
    assert choose(tmp_path, fresh=True).path == tmp_path / "out"
    (tmp_path / "out").mkdir()
    assert choose(tmp_path, fresh=True).path == tmp_path / "out"


# run.json


def test_a_write_that_dies_leaves_the_old_run_json(started, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    before = (started / "run.json").read_text()
    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        mark_finished(started)
    assert (started / "run.json").read_text() == before


def test_a_full_disk_leaves_no_half_file(started, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    before = content(started)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        mark_finished(started)
    assert content(started) == before


@pytest.mark.parametrize("text", ['{"identity": ', "[]", '{"identity": 3}'])
def test_a_foreign_run_json_is_refused(started, text):
    (started / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json"):
        choose_run_folder(started, IDENTITY)
