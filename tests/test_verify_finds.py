"""`fastdpo verify` on an engine that is made wrong: the fault is found and named."""

import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from verifying import folder_with_models_and_rows, run, table, what_differs

from fastdpo import attention, engine_way, head, ops, plain_way, verify
from fastdpo.collate import LAYOUTS
from fastdpo.columns import Cut
from fastdpo.kernels import reference

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return folder_with_models_and_rows(tmp_path_factory.mktemp("here"))


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


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_a_cut_that_takes_a_token_too_many_is_found(here, monkeypatch, capsys, mode):
    cut = Cut.__call__

    def shorter(self, prompt, completion):
        prompt, completion = cut(self, prompt, completion)
        return prompt, completion[:-1]

    flags = ("--layout", "padded", "--max_length", "20", "--truncation_mode", mode)
    assert run(here, *flags) == 0
    monkeypatch.setattr(Cut, "__call__", shorter)
    assert run(here, *flags) == 1
    assert "tokens scored, plainly" in what_differs(capsys)["padded", "token"]


def test_a_token_scored_too_little_is_found(here, monkeypatch, capsys):
    score = engine_way.score

    def one_less(policy, batch, **settings):
        batch.cu_seqlens[1] -= 1
        return score(policy, batch, **settings)

    monkeypatch.setattr(engine_way, "score", one_less)
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


def test_roundings_of_next_to_nothing_agree():
    """A key's bias has no gradient but rounding's, an unused expert none or zeros."""
    names = ("weight", "bias", "unused")
    theirs = (torch.ones(3), torch.tensor([1e-9]), None)
    ours = (torch.ones(3), torch.tensor([-1e-9]), torch.zeros(2))
    loss_B, tolerance = torch.zeros(2), verify.Tolerance.of(torch.float32, 1.0)
    answer, plain = (
        plain_way.Answer([], loss, dict(zip(names, gradients, strict=True)))
        for loss, gradients in ((loss_B + 1e-7, ours), (loss_B, theirs))
    )
    plain = plain_way.Plain(plain, torch.zeros(2, 2), torch.zeros(2, 2), slope_B=loss_B, spread=1.0)
    subject = SimpleNamespace(trained=dict.fromkeys(names))
    for compare in (verify._compare_losses, verify._compare_gradients):
        assert compare(subject, "padded", plain, answer, tolerance).agrees


def test_products_that_are_skipped_show_in_the_gradients(here, capsys):
    assert run(here, "--head_skip_below", "0.9", "--layout", "padded") == 1
    assert {what for _, what in what_differs(capsys)} == {"gradients"}


def test_a_nan_of_the_engine_differs(here, monkeypatch, capsys):
    monkeypatch.setattr(head, "logit_scale", lambda config: float("nan"))
    assert run(here, "--layout", "padded") == 1
    assert set(what_differs(capsys)) == {("padded", w) for w in ("token", "pair", "gradients")}


def test_an_engine_that_cannot_run_differs(here, monkeypatch, capsys):
    def broken(*_args, **_settings):
        raise RuntimeError("no kernel for this shape")

    monkeypatch.setattr(attention, "_attend", broken)
    assert run(here, "--layout", "shared") == 1
    found = what_differs(capsys)
    assert set(found) == {("shared", "forward")}
    assert "no kernel for this shape" in found["shared", "forward"]
    assert run(here) == 0, "training would pad"
    found = table(capsys)
    for layout in ("shared", "packed"):
        line = found[layout, "not"]
        assert "skipped" in line and "no kernel for this shape" in line
    assert ("padded", "token") in found


def test_an_engine_without_a_backward_differs(here, monkeypatch, capsys):
    attend = attention._attend

    def fail(_gradient):
        raise RuntimeError("no backward for this shape")

    def broken(*tensors, **settings):
        out = attend(*tensors, **settings)
        if out.requires_grad:
            out.register_hook(fail)
        return out

    monkeypatch.setattr(attention, "_attend", broken)
    assert run(here) == 1
    assert set(what_differs(capsys)) == {("shared", "forward"), ("packed", "forward")}
