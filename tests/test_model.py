"""Scores against the model's own logits, through whatever wraps the model."""

import copy
import functools
import types

import families
import pytest
import tiny
import torch
from accelerate.utils import convert_outputs_to_fp32
from naive import own_logps
from peft import LoraConfig, get_peft_model

from fastdpo.batch import PairBatch
from fastdpo.collate import PaddedCollator
from fastdpo.model import (
    TOKEN_STATS,
    attach_scorer,
    score,
    token_logps_without_grad,
)

FAMILIES = ["llama", "qwen2", "gemma2", "mixtral"]


@pytest.fixture
def inputs():
    return PaddedCollator(pad_token_id=0)(tiny.ID_PAIRS)


@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_equals_the_models_own_logits(family, inputs):
    model = tiny.model(family, tiny.VOCAB)
    expected = own_logps(model, inputs)
    grads = torch.autograd.grad(expected.sum(), list(model.parameters()), allow_unused=True)
    attach_scorer(model)
    scored = score(model, PairBatch.from_inputs(inputs))
    torch.testing.assert_close(scored.token_logps_C, expected, atol=2e-5, rtol=1e-5)
    ours = torch.autograd.grad(
        scored.token_logps_C.sum(), list(model.parameters()), allow_unused=True
    )
    for grad, own in zip(ours, grads, strict=True):
        torch.testing.assert_close(grad, own, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", [*families.FAMILIES, "phi"])  # phi: a bias in the head
def test_scoring_equals_the_own_logits_of_every_family(family, inputs):
    model = families.model(family, torch.float32)
    with torch.no_grad():
        if (bias_V := model.get_output_embeddings().bias) is not None:
            bias_V.normal_()
        expected = own_logps(model, inputs)
        attach_scorer(model)
        scored = score(model, PairBatch.from_inputs(inputs))
    torch.testing.assert_close(scored.token_logps_C, expected, atol=5e-5, rtol=1e-5)


def test_a_batch_padded_on_the_left_is_scored_alike(inputs):
    model = tiny.model("llama", tiny.VOCAB)
    attach_scorer(model)
    attention_mask = inputs["attention_mask"].flip(1)
    left = {"attention_mask": attention_mask}
    for name in ("input_ids", "completion_mask"):
        left[name] = torch.zeros_like(inputs[name])
        left[name][attention_mask.bool()] = inputs[name][inputs["attention_mask"].bool()]
    ours = score(model, PairBatch.from_inputs(left)).token_logps_C
    theirs = score(model, PairBatch.from_inputs(inputs)).token_logps_C
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_scoring_reaches_a_model_inside_peft(inputs):
    model = get_peft_model(tiny.model("llama", tiny.VOCAB), LoraConfig(init_lora_weights=False))
    expected = own_logps(model, inputs)
    attach_scorer(model)
    scored = score(model, PairBatch.from_inputs(inputs))
    torch.testing.assert_close(scored.token_logps_C, expected, atol=2e-5, rtol=1e-5)
    with model.disable_adapter():
        plain = score(model, PairBatch.from_inputs(inputs)).token_logps_C
    assert (plain - expected).abs().max() > 1e-3


def test_stats_come_with_the_scores(inputs):
    model = tiny.model("llama", tiny.VOCAB)
    attach_scorer(model)
    scored = score(model, PairBatch.from_inputs(inputs), stats=TOKEN_STATS)
    logits = model(inputs["input_ids"], inputs["attention_mask"]).logits[:, :-1]
    logits_CV = logits[inputs["completion_mask"][:, 1:].bool()]
    labels_N = PairBatch.from_inputs(inputs).labels_N
    logps_CV = logits_CV.log_softmax(-1)
    entropy_C = -(logps_CV.exp() * logps_CV).sum(-1)
    torch.testing.assert_close(scored.entropy_C, entropy_C, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(scored.mean_logit_C, logits_CV.mean(-1), atol=2e-5, rtol=1e-4)
    assert scored.is_top1_C.tolist() == (logits_CV.argmax(-1) == labels_N).tolist()


def test_scoring_keeps_no_keys_and_values(inputs):
    model, kept = tiny.model("llama", tiny.VOCAB), []
    attach_scorer(model)
    model.model.register_forward_hook(lambda *args: kept.append(args[-1].past_key_values))
    score(model, PairBatch.from_inputs(inputs))
    assert kept == [None]


def test_the_models_own_forward_and_generate_still_work(inputs):
    model = tiny.model("llama", tiny.VOCAB)
    before = model(inputs["input_ids"], labels=inputs["input_ids"])
    # its mask is made of the pad tokens, as the forward's signature has one
    prompts = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]])
    generated = model.generate(prompts, max_new_tokens=4, do_sample=False)
    attach_scorer(model)
    after = model(inputs["input_ids"], labels=inputs["input_ids"])
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    again = model.generate(prompts, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, again)


def test_a_copy_of_a_scoring_model_scores_with_its_own_weights(inputs):
    model = tiny.model("llama", tiny.VOCAB)
    attach_scorer(model)
    attach_scorer(model)  # a second trainer on the same model
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    batch = PairBatch.from_inputs(inputs)
    logps_C = score(model, batch).token_logps_C
    torch.testing.assert_close(logps_C, torch.full_like(logps_C, tiny.VOCAB).log().neg())
    assert (score(twin, batch).token_logps_C - logps_C).abs().max() > 1e-2
    assert twin(inputs["input_ids"]).logits.abs().max() > 1e-2


def test_a_model_that_another_library_has_wrapped_in_between_still_works(inputs):
    model = tiny.model("llama", tiny.VOCAB)
    before, calls = model(inputs["input_ids"]).logits, []
    for i in range(3):  # as trainers of two libraries, in turns
        attach_scorer(model)
        theirs = functools.partial(
            lambda i, own, **kwargs: calls.append(i) or own(**kwargs), i, model.forward
        )
        model.forward = functools.update_wrapper(theirs, type(model).forward)
    attach_scorer(model)
    for each in (model, copy.deepcopy(model)):
        calls.clear()
        assert torch.equal(each(input_ids=inputs["input_ids"]).logits, before)
        assert calls == [2, 1, 0]
        score(each, PairBatch.from_inputs(inputs))


def test_a_scorer_within_accelerates_autocast_is_not_put_there_again(inputs):
    model = tiny.model("llama", tiny.VOCAB)
    attach_scorer(model)
    prepared = convert_outputs_to_fp32(model.forward.__func__)
    model.forward = types.MethodType(prepared, model)
    attach_scorer(model)
    assert model.forward.__func__ is prepared


@pytest.mark.parametrize("training", [False, True])
def test_frozen_scores_have_no_gradient_and_no_dropout(training):
    inputs = PaddedCollator(pad_token_id=0)(tiny.ID_PAIRS)
    model = get_peft_model(
        tiny.model("llama", tiny.VOCAB), LoraConfig(lora_dropout=0.5, init_lora_weights=False)
    )
    attach_scorer(model)
    model.train(training)
    logps_C = token_logps_without_grad(model, PairBatch.from_inputs(inputs))
    assert not logps_C.requires_grad and model.training == training
    torch.testing.assert_close(logps_C, own_logps(model.eval(), inputs), atol=2e-5, rtol=1e-5)
