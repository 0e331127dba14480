"""Models and adapters that DPOTrainer refuses before it has spent anything."""

import copy

import pytest
import tiny
import torch
from peft import AdaptionPromptConfig, CPTConfig, LoraConfig, PeftModel, get_peft_model
from trainers import LORA, make_trainer, with_transformers_adapter
from transformers import T5Config, T5ForConditionalGeneration

from fastdpo.model_check import check_models

ADAPTERS = LoraConfig(**LORA)


@pytest.mark.parametrize("has_new", [False, True], ids=["alone", "under new ones"])
@pytest.mark.parametrize("name", ["model", "ref_model"])
def test_adapters_that_a_wrapper_left_in_the_layers_are_refused(
    tmp_path, tokenizer, nothing_spent, name, has_new
):
    base = get_peft_model(tiny.model("llama", len(tokenizer)), ADAPTERS).get_base_model()
    adapters = {"peft_config": ADAPTERS} if has_new else {}
    with pytest.raises(ValueError, match=f"want {name} without adapters, got LlamaForCausalLM"):
        make_trainer(tmp_path, tokenizer, **{name: base}, **adapters)


def test_adapters_that_transformers_loaded_are_trained_but_take_no_others(
    tmp_path, tokenizer, nothing_spent
):
    model = with_transformers_adapter(tiny.model("llama", len(tokenizer)))
    with pytest.raises(ValueError, match="want model without adapters"):
        make_trainer(tmp_path, tokenizer, model=model, peft_config=ADAPTERS)


@pytest.mark.parametrize("kind", ["the policy", "under its adapters", "one tensor"])
def test_a_reference_that_would_train_is_refused(tmp_path, tokenizer, nothing_spent, kind):
    model = ref_model = tiny.model("llama", len(tokenizer))
    if kind == "under its adapters":
        model = get_peft_model(ref_model, ADAPTERS)
    if kind == "one tensor":
        ref_model = tiny.model("llama", len(tokenizer), seed=1)
        ref_model.lm_head.weight = model.lm_head.weight
    with pytest.raises(ValueError, match="want ref_model apart from model, got one with weights"):
        make_trainer(tmp_path, tokenizer, model=model, ref_model=ref_model)
    assert any(parameter.requires_grad for parameter in model.parameters())


def test_a_frozen_reference_that_adapters_would_be_put_on_is_refused(
    tmp_path, tokenizer, nothing_spent
):
    model = tiny.model("llama", len(tokenizer)).requires_grad_(False)
    with pytest.raises(ValueError, match="want ref_model apart from model"):
        make_trainer(tmp_path, tokenizer, model=model, ref_model=model, peft_config=ADAPTERS)


def test_a_reference_may_share_what_does_not_train(tmp_path, tokenizer):
    model = tiny.model("llama", len(tokenizer)).requires_grad_(False)
    other = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    make_trainer(tmp_path, tokenizer, model=model, ref_model=other)


@pytest.mark.parametrize("name", ["model", "ref_model"])
def test_an_encoder_decoder_is_refused(tmp_path, tokenizer, nothing_spent, name):
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 300}
    t5 = T5ForConditionalGeneration(T5Config(**sizes))
    with pytest.raises(ValueError, match=f"want {name} as a decoder-only model, got T5For"):
        make_trainer(tmp_path, tokenizer, **{name: t5})


@pytest.mark.parametrize("name", ["model", "ref_model"])
def test_a_compiled_copy_is_refused(tmp_path, tokenizer, nothing_spent, name):
    compiled = torch.compile(tiny.model("llama", len(tokenizer)))
    with pytest.raises(TypeError, match=rf"{name} as .*, got one of torch.compile.*{name}.compile"):
        make_trainer(tmp_path, tokenizer, **{name: compiled})


@pytest.mark.parametrize("name", ["model", "ref_model"])
def test_a_model_that_predicts_no_token_is_refused(tmp_path, tokenizer, nothing_spent, name):
    with pytest.raises(ValueError, match=f"want {name} with a head .*, got LlamaModel"):
        make_trainer(tmp_path, tokenizer, **{name: tiny.model("llama", len(tokenizer)).model})


def test_a_policy_with_nothing_to_train_is_refused(tokenizer, nothing_spent, tmp_path):
    get_peft_model(tiny.model("llama", len(tokenizer)), ADAPTERS).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.model("llama", len(tokenizer)), tmp_path)
    with pytest.raises(ValueError, match="want a model with something to train.*is_trainable"):
        make_trainer(tmp_path, tokenizer, model=loaded)


def test_merged_adapters_are_refused_where_they_would_train(tmp_path, tokenizer, nothing_spent):
    model = get_peft_model(tiny.model("llama", len(tokenizer)), ADAPTERS)
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapters beside its weights, got default merged"):
        make_trainer(tmp_path, tokenizer, model=model)


@pytest.mark.parametrize("name", ["model", "ref_model"])
def test_virtual_tokens_of_another_kind_are_refused(tmp_path, tokenizer, nothing_spent, name):
    ids = {"cpt_token_ids": [5, 6], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]}
    model = get_peft_model(tiny.model("llama", len(tokenizer)), CPTConfig("CAUSAL_LM", **ids))
    with pytest.raises(ValueError, match=f"want {name} with adapters on layers or .* got CPT"):
        make_trainer(tmp_path, tokenizer, **{name: model})


@pytest.mark.parametrize("name", ["model", "ref_model"])
def test_adapters_that_put_other_modules_in_place_are_refused(
    tmp_path, tokenizer, nothing_spent, name
):
    config = AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1)
    model = get_peft_model(tiny.model("llama", len(tokenizer)), config)
    with pytest.raises(ValueError, match=f"want {name} with adapters on layers.*ADAPTION_PROMPT"):
        make_trainer(tmp_path, tokenizer, **{name: model})


def test_new_adapters_may_have_a_reference_whose_own_transformers_put_there():
    ref_model = with_transformers_adapter(tiny.model("llama", tiny.VOCAB))
    check_models(tiny.model("llama", tiny.VOCAB, seed=1), ref_model, ADAPTERS)
