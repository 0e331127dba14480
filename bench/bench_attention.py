"""Is attention along a tree as fast as a model's own attention in the padded layout?

    OMP_NUM_THREADS=1 pytest bench/bench_attention.py      real models' heads, minutes
    pytest bench/bench_attention.py -m "not slow"          tiny, seconds

One layer's attention, forward and backward, without the layers around it. "full rows" are
sequences of one length: padded and packed have the same tokens then. Of the profiles' batches,
packed leaves out the padding, and shared the second copy of each prompt. Outputs and gradients of
all ways are compared with float64 first, and a wrong one is not timed.
"""

import statistics
from functools import partial

import pytest
import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bench.length_profiles import TINY, TYPICAL, random_pairs
from bench.measure import CUDA, DEVICE, DTYPE, IS_16_BITS, in_turns
from bench.tables import table
from fastdpo.attention import tree_attention
from fastdpo.collate import make_collator
from fastdpo.columns import ID_COLUMNS, Cut

HEADS = {  # H query heads, G key and value heads, K head size
    "tiny": (2, 1, 16),
    "4 layers, D=256": (4, 4, 64),
    "Qwen2.5-0.5B": (14, 2, 64),
    "Llama-3-8B": (32, 8, 128),
}
PAIRS = 8
FULL_ROW = 256  # tokens of each prompt and of each completion
ROUNDS, WARMUP_TURNS = 7, 2
STEPS = 20 if CUDA else 1  # of a turn: a GPU waits for the CPU's launches at the first
TOLERANCE = 3e-2 if IS_16_BITS else 1e-4  # of the largest element
LAYOUTS = {"padded": "padded", "padded, masked": "padded", "packed": "packed", "shared": "shared"}


class Layer(nn.Module):
    """What an attention function reads of the layer that calls it."""

    is_causal = True

    def __init__(self, H, G):
        super().__init__()
        self.num_key_value_groups = H // G


def numbered_pairs(profile):
    """Pairs whose tokens are all different: a token's number says where it stands."""
    if profile == "full rows":
        lengths = [(FULL_ROW,) * 3] * PAIRS
    else:
        pairs = random_pairs((TYPICAL | {"tiny": TINY})[profile], PAIRS, vocab_size=1000)
        lengths = [tuple(map(len, pair.values())) for pair in pairs]
    numbers = iter(range(1, 1 + sum(map(sum, lengths))))
    return [
        {name: [next(numbers) for _ in range(n)] for name, n in zip(ID_COLUMNS, each, strict=True)}
        for each in lengths
    ]


class Case:
    """One way's tensors (., heads, tokens, K), cut from tables with a row for each token."""

    def __init__(self, way, profile, heads, dtype=DTYPE):
        self.H, self.G, K = HEADS[heads]
        pairs = numbered_pairs(profile)
        collator = make_collator(LAYOUTS[way], Cut(), pad_token_id=0, pad_to_multiple_of=None)
        inputs = collator(pairs)
        self.ids, self.tree = inputs["input_ids"].to(DEVICE), inputs.get("tree")
        self.tree = self.tree and self.tree.to(DEVICE)
        completions = [i for pair in pairs for i in pair["chosen_ids"] + pair["rejected_ids"]]
        self.num_ids = 1 + max(completions)
        draw = torch.Generator().manual_seed(0)
        # the last table: the output's gradient, 0 where a prompt stands in some layouts twice
        tables = [
            torch.randn(self.num_ids, n, K, generator=draw)
            for n in (self.H, self.G, self.G, self.H)
        ]
        is_completion = torch.zeros(self.num_ids, 1, 1).index_fill_(0, torch.tensor(completions), 1)
        tables[3] *= is_completion
        rows = [each.to(DEVICE, dtype)[self.ids].transpose(1, 2) for each in tables]
        self.query, self.key, self.value = (x.contiguous().requires_grad_() for x in rows[:3])
        self.doutput = rows[3].transpose(1, 2).contiguous()  # attention functions swap the two
        self.mask = None
        if way == "padded, masked":
            L = self.ids.shape[1]
            causal_LL = torch.ones(L, L, dtype=torch.bool, device=DEVICE).tril()
            self.mask = causal_LL & (self.ids > 0)[:, None, None, :]

    def step(self):
        """The output (., tokens, H, K), after a backward."""
        self.query.grad = self.key.grad = self.value.grad = None
        output, _ = tree_attention(
            Layer(self.H, self.G),
            self.query,
            self.key,
            self.value,
            self.mask,
            native=sdpa_attention_forward,
            tree=self.tree,
        )
        output.backward(self.doutput)
        return output.detach()

    def by_token(self):
        """Output and gradients in float64, a row a token: the completions', and all tokens'."""
        output = self.step()
        is_scored = (self.doutput != 0).any(-1, True).any(-2, True)
        places = [output * is_scored]
        places += [x.grad.transpose(1, 2) for x in (self.query, self.key, self.value)]
        ids = self.ids.flatten()
        found = []
        for place in places:
            rows = place.flatten(0, 1).double()
            found.append(rows.new_zeros(self.num_ids, *rows.shape[1:]).index_add_(0, ids, rows)[1:])
        return found


def repeat(step):
    for _ in range(STEPS):
        step()


def check(case, truth):
    for made, wanted in zip(case.by_token(), truth, strict=True):
        error = ((made - wanted).abs().max() / wanted.abs().max()).item()
        assert error < TOLERANCE, f"off by {error:.1e} of the largest element"


@pytest.mark.parametrize(
    "profile, heads",
    [
        ("tiny", "tiny"),
        *(
            pytest.param(profile, heads, marks=pytest.mark.slow)
            for profile in ("full rows", *TYPICAL)
            for heads in HEADS
            if heads != "tiny"
        ),
    ],
)
def test_attention(benchmark, profile, heads):
    truth = Case("padded", profile, heads, dtype=torch.float64).by_token()
    cases = {way: Case(way, profile, heads) for way in LAYOUTS}
    for case in cases.values():
        check(case, truth)
    steps = {way: partial(repeat, case.step) for way, case in cases.items()}
    for _ in range(WARMUP_TURNS):
        for step in steps.values():
            step()
    turns = in_turns(benchmark, steps, ROUNDS)
    taken = {way: [each.cost / STEPS for each in turns[way]] for way in cases}
    found = table(
        "Attention, as a share of the padded layout's without a mask (milliseconds); a cell: "
        f"{ROUNDS} timed turns, the same {PAIRS} pairs in each"
    )
    for way, case in cases.items():
        share = statistics.median(
            ours / theirs for ours, theirs in zip(taken[way], taken["padded"], strict=True)
        )
        milliseconds = 1e3 * statistics.median(taken[way])
        cells = {"tokens": case.ids.numel(), heads: f"{share:.2f} ({milliseconds:.1f})"}
        found.put(f"{profile}: {way}", cells)
