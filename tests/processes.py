"""Processes of their own, one or several that train together on the CPU, over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TRAIN = """
import json, sys
import tiny
from trainers import make_trainer

out, settings = sys.argv[1], json.loads(sys.argv[2])
rows = tiny.rows()
rows[0]["chosen"] *= 6  # one rank has a long pair, and more packs than the other
settings |= {"max_steps": 3, "train_sampling_strategy": "sequential"}
trainer = make_trainer(out, tiny.tokenizer(), rows=rows, **settings)
trainer.train()
if trainer.is_world_process_zero():
    print("LOGGED", json.dumps([e for e in trainer.state.log_history if "loss" in e]))
trainer.accelerator.wait_for_everyone()
"""
# gloo's threads now and then abort a process that tears them down
GOODBYE = """
import os, sys
sys.stdout.flush()
os._exit(0)
"""


def run_ranks(folder: Path, script: str, *arguments: str, world_size: int) -> str:
    """What `script` prints, run by world_size processes; AssertionError where it fails."""
    file = folder / "script.py"
    file.write_text(script + GOODBYE)
    launcher = [sys.executable]
    if world_size > 1:
        launcher += ["-m", "torch.distributed.run", f"--nproc-per-node={world_size}"]
        launcher += ["--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        launcher += [f"--log-dir={folder / 'torchrun'}"]
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [*launcher, str(file), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def printed_json(printed: str, word: str) -> Any:
    """What stands behind `word` at the beginning of a line."""
    line = next(line for line in printed.splitlines() if line.startswith(word))
    return json.loads(line.removeprefix(word))


def logged_by(world_size: int, folder: Path, **settings) -> list[dict[str, float]]:
    """What `world_size` processes log of three updates, a dictionary each."""
    arguments = str(folder / "run"), json.dumps(settings)
    return printed_json(run_ranks(folder, TRAIN, *arguments, world_size=world_size), "LOGGED")
