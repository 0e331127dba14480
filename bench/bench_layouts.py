"""Which layout of a batch is cheapest, at which lengths of prompt and completion?

    OMP_NUM_THREADS=1 pytest bench/bench_layouts.py      every profile, about an hour
    pytest bench/bench_layouts.py -m "not slow"          one tiny model, seconds

Whole training steps of fastdpo in each layout beside the plain padded loop's, with LoRA: the
named profiles, five that are like public datasets, and the first pairs of a real one. Contenders
take turns, step by step, on the same batches; a run whose losses differ is not timed.
"""

import pytest

from bench.cases import cases
from bench.contenders import CONTENDERS, LAYOUTS
from bench.length_profiles import DATASETS, TYPICAL
from bench.step_race import race_and_report
from bench.tasks import task_of

NAMES = ["naive", *(name for name in CONTENDERS if name in LAYOUTS)]


@pytest.mark.parametrize("profile", cases(["tiny", *TYPICAL, *DATASETS, "real pairs"]))
def test_layouts(benchmark, profile):
    task = task_of(profile, adapters=True)
    measured = [] if profile == "tiny" else NAMES
    race_and_report(f"Layouts, {profile}, LoRA", task, NAMES, benchmark, measured=measured)
