"""Which layout a run takes: what the model can run, what was asked for, what a pair shows."""

import logging
import math
import shutil
import sysconfig
from pathlib import Path

import families
import pytest
import tiny
import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from trainers import LORA, logged, make_trainer
from transformers import TrainerCallback

from fastdpo import attention
from fastdpo.batch import PairBatch
from fastdpo.collate import make_collator
from fastdpo.columns import Cut
from fastdpo.layout import choose_layout, why_padded


def for_tokenizer(family, tokenizer, **settings):
    return families.model(family, torch.float32, vocab_size=len(tokenizer), **settings)


HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "experts_implementation": "eager",
}
PADDED_ONLY = {
    "mamba": ({"state_size": 4}, "carries a state from token to token"),
    "qwen3_next": (HYBRID, "has layers of type linear_attention|carries a state"),
    "gpt_oss": ({"num_local_experts": 2, "sliding_window": 6}, "has attention sinks"),
    "bloom": ({"n_head": 4}, "does not use transformers' attention interface"),
}


@pytest.mark.parametrize("family", PADDED_ONLY)
def test_what_cannot_run_packed_says_so_in_a_line(family):
    settings, reason = PADDED_ONLY[family]
    model = families.model(family, torch.float32, **settings)
    assert any(each in why_padded(model) for each in reason.split("|"))
    for strict in (False, True):  # no difference that a check has found
        layout = choose_layout("auto", [model], None, strict=strict)
        assert layout.name == "padded" and why_padded(model) in layout.line
    as_reference = [families.model("llama", torch.float32), model]
    assert choose_layout("auto", as_reference, None, strict=False).name == "padded"
    assert choose_layout("padded", [model], None, strict=False).name == "padded"
    with pytest.raises(ValueError, match="want layout='shared' for a model that can run it"):
        choose_layout("shared", [model], None, strict=False)


@pytest.mark.parametrize("kind", ["chunked_attention", "conv", "linear_attention"])
def test_layers_of_another_kind_than_attention_stay_padded(kind):
    model = families.model("llama", torch.float32)
    model.config.layer_types = ["full_attention", "sliding_attention", "attention"]
    assert why_padded(model) is None
    model.config.layer_types = ["full_attention", kind]
    assert why_padded(model) == f"LlamaForCausalLM has layers of type {kind}"


def test_attention_sinks_by_any_name_stay_padded():
    model = families.model("llama", torch.float32)
    model.model.layers[0].self_attn.sink = torch.nn.Parameter(torch.zeros(2))
    assert "has attention sinks" in why_padded(model)


def test_attention_without_its_soft_capping_stays_padded_and_says_what_to_do():
    model = families.model("gemma2", torch.float32)
    assert why_padded(model) is None
    model.config._attn_implementation = "sdpa"
    assert "load it with attn_implementation='eager'" in why_padded(model)


def test_sharded_weights_go_unchecked_and_say_so():
    model = families.model("llama", torch.float32)
    layout = choose_layout("auto", [model], None, strict=False)
    assert layout.name == "shared" and "not checked" in layout.line
    with pytest.raises(ValueError, match="want strict_layout=False with sharded weights"):
        choose_layout("auto", [model], None, strict=True)


