"""What does it cost to split a batch into packs, beside laying it out?

    OMP_NUM_THREADS=1 pytest bench/bench_packs.py      seconds

512 pairs of 800 prompt tokens and 2 * 100 to 1,200 of completions, as arrays. CPU time of one
process; splitting and laying out take turns.
"""

import statistics

import numpy as np
import pytest

from bench.measure import in_turns
from bench.tables import table
from fastdpo.collate import make_collator
from fastdpo.columns import ID_COLUMNS, Cut
from fastdpo.packs import into_packs

PAIRS, TURNS = 512, 7


@pytest.fixture(scope="module")
def rows():
    draw = np.random.default_rng(0).integers
    lengths = [(800, *draw(100, 1200, 2)) for _ in range(PAIRS)]
    return [
        {name: draw(0, 1000, length) for name, length in zip(ID_COLUMNS, each, strict=True)}
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

    ways = {
        "split, ms": lambda: into_packs(rows, max_tokens, collator),
        "laid out, ms": lambda: lay_out(packs),
    }
    taken = in_turns(benchmark, ways, TURNS)
    milliseconds = {n: 1e3 * statistics.median(s.cpu for s in each) for n, each in taken.items()}
    measured = {"packs": len(packs), **milliseconds}
    table(f"{PAIRS} pairs in packs").put(f"{layout}, {max_tokens:,} tokens", measured)
    benchmark.extra_info |= measured
