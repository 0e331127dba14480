"""Peak memory of a contender's training steps, in a process of its own.

Counted above what is there when the first step begins: model, reference and rows.

    python -m bench.peak_memory < task.json       prints a number of MiB
"""

import functools
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

from bench.contenders import CONTENDERS
from bench.measure import CUDA, PeakMemory, free_memory
from bench.tasks import Task

ROOT = Path(__file__).parents[1]
STEPS = 3  # the optimizer's state is there from the second on
ROOM = 40 << 30  # bytes of a GPU for each process that runs at once


def peaks_mib(names: list[str], task: Task) -> dict[str, float]:
    """MiB of each contender over the task's first STEPS steps; NaN of one that failed.

    One after the other on a CPU; on a GPU, of which torch counts what each allocated, as many at
    once as it should have room for.
    """
    free_memory()
    at_once = max(1, torch.cuda.mem_get_info()[0] // ROOM) if CUDA else 1
    with ThreadPoolExecutor(at_once) as pool:
        peaks = pool.map(functools.partial(_peak_mib, task=task), names)
        return dict(zip(names, peaks, strict=True))


def _peak_mib(name: str, task: Task) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "bench.peak_memory"],
        input=json.dumps({"name": name, "task": asdict(task)}),
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    return math.nan if done.returncode else float(done.stdout.splitlines()[-1])


def _measured(name: str, task: Task) -> float:
    contender = CONTENDERS[name](task)
    peak = PeakMemory(getattr(contender, "pid", None))  # one may run in another process still
    for _ in range(STEPS):
        contender.step()
    mib = peak.mib()
    contender.close()
    return mib


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    print(_measured(asked["name"], Task(**asked["task"])))