def test_memory_that_runs_out_in_the_check_is_no_reason_to_pad(tmp_path, tokenizer, monkeypatch):
    def run_out(*args, **kwargs):
        raise torch.OutOfMemoryError("pretended")

    monkeypatch.setattr(attention, "_attend", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        make_trainer(tmp_path, tokenizer)


def test_what_fails_padded_is_no_layouts_doing(tmp_path, tokenizer):
    model = tiny.model("llama", len(tokenizer))

    def only_short_rows(module, args, kwargs):
        if kwargs["input_ids"].shape[1] > 32 and "tree" not in kwargs:
            raise ValueError("padded is broken")

    model.model.register_forward_pre_hook(only_short_rows, with_kwargs=True)
    rows = [row | {"prompt": 4 * row["prompt"]} for row in tiny.rows()]
    with pytest.raises(ValueError, match="padded is broken"):
        make_trainer(tmp_path, tokenizer, model=model, rows=rows)


def test_noise_that_reads_the_length_of_a_row_needs_padding(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, neftune_noise_alpha=5)
    assert trainer.layout.name == "padded" and "neftune_noise_alpha" in trainer.layout.line
    assert make_trainer(tmp_path, tokenizer, neftune_noise_alpha=0).layout.name == "shared"
    with pytest.raises(ValueError, match="want layout='shared'.*neftune_noise_alpha"):
        make_trainer(tmp_path, tokenizer, neftune_noise_alpha=5, layout="shared")


def test_a_model_that_cannot_run_packed_trains_padded(tmp_path, tokenizer, caplog):
    model = for_tokenizer("gpt_oss", tokenizer, num_local_experts=2, num_experts_per_tok=2)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, tokenizer, model=model, max_steps=2)
    assert "layout padded: GptOssForCausalLM has attention sinks" in caplog.text
    assert "padded: chosen and rejected in one padded forward: GptOss" in trainer.summary()
    trainer.train()
    weight = model.config.router_aux_loss_coef * logged(trainer, "aux_loss")[0]
    assert logged(trainer)[0] == pytest.approx(math.log(2) + weight, abs=1e-5)


@pytest.fixture
def leaky_windows(monkeypatch):
    """Attention that looks past sliding windows, as a kernel that ignores them would."""
    own = attention._attend

    def attend(*args, window, **settings):
        return own(*args, window=None, **settings)

    monkeypatch.setattr(attention, "_attend", attend)


WINDOWS = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 6}


def test_a_difference_names_the_layer_kind_and_pads(tmp_path, tokenizer, leaky_windows, caplog):
    model = for_tokenizer("gemma3_text", tokenizer, **WINDOWS)
    within_a_window = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(
            tmp_path, tokenizer, model=model, rows=[within_a_window, *tiny.rows()]
        )
    assert trainer.layout.name == "padded"
    assert "gives other log-probabilities than padded" in caplog.text
    assert "from layer 1 (sliding_attention) on" in caplog.text
    assert model.config._attn_implementation == "sdpa"  # as it came


@pytest.mark.parametrize("settings", [{"strict_layout": True}, {"layout": "packed"}], ids=str)
def test_a_difference_ends_a_run_that_asked_for_more(tmp_path, tokenizer, leaky_windows, settings):
    model = for_tokenizer("gemma3_text", tokenizer, **WINDOWS)
    with pytest.raises(ValueError, match=r"from layer 1 \(sliding_attention\) on"):
        make_trainer(tmp_path, tokenizer, model=model, **settings)


@pytest.mark.parametrize("which", ["model", "ref_model"])
def test_a_model_that_keeps_its_tree_to_itself_is_detected(tmp_path, tokenizer, caplog, which):
    models = {name: tiny.model("llama", len(tokenizer)) for name in ("model", "ref_model")}
    for layer in models[which].model.layers:
        own = layer.self_attn.forward
        layer.self_attn.forward = lambda *args, tree=None, own=own, **kwargs: own(*args, **kwargs)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, tokenizer, **models)
    assert trainer.layout.name == "padded"
    assert "LlamaForCausalLM cannot run it" in caplog.text
    for model in models.values():
        assert model.config._attn_implementation == "sdpa"  # as it came


