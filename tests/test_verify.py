"""`fastdpo verify`: it agrees with a sound engine, and finds and names what is made wrong."""

import math
import os

import datasets
import families
import pytest
import tiny
import torch
from datasets import Dataset, Features, Value

from fastdpo import attention, cli, head, losses, ops, verify
from fastdpo.collate import LAYOUTS
from fastdpo.kernels import reference
from fastdpo.losses import pair_loss
from fastdpo.parser import VerifyParser
from fastdpo.subject import load_subject

pytestmark = pytest.mark.usefixtures("offline")
LORA = ("--use_peft", "--lora_target_modules", "all-linear")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Two tiny models and 8 preference rows."""
    folder = tmp_path_factory.mktemp("here")
    tokenizer = tiny.tokenizer(text for pair in tiny.PAIRS for text in pair)
    for family in ("llama", "gemma2"):
        save(tiny.model(family, len(tokenizer)), folder / family)
    tiny.write_rows(folder / "rows.jsonl", tiny.rows())
    return folder


def save(model, path):
    tiny.tokenizer(text for pair in tiny.PAIRS for text in pair).save_pretrained(path)
    model.save_pretrained(path)


def run(here, *more, model="llama", rows="rows.jsonl"):
    names = ("--model_name_or_path", str(here / model), "--dataset_name", str(here / rows))
    return cli.main(["verify", *names, "--use_cpu", "True", *more])


def table(capsys):
    """What was printed: {(layout, first word of what was compared): its line}."""
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(LAYOUTS)]
    return {tuple(line.split()[:2]): line for line in rows}


def what_differs(capsys):
    return {at: line for at, line in table(capsys).items() if "DIFFERS" in line}


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
    for finding in verify.compare(subject, verify.plain_way(subject)):
        assert finding.largest < finding.allowed / 20, finding


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


def test_what_16_bits_cannot_show_is_said(here, capsys):
    for flags, is_said in ((("--bf16", "True"), True), ((), False)):
        run(here, *flags, "--layout", "padded")
        assert ("shows in float32 alone" in capsys.readouterr().out) == is_said


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_cut_pairs_agree(here, mode, capsys):
    # at 12 tokens keep_end leaves some completions without any prompt
    flags = ("--max_length", "12", "--truncation_mode", mode, "--loss_type", "ipo")
    assert run(here, *flags, "--max_pairs", "3") == 0


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
    plain = verify.plain_way(load(here, *more, rows=tmp_path / "rows.jsonl"))
    assert plain.slope_B.min() > 0.05


@pytest.mark.parametrize("loss_type", [("aot",), ("aot_unpaired", "sigmoid"), ("sft", "ipo")])
def test_losses_of_a_batch_agree_and_a_wrong_mix_is_found(here, monkeypatch, loss_type, capsys):
    # at this beta the references lie far enough apart for other ranks than the policy's
    flags = ("--loss_type", *loss_type, "--per_device_train_batch_size", "3", "--beta", "0.01")
    assert run(here, *flags) == 0
    alone = {"loss_type": ("sigmoid",), "loss_weights": None}
    monkeypatch.setattr(
        verify, "pair_loss", lambda *tensors, **settings: pair_loss(*tensors, **settings | alone)
    )
    capsys.readouterr()
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


def load(here, *more, rows="rows.jsonl"):
    """The subject that `fastdpo verify` would look at."""
    names = ("--model_name_or_path", str(here / "llama"), "--dataset_name", str(here / rows))
    parser = VerifyParser("fastdpo verify")
    run, max_pairs, _ = parser.parse([*names, "--use_cpu", "True", *more])
    return load_subject(run, max_pairs)


def test_adapters_all_have_a_gradient_to_compare(here):
    gradients = verify.plain_way(load(here, *LORA, "--max_pairs", "2")).answer.gradients
    assert len(gradients) == 2 * 7 * 2  # two matrices on seven layers, in two blocks
    assert all(gradient.any() for gradient in gradients.values())


# An engine made wrong


def test_attention_that_leaks_is_found(here, monkeypatch, capsys):
    attend = attention._attend

    def leaky(query, key, value, **settings):
        out = attend(query, key, value, **settings)
        return out + 0.05 * value.mean(2, keepdim=True).repeat_interleave(2, 1)

    monkeypatch.setattr(attention, "_attend", leaky)
    assert run(here) == 1
    found = what_differs(capsys)
    assert {layout for layout, _ in found} == {"shared", "packed"}
    assert "pair " in found["shared", "token"] and ", token " in found["shared", "token"]


def test_a_branch_that_sees_a_token_of_its_sibling_is_found(here, monkeypatch, capsys):
    # one token too many of the trunk: nothing in the packed layout, which has no branches
    by_segments = attention._by_segments

    def one_too_many(query, key, value, tree, **settings):
        branches = [b._replace(shared=b.shared + 1) for b in tree.branches]
        object.__setattr__(tree, "branches", tuple(branches))
        return by_segments(query, key, value, tree, **settings)

    monkeypatch.setattr(attention, "_by_segments", one_too_many)
    assert run(here) == 1
    assert {layout for layout, _ in what_differs(capsys)} == {"shared"}


def test_a_head_off_by_a_scale_is_found(here, monkeypatch, capsys):
    monkeypatch.setattr(head, "logit_scale", lambda config: 1.01)
    assert run(here) == 1
    assert {(layout, "token") for layout in LAYOUTS} <= set(what_differs(capsys))


def test_a_little_too_much_in_every_token_is_found(here, monkeypatch, capsys):
    # less than a single token may be off, more than all of them may
    linear_logps = ops.linear_logps

    def shifted(*tensors, **settings):
        logps_N, found = linear_logps(*tensors, **settings)
        return logps_N + 5e-5, found

    monkeypatch.setattr(ops, "linear_logps", shifted)
    assert run(here, "--layout", "padded") == 1
    assert set(what_differs(capsys)) == {("padded", "token")}


def wrong_at(n):
    """ops.linear_logps, 0.01 off at its n-th row."""
    linear_logps = ops.linear_logps

    def wrong(*tensors, **settings):
        logps_N, found = linear_logps(*tensors, **settings)
        return logps_N + 0.01 * (torch.arange(len(logps_N)) == n), found

    return wrong


def test_one_wrong_token_is_named(here, monkeypatch, capsys):
    monkeypatch.setattr(ops, "linear_logps", wrong_at(3))
    assert run(here, "--layout", "padded") == 1
    line = what_differs(capsys)["padded", "token"]
    assert "pair 0, chosen, token 3 (" in line and " 1.0e-02" in line


def test_a_token_is_numbered_as_in_the_row_though_its_beginning_is_cut(
    here, tmp_path, monkeypatch, capsys
):
    # tokens 2 to 5 are left of either completion, and nothing predicts token 2
    tokens = {"prompt_ids": [5], "chosen_ids": [*range(10, 16)], "rejected_ids": [*range(20, 26)]}
    tiny.write_rows(tmp_path / "rows.jsonl", [tokens])
    monkeypatch.setattr(ops, "linear_logps", wrong_at(1))
    flags = ("--layout", "padded", "--max_length", "4", "--truncation_mode", "keep_end")
    assert run(here, *flags, rows=tmp_path / "rows.jsonl") == 1
    assert "pair 0, chosen, token 4 (" in what_differs(capsys)["padded", "token"]


def test_a_token_scored_too_little_is_found(here, monkeypatch, capsys):
    score = verify.score

    def one_less(policy, batch, **settings):
        batch.cu_seqlens[1] -= 1
        return score(policy, batch, **settings)

    monkeypatch.setattr(verify, "score", one_less)
    assert run(here, "--layout", "padded") == 1
    assert "pair 0, chosen: " in what_differs(capsys)["padded", "token"]


def test_a_dropped_gradient_is_found_and_its_parameter_named(here, monkeypatch, capsys):
    linear_logps = ops.linear_logps

    def frozen(hidden_ND, head_VD, labels_N, **settings):
        return linear_logps(hidden_ND, head_VD.detach(), labels_N, **settings)

    monkeypatch.setattr(ops, "linear_logps", frozen)
    assert run(here) == 1
    found = what_differs(capsys)
    assert set(found) == {(layout, "gradients") for layout in LAYOUTS}
    assert all("lm_head.weight" in line for line in found.values())


def test_a_wrong_loss_is_found(here, monkeypatch, capsys):
    def off(*tensors, beta, **settings):
        return reference.pair_loss(*tensors, beta=1.02 * beta, **settings)

    monkeypatch.setattr(ops, "pair_loss", off)
    assert run(here) == 1
    found = what_differs(capsys)
    assert {what for _, what in found} == {"pair", "gradients"}


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha_divergence"])
def test_a_slope_off_by_a_thousandth_is_found_at_a_small_beta(
    here, monkeypatch, divergence, capsys
):
    flags = ("--layout", "padded", "--beta", "0.005", "--f_divergence_type", divergence)
    assert run(here, *flags) == 0

    def off(token_logps_C, *others, **settings):
        steeper_C = 1.001 * token_logps_C - 0.001 * token_logps_C.detach()
        return reference.pair_loss(steeper_C, *others, **settings)

    monkeypatch.setattr(ops, "pair_loss", off)
    assert run(here, *flags) == 1
    assert {what for _, what in what_differs(capsys)} == {"gradients"}


@pytest.mark.parametrize(
    "difference, allowed, agrees",
    [
        ([0.0, 5.0], [1e-3, 6.0], True),
        ([0.0, 5.0], [1e-3, math.inf], False),  # that says nothing
        ([math.nan, 0.0], [math.inf, 1e-3], False),
        ([0.0, 2e-3], [1e-3, 1e-3], False),
    ],
)
def test_a_finding_agrees_within_finite_bounds_alone(difference, allowed, agrees):
    difference, allowed = torch.tensor(difference), torch.tensor(allowed)
    finding = verify._finding("padded", "losses", difference, allowed, str)
    assert finding.agrees == agrees and ("DIFFERS" in str(finding)) != agrees


def test_a_nan_of_the_engine_differs(here, monkeypatch, capsys):
    monkeypatch.setattr(head, "logit_scale", lambda config: float("nan"))
    assert run(here, "--layout", "padded") == 1
    assert set(what_differs(capsys)) == {("padded", w) for w in ("token", "pair", "gradients")}


def test_an_engine_that_cannot_run_differs(here, monkeypatch, capsys):
    def broken(*_args, **_settings):
        raise RuntimeError("no kernel for this shape")

    monkeypatch.setattr(attention, "_attend", broken)
    assert run(here) == 1
    found = what_differs(capsys)
    assert set(found) == {("shared", "forward"), ("packed", "forward")}
    assert "no kernel for this shape" in found["shared", "forward"]


# Bad input


def error(capsys):
    err = capsys.readouterr().err
    return next(line for line in err.splitlines() if line.startswith("fastdpo: error: "))


@pytest.mark.parametrize(
    "more, told",
    [
        (("--max_pairs", "0"), "max_pairs"),
        (("--num_processes", "2"), "--num_processes"),
        (("--model_name_or_path", "/no/where"), "/no/where"),
        (("--dataset_name", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--fresh",), "--fresh"),
    ],
)
def test_bad_input_ends_with_one_line(here, more, told, capsys):
    assert run(here, *more) == 2
    assert told in error(capsys)


def test_a_nan_weight_is_named(here, tmp_path, capsys):
    model = tiny.model("llama", 300)
    model.model.layers[1].mlp.up_proj.weight.data[3, 4:6] = float("nan")
    save(model, tmp_path / "model")
    assert run(here, model=tmp_path / "model") == 2
    assert "2 NaN or Inf in model.layers.1.mlp.up_proj.weight" in error(capsys)


def test_hidden_states_that_overflow_are_named(here, tmp_path, capsys):
    model = tiny.model("llama", 300)
    model.model.layers[1].mlp.down_proj.weight.data.fill_(3e38)
    save(model, tmp_path / "model")
    assert run(here, model=tmp_path / "model") == 2
    told = error(capsys)
    assert "pair 0, chosen, token " in told and "hidden states of layer 1" in told


def test_a_token_outside_the_vocabulary_is_named(here, tmp_path, capsys):
    tokens = {"prompt_ids": [5, 6], "chosen_ids": [7, 8], "rejected_ids": [9]}
    tiny.write_rows(tmp_path / "rows.jsonl", [tokens, {**tokens, "rejected_ids": [9, 290]}])
    save(tiny.model("llama", 280), tmp_path / "model")  # fewer than its tokenizer's
    assert run(here, model=tmp_path / "model", rows=tmp_path / "rows.jsonl") == 2
    assert "train dataset, pair 1, rejected_ids: want token ids in [0, 280)" in error(capsys)


# The command


@pytest.mark.parametrize("error, code", [(KeyError("a"), 3), (BrokenPipeError(), 141)])
def test_an_error_is_no_difference(here, monkeypatch, error, code, capfd):
    def fail(*_):
        raise error

    monkeypatch.setattr(os, "dup2", lambda *_: None)
    monkeypatch.setattr(verify, "compare", fail)
    assert run(here) == code
    assert ("KeyError: 'a'" in capfd.readouterr().err) == (code == 3)


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
