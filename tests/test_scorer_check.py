"""What the check before training finds out about a model."""

import contextlib

import families
import pytest
import tiny
import torch
from trainers import make_trainer

from fastdpo.model import attach_scorer, causal_lm_of
from fastdpo.scorer_check import check_scorer


@pytest.mark.parametrize("wrong", [lambda own: 3 * own, lambda own: 0], ids=["otherwise", "none"])
def test_a_loss_of_experts_that_is_not_made_alike_is_detected(wrong):
    model = tiny.model("mixtral", tiny.VOCAB)
    attach_scorer(model)
    [own] = model._unscored_forwards

    def forward(**inputs):
        outputs = own(**inputs)
        if outputs.aux_loss is not None:
            outputs.aux_loss = wrong(outputs.aux_loss)
        return outputs

    model._unscored_forwards = [forward]
    check_scorer(model, [5, 6, 7, 8])
    with pytest.raises(ValueError, match="want its own load-balancing loss"):
        check_scorer(model, [5, 6, 7, 8], aux_loss=True)


def test_a_loss_of_experts_may_be_off_by_what_its_dtype_rounds():
    for dtype, is_refused in ((torch.float32, True), (torch.bfloat16, False)):
        model = tiny.model("mixtral", tiny.VOCAB, dtype=dtype)
        attach_scorer(model)

        def forward(own=model._unscored_forwards[0], dtype=dtype, **inputs):
            outputs = own(**inputs)
            if outputs.aux_loss is not None:
                outputs.aux_loss = (1.02 * outputs.aux_loss).to(dtype)
            return outputs

        model._unscored_forwards = [forward]
        with (
            pytest.raises(ValueError, match="want its own load")
            if is_refused
            else contextlib.nullcontext()
        ):
            check_scorer(model, [5, 6, 7, 8], aux_loss=True)


@pytest.mark.parametrize("times", [2, 1.003], ids=["far", "near"])
def test_logits_made_in_an_unknown_way_are_detected(times):
    model = tiny.model("llama", tiny.VOCAB)
    attach_scorer(model)
    model.train()
    check_scorer(model, [5, 6, 7, 8])
    assert model.training
    causal_lm_of(model).lm_head.register_forward_hook(lambda module, args, logits: logits * times)
    with pytest.raises(ValueError, match="want the model's own log-probabilities"):
        check_scorer(model, [5, 6, 7, 8])


def test_a_model_that_looks_at_later_tokens_is_detected():
    model = families.model("llama", torch.float32, vocab_size=tiny.VOCAB, is_causal=False)
    attach_scorer(model)
    with pytest.raises(ValueError, match="want a causal model"):
        check_scorer(model, [5, 6, 7, 8])


def test_a_loss_of_experts_that_cannot_be_made_is_a_setting_to_change():
    model = tiny.model("mixtral", tiny.VOCAB)
    attach_scorer(model)
    model.num_experts_per_tok = 400  # of 4 experts
    model.config.num_experts_per_tok = 400
    with pytest.raises(ValueError, match="cannot be made .*: set router_aux_loss_coef=0"):
        check_scorer(model, [5, 6, 7, 8], aux_loss=True)


def test_weights_of_several_dtypes_are_checked_under_the_runs_autocast_and_one_without():
    asked = []

    def autocast():
        asked.append(True)
        return torch.autocast("cpu", torch.bfloat16)

    model = tiny.model("llama", tiny.VOCAB)
    attach_scorer(model)
    check_scorer(model, [5, 6, 7, 8], autocast=autocast)
    assert not asked  # which would hide what is off by less than it rounds
    model.model.layers[0].mlp.up_proj.bfloat16()
    check_scorer(model, [5, 6, 7, 8], autocast=autocast)
    assert asked


def test_numbers_that_a_forwards_length_alone_moves_by_little_are_causal():
    model = tiny.model("llama", tiny.VOCAB)
    attach_scorer(model)

    def rounded_by_length(module, args, hidden):
        return hidden * (1 + 1e-2 * hidden.shape[1])

    model.model.norm.register_forward_hook(rounded_by_length)
    check_scorer(model, [5, 6, 7, 8])


def test_rounded_logits_are_no_unknown_way_and_nan_is_no_agreement():
    model = tiny.model("llama", tiny.VOCAB, dtype=torch.bfloat16)
    model.lm_head.weight.data *= 30  # logits whose rounding is large
    attach_scorer(model)
    check_scorer(model, [5, 6, 7, 8])
    model.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match="want finite log-probabilities, got nan"):
        check_scorer(model, [5, 6, 7, 8])


def test_a_completion_of_an_end_alone_is_checked_behind_its_prompt(tmp_path, tokenizer):
    rows = [row | {"chosen": ""} for row in tiny.rows()]
    trainer = make_trainer(tmp_path, tokenizer, rows=rows)
    assert trainer.train_dataset[0]["chosen_ids"] == [tokenizer.eos_token_id]
