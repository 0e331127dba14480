"""The policy before training: its dropout off, its tokenizer able to pad."""

import families
import pytest
import tiny
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.tuners.boft.layer import MultiplicativeDropoutLayer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from fastdpo.layout import why_padded
from fastdpo.policy import (
    disable_dropout,
    load_policy,
    load_tokenizer,
    make_ready,
    with_adapters,
)

DROPPING = {  # where each keeps its rates
    "llama": {"attention_dropout": 0.3},  # on the attention modules
    "opt": {"dropout": 0.3, "ffn_dim": 48, "word_embed_proj_dim": 32, "layerdrop": 0.3},  # floats
    "falcon": {"hidden_dropout": 0.3, "attention_dropout": 0.3},  # read as numbers by its layers
    "bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3, "n_head": 4},
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "granitemoe": {"attention_dropout": 0.3, "num_local_experts": 2, "num_experts_per_tok": 1},
}


def rates(module):
    return {k: v for k, v in vars(module).items() if "drop" in k and isinstance(v, float) and v}


@pytest.mark.parametrize("family", DROPPING)
def test_without_dropout_two_forwards_are_the_same(family):
    torch.manual_seed(0)
    sizes = {name: size for name, size in families.SIZES.items() if name != "head_dim"}
    config = AutoConfig.for_model(family, **(sizes | DROPPING[family]))
    model = AutoModelForCausalLM.from_config(config).train()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)
        disable_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)
    assert not any(rates(module) for module in model.modules()) and not rates(model.config)


def test_a_pad_token_that_the_tokenizer_lacks_is_refused_and_left_out():
    tokenizer = tiny.tokenizer()
    with pytest.raises(
        ValueError, match="want pad_token in the tokenizer's vocabulary, got '<no>'"
    ):
        load_tokenizer(tokenizer, "model", pad_token="<no>")
    assert tokenizer.pad_token == "<pad>"
    assert load_tokenizer(tokenizer, "model", pad_token="</s>").pad_token_id == 2


def test_a_tokenizer_pads_with_its_end_token_or_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    assert load_tokenizer(tokenizer, "model").pad_token == "</s>"
    tokenizer.pad_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match="want a tokenizer with a pad_token or an eos_token"):
        load_tokenizer(tokenizer, "model")


def test_weights_that_are_not_all_there_or_of_another_shape_are_refused(tmp_path):
    families.model("llama", torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]  # as in a checkpoint of the body alone
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="want all weights.*got none for.*lm_head.weight"):
        load_policy(str(tmp_path))
    weights["lm_head.weight"] = torch.zeros(3, 3)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"want a model that loads, got {tmp_path}"):
        load_policy(str(tmp_path))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=f"want a model that loads, got {tmp_path}"):
        load_policy(str(tmp_path))


def test_adapters_beside_a_model_or_alone_are_refused(tmp_path):
    adapted = get_peft_model(families.model("llama", torch.float32), LoraConfig(r=2))
    adapted.save_pretrained(tmp_path)
    for _ in ("alone", "beside a model"):
        wanted = f"want a model by its name, got {tmp_path}, which has ad"
        with pytest.raises(ValueError, match=wanted):
            load_policy(str(tmp_path))
        families.model("llama", torch.float32).save_pretrained(tmp_path)


def test_a_pad_token_beyond_the_model_is_refused():
    model = families.model("llama", torch.float32)
    V = model.config.vocab_size
    larger = families.model("llama", torch.float32, vocab_size=V + 1)
    for policy, ref_model in ((model, None), (larger, model)):
        with pytest.raises(ValueError, match=rf"want a pad token in \[0, {V}\), .*got {V}"):
            make_ready(policy, ref_model, pad_token_id=V, without_dropout=True)


def test_arguments_that_no_model_takes_are_refused(tmp_path):
    families.model("llama", torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="want a model that loads.*'atn'"):
        load_policy(str(tmp_path), atn="eager")


def test_a_model_without_a_tokenizer_is_named(tmp_path):
    families.model("llama", torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"want a tokenizer in {tmp_path}, got none"):
        load_tokenizer(None, str(tmp_path))


def test_a_tokenizer_is_read_of_the_revision_asked_for(monkeypatch, tokenizer):
    asked = {}

    def read(name, **settings):
        asked.update(settings)
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", read)
    load_tokenizer(None, "some/model", revision="v1", trust_remote_code=True)
    assert asked == {"revision": "v1", "trust_remote_code": True}


