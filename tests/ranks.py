"""Several processes that train together on a CPU, over gloo."""

import os
import subprocess
import sys
from pathlib import Path

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
    environment = {"PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, str(file), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
