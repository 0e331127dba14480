"""A checkpoint as transformers saves one."""

import torch
from safetensors.torch import save_file


def save_checkpoint(folder, step, *, state='{"global_step": 0}', optimizer=True):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    save_file({"weight": torch.zeros(2)}, checkpoint / "model.safetensors")
    if optimizer:
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({}, checkpoint / name)
    if state is not None:
        (checkpoint / "trainer_state.json").write_text(state)
    return checkpoint
