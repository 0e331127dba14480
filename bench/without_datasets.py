"""A pytest plugin for machines without datasets: a file that needs it is skipped, and says so.

    python -m pytest -p bench.without_datasets tests/test_cuda.py

fastdpo's trainer reads its rows with datasets; its kernels, losses and attention do without.
"""

from importlib.util import find_spec

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    needs_it = report.failed and "No module named 'datasets'" in str(report.longrepr)
    if needs_it and find_spec("datasets") is None:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, "Skipped: datasets is not installed")
    return report
