"""Decide what to do with a run's folder: start, resume, report that it is finished, or refuse.

run.json, written before the first step, holds the run's identity (run_identity.py). A run of the
same identity resumes from the last whole checkpoint, or is reported complete; any other is refused.
`fresh` starts in a new folder beside it.
"""

import contextlib
import fcntl
import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdpo.checkpoints import WEIGHTS, checkpoints_in, last_checkpoint, step_of, why_torn

RUN_FILE = "run.json"

# Settings that decide which weights there are, and which of them train.
OF_WEIGHTS = frozenset(
    "use_peft lora_r lora_target_modules lora_target_parameters lora_modules_to_save "
    "use_dora".split()
)
PATIENCE_S = 10  # a killed run's data loaders take a while to notice


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """Where a run writes, the checkpoint it goes on from, and what to tell about both."""

    path: Path
    checkpoint: Path | None = None
    finished: bool = False
    notes: tuple[str, ...] = ()


def choose_run_folder(
    path: str | Path,
    identity: dict[str, Any],
    *,
    fresh: bool = False,
    resume_from: str | bool | None = None,
) -> RunFolder:
    """The folder for the run `identity`: `path`, or with `fresh` the next free one beside it.

    Writes nothing but that next folder, empty. resume_from: a checkpoint to go on from instead of
    the last one; true for the last one, which then has to be there.

    ValueError where the folder holds other work, or no checkpoint to go on from as asked, or where
    it cannot be written to, or another run is writing to it; where the checkpoint named is torn, of
    other weights, or beyond max_steps.
    """
    path = Path(path)
    _check_writable(path)
    resume_last = str(resume_from).lower() == "true"
    named = Path(resume_from).expanduser() if resume_from and not resume_last else None
    if fresh and resume_last:
        raise ValueError("want --fresh or the last checkpoint to resume from, got both")
    if named is not None:
        _check_named(named, identity)
    if fresh and not _is_free(path):
        path = _make_next_free(path)
    if path.is_dir():
        with locked(path):  # what is in there stands still now, or the folder is another run's
            pass
    _check_ownership(path, identity, named=named, resume_last=resume_last)
    if _read(path).get("finished"):
        return RunFolder(path=path, finished=True, notes=(f"{path}: this run is complete",))

    checkpoint, notes = (named, ()) if named else last_checkpoint(path)
    if resume_last and checkpoint is None:
        raise ValueError(f"want a whole checkpoint to resume from in {path}, got none")
    if checkpoint is not None:
        notes += (f"resuming from {checkpoint}, step {step_of(checkpoint)}",)
    elif fresh or _read(path):
        notes += (f"starting at step 0 in {path}",)
    return RunFolder(path=path, checkpoint=checkpoint, notes=notes)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other runs on this machine out of `path`, which is made if it is not there.

    ValueError where one is in it, and stays. A file system without locks keeps nobody out.
    """
    path.mkdir(parents=True, exist_ok=True)
    folder = os.open(path, os.O_RDONLY)
    due = time.monotonic() + PATIENCE_S
    try:
        while not _take_lock(folder):
            if time.monotonic() > due:
                raise ValueError(f"want an output_dir that no other run is writing to, got {path}")
            time.sleep(0.1)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_UN)  # closing alone would leave it to a loader's workers
        os.close(folder)


def _take_lock(folder: int) -> bool:
    """Take the lock of an open folder; False while another process has it. True, too, on a file
    system without locks."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def mark_started(path: Path, identity: dict[str, Any]) -> None:
    """Claim `path` for the run `identity`, before its first step."""
    _write(path, {"identity": identity, "finished": False})


def mark_finished(path: Path) -> None:
    """Note in run.json that the run came to its end and its model is saved."""
    _write(path, {**_read(path), "finished": True})


