import copy
import types

import families
import pytest
import tiny
import torch
from naive import own_logps
from peft import LoraConfig, get_peft_model

from fastdpo.attention import attend_along_trees
from fastdpo.batch import PairBatch
from fastdpo.collate import PackedCollator, PaddedCollator
from fastdpo.experts import (
    ExpertCounts,
    balancing_loss,
    experts_per_token,
    with_batch_experts,
)
from fastdpo.model import (
    TOKEN_STATS,
    attach_scorer,
    aux_loss_weight,
    causal_lm_of,
    check_scorer,
    score,
    token_logps_without_grad,
)

VOCAB = 97
ROWS = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 2], "rejected_ids": [11, 2]},
    {"prompt_ids": [12, 13], "chosen_ids": [14, 2], "rejected_ids": [15, 16, 17, 18, 2]},
]
FAMILIES = ["llama", "qwen2", "gemma2", "mixtral"]


@pytest.fixture
def inputs():
    return PaddedCollator(pad_token_id=0)(ROWS)


@pytest.mark.parametrize("family", FAMILIES)
def test_scoring_equals_the_models_own_logits(family, inputs):
    model = tiny.model(family, VOCAB)
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
    model = tiny.model("llama", VOCAB)
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
    model = get_peft_model(tiny.model("llama", VOCAB), LoraConfig(init_lora_weights=False))
    expected = own_logps(model, inputs)
    attach_scorer(model)
    scored = score(model, PairBatch.from_inputs(inputs))
    torch.testing.assert_close(scored.token_logps_C, expected, atol=2e-5, rtol=1e-5)
    with model.disable_adapter():
        plain = score(model, PairBatch.from_inputs(inputs)).token_logps_C
    assert (plain - expected).abs().max() > 1e-3


def test_stats_come_with_the_scores(inputs):
    model = tiny.model("llama", VOCAB)
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
    model, kept = tiny.model("llama", VOCAB), []
    attach_scorer(model)
    model.model.register_forward_hook(lambda *args: kept.append(args[-1].past_key_values))
    score(model, PairBatch.from_inputs(inputs))
    assert kept == [None]


def test_the_models_own_forward_and_generate_still_work(inputs):
    model = tiny.model("llama", VOCAB)
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
    model = tiny.model("llama", VOCAB)
    attach_scorer(model)
    attach_scorer(model)  # a second trainer on the same model
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    batch = PairBatch.from_inputs(inputs)
    logps_C = score(model, batch).token_logps_C
    torch.testing.assert_close(logps_C, torch.full_like(logps_C, VOCAB).log().neg())
    assert (score(twin, batch).token_logps_C - logps_C).abs().max() > 1e-2
    assert twin(inputs["input_ids"]).logits.abs().max() > 1e-2


@pytest.mark.parametrize("training", [False, True])
def test_frozen_scores_have_no_gradient_and_no_dropout(training):
    inputs = PaddedCollator(pad_token_id=0)(ROWS)
    model = get_peft_model(
        tiny.model("llama", VOCAB), LoraConfig(lora_dropout=0.5, init_lora_weights=False)
    )
    attach_scorer(model)
    model.train(training)
    logps_C = token_logps_without_grad(model, PairBatch.from_inputs(inputs))
    assert not logps_C.requires_grad and model.training == training
    torch.testing.assert_close(logps_C, own_logps(model.eval(), inputs), atol=2e-5, rtol=1e-5)


def test_experts_loss_is_the_same_in_every_layout():
    rows = [*ROWS, {**ROWS[0], "rejected_ids": [9, 10, 14]}]  # beginnings that are run once
    model = tiny.model("mixtral", VOCAB)
    attach_scorer(model)
    attend_along_trees(model)
    losses = [
        score(model, PairBatch.from_inputs(collate(rows)), aux_loss=True).aux_loss
        for collate in (PaddedCollator(pad_token_id=0), PackedCollator(share=True))
    ]
    torch.testing.assert_close(*losses)


def test_experts_loss_is_the_models_own(inputs):
    model = tiny.model("mixtral", VOCAB)
    own = model(inputs["input_ids"], inputs["attention_mask"], output_router_logits=True).aux_loss
    attach_scorer(model)
    scored = score(model, PairBatch.from_inputs(inputs), aux_loss=True)
    torch.testing.assert_close(scored.aux_loss, own)


EXPERTS = {  # where each keeps their number
    "mixtral": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16},
    "olmoe": {"num_experts": 4},
    "jetmoe": {"num_local_experts": 4, "num_key_value_heads": 4},
    "gpt_oss": {"num_local_experts": 4},
}


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_loss_is_the_models_own_in_every_family(family):
    settings = {"num_experts_per_tok": 2, "vocab_size": VOCAB, **EXPERTS[family]}
    model = families.model(family, torch.float32, **settings)
    attach_scorer(model)
    assert aux_loss_weight(model, 0.5) == 0.5
    if not model(torch.tensor([[5, 6]]), output_router_logits=True).aux_loss:
        pytest.skip(f"{family} has no load-balancing loss in this version of transformers")
    check_scorer(model, [5, 6, 7, 8, 9, 10], aux_loss=True)


