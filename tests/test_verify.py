"""`fastdpo verify`: it agrees with a sound engine; bad input; the command."""

import datasets
import families
import pytest
import tiny
import torch
from command_line import last_line
from datasets import Dataset, Features, Value
from verifying import folder_with_models_and_rows, load, run, save, table, what_differs

from fastdpo import cli, engine_way, losses, plain_way, verify
from fastdpo.batch_loss import pack_losses
from fastdpo.collate import LAYOUTS
from fastdpo.losses import pair_loss
from fastdpo.model import score

pytestmark = pytest.mark.usefixtures("offline")
LORA = ("--use_peft", "--lora_target_modules", "all-linear")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return folder_with_models_and_rows(tmp_path_factory.mktemp("here"))


# A sound engine


@pytest.mark.parametrize(
    "more",
    [(), LORA, (*LORA[:2], "q_proj", "lm_head"), ("--bf16", "True")],
    ids=["full", "lora", "lora-on-the-head", "autocast"],
)
@pytest.mark.parametrize("model", ["llama", "gemma2"])
def test_every_layout_agrees(here, model, more, capsys):
    assert run(here, "--per_device_train_batch_size", "3", *more, model=model) == 0
    lines = table(capsys)
    assert set(lines) == {(a, b) for a in LAYOUTS for b in ("token", "pair", "gradients")}
    assert all("  ok  " in line for line in lines.values())


def test_a_float32_engine_agrees_far_within_its_tolerance(here):
    subject = load(here)
    for finding in verify.compare(subject, plain_way.plain_way(subject)):
        assert finding.worst < finding.allowed / 20, finding


def test_pairs_that_teach_nothing_are_refused_alone(here, capsys):
    row = tiny.rows(1)[0]
    equal = row | {"rejected": row["chosen"]}
    tiny.write_rows(here / "equal.jsonl", [equal, equal])
    assert run(here, rows="equal.jsonl") == 2
    assert "got 2 with chosen equal to rejected" in capsys.readouterr().err
    tiny.write_rows(here / "equal.jsonl", [equal, *tiny.rows(2)])
    assert run(here, rows="equal.jsonl") == 0


def test_pairs_that_are_equal_once_they_are_cut_are_refused_alone(here, tmp_path, capsys):
    row = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9, 9], "rejected_ids": [7, 8, 10]}
    tiny.write_rows(tmp_path / "rows.jsonl", [row] * 2)
    assert run(here, rows=tmp_path / "rows.jsonl") == 0
    assert run(here, "--max_length", "4", rows=tmp_path / "rows.jsonl") == 2
    assert "got 2 with chosen equal to rejected" in capsys.readouterr().err


def test_a_loss_without_any_gradient_agrees(here, capsys):
    assert run(here, "--loss_weights", "0") == 0
    assert not what_differs(capsys)


def test_gradients_in_16_bits_agree_at_any_beta(here, tmp_path, capsys):
    """A rounding of a log-ratio may turn a steep loss's slope around: the loss's bound has it."""
    rows = [row | {"chosen": 12 * row["chosen"]} for row in tiny.rows()]
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    flags = ("--layout", "padded", "--dtype", "bfloat16")
    assert run(here, *flags, "--beta", "60", rows=tmp_path / "rows.jsonl") == 0


def test_what_16_bits_cannot_show_is_said(here, capsys):
    for flags, is_said in ((("--bf16", "True"), True), ((), False)):
        run(here, *flags, "--layout", "padded")
        assert ("shows in float32 alone" in capsys.readouterr().out) == is_said


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_cut_pairs_agree(here, mode, capsys):
    # at 12 tokens keep_end leaves some completions without any prompt
    flags = ("--max_length", "12", "--truncation_mode", mode, "--loss_type", "ipo")
    assert run(here, *flags, "--max_pairs", "3") == 0


def test_pairs_of_unlike_lengths_agree_where_what_is_longer_weighs_less(here):
    assert run(here, "--ld_alpha", "0.2", "--beta", "1.0", "--max_pairs", "3") == 0


