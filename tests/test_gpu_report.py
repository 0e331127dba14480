"""bench/gpu_report.sh: its steps and its time, with a Python that is none."""

import os
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = "tests linear_logps train_step profile layouts attention pair_loss".split()
STEPS += ["gradient_filter", "precomputed"]


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
    return {line[0]: line[1].split(",")[0] for line in lines if line[0] in STEPS}


def test_a_dry_run_takes_every_step(tmp_path):
    code, summary = report(tmp_path, f'echo "$*" >> {tmp_path}/asked', "--dry")
    assert code == 0 and fates(summary) == dict.fromkeys(STEPS, "ok")
    asked = (tmp_path / "asked").read_text()
    assert "-m bench.profile_step --tiny" in asked and "8B" not in asked
    for word in asked.split():
        path = word.split("::")[0]
        assert not path.startswith(("bench/", "tests/")) or (ROOT / path).exists(), word


def test_a_step_that_fails_is_named_and_the_others_run(tmp_path):
    script = 'case "$*" in *layouts*) echo broken; exit 3;; esac'
    _, summary = report(tmp_path, script)
    assert fates(summary) == {**dict.fromkeys(STEPS, "ok"), "layouts": "FAILED (3)"}
    assert "layouts: FAILED (3), 0 s: broken" in summary


def test_the_report_ends_in_time_though_no_step_heeds_its_limit(tmp_path):
    script = "if [[ \"$1\" == -m ]]; then trap '' INT; sleep 60 & wait $!; sleep 60; fi"
    began = time.monotonic()
    _, summary = report(tmp_path, script, TOTAL_S="12")
    assert time.monotonic() - began < 40  # on a busy machine, and without its end 120
    assert fates(summary) == {**dict.fromkeys(STEPS, "left out"), "tests": "cut off at 2 s"}


def test_without_a_gpu_there_is_no_report(tmp_path):
    code, summary = report(tmp_path, 'case "$*" in *is_available*) exit 1;; esac')
    assert code == 2 and summary.startswith("want a GPU that torch sees, got none")
