"""Peak memory of a contender's training steps, in a process of its own.

On a GPU, what torch allocated at most; on a CPU the resident memory's peak, as Linux counts it.
Either is counted above what stands when the first step begins: model, reference and rows.

    python -m bench.peak_memory < task.json       prints a number of MiB
"""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench.contenders import CONTENDERS
from bench.tasks import CUDA, Task

ROOT = Path(__file__).parents[1]
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


STEPS = 3  # the optimizer's state is there from the second on


def peak_mib(name: str, task: Task) -> float:
    """MiB of contender `name` over the task's first STEPS steps."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.peak_memory"],
        input=json.dumps({"name": name, "task": asdict(task)}),
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])


def _measured(name: str, task: Task) -> float:
    contender = CONTENDERS[name](task)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        CLEAR_REFS.write_text("5")  # VmHWM starts again from VmRSS
        before = _status_mib("VmRSS")
    for _ in range(STEPS):
        contender.step()
    peak = torch.cuda.max_memory_allocated() / 2**20 if CUDA else _status_mib("VmHWM")
    contender.close()
    return peak - before


def _status_mib(field: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print(_measured(asked["name"], Task(**asked["task"])))
