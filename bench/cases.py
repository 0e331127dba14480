"""The parameters of benchmarks: all but "tiny" are slow, and "real pairs" want their file."""

from collections.abc import Iterable

import pytest

from bench.length_profiles import REAL_PAIRS

no_real_pairs = pytest.mark.skipif(not REAL_PAIRS.exists(), reason=f"no {REAL_PAIRS.name} here")
MARKS = {"tiny": [], "real pairs": [pytest.mark.slow, no_real_pairs]}


def cases(names: Iterable[str]) -> list:
    return [pytest.param(name, marks=MARKS.get(name, [pytest.mark.slow])) for name in names]