@pytest.mark.parametrize("wrong", [lambda own: 3 * own, lambda own: 0], ids=["otherwise", "none"])
def test_a_loss_of_experts_that_is_not_made_alike_is_found_out(wrong):
    model = tiny.model("mixtral", VOCAB)
    attach_scorer(model)
    own = model._unscored_forward

    def forward(**inputs):
        outputs = own(**inputs)
        if outputs.aux_loss is not None:
            outputs.aux_loss = wrong(outputs.aux_loss)
        return outputs

    model._unscored_forward = forward
    check_scorer(model, [5, 6, 7, 8])
    with pytest.raises(ValueError, match="want its own load-balancing loss"):
        check_scorer(model, [5, 6, 7, 8], aux_loss=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_loss_is_made_in_float32_under_autocast(dtype):
    torch.manual_seed(0)
    router_logits = tuple(torch.randn(4096, 8) for _ in range(4))
    token_uses = torch.randint(0, 3, (1, 4096))
    wanted, _ = balancing_loss(router_logits, 2, token_uses)
    with torch.autocast("cpu", dtype):
        loss, _ = balancing_loss(router_logits, 2, token_uses)
    assert loss.item() == wanted.item()


def test_experts_that_cannot_be_counted_are_refused():
    model = tiny.model("mixtral", VOCAB)
    model.config = types.SimpleNamespace(
        get_text_config=lambda: types.SimpleNamespace(output_router_logits=False)
    )
    del model.num_experts
    assert aux_loss_weight(model, 0.0) == aux_loss_weight(model, None) == 0.0
    with pytest.raises(ValueError, match="want router_aux_loss_coef=0 for MixtralForCausalLM"):
        aux_loss_weight(model, 0.1)


def test_experts_loss_is_weighed_as_the_model_says_unless_told():
    mixtral, llama = tiny.model("mixtral", VOCAB), tiny.model("llama", VOCAB)
    assert aux_loss_weight(mixtral, None) == mixtral.config.router_aux_loss_coef > 0
    assert aux_loss_weight(mixtral, 0.0) == 0.0
    assert aux_loss_weight(llama, None) == 0.0
    with pytest.raises(ValueError, match=r"router_aux_loss_coef.*llama"):
        aux_loss_weight(llama, 0.1)


def test_logits_made_in_an_unknown_way_are_found_out():
    model = tiny.model("llama", VOCAB)
    attach_scorer(model)
    model.train()
    check_scorer(model, [5, 6, 7, 8])
    assert model.training
    causal_lm_of(model).lm_head.register_forward_hook(lambda module, args, logits: logits * 2)
    with pytest.raises(ValueError, match="want the model's own log-probabilities"):
        check_scorer(model, [5, 6, 7, 8])


def test_a_model_that_looks_at_later_tokens_is_found_out():
    model = families.model("llama", torch.float32, vocab_size=VOCAB, is_causal=False)
    attach_scorer(model)
    with pytest.raises(ValueError, match="want a causal model"):
        check_scorer(model, [5, 6, 7, 8])


def test_a_dense_model_of_a_family_with_experts_has_no_loss_of_them():
    model = families.model("granitemoehybrid", torch.float32, vocab_size=VOCAB)
    assert model.config.router_aux_loss_coef > 0
    assert aux_loss_weight(model, None) == 0.0


def test_a_loss_of_experts_that_cannot_be_made_is_a_setting_to_change():
    model = tiny.model("mixtral", VOCAB)
    attach_scorer(model)
    model.num_experts_per_tok = 400  # of 4 experts
    model.config.num_experts_per_tok = 400
    with pytest.raises(ValueError, match="cannot be made .*: set router_aux_loss_coef=0"):
        check_scorer(model, [5, 6, 7, 8], aux_loss=True)


def test_rounded_logits_are_no_unknown_way_and_nan_is_no_agreement():
    model = tiny.model("llama", VOCAB, dtype=torch.bfloat16)
    model.lm_head.weight.data *= 30  # logits whose rounding is large
    attach_scorer(model)
    check_scorer(model, [5, 6, 7, 8])
    model.lm_head.weight.data[3, 3] = torch.nan
    with pytest.raises(ValueError, match="want finite log-probabilities, got nan"):
        check_scorer(model, [5, 6, 7, 8])


def test_experts_of_a_text_config_are_found():
    """Where a vision-language model has them."""
    text = types.SimpleNamespace(num_experts=8, num_experts_per_tok=2)
    config = types.SimpleNamespace(get_text_config=lambda: text)
    assert experts_per_token(types.SimpleNamespace(config=config)) == 2


def test_a_filler_runs_and_its_tokens_count_once():
    counts = [
        ExpertCounts(torch.tensor(chosen), torch.tensor(2.0)) for chosen in ([1.0, 3.0], [4.0, 0.0])
    ]
    packs = [{"counts": each} for each in counts]
    packs.append(packs[-1] | {"is_filler": True})
    run = []
    made = with_batch_experts(packs, lambda pack: run.append(pack) or pack["counts"], num_pairs=5)
    assert len(run) == len(made) == 3  # a rank runs as many forwards as any
    for pack in made:
        assert pack["experts"].counts.chosen_E.tolist() == [5.0, 3.0]
        assert pack["experts"].counts.tokens.item() == 4.0