def test_a_reference_that_cannot_run_packed_pads_both(tmp_path, tokenizer):
    reference = for_tokenizer("gpt_oss", tokenizer, num_local_experts=2, num_experts_per_tok=2)
    trainer = make_trainer(tmp_path, tokenizer, ref_model=reference)
    assert trainer.layout.name == "padded" and "GptOss" in trainer.layout.line


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_every_layout_logs_the_same_numbers(tmp_path, tokenizer, adapters):
    def run(layout):
        lora = LoraConfig(**LORA) if adapters else None
        trainer = make_trainer(tmp_path, tokenizer, layout=layout, peft_config=lora)
        trainer.train()
        assert trainer.layout.name == layout
        return trainer.state.log_history[:-1]

    shared, packed, padded = map(run, ("shared", "packed", "padded"))
    for ours in (shared, packed):
        for entry, theirs in zip(ours, padded, strict=True):
            assert entry == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_may_be_set_between_steps(tmp_path, tokenizer, implementation):
    class Sets(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            model.set_attn_implementation(implementation)

    plain = make_trainer(tmp_path, tokenizer)
    plain.train()
    changed = make_trainer(tmp_path, tokenizer, callbacks=[Sets()])
    changed.train()
    assert changed.layout.name == "shared" and logged(changed) == logged(plain)


def test_a_run_reports_the_tokens_it_ran_and_those_it_did_not(tmp_path, tokenizer):
    def tokens(layout):
        trainer = make_trainer(tmp_path, tokenizer, layout=layout, max_steps=2)
        metrics = trainer.train().metrics
        return [metrics[f"tokens/{n}"] for n in ("run", "shared", "padding_avoided")]

    padded, packed, shared = map(tokens, ("padded", "packed", "shared"))
    assert padded[1:] == [0, 0]
    assert packed[0] + packed[2] == padded[0] and packed[1] == 0
    assert sum(shared) == padded[0] and shared[1] > 0 and shared[2] == packed[2]


def test_the_body_runs_each_token_of_the_tree_once():
    """Its products are those of a single row of the tree's tokens, attention aside."""
    model = families.model("llama", torch.float32)
    rows = [{"prompt_ids": [*range(3, 33)], "chosen_ids": [40] * 7, "rejected_ids": [50] * 9}] * 2
    rows[1] = rows[1] | {"prompt_ids": [*range(33, 3, -1)]}

    def flops(inputs):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.base_model(**inputs, use_cache=False)
        counts = counter.get_flop_counts()["Global"]
        return sum(n for operator, n in counts.items() if "attention" not in str(operator))

    attention.attend_along_trees(model)
    batch = PairBatch.from_inputs(make_collator("shared", Cut(), 0, None)(rows))
    tokens = 2 * (30 + 7 + 9)
    assert flops(batch.model_inputs) == flops({"input_ids": torch.full((1, tokens), 7)})


@pytest.mark.skipif(
    shutil.which("g++") is None or not Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="torch.compile needs a C++ compiler and Python's headers here",
)
def test_a_compiled_model_trains_alike(tmp_path, tokenizer):
    plain = make_trainer(tmp_path, tokenizer, max_steps=2)
    plain.train()
    compiled = make_trainer(tmp_path, tokenizer, max_steps=2, torch_compile=True)
    compiled.train()
    assert logged(compiled) == pytest.approx(logged(plain), rel=1e-4)


def test_autocast_runs_the_tree_in_bfloat16(tmp_path, tokenizer):
    plain = make_trainer(tmp_path, tokenizer)
    plain.train()
    narrow = make_trainer(tmp_path, tokenizer, bf16=True)
    assert narrow.layout.name == "shared"
    narrow.train()
    assert logged(narrow)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(narrow) == pytest.approx(logged(plain), abs=0.05)
    assert logged(narrow) != logged(plain)


def test_adapters_that_look_for_one_invocation_in_a_row_stay_padded(tmp_path, tokenizer):
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        alora_invocation_tokens=tokenizer("a")["input_ids"],
    )
    with pytest.raises(ValueError, match="want gradient_checkpointing=False with aLoRA"):
        make_trainer(tmp_path, tokenizer, peft_config=lora)
    settings = {"peft_config": lora, "gradient_checkpointing": False}
    trainer = make_trainer(tmp_path, tokenizer, **settings)
    assert trainer.layout.name == "padded" and "aLoRA" in trainer.layout.line
