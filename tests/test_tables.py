"""bench/tables.py: what stands beside a benchmark's numbers."""

import platform

import pytest

from bench import tables


@pytest.mark.parametrize(
    ("info", "name"),
    [
        ("model name\t: Some CPU @ 2 GHz\nflags\t: fpu\n", "Some CPU @ 2 GHz"),
        ("CPU implementer\t: 0x41\n", platform.machine()),
    ],
    ids=["named", "ARM"],
)
def test_a_run_names_its_cpu(monkeypatch, tmp_path, info, name):
    file = tmp_path / "cpuinfo"
    file.write_text(info)
    monkeypatch.setattr(tables, "CPU_INFO", file)
    monkeypatch.setattr(tables, "CUDA", False)
    assert tables.environment().startswith(f"{name}, ")