def test_a_model_and_its_tokenizer_may_be_in_a_subfolder(tmp_path, tokenizer):
    families.model("llama", torch.float32).save_pretrained(tmp_path / "sub")
    tokenizer.save_pretrained(tmp_path / "sub")
    assert load_policy(str(tmp_path), subfolder="sub").config.model_type == "llama"
    loaded = load_tokenizer(None, str(tmp_path), subfolder="sub", dtype="float32")
    assert len(loaded) == len(tokenizer)
    (tmp_path / "sub/adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"want a model by its name, got {tmp_path}, which has ad"):
        load_policy(str(tmp_path), subfolder="sub")


def test_adapters_that_show_once_a_repository_is_loaded_are_refused(tmp_path, monkeypatch):
    """As of one on the Hub, where no folder tells of them before."""
    model = families.model("llama", torch.float32)
    model.save_pretrained(tmp_path)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    found = model, {"missing_keys": []}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name, **_: found)
    with pytest.raises(ValueError, match=f"want a model by its name, got {tmp_path}, which has ad"):
        load_policy(str(tmp_path))


def test_soft_capped_attention_is_loaded_as_one_that_caps(tmp_path):
    families.model("gemma2", torch.float32).save_pretrained(tmp_path)
    assert why_padded(load_policy(str(tmp_path), attn_implementation=None)) is None
    asked = load_policy(str(tmp_path), attn_implementation="flex_attention")
    assert asked.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize(
    ("asked", "made"),
    [
        ({}, torch.float32),
        ({"dtype": None}, torch.float32),
        ({"dtype": "auto"}, torch.bfloat16),  # as the file has it
        ({"dtype": "float16"}, torch.float16),
        ({"torch_dtype": "float16"}, torch.float16),  # its name before transformers 5
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, torch.float16),
        ({"dtype": torch.float16}, torch.float16),
    ],
    ids=str,
)
def test_a_policy_is_loaded_in_the_dtype_that_is_asked_for(tmp_path, asked, made):
    families.model("llama", torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_policy(str(tmp_path), **asked).parameters()} == {made}


@pytest.mark.parametrize("dtype", ["float23", "Tensor"])
def test_a_dtype_that_torch_lacks_is_refused(dtype):
    with pytest.raises(ValueError, match=f"want dtype auto or .* torch.dtype, got '{dtype}'"):
        load_policy("a-name", dtype=dtype)


def test_a_config_is_read_of_the_models_revision(monkeypatch):
    asked = {}

    def read(name, **settings):
        asked.update(settings)
        raise OSError

    monkeypatch.setattr(AutoConfig, "from_pretrained", read)
    with pytest.raises(ValueError, match="want a model's configuration in some/model"):
        load_policy("some/model", revision="v1", trust_remote_code=True, device_map="auto")
    assert asked == {"revision": "v1", "trust_remote_code": True}


def test_an_encoder_decoder_is_refused(tmp_path):
    AutoConfig.for_model("t5", d_model=8, num_layers=1, vocab_size=40).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"want a decoder-only .* got .* \(t5\)"):
        load_policy(str(tmp_path))


def test_a_vision_language_model_is_loaded_by_its_own_class(tmp_path):
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 40}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16}
    config = Qwen2VLConfig(text_config=text, vision_config=vision)
    Qwen2VLForConditionalGeneration(config).save_pretrained(tmp_path)
    assert type(load_policy(str(tmp_path))) is Qwen2VLForConditionalGeneration


@pytest.mark.parametrize(
    "adapters",
    [
        LoHaConfig(r=4, rank_dropout=0.5, module_dropout=0.5, init_weights=False),
        LoKrConfig(r=4, rank_dropout=0.5, module_dropout=0.5, init_weights=False),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_adapters_drop_nothing_either(adapters):
    torch.manual_seed(0)
    adapters.target_modules = ["q_proj", "v_proj"]
    model = get_peft_model(families.model("llama", torch.float32), adapters).train()
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, model(ids).logits)
        disable_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)


def test_bofts_own_dropout_is_off():
    layer = torch.nn.Sequential(MultiplicativeDropoutLayer(p=0.5))
    disable_dropout(layer)
    assert layer[0].p == 0.0


def test_both_configs_learn_the_pad_token_and_a_reference_drops_nothing():
    models = [families.model("llama", torch.float32, attention_dropout=0.3) for _ in range(2)]
    make_ready(*models, pad_token_id=7, without_dropout=True)
    assert models[0].config.pad_token_id == models[0].generation_config.pad_token_id == 7
    assert not any(rates(module) for model in models for module in model.modules())


def test_a_model_that_does_not_generate_needs_no_settings_for_it():
    model = tiny.model("llama", 300)
    del model.generation_config  # as a class of one's own without GenerationMixin
    make_ready(model, None, pad_token_id=7, without_dropout=True)
    assert model.config.pad_token_id == 7


def test_adapters_on_a_quantised_model_train_in_bfloat16_but_for_doras_magnitudes():
    model = tiny.model("llama", 300)
    model.is_loaded_in_4bit = True  # as transformers says of bitsandbytes' layers
    adapted = with_adapters(model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            is_magnitude = "lora_magnitude_vector" in name
            assert parameter.dtype == (torch.float32 if is_magnitude else torch.bfloat16), name
