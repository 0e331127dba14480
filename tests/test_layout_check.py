"""One pair in two layouts: what is looked at, what counts as a difference, what is left behind."""

import contextlib
from functools import partial
from types import SimpleNamespace

import pytest
import tiny
import torch

from fastdpo import layout_check
from fastdpo.attention import attend_along_trees
from fastdpo.collate import make_collator
from fastdpo.columns import Cut
from fastdpo.layout_check import LayoutCheck
from fastdpo.model import attach_scorer, causal_lm_of

ROW = {"prompt_ids": [5, 6, 7], "chosen_ids": [8, 9, 10, 11], "rejected_ids": [12, 13, 14]}


def check(autocast=contextlib.nullcontext):
    make = partial(make_collator, cut=Cut(), pad_token_id=0, pad_to_multiple_of=None)
    return LayoutCheck(pair=ROW, make_collator=make, device=torch.device("cpu"), autocast=autocast)


def model():
    made = tiny.model("llama", 300)
    attach_scorer(made)
    attend_along_trees(causal_lm_of(made))
    return made


def bfloat16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("was_training", [True, False])
def test_a_model_is_scored_in_eval_without_gradients_and_left_as_it_was(was_training):
    scored, policy = [], model().train(was_training)
    policy.register_forward_hook(
        lambda module, *_: scored.append((module.training, torch.is_grad_enabled()))
    )
    assert check().difference(policy, "packed") is None
    assert scored == 2 * [(False, False)] and policy.training is was_training


def test_both_layouts_are_scored_under_the_runs_autocast():
    seen, policy = [], model()
    policy.model.layers[0].register_forward_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    check(bfloat16).difference(policy, "packed")
    assert seen == [True, True]


@pytest.mark.parametrize(
    ("autocast", "dtype", "off_by", "differs"),
    [
        (contextlib.nullcontext, torch.float32, 0.9e-3, False),
        (contextlib.nullcontext, torch.float32, 1.1e-3, True),
        (contextlib.nullcontext, torch.float32, float("nan"), True),
        (contextlib.nullcontext, torch.bfloat16, 0.08, False),
        (contextlib.nullcontext, torch.bfloat16, 0.12, True),
        (bfloat16, torch.float32, 0.08, False),
        (bfloat16, torch.float32, 0.12, True),
    ],
)
def test_a_difference_is_more_than_rounding_on_average(
    monkeypatch, autocast, dtype, off_by, differs
):
    def score(policy, batch):
        sign_C = 1 - 2 * (torch.arange(7) % 2)  # as much too high as too low
        return SimpleNamespace(token_logps_C=off_by * sign_C * ("tree" in batch.model_inputs))

    monkeypatch.setattr(layout_check, "score", score)
    monkeypatch.setattr(LayoutCheck, "_where", lambda *_: "the head")
    reason = check(autocast).difference(model().to(dtype), "packed")
    assert (reason is not None) == differs


def test_the_layer_whose_output_is_no_number_is_named():
    def spoil_along_trees(layer, args, kwargs, output):
        return output * float("nan") if "tree" in kwargs else output

    policy = model()
    policy.model.layers[0].register_forward_hook(spoil_along_trees, with_kwargs=True)
    assert "from layer 0 (attention) on" in check().difference(policy, "packed")


@pytest.mark.parametrize("error", [TypeError, ValueError, RuntimeError])
def test_a_model_that_fails_in_the_layout_alone_cannot_run_it(error):
    def fail_along_trees(module, args, kwargs):
        if "tree" in kwargs:
            raise error("no trees here")

    policy = model()
    policy.model.register_forward_pre_hook(fail_along_trees, with_kwargs=True)
    reason = check().difference(policy, "packed")
    assert reason == "LlamaForCausalLM cannot run it: no trees here"
