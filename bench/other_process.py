"""A contender in a process of its own, perhaps of an interpreter that has other versions.

    OtherProcess(task, "bench.contenders", name)     here
    serve(contender_of)                              there: all that the module runs

They exchange a line of JSON for the task, and one for each step: what it took, and what it logged.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from bench.measure import PeakMemory, Seconds, seconds
from bench.tasks import Task

BENCH = Path(__file__).parent


class OtherProcess:
    """As SteppedTrainer, of a contender that `module` serves; step() returns what it took there.

    python: another interpreter than this one. It sees bench/ and not its neighbour kernels/, which
    transformers below 5.11 takes for another package.

    ChildProcessError where the process has ended: what it printed says why.
    """

    def __init__(self, task: Task, module: str, *arguments: str, python: str | None = None):
        self.log: list[dict[str, float]] = []
        self._folder = tempfile.TemporaryDirectory()
        where = {"cwd": BENCH.parent}
        if python:
            Path(self._folder.name, "bench").symlink_to(BENCH)
            environment = {name: os.environ[name] for name in os.environ if name != "PYTHONPATH"}
            where = {"cwd": self._folder.name, "env": environment}
        self._process = subprocess.Popen(
            [python or sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **where,
        )
        self.pid = self._process.pid
        self._ask(json.dumps(asdict(task)))

    def step(self) -> Seconds:
        answer = self._ask("step")
        self.log += answer["log"]
        return Seconds(**answer["seconds"])

    def close(self) -> None:
        self._process.communicate()  # closes its input, where it ends
        self._folder.cleanup()

    def _ask(self, line: str) -> dict:
        print(line, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            self.close()
            raise ChildProcessError(f"want {self._process.args} to answer, got its end")
        return json.loads(answer)


def serve(contender_of: Callable) -> None:
    """Step contender_of(task) as its OtherProcess, at the other end of stdin and stdout, asks."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed
    contender = contender_of(Task(**json.loads(sys.stdin.readline())))
    PeakMemory()  # gives freed memory back, before the peak is measured from outside
    print(json.dumps({}), file=answers)
    for _ in sys.stdin:
        before = len(contender.log)
        taken = asdict(seconds(contender.step))
        print(json.dumps({"seconds": taken, "log": contender.log[before:]}), file=answers)
    contender.close()