def _check_named(checkpoint: Path, identity: dict[str, Any]) -> None:
    """ValueError unless this run can go on from `checkpoint`, which may be another run's."""
    if torn := why_torn(checkpoint):
        raise ValueError(f"want a whole checkpoint to resume from, got {checkpoint}: {torn}")
    if there := _read(checkpoint.parent).get("identity"):
        _check_same_weights(checkpoint, there, identity)
    step, last = step_of(checkpoint), identity.get("max_steps", 0)
    if step is not None and 0 < last < step:
        raise ValueError(f"want max_steps from {step} to resume from {checkpoint}, got {last}")


def _check_same_weights(checkpoint: Path, there: dict[str, Any], now: dict[str, Any]) -> None:
    of_weights = [
        {name: value for name, value in each.items() if name in OF_WEIGHTS} for each in (there, now)
    ]
    hashes = [str(each.get("model_name_or_path")).rpartition(" ")[2] for each in (there, now)]
    if all(each.endswith(")") for each in hashes):  # of folders, whatever their names
        of_weights = [a | {"model": b} for a, b in zip(of_weights, hashes, strict=True)]
    if differences := _differences(*of_weights):
        raise ValueError(
            "want a checkpoint of the same model and adapters to resume from, got "
            f"{checkpoint}: {'; '.join(differences)}"
        )


def _check_ownership(
    path: Path, identity: dict[str, Any], *, named: Path | None, resume_last: bool
) -> None:
    elsewhere = "give another --output_dir, or --fresh to start over beside it"
    holds_checkpoints = bool(checkpoints_in(path))
    holds_model = any(found for pattern in WEIGHTS for found in path.glob(pattern))
    run = _read(path)
    if not (holds_checkpoints or holds_model or run.get("finished")):
        return  # another run may have begun here, but left nothing that could be lost
    if run:
        differences = _differences(run["identity"], identity)
        if differences:
            raise ValueError(f"{path} holds another run: {'; '.join(differences)}; {elsewhere}")
    elif holds_checkpoints:
        if not resume_last and (named is None or named.parent.resolve() != path.resolve()):
            raise ValueError(
                f"{path} holds checkpoints and no {RUN_FILE} that says of which run; {elsewhere}, "
                "or name one with --resume_from_checkpoint"
            )
    else:
        raise ValueError(f"{path} holds a model and no {RUN_FILE}; {elsewhere}")


def _differences(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        f"{name} is {there.get(name, 'unset')} there, {now.get(name, 'unset')} here"
        for name in dict.fromkeys([*there, *now])
        if there.get(name) != now.get(name)
    ]


def _check_writable(path: Path) -> None:
    there = next(each for each in (path, *path.parents) if each.exists())
    if not there.is_dir():
        raise ValueError(f"want a folder as output_dir, got {path}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"want an output_dir to write to, got {path}: {there} is read-only")


def _is_free(path: Path) -> bool:
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _make_next_free(path: Path) -> Path:
    if path.name in ("", ".."):  # such as "."
        path = path.resolve()
    for number in itertools.count(2):
        candidate = path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir()
        except FileExistsError:
            continue  # also when another process took it just now
        return candidate


def _read(path: Path) -> dict[str, Any]:
    """The content of `path`'s run.json; {} where there is none."""
    file = path / RUN_FILE
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"want JSON in {file}, got {error}") from error
    if not isinstance(run, dict) or not isinstance(run.get("identity"), dict):
        raise ValueError(f"want a mapping with an identity in {file}, got another program's")
    return run


def _write(path: Path, run: dict[str, Any]) -> None:
    """Replace run.json at once: whoever reads it, or kills this, finds the old one or the new."""
    path.mkdir(parents=True, exist_ok=True)
    unfinished = path / f".{RUN_FILE}.{os.getpid()}"
    try:
        with open(unfinished, "w", encoding="utf-8") as file:
            json.dump(run, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path / RUN_FILE)
    except OSError:  # a full disk
        unfinished.unlink(missing_ok=True)
        raise