def test_weighted_pairs_agree_and_a_wrong_weight_is_found(here, monkeypatch, capsys):
    for dtype in ("bfloat16", "float32"):
        assert run(here, "--use_weighting", "True", "--loss_type", "ipo", "--dtype", dtype) == 0
    monkeypatch.setattr(losses, "pair_weights", lambda *tensors: 1.01)
    capsys.readouterr()
    assert run(here, "--use_weighting", "True", "--loss_type", "ipo") == 1
    assert {what for _, what in what_differs(capsys)} == {"pair", "gradients"}


@pytest.mark.parametrize(
    "more", [("--ld_alpha", "0.2"), ("--ld_alpha", "0", "--loss_type", "hinge"), ()], ids=str
)
def test_no_pairs_loss_is_flat(here, tmp_path, more):
    """Where a pair's loss does not move with its tokens, nothing of the engine's gradient shows."""
    rows = [row | {"chosen": 40 * row["chosen"]} for row in tiny.rows()]
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    plain = plain_way.plain_way(load(here, *more, rows=tmp_path / "rows.jsonl"))
    assert plain.slope_B.min() > 0.05


@pytest.mark.parametrize("loss_type", [("aot",), ("aot_unpaired", "sigmoid"), ("sft", "ipo")])
def test_losses_of_a_batch_agree_and_a_wrong_mix_is_found(here, monkeypatch, loss_type, capsys):
    # at this beta the references lie far enough apart for other ranks than the policy's
    flags = ("--loss_type", *loss_type, "--per_device_train_batch_size", "3", "--beta", "0.01")
    assert run(here, *flags) == 0

    def each_alone(*tensors, **settings):
        alone = {"loss_type": ("sigmoid",), "loss_weights": None}
        return pair_loss(*tensors, **settings | alone)

    monkeypatch.setattr(engine_way, "pair_loss", each_alone)
    capsys.readouterr()
    assert run(here, *flags) == 1
    assert {what for _, what in what_differs(capsys)} == {"pair", "gradients"}


@pytest.mark.parametrize(
    "more",
    [("--use_weighting", "True"), ("--loss_type", "aot", "sft", "--beta", "0.01")],
    ids=["of-pairs", "of-a-batch"],
)
def test_packs_agree(here, monkeypatch, more, capsys):
    forwards = []
    monkeypatch.setattr(
        engine_way, "score", lambda *args, **kw: forwards.append(None) or score(*args, **kw)
    )
    batches = ("--per_device_train_batch_size", "5", "--layout", "shared")
    assert run(here, *more, *batches, "--max_tokens_per_forward", "30") == 0
    assert "of 5 pairs, in packs of at most 30 tokens" in capsys.readouterr().out
    assert len(forwards) > 4  # of 8 pairs


def test_a_pack_that_does_not_see_its_batch_is_found(here, monkeypatch, capsys):
    def each_alone(packs, **settings):
        return [loss for pack in packs for loss in pack_losses([pack], **settings)]

    monkeypatch.setattr(engine_way, "pack_losses", each_alone)
    flags = ("--loss_type", "aot", "--beta", "0.01", "--max_tokens_per_forward", "30")
    assert run(here, *flags) == 1
    assert {what for _, what in what_differs(capsys)} == {"pair", "gradients"}


def test_only_the_first_rows_are_looked_at(here, tmp_path, capsys):
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.rows(5))
    assert run(here, "--max_pairs", "2", rows=tmp_path / "rows.jsonl") == 0
    assert "pairs      2 of the first 2 rows" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="datasets 4 has no Json")
def test_rows_of_unlike_tools_are_read_as_in_training(here, tmp_path):
    """As one list of Python's they are no column of Arrow's."""
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    messages = {name: [{"role": role, "content": name}] for name, role in roles.items()}
    tools = [[{"name": "look", "wants": default}] for default in ({"at": None}, "nothing")]
    message = [{"role": Value("string"), "content": Value("string")}]
    features = Features(dict.fromkeys(messages, message) | {"tools": datasets.Json()})
    rows = [messages | {"tools": each} for each in tools]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "rows")
    assert run(here, rows=tmp_path / "rows") == 0


def test_rows_left_out_are_not_counted_as_pairs(here, tmp_path, capsys):
    rows = tiny.rows(4)
    rows[1]["prompt"] *= 9  # alone longer than max_length
    tiny.write_rows(tmp_path / "rows.jsonl", rows)
    assert run(here, "--max_length", "40", rows=tmp_path / "rows.jsonl") == 0
    assert "pairs      3 of the first 4 rows" in capsys.readouterr().out


