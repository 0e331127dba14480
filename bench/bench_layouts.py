"""Which layout of a batch is cheapest, at which lengths of prompt and completion?

    OMP_NUM_THREADS=1 pytest bench/bench_layouts.py      every profile, about an hour
    pytest bench/bench_layouts.py -m "not slow"          one tiny model, seconds

Whole training steps of fastdpo in each layout beside the plain padded loop's, with LoRA: the
named profiles, five that are like public datasets, and the first pairs of a real one. Contenders
take turns, step by step, on the same batches; a run whose losses differ is not timed.
"""

import pytest

from bench.contenders import CONTENDERS, LAYOUTS
from bench.length_profiles import DATASETS, REAL_PAIRS, TARGETS
from bench.peak_memory import peaks_mib
from bench.step_race import race, report
from bench.tasks import task_of

NAMES = ["naive", *(name for name in CONTENDERS if name in LAYOUTS)]
no_real_pairs = pytest.mark.skipif(not REAL_PAIRS.exists(), reason=f"no {REAL_PAIRS.name} here")


@pytest.mark.parametrize(
    "profile",
    [
        "tiny",
        *(pytest.param(name, marks=pytest.mark.slow) for name in (*TARGETS, *DATASETS)),
        pytest.param("real pairs", marks=[pytest.mark.slow, no_real_pairs]),
    ],
)
def test_layouts(benchmark, profile):
    task = task_of(profile, adapters=True)
    taken = race(task, NAMES, benchmark)
    peaks = {} if profile == "tiny" else peaks_mib(NAMES, task)
    report(f"Layouts, {profile}, LoRA", task, taken, peaks, benchmark)
