"""What a step takes, in time and in memory: on a GPU where there is one, else on the CPU."""

import ctypes
import gc
import math
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = getattr(torch, os.environ.get("BENCH_DTYPE", "bfloat16" if CUDA else "float32"))  # of heads
IS_16_BITS = DTYPE.itemsize == 2


@dataclass(frozen=True, slots=True)
class Seconds:
    """One step's CPU time over all threads, the system's share of it, and its wall time."""

    cpu: float
    system: float
    wall: float

    @property
    def cost(self) -> float:
        """What a ratio is made of: CPU time where one thread does all of the work, else wall time.

        CPU time is blind to what else runs on the machine, and to a GPU's work.
        """
        return self.cpu if cpu_time_counts() else self.wall

    @property
    def user(self) -> float:
        """CPU time without the system's share."""
        return self.cpu - self.system


def free_memory() -> None:
    """Let go of earlier trainers' models: a trainer and its callbacks hold one another."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def cpu_time_counts() -> bool:
    return not CUDA and torch.get_num_threads() == 1


def seconds(step: Callable[[], object]) -> Seconds:
    """What a step took; one that ran in another process returns that itself."""
    _synchronize()
    cpu, system, wall = time.process_time(), _system_seconds(), time.perf_counter()
    taken = step()
    if isinstance(taken, Seconds):
        return taken
    _synchronize()
    return Seconds(
        cpu=time.process_time() - cpu,
        system=_system_seconds() - system,
        wall=time.perf_counter() - wall,
    )


def in_turns(
    benchmark, ways: dict[str, Callable[[], object]], rounds: int
) -> dict[str, list[Seconds]]:
    """Each way's Seconds in `rounds` turns; a round of `benchmark` is a turn of all."""
    taken = {name: [] for name in ways}

    def turn() -> None:
        for name, run in ways.items():
            taken[name].append(seconds(run))

    benchmark.pedantic(turn, rounds=rounds)
    return taken


def _system_seconds() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_stime


def _synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


class PeakMemory:
    """The most memory since it was made, above what stood then: of this process, or on a CPU of the
    one that is numbered pid.

    On a GPU, what torch allocated; on a CPU, resident memory as Linux counts it, after the C
    library gave back what it had kept of freed memory. NaN on a CPU that Linux does not run.
    """

    def __init__(self, pid: int | None = None):
        self._process = Path("/proc", str(pid or "self"))
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated() / 2**20
        elif self._clear_refs.exists():
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
            if trim is not None:
                trim(0)
            self._clear_refs.write_text("5")  # VmHWM starts again from VmRSS
            self._before = self._status_mib("VmRSS")
        else:
            self._before = math.nan

    def mib(self) -> float:
        if CUDA:
            return torch.cuda.max_memory_allocated() / 2**20 - self._before
        return self._status_mib("VmHWM") - self._before if self._clear_refs.exists() else math.nan

    @property
    def _clear_refs(self) -> Path:
        return self._process / "clear_refs"

    def _status_mib(self, field: str) -> float:
        lines = (self._process / "status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024
