"""What does it cost to split a batch into packs, beside laying it out?

    OMP_NUM_THREADS=1 pytest bench/bench_packs.py      seconds

512 pairs of 800 prompt tokens and 2 * 100 to 1,200 of completions, as arrays. CPU time of one
process; splitting and laying out take turns.
"""

import statistics
import time

import numpy as np
import pytest

from bench.tables import table
from fastdpo.collate import make_collator
from fastdpo.columns import Cut
from fastdpo.packs import into_packs

PAIRS, TURNS = 512, 7


@pytest.fixture(scope="module")
def rows():
    draw = np.random.default_rng(0).integers
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    lengths = [(800, *draw(100, 1200, 2)) for _ in range(PAIRS)]
    return [
        {name: draw(0, 1000, length) for name, length in zip(names, each, strict=True)}
        for each in lengths
    ]


@pytest.mark.parametrize("max_tokens", [1500, 4096, 16384])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_split(benchmark, rows, layout, max_tokens):
    collator = make_collator(layout, Cut(max_length=2048), pad_token_id=0, pad_to_multiple_of=None)

    def lay_out(packs):
        return [collator(pack) for pack in packs]

    packs = into_packs(rows, max_tokens, collator)
    assert sum(map(len, packs)) == PAIRS
    for pack, inputs in zip(packs, lay_out(packs), strict=True):
        assert inputs["tokens"].run <= max_tokens or len(pack) == 1

    taken = {into_packs: [], lay_out: []}
    for _ in range(TURNS):
        for function, arguments in (
            (into_packs, (rows, max_tokens, collator)),
            (lay_out, (packs,)),
        ):
            start = time.process_time()
            function(*arguments)
            taken[function].append(1e3 * (time.process_time() - start))
    split_ms, lay_out_ms = (statistics.median(times) for times in taken.values())
    measured = {"packs": str(len(packs)), "split, ms": split_ms, "laid out, ms": lay_out_ms}
    for column, value in measured.items():
        table(f"{PAIRS} pairs in packs").put(f"{layout}, {max_tokens:,} tokens", column, value)
    benchmark.extra_info |= measured
    benchmark.pedantic(into_packs, args=(rows, max_tokens, collator), rounds=1)
