"""The load-balancing loss: as the model makes it, in every layout and in packs."""

import types

import families
import pytest
import tiny
import torch
from trainers import logged, make_trainer

from fastdpo.attention import attend_along_trees
from fastdpo.batch import PairBatch
from fastdpo.collate import PackedCollator, PaddedCollator
from fastdpo.experts import (
    ExpertCounts,
    aux_loss_weight,
    balancing_loss,
    experts_per_token,
    with_batch_experts,
)
from fastdpo.model import attach_scorer, score
from fastdpo.scorer_check import check_scorer

EXPERTS = {  # where each keeps their number
    "mixtral": {"num_local_experts": 4},
    "granitemoe": {"num_local_experts": 4},
    "phimoe": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16},
    "olmoe": {"num_experts": 4},
    "jetmoe": {"num_local_experts": 4, "num_key_value_heads": 4},
    "gpt_oss": {"num_local_experts": 4},
}


def test_experts_loss_is_the_same_in_every_layout():
    one, two = tiny.ID_PAIRS
    pairs = [one, two, {**one, "rejected_ids": [9, 10, 14]}]  # beginnings that are run once
    model = tiny.model("mixtral", tiny.VOCAB)
    attach_scorer(model)
    attend_along_trees(model)
    losses = [
        score(model, PairBatch.from_inputs(collate(pairs)), aux_loss=True).aux_loss
        for collate in (PaddedCollator(pad_token_id=0), PackedCollator(share=True))
    ]
    torch.testing.assert_close(*losses)


def test_experts_loss_is_the_models_own():
    inputs = PaddedCollator(pad_token_id=0)(tiny.ID_PAIRS)
    model = tiny.model("mixtral", tiny.VOCAB)
    own = model(inputs["input_ids"], inputs["attention_mask"], output_router_logits=True).aux_loss
    attach_scorer(model)
    scored = score(model, PairBatch.from_inputs(inputs), aux_loss=True)
    torch.testing.assert_close(scored.aux_loss, own)


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_loss_is_the_models_own_in_every_family(family):
    settings = {"num_experts_per_tok": 2, "vocab_size": tiny.VOCAB, **EXPERTS[family]}
    model = families.model(family, torch.float32, **settings)
    attach_scorer(model)
    assert aux_loss_weight(model, 0.5) == 0.5
    if not model(torch.tensor([[5, 6]]), output_router_logits=True).aux_loss:
        pytest.skip(f"{family} has no load-balancing loss in this version of transformers")
    check_scorer(model, [5, 6, 7, 8, 9, 10], aux_loss=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_experts_loss_is_made_in_float32(dtype, autocast):
    torch.manual_seed(0)
    router_logits = tuple(torch.randn(4096, 8, dtype=dtype) for _ in range(4))
    token_uses = torch.randint(0, 3, (1, 4096))
    wanted, _ = balancing_loss(tuple(each.float() for each in router_logits), 2, token_uses)
    with torch.autocast("cpu", dtype, enabled=autocast):
        loss, _ = balancing_loss(router_logits, 2, token_uses)
    assert loss.item() == wanted.item()


def test_experts_that_cannot_be_counted_are_refused():
    model = tiny.model("mixtral", tiny.VOCAB)
    model.config = types.SimpleNamespace(
        get_text_config=lambda: types.SimpleNamespace(output_router_logits=False)
    )
    del model.num_experts
    assert aux_loss_weight(model, 0.0) == aux_loss_weight(model, None) == 0.0
    with pytest.raises(ValueError, match="want router_aux_loss_coef=0 for MixtralForCausalLM"):
        aux_loss_weight(model, 0.1)


def test_experts_loss_is_weighed_as_the_model_says_unless_overridden():
    mixtral, llama = tiny.model("mixtral", tiny.VOCAB), tiny.model("llama", tiny.VOCAB)
    assert aux_loss_weight(mixtral, None) == mixtral.config.router_aux_loss_coef > 0
    assert aux_loss_weight(mixtral, 0.0) == 0.0
    assert aux_loss_weight(llama, None) == 0.0
    with pytest.raises(ValueError, match=r"router_aux_loss_coef.*llama"):
        aux_loss_weight(llama, 0.1)


def test_a_dense_model_of_a_family_with_experts_has_no_loss_of_them():
    model = families.model("granitemoehybrid", torch.float32, vocab_size=tiny.VOCAB)
    assert model.config.router_aux_loss_coef > 0
    assert aux_loss_weight(model, None) == 0.0


def test_a_reference_needs_no_experts(tmp_path, tokenizer):
    policy, reference = (tiny.model(family, len(tokenizer)) for family in ("mixtral", "llama"))
    trainer = make_trainer(tmp_path, tokenizer, policy, ref_model=reference, max_steps=1)
    trainer.train()
    assert len(logged(trainer, "aux_loss")) == 1


def test_a_batchs_experts_are_counted_without_dropout(tmp_path, tokenizer):
    model = tiny.model("mixtral", len(tokenizer))
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.9
    settings = {"max_tokens_per_forward": 100, "disable_dropout": False}
    trainer = make_trainer(tmp_path, tokenizer, model, **settings)
    packs = next(iter(trainer.get_train_dataloader()))["packs"]
    counted = [
        trainer.before_packs(model.train(is_training), packs)[0]["experts"].counts.chosen_E.tolist()
        for is_training in (False, True)
    ]
    assert model.training and counted[0] == counted[1]


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
