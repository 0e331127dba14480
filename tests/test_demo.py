"""The demo: its task, its pairs, and that it compares no times of two trainings that differ."""

import contextlib
import io
import json
import re
import subprocess
from statistics import median
from types import SimpleNamespace

import pytest
import torch

from fastdpo import cli, demo, demo_race
from fastdpo.demo_task import Question, build_tokenizer, make_questions, preference_rows


def test_the_program_tells_right_from_wrong():
    question = make_questions()[0]
    assert question.is_right(question.answer(+1))
    assert not question.is_right(question.answer(-1))
    assert not question.is_right(question.answer(+1).rsplit(" ", 1)[0])  # one number short
    first = str(question.start + 1)
    assert not question.is_right(question.answer(+1).replace(first, str(question.start)))


def test_counting_up_is_chosen():
    up, down = " up : 318 319 320 321 322", " down : 316 315 314 313 312"
    rows = preference_rows([Question("Count from 317 .", 317)])
    assert rows == [{"prompt": "Count from 317 .", "chosen": up, "rejected": down}]


def test_held_out_questions_are_in_no_training_pair():
    trained = set(demo.train_rows(demo.FULL)["prompt"])
    assert not trained & {question.prompt for question in demo.held_out()}


def test_every_word_has_a_token_and_one_bos():
    tokenizer = build_tokenizer()
    for row in preference_rows(make_questions()):
        for side in ("chosen", "rejected"):
            ids = tokenizer(row["prompt"] + row[side])["input_ids"]
            assert tokenizer.pad_token_id not in ids and ids.count(tokenizer.bos_token_id) == 1


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of a demo, what it printed and how it ended."""
    folder, printed = tmp_path_factory.mktemp("demo") / "new/demo", io.StringIO()
    held = bytearray(600 << 20)  # no process of the race has these bytes
    with contextlib.redirect_stdout(printed):
        code = cli.main(["demo", "--tiny", "--output_dir", str(folder)])
    del held
    return folder, printed.getvalue(), code


def test_the_demo_runs_to_its_end_and_both_ways_agree(ran):
    folder, printed, code = ran
    assert code == 0
    for line in ("counted up, exactly", "wall time", "memory over the start"):
        assert line in printed
    assert re.search("reward accuracy +0% +100%", printed)
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "trained/model.safetensors").exists()
    assert not [*folder.rglob("checkpoint-*")]
    naive = json.loads((folder / "naive.json").read_text())
    assert 1 < naive["peak_mib"] < 400  # beyond what torch itself takes


def test_held_out_questions_are_scored_and_answered_as_one_by_one(tmp_path):
    tokenizer, model = demo.fit(demo.TINY)
    trainer = demo.make_trainer(tmp_path, model, tokenizer, demo.TINY)
    asked = [pair["prompt_ids"] for pair in trainer.eval_dataset]
    assert asked == [tokenizer(question.prompt)["input_ids"] for question in demo.held_out()]
    answers = demo.greedy_answers(tokenizer, model)
    for prompt_ids, answer in zip(asked[:4], answers[:4], strict=True):
        prompt = torch.tensor([prompt_ids])
        (tokens,) = model.generate(input_ids=prompt, max_new_tokens=10, do_sample=False)
        assert tokenizer.decode(tokens[len(prompt_ids) :], skip_special_tokens=True) == answer


def test_an_answer_is_what_stands_between_its_prompt_and_its_end():
    tokenizer, questions = build_tokenizer(), demo.held_out()
    texts = [f"{question.answer(+1)} {tokenizer.eos_token}" for question in questions]
    answers = tokenizer(texts, add_special_tokens=False, return_tensors="pt")["input_ids"]
    model = SimpleNamespace(
        eval=lambda: model, generate=lambda input_ids, **_: torch.cat([input_ids, answers], 1)
    )
    answered = demo.greedy_answers(tokenizer, model)
    assert all(q.is_right(answer) for q, answer in zip(questions, answered, strict=True))


def test_the_report_counts_right_answers():
    wrong, right = ([q.answer(step) for q in demo.held_out()] for step in (-1, +1))
    report = demo._report((0.25, wrong), (0.75, right[:50] + wrong[50:]))
    assert re.search("reward accuracy +25% +75%", report)
    assert re.search("counted up, exactly +0% +50%", report)


def test_the_demo_is_tiny_only_where_asked(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(demo, "_learn", lambda _, size: sizes.append(size))
    monkeypatch.setattr(demo_race, "race", lambda _, size: sizes.append(size) or True)
    for more in ([], ["--tiny"]):
        assert cli.main(["demo", "--output_dir", str(tmp_path), *more]) == 0
    assert sizes == [demo.FULL, demo_race.FULL, demo.TINY, demo_race.TINY]


@pytest.mark.parametrize("argv, told", [(["--foo"], "--foo"), (["--output_dir", "file"], "file")])
def test_what_the_demo_cannot_run_with_ends_with_one_line(
    argv, told, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert cli.main(["demo", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("fastdpo: error: ") and told in line


@pytest.mark.parametrize("added, told", [(0.01, "1.0e-02"), (float("nan"), "nan")])
def test_times_are_not_compared_where_the_losses_differ(ran, capsys, monkeypatch, added, told):
    folder, _, _ = ran
    ours, naive = (json.loads((folder / f"{name}.json").read_text()) for name in demo_race.WAYS)
    naive["loss"] = [*ours["loss"][:-1], ours["loss"][-1] + added]
    (folder / "naive.json").write_text(json.dumps(naive))
    monkeypatch.setattr(demo, "_learn", lambda *_: None)
    monkeypatch.setattr(demo_race.subprocess, "run", lambda *_, **__: None)  # they have run
    assert cli.main(["demo", "--tiny", "--output_dir", str(folder)]) == 1
    assert f"differ by up to {told}: no times are compared" in capsys.readouterr().out


@pytest.mark.parametrize("size", [demo_race.FULL, demo_race.TINY])
def test_the_race_divides_the_naive_ways_time_and_memory_by_ours(
    tmp_path, monkeypatch, capsys, size
):
    measured = {
        "fastdpo": {"seconds": 2.0, "peak_mib": 0, "loss": [0.7, 0.6]},
        "naive": {"seconds": 9.0, "peak_mib": 30.0, "loss": [0.7, 0.6001]},
    }

    def run(command, **_):
        assert ("--tiny" in command) == (size is demo_race.TINY)
        name = command[command.index("--race") + 1]
        (tmp_path / f"{name}.json").write_text(json.dumps(measured[name]))

    monkeypatch.setattr(demo_race.subprocess, "run", run)
    assert demo_race.race(tmp_path, size)
    seconds, memory = (line.split() for line in capsys.readouterr().out.splitlines()[1:3])
    assert seconds[-3:] == ["2.0", "9.0", "4.50"] and memory[-3:] == ["0.0", "30.0", "-"]


def test_a_way_that_fails_ends_the_race(ran, monkeypatch):
    monkeypatch.setattr(demo_race.sys, "executable", "false")
    with pytest.raises(subprocess.CalledProcessError):
        demo_race.race(ran[0], demo_race.TINY)


def test_both_ways_take_the_same_steps_where_steps_are_large(tmp_path, monkeypatch):
    """Large enough for schedule, clipping and momentum to show in the losses."""
    monkeypatch.setattr(demo_race, "LEARNING_RATE", 1e-2)
    size = demo_race.RaceSize(hidden_size=32, vocabulary=2000, updates=4)
    losses = []
    for name, run in demo_race.WAYS.items():
        run(tmp_path, size)
        losses.append(json.loads((tmp_path / f"{name}.json").read_text())["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_the_naive_loop_takes_no_gradient_of_its_reference():
    tokenizer, size = build_tokenizer(), demo_race.TINY
    policy, reference = (demo_race.random_model(size) for _ in range(2))
    batches = [demo_race.random_pairs(tokenizer, 2)]
    demo_race.naive_training(policy, reference, batches, tokenizer.pad_token_id)
    assert all(parameter.grad is None for parameter in reference.parameters())


@pytest.mark.parametrize("size", [demo.FULL, demo.TINY])
def test_every_update_has_its_pairs(size):
    assert len(demo.train_rows(size)) == size.dpo_steps * demo.BATCH


def test_the_races_pairs_have_a_chats_lengths_and_tokens_of_the_tokenizer():
    tokenizer = build_tokenizer()
    pairs = demo_race.random_pairs(tokenizer, 400)
    for name, middle in (
        ("prompt_ids", demo_race.PROMPT_MEDIAN),
        ("chosen_ids", demo_race.COMPLETION_MEDIAN),
        ("rejected_ids", demo_race.COMPLETION_MEDIAN),
    ):
        lengths = [len(pair[name]) for pair in pairs]
        assert 0.85 < median(lengths) / middle < 1.15
        assert max(lengths) > 3 * middle and max(lengths) <= demo_race.LONGEST
        assert {token for pair in pairs for token in pair[name]} <= {*range(3, len(tokenizer))}
