"""How much cheaper is a whole training step than TRL's, and than the plain loop's?

    OMP_NUM_THREADS=1 pytest bench/bench_train_step.py                    minutes a length profile
    pytest bench/bench_train_step.py -m "not slow"                        one tiny model, seconds
    pytest bench/bench_train_step.py -k "large and chat"                  8B on a GPU, else 135M
    pytest bench/bench_train_step.py -k llama_factory                     see llamafactory_steps.py

And: does a DPO step with a precomputed reference cost more than a supervised step on the same
sequences? Whole steps of the public trainers, from one `on_step_begin` to the next. Contenders
take turns, step by step, on the same batches; a run whose losses differ is not timed. A row is 4
timed steps after the warm-up; the table's title says of how many pairs. Below it: how many times
the multiply-adds that the pairs need TRL's steps have (work_bound.py).
"""

import pytest
import torch

from bench.cases import cases
from bench.contenders import CONTENDERS, LLAMAFACTORY_PYTHON, PEERS
from bench.length_profiles import TYPICAL
from bench.measure import CUDA
from bench.step_race import LOSS_TOLERANCE, assert_same_losses, losses, race_and_report
from bench.tasks import LARGE_MODEL, WARMUP_STEPS, task_of

PROFILES = cases(["tiny", *TYPICAL, "real pairs"])
has_room = not CUDA or torch.cuda.mem_get_info()[1] > 120 << 30
wants_room = pytest.mark.skipif(not has_room, reason=f"{LARGE_MODEL} wants 120 GiB on a GPU")
LARGE = [
    pytest.param(name, marks=[pytest.mark.slow, wants_room])
    for name in (TYPICAL if CUDA else ["chat"])  # the one that was seen to fit 24 GiB
]


@pytest.mark.parametrize("adapters", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("profile", PROFILES)
def test_train_step(benchmark, profile, adapters):
    task = task_of(profile, adapters=adapters)
    names = ["naive", *PEERS, "fastdpo", "fastdpo, fastest"]
    measured = names[-1:] if profile == "tiny" else names  # each starts a process
    title = f"Training step, {profile}, {_trained(adapters)}"
    race_and_report(title, task, names, benchmark, measured=measured)


@pytest.mark.parametrize("profile", ["tiny", *LARGE])
def test_large_model_step(benchmark, profile):
    """Only with LoRA, and few contenders: one more TRL was seen to exceed 23 GiB."""
    task = task_of(profile, adapters=True, model=LARGE_MODEL)
    trl = "TRL, fastest" if CUDA else "TRL, fastest, completions alone"
    names = ["naive", *(name for name in PEERS if name == trl), "fastdpo, fastest"]
    title = f"Training step, few contenders, {profile}, LoRA"
    measured = [] if profile == "tiny" else names
    race_and_report(title, task, names, benchmark, measured=measured)


@pytest.mark.skipif(CUDA or not LLAMAFACTORY_PYTHON, reason="wants LLAMAFACTORY_PYTHON, on a CPU")
@pytest.mark.parametrize("adapters", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("profile", PROFILES)
def test_llama_factory_step(benchmark, profile, adapters):
    task = task_of(profile, adapters=adapters)
    names = ["naive", "LLaMA-Factory", "fastdpo, fastest"]
    title = f"Training step, LLaMA-Factory, {profile}, {_trained(adapters)}"
    measured = [] if profile == "tiny" else names
    race_and_report(title, task, names, benchmark, measured=measured)


@pytest.mark.parametrize("adapters", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("profile", PROFILES)
def test_precomputed_reference_step(benchmark, profile, adapters):
    task = task_of(profile, adapters=adapters)
    names = ["supervised", "fastdpo, reference precomputed"]
    first = task.pairs[: task.batch]
    tokens = sum(len(pair[side]) + 1 for pair in first for side in ("chosen_ids", "rejected_ids"))

    def trained_alike(logs):
        """The supervised loss of the first step, from the log-probabilities that DPO logged; and
        at the end DPO's losses, by the plain loop, which is not timed here."""
        supervised, dpo = logs.values()
        logps = dpo[0]["logps/chosen"] + dpo[0]["logps/rejected"]  # means over B pairs
        assert losses(supervised)[0] == pytest.approx(
            -logps * task.batch / tokens, abs=LOSS_TOLERANCE
        )
        if len(losses(dpo)) > WARMUP_STEPS:
            naive = CONTENDERS["naive"](task)
            for _ in losses(dpo):
                naive.step()
            assert_same_losses({"naive": naive.log, names[1]: dpo})

    title = f"Reference scored before, {profile}, {_trained(adapters)}"
    measured = [] if profile == "tiny" else names
    race_and_report(title, task, names, benchmark, measured=measured, check=trained_alike)


def _trained(adapters):
    return "LoRA" if adapters else "full"
