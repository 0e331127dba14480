"""The checkpoints in a run's folder: which there are, which are whole, which is the last."""

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

STATE_FILE = "trainer_state.json"  # transformers writes it last
WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin")
SHARDS = ("pytorch_model_fsdp*", "global_step*")  # of FSDP and DeepSpeed
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
READ_JSON = ("*config.json", "tokenizer*.json", *INDEXES)  # to resume; others may be anyone's
OPTIMIZER = ("optimizer*", "global_step*")  # the latter is DeepSpeed's


def checkpoints_in(path: Path) -> list[Path]:
    """The folders checkpoint-<step> in `path`, whole or not, the latest step first."""
    found = [p for p in path.glob("checkpoint-*") if p.is_dir() and step_of(p) is not None]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int | None:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else None


def why_torn(checkpoint: Path) -> str | None:
    """What `checkpoint` lacks for having been saved to the end; None if nothing."""
    if not checkpoint.is_dir():
        return "no such folder"
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"no {STATE_FILE}, it was not saved to the end"
    except ValueError:
        return f"half a {STATE_FILE}, it was not saved to the end"
    if not isinstance(state, dict) or "global_step" not in state:
        return f"no global_step in {STATE_FILE}"
    if not any(found for name in (*WEIGHTS, *SHARDS) for found in checkpoint.glob(name)):
        return "no weights"
    for file in sorted(checkpoint.iterdir()):
        if not _is_whole(file):
            return f"half a {file.name}"
    wanted = []
    if (checkpoint / "optimizer.pt").exists():  # which transformers would leave out without these
        wanted += "scheduler.pt", "rng_state*.pth"
    if any(checkpoint.glob("model-*-of-*.safetensors")):
        wanted.append(INDEXES[0])
    for name in INDEXES:
        if (index := checkpoint / name).exists():
            read = json.loads(index.read_text(encoding="utf-8"))
            if not isinstance(read, dict) or not isinstance(read.get("weight_map"), dict):
                return f"no weight_map in {name}"
            wanted += sorted({*read["weight_map"].values()})
    return next((f"no {name}" for name in wanted if not any(checkpoint.glob(name))), None)


def _is_whole(file: Path) -> bool:
    """Whether a file of JSON or of tensors has its end; True for any other file."""
    try:
        if file.suffix in (".pt", ".pth", ".bin"):
            return zipfile.is_zipfile(file)  # what torch.save writes, with its directory at its end
        if file.suffix == ".safetensors":
            with safe_open(file, framework="numpy"):  # reads the header, which says how long it is
                return True
        if any(map(file.match, READ_JSON)):
            json.loads(file.read_bytes())
    except (ValueError, SafetensorError):
        return False
    return True


def last_checkpoint(path: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The latest whole checkpoint of `path`, and a note on each later one.

    ValueError where it holds the model alone, and going on would start the optimizer from scratch.
    """
    notes = ()
    for checkpoint in checkpoints_in(path):
        if torn := why_torn(checkpoint):
            notes += (f"skipping {checkpoint}: {torn}",)
            continue
        if not any(found for name in OPTIMIZER for found in checkpoint.glob(name)):
            raise ValueError(
                f"{checkpoint} holds no optimizer (save_only_model), so the run cannot go on as it "
                "was: name it with --resume_from_checkpoint to go on with a new one, or give "
                "another --output_dir, or --fresh to start over beside it"
            )
        return checkpoint, notes
    return None, notes