def test_a_named_layout_is_run_alone(here, capsys):
    assert run(here, "--layout", "packed") == 0
    assert {layout for layout, _ in table(capsys)} == {"packed"}


def test_layouts_that_a_model_cannot_run_are_said_not_run(here, tmp_path, capsys):
    sinks = families.model("gpt_oss", torch.float32, vocab_size=300, num_local_experts=4)
    save(sinks, tmp_path / "sinks")
    assert run(here, model=tmp_path / "sinks") == 0
    lines = table(capsys)
    assert "attention sinks" in lines["shared", "not"]
    for layout in ("shared", "packed"):
        assert "  skipped " in lines[layout, "not"] and "  ok  " not in lines[layout, "not"]
    assert "  ok  " in lines["padded", "gradients"]
    assert run(here, "--layout", "shared", model=tmp_path / "sinks") == 2
    assert "attention sinks" in capsys.readouterr().err


def test_adapters_all_have_a_gradient_to_compare(here):
    gradients = plain_way.plain_way(load(here, *LORA, "--max_pairs", "2")).answer.gradients
    assert len(gradients) == 2 * 7 * 2  # two matrices on seven layers, in two blocks
    assert all(gradient.any() for gradient in gradients.values())


# Bad input


@pytest.mark.parametrize(
    "more, told",
    [
        (("--max_pairs", "0"), "max_pairs"),
        (("--num_processes", "2"), "--num_processes"),
        (("--model_name_or_path", "/no/where"), "/no/where"),
        (("--dataset_name", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--fresh",), "--fresh"),
        (("--lora_r", "8"), "want lora_r=16 without use_peft"),
        (("--pad_token", "<none>"), "want pad_token in the tokenizer's vocabulary"),
        (
            ("--use_peft", "--lora_target_modules", "q_proj", "fc9"),
            "want lora_target_modules of layers that the model has, got 'fc9'",
        ),
    ],
)
def test_bad_input_ends_with_one_line(here, more, told, capsys):
    assert run(here, *more) == 2
    assert told in last_line(capsys)


def test_a_nan_weight_is_named(here, tmp_path, capsys):
    model = tiny.model("llama", 300)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4:6] = float("nan")
    save(model, tmp_path / "model")
    assert run(here, model=tmp_path / "model") == 2
    assert "2 NaN or Inf in model.layers.1.mlp.up_proj.weight" in last_line(capsys)


def test_hidden_states_that_overflow_are_named(here, tmp_path, capsys):
    model = tiny.model("llama", 300)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(3e38)
    save(model, tmp_path / "model")
    assert run(here, model=tmp_path / "model") == 2
    told = last_line(capsys)
    assert "pair 0, chosen, token " in told and "hidden states of layer 1" in told


def test_a_token_outside_the_vocabulary_is_named(here, tmp_path, capsys):
    tokens = {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}
    tiny.write_rows(tmp_path / "rows.jsonl", [tokens, {**tokens, "rejected_ids": [9, 290]}])
    save(tiny.model("llama", 280), tmp_path / "model")  # fewer than its tokenizer's
    assert run(here, model=tmp_path / "model", rows=tmp_path / "rows.jsonl") == 2
    assert "train dataset, pair 1, rejected_ids: want token ids in [0, 280)" in last_line(capsys)


# The command


@pytest.mark.parametrize("kind", [KeyError, BrokenPipeError])  # a pipe that is not its output's
def test_a_crash_does_not_exit_as_a_difference(kind, here, monkeypatch, capfd):
    def fail(*_):
        raise kind("a")

    monkeypatch.setattr(verify, "compare", fail)
    assert run(here) == 3
    assert kind.__name__ in capfd.readouterr().err


def test_memory_that_runs_out_is_no_layout_that_cannot_run(here, monkeypatch, capfd):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(engine_way, "score", fail)
    assert run(here) == 3
    assert "out of memory" in capfd.readouterr().err


def test_help_lists_its_flags(capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["verify", "--help"])
    assert exit.value.code == 0
    out = capsys.readouterr().out
    assert "--max_pairs" in out and "--layout" in out and "--fresh" not in out


def test_nothing_is_written(here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run(here, "--max_pairs", "1", "--output_dir", "out") == 0
    assert not list(tmp_path.iterdir())
