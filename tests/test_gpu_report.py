"""bench/gpu_report.sh: its steps and time limits, with a stub for Python."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STEPS = "tests linear_logps train_step profile layouts attention pair_loss".split()
STEPS += ["gradient_filter", "precomputed", "large_model"]
NO_DATASETS = """
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = classmethod(
    lambda cls, name, *places: None if name == "datasets" else find(name, *places)
)
"""
IN_A_DRY_RUN = ["collected", *STEPS]


def report(tmp_path, script, *flags, **environment):
    """Exit code and summary of a run whose Python is `script`."""
    python = tmp_path / "python"
    python.write_text(f"#!/usr/bin/env bash\n{script}\n")
    python.chmod(0o755)
    folder = tmp_path / "report"
    done = subprocess.run(
        ["bash", ROOT / "bench/gpu_report.sh", *flags, folder],
        env={**os.environ, "PYTHON": str(python), **environment},
        capture_output=True,
        text=True,
    )
    return done.returncode, (folder / "summary.txt").read_text()


def fates(summary):
    lines = [line.split(": ", 2) for line in summary.splitlines()]
    return {line[0]: line[1].split(",")[0] for line in lines if line[0] in IN_A_DRY_RUN}


def test_a_dry_run_takes_every_step(tmp_path):
    code, summary = report(tmp_path, f'echo "$*" >> {tmp_path}/asked', "--dry")
    assert code == 0 and fates(summary) == dict.fromkeys(IN_A_DRY_RUN, "ok")
    asked = (tmp_path / "asked").read_text()
    assert "-m bench.profile_step --profile tiny" in asked and "8B" not in asked
    assert "--collect-only tests/test_cuda.py" in asked
    for word in asked.split():
        assert not word.startswith(("bench/", "tests/")) or (ROOT / word).exists(), word


def test_a_step_that_fails_is_named_and_the_others_run(tmp_path):
    script = 'case "$*" in *layouts*) echo broken; exit 3;; esac'
    _, summary = report(tmp_path, script)
    assert fates(summary) == {**dict.fromkeys(STEPS, "ok"), "layouts": "FAILED (3)"}
    assert re.search(r"^layouts: FAILED \(3\), \d+ s: broken$", summary, re.M)


def test_the_report_ends_in_time_though_no_step_heeds_its_limit(tmp_path):
    script = "if [[ \"$1\" == -m ]]; then trap '' INT; sleep 60 & wait $!; sleep 60; fi"
    began = time.monotonic()
    _, summary = report(tmp_path, script, TOTAL_S="4", KILL_S="2")
    assert time.monotonic() - began < 40  # on a busy machine, and without its end 120
    found = fates(summary)
    assert re.fullmatch("cut off at [0-2] s", found["tests"])  # 2, on a machine that is not busy
    assert found == dict.fromkeys(STEPS, "left out") | {"tests": found["tests"]}


def test_without_a_gpu_there_is_no_report(tmp_path):
    code, summary = report(tmp_path, 'case "$*" in *is_available*) exit 1;; esac')
    assert code == 2 and summary.startswith("want a GPU that torch of ")


@pytest.mark.parametrize("given, seen", [(None, "0"), ("3,5", "3"), ("", "")])
def test_of_several_gpus_it_takes_the_first(tmp_path, monkeypatch, given, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    environment = {} if given is None else {"CUDA_VISIBLE_DEVICES": given}
    report(tmp_path, f'echo "$CUDA_VISIBLE_DEVICES" > {tmp_path}/seen', "--dry", **environment)
    assert (tmp_path / "seen").read_text() == f"{seen}\n"


def test_the_limits_leave_no_step_out():
    script = (ROOT / "bench/gpu_report.sh").read_text("utf-8")
    limits = [int(found) for found in re.findall(r"^(?:step|bench) (\d+)", script, re.MULTILINE)]
    total, to_kill = (
        int(re.search(rf"{name}=\D*(\d+)", script)[1]) for name in ("TOTAL_S", "KILL_S")
    )
    assert len(limits) == len(STEPS) and sum(limits) <= total - to_kill


def test_a_file_that_needs_datasets_is_skipped_where_there_is_none(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_DATASETS)
    (tmp_path / "test_rows.py").write_text("import datasets\n")
    (tmp_path / "test_kernels.py").write_text("def test_kernel():\n    pass\n")
    (tmp_path / "test_broken.py").write_text("import no_such_thing\n")
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "bench.without_datasets", tmp_path]
    done = subprocess.run(
        [*command, "--continue-on-collection-errors"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert "test_rows.py:0: datasets is not installed" in done.stdout, done.stdout
    assert "1 passed, 1 skipped, 1 error" in done.stdout
