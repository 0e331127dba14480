"""bench/step_race.py: when a race is valid, and what it reports."""

import math
from types import SimpleNamespace

import pytest

from bench import bench_train_step, contenders, step_race, tables
from bench.measure import Seconds
from bench.tasks import Task

MOVES = [0, 4.1e-3, -1.8e-3, -1.1e-2]  # of a race in bfloat16, a step each
RIGHT, WRONG = [0, 3.4e-4, -5e-4, 6.9e-4], [0, 3.4e-4, -2.6e-3, 2.6e-3]


@pytest.mark.parametrize(
    "errors, passes",
    [(RIGHT, True), (WRONG, False), (RIGHT[:2], True), ([-move for move in MOVES], False)],
    ids=["right", "wrong", "warm-up", "untrained"],
)
def test_a_bfloat16_race_is_judged_at_its_end(monkeypatch, errors, passes):
    for name, value in {"CUDA": True, "LOSS_TOLERANCE": 5e-2, "MOVES_PER_ERROR": 5}.items():
        monkeypatch.setattr(step_race, name, value)
    naive = [math.log(2) + move for move in MOVES[: len(errors)]]
    other = [loss + error for loss, error in zip(naive, errors, strict=True)]
    losses = {"naive": naive, "other": other}
    logs = {name: [{"loss": loss} for loss in each] for name, each in losses.items()}
    if passes:
        step_race.assert_same_losses(logs)
    else:
        with pytest.raises(AssertionError, match="losses move by"):
            step_race.assert_same_losses(logs)


def test_tokens_a_second_are_those_of_the_timed_pairs(monkeypatch):
    monkeypatch.setattr(tables, "TABLES", {})
    short, long = (
        {"prompt_ids": [5] * length, "chosen_ids": [6], "rejected_ids": [7]} for length in (1, 50)
    )
    # two steps of warm-up, a timed one, and the last, which is not
    task = Task(model="tiny", pairs=[long, long, short, long], batch=1, adapters=True)
    benchmark = SimpleNamespace(extra_info={})
    taken = {"naive": [Seconds(cpu=2.0, system=0.0, wall=2.0)]}
    step_race.report("a race", task, taken, {}, benchmark)
    assert benchmark.extra_info["rows"]["naive"]["tokens/s"] == 3.0


def test_a_race_that_went_wrong_keeps_its_times_under_that_title_and_fails(monkeypatch):
    reported, wrong = [], AssertionError("losses move by 1")
    monkeypatch.setattr(step_race, "race", lambda *_, **__: ({}, wrong))
    monkeypatch.setattr(step_race, "report", lambda title, *_: reported.append(title))
    with pytest.raises(AssertionError, match="losses move by 1"):
        step_race.race_and_report("chat", None, [], None, measured=["naive"])
    assert reported == ["NOT ALIKE, losses move by 1: chat"]


def test_a_race_with_a_scored_reference_fails_where_it_trains_nothing(monkeypatch):
    reported, name = [], "fastdpo, reference precomputed"
    settings, own = contenders.trainer_settings, contenders.CONTENDERS[name]

    def without_steps(task):
        with monkeypatch.context() as patch:
            patch.setattr(
                contenders, "trainer_settings", lambda t: settings(t) | {"learning_rate": 0}
            )
            return own(task)

    monkeypatch.setitem(contenders.CONTENDERS, name, without_steps)
    monkeypatch.setattr(step_race, "report", lambda title, *_: reported.append(title))
    benchmark = SimpleNamespace(pedantic=lambda turn, rounds: [turn() for _ in range(rounds)])
    with pytest.raises(AssertionError):
        bench_train_step.test_precomputed_reference_step(benchmark, "tiny", True)
    assert len(reported) == 1 and reported[0].startswith("NOT ALIKE, ")
