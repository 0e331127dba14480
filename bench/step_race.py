"""Contenders take turns, a step each; their losses are compared before their times count."""

import contextlib
import math
import statistics
from collections.abc import Callable

from bench.contenders import PEERS, started
from bench.measure import CUDA, Seconds, cpu_time_counts, free_memory, in_turns
from bench.peak_memory import peaks_mib
from bench.tables import environment, table
from bench.tasks import WARMUP_STEPS, Task
from bench.work_bound import WAYS, work_bound

# bfloat16 logits round a completion's sum by 0.7 nats
LOSS_TOLERANCE, MOVES_PER_ERROR = (5e-2, 5) if CUDA else (1e-4, 10)


def race(
    task: Task, names: list[str], benchmark, *, check: Callable | None = None
) -> tuple[dict[str, list[Seconds]], AssertionError | None]:
    """Seconds of each contender's steps after the warm-up: the same batches in the same order; and
    what check had to say after them.

    check(logs), given what each contender logged, is called before and after the timing, and
    raises AssertionError where they did not train alike.
    """
    check = check or assert_same_losses
    free_memory()
    with contextlib.ExitStack() as stack:
        contenders = {
            name: stack.enter_context(contextlib.closing(started(name, task))) for name in names
        }
        logs = {name: contender.log for name, contender in contenders.items()}
        for contender in contenders.values():
            for _ in range(WARMUP_STEPS):
                contender.step()
        check(logs)
        steps = {name: contender.step for name, contender in contenders.items()}
        taken = in_turns(benchmark, steps, task.timed_steps)
        try:
            check(logs)
        except AssertionError as error:
            return taken, error
    return taken, None


def race_and_report(
    title: str,
    task: Task,
    names: list[str],
    benchmark,
    *,
    measured: list[str],
    check: Callable | None = None,
) -> None:
    """The race's table, and again with the peak memory of `measured`, each in its own process.

    A run that is cut off while they are measured still has the first; one whose contenders turned
    out not to train alike has it under that title, and fails.
    """
    taken, wrong = race(task, names, benchmark, check=check)
    report(f"NOT ALIKE, {wrong}: {title}" if wrong else title, task, taken, {}, benchmark)
    if wrong:
        raise wrong
    if measured:
        report(title, task, taken, peaks_mib(measured, task), benchmark)


def losses(log: list[dict[str, float]]) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]


def assert_same_losses(logs: dict[str, list[dict[str, float]]]) -> None:
    """Every step's loss within LOSS_TOLERANCE of the first contender's.

    And the losses must move by more than MOVES_PER_ERROR times what they differ, or they would show
    nothing: the first loss is ln 2, whatever the gradients are.
    """
    name, *others = logs
    expected, furthest = losses(logs[name]), 0.0
    for other in others:
        for step, (loss, wanted) in enumerate(zip(losses(logs[other]), expected, strict=True)):
            furthest = max(furthest, abs(loss - wanted))
            assert abs(loss - wanted) <= LOSS_TOLERANCE, (
                f"step {step}: {name} {wanted}, {other} {loss}: a wrong run is not timed"
            )
    moved = max(abs(loss - math.log(2)) for loss in expected)
    # bfloat16 needs a whole race to get out of its own rounding. In six steps of 4 layers with LoRA
    # a right run moved 15 to 18 times its error; one with a fifth more learning rate 4 times, one
    # without the chosen completions' gradient 2 times.
    if len(expected) > WARMUP_STEPS or not CUDA:
        assert moved > MOVES_PER_ERROR * furthest, (
            f"losses move by {moved:.1e} and differ by {furthest:.1e}"
        )


def report(
    title: str, task: Task, taken: dict[str, list[Seconds]], peaks: dict[str, float], benchmark
) -> None:
    """Fill a table, a contender a row, and hand its numbers to `benchmark`.

    A ratio is the median, over the steps, of another's cost of a step over the contender's own
    cost of the same step. Tokens are those of the 2B sequences of a timed step, padding aside, for
    everyone. System time is mostly page faults on new large tensors, which cost differently on
    every machine: where CPU time is what counts, every ratio has another in brackets without it.
    """
    tokens = statistics.mean(
        2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) + 2
        for pairs in task.timed_batches
        for pair in pairs
    )
    peers = ("naive", *PEERS, "LLaMA-Factory", "supervised")
    against = [name for name in peers if name in taken]
    timed = len(next(iter(taken.values())))
    found = table(
        f"{title}; {task.model}; a row: {timed} timed steps at batch {task.batch}, "
        f"{timed * task.batch} pairs"
    )
    if PEERS.keys() & taken.keys():
        bounds = {way: f"{work_bound(task, WAYS[way]):.2f}" for way in ("TRL", "TRL on a CPU")}
        found.notes["work"] = (
            f"multiply-adds, in those that the pairs need: TRL {bounds['TRL']} where its head "
            f"scores completions alone, as on a GPU, {bounds['TRL on a CPU']} as on a CPU"
        )
    if cpu_time_counts():
        found.notes["brackets"] = "in brackets: without system time"
    rows = {}
    for name, steps in taken.items():
        per_pair = statistics.median(s.cost for s in steps) / task.batch
        rows[name] = {
            "CPU ms/pair": 1e3 * statistics.median(s.cpu for s in steps) / task.batch,
            "of it system": sum(s.system for s in steps) / sum(s.cpu for s in steps),
            "wall ms/pair": 1e3 * statistics.median(s.wall for s in steps) / task.batch,
            "pairs/s": 1 / per_pair,
            "tokens/s": tokens / per_pair,
            "peak MiB": peaks.get(name, math.nan),
            "of naive's peak": peaks.get(name, math.nan) / peaks.get("naive", math.nan),
            **{f"{other} / this": _ratio(taken[other], steps) for other in against},
        }
        found.put(name, rows[name])
    benchmark.extra_info |= {"title": title, "environment": environment(), "rows": rows}


def _ratio(theirs: list[Seconds], ours: list[Seconds]) -> str:
    steps = list(zip(theirs, ours, strict=True))
    ratio = f"{statistics.median(their.cost / our.cost for their, our in steps):.2f}"
    if not cpu_time_counts():
        return ratio
    return f"{ratio} ({statistics.median(their.user / our.user for their, our in steps):.2f})"
