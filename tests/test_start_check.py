"""A run that does not start at its reference is told so, and why that may be."""

import logging
from types import SimpleNamespace

import families
import pytest
import tiny
import torch

from fastdpo.reference_logps import AdaptersOff, FrozenModel, RowLogps
from fastdpo.start_check import check_start

COPY, WITHOUT = FrozenModel(None, "a frozen copy"), AdaptersOff(None, ())
POLICY = tiny.model("llama", tiny.VOCAB)
REFERENCE_S = torch.tensor([-10.0, -20.0, -30.0, -40.0])
PLAIN = {"disable_dropout": True, "neftune_noise_alpha": None, "fp16": False, "bf16": False}


def warning(caplog, off_by_S, reference=COPY, policy=None, **settings):
    losses = SimpleNamespace(logps_S=REFERENCE_S + torch.tensor(off_by_S))
    args = SimpleNamespace(**(PLAIN | settings))
    with caplog.at_level(logging.WARNING):
        check_start(policy or POLICY, losses, REFERENCE_S, reference, args)
    return caplog.text


@pytest.mark.parametrize("off_by_S", [[0.0] * 4, [0.009, 0.0, -0.009, 0.0]])
def test_a_start_at_the_reference_needs_no_word(caplog, off_by_S):
    assert warning(caplog, off_by_S) == ""


@pytest.mark.parametrize("off_by", [0.02, -0.02, float("nan")])
def test_one_completion_that_is_off_is_enough(caplog, off_by):
    text = warning(caplog, [0.0, 0.0, off_by, 0.0])
    assert "does not start at its reference" in text and "(a frozen copy)" in text


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "another model or was scored elsewhere, this is expected."),
        ({"disable_dropout": False}, "set disable_dropout=True"),
        ({"neftune_noise_alpha": 5}, "NEFTune adds noise"),
        ({"fp16": True}, "this is the rounding"),
        ({"bf16": True}, "this is the rounding"),
    ],
)
def test_the_likeliest_cause_is_named(caplog, settings, why):
    assert why in warning(caplog, [1.0] * 4, **settings)


@pytest.mark.parametrize("reference", [COPY, WITHOUT])
def test_experts_that_a_router_draws_are_named(caplog, reference):
    policy = families.model("phimoe", torch.float32, num_local_experts=4, **families.EXPERTS)
    text = warning(caplog, [1.0] * 4, reference, policy)
    assert "experts run with random noise" in text and "(router_jitter_noise)" in text


@pytest.mark.parametrize("reference", [WITHOUT, RowLogps("scored before", WITHOUT)])
def test_adapters_that_change_the_model_are_named(caplog, reference):
    assert "The adapters change the model from the start" in warning(caplog, [1.0] * 4, reference)


def test_a_reference_from_elsewhere_says_nothing_of_adapters(caplog):
    text = warning(caplog, [1.0] * 4, RowLogps())
    assert "scored elsewhere" in text and "adapters" not in text
