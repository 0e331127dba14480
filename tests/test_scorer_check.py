"""What the check before training finds out about a model."""

import families
import pytest
import tiny
import torch

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


def test_logits_made_in_an_unknown_way_are_detected():
    model = tiny.model("llama", tiny.VOCAB)
    attach_scorer(model)
    model.train()
    check_scorer(model, [5, 6, 7, 8])
    assert model.training
    causal_lm_of(model).lm_head.register_forward_hook(lambda module, args, logits: logits * 2)
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


def test_rounded_logits_are_no_unknown_way_and_nan_is_no_agreement():
    model = tiny.model("llama", tiny.VOCAB, dtype=torch.bfloat16)
    model.lm_head.weight.data *= 30  # logits whose rounding is large
    attach_scorer(model)
    check_scorer(model, [5, 6, 7, 8])
    model.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match="want finite log-probabilities, got nan"):
        check_scorer(model, [5, 6, 7, 8])
