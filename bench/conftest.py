"""Benchmarks import each other as `bench.<module>`; their tables are printed when all have run.

pytest-benchmark's own table is not: its times are of single turns, which mean nothing alone.
"""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    config.option.benchmark_quiet = True


def pytest_terminal_summary(terminalreporter):
    from bench.tables import TABLES, environment

    if TABLES:
        terminalreporter.section("results")
        terminalreporter.write_line(environment())
    for table in TABLES.values():
        terminalreporter.write_line(f"\n{table.markdown()}")
