"""The tables of a run, in Markdown to be pasted: benchmarks fill them, its end prints them."""

import math
import platform
import re
import subprocess
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.measure import CUDA

LIBRARIES = ("torch", "triton", "transformers", "peft", "trl", "liger-kernel", "cut-cross-entropy")
CPU_INFO = Path("/proc/cpuinfo")
TABLES: dict[str, "Table"] = {}  # by title; bench/conftest.py prints them


@dataclass(slots=True)
class Table:
    """Cells by row and column, and lines that stand below them; a later one takes its place."""

    title: str
    rows: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def put(self, row: str, cells: dict[str, str | int | float]) -> None:
        """Cells by column. A float gets three digits or all of its integer part, NaN nothing."""
        self.rows.setdefault(row, {}).update({name: _text(value) for name, value in cells.items()})

    def markdown(self) -> str:
        columns = list(dict.fromkeys(name for cells in self.rows.values() for name in cells))
        table = [["", *columns], ["---"] * (1 + len(columns))]
        for row, cells in self.rows.items():
            table.append([row, *(cells.get(column, "") for column in columns)])
        lines = ["| " + " | ".join(line) + " |" for line in table]
        notes = [f"- {note}" for note in self.notes.values()]
        return "\n".join([self.title, "", *lines, *([""] if notes else []), *notes])


def _text(value: str | int | float) -> str:
    if not isinstance(value, float):
        return str(value)
    digits = ".3g" if abs(value) < 100 else ".0f"
    return "" if math.isnan(value) else f"{value:{digits}}"


def table(title: str) -> Table:
    """The table of that title, a new one if there is none."""
    return TABLES.setdefault(title, Table(title))


def environment() -> str:
    """Device, threads, versions and commit, which every number belongs to."""
    device = torch.cuda.get_device_name() if CUDA else _cpu_name()
    threads = f"{torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1)
    versions = [f"{name} {version(name)}" for name in LIBRARIES if _is_installed(name)]
    return ", ".join([device, threads, *versions, f"commit {_commit()}"])


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _cpu_name() -> str:
    found = re.search(r"model name\s*: (.*)", CPU_INFO.read_text())
    return found[1] if found else platform.machine()  # ARM's have none


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:  # no git here
        return "unknown"
    return done.stdout.strip() or "unknown"
