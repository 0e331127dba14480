"""What a head may look like: adapters, scalings and caps; what is refused."""

import families
import pytest
import tiny
import torch
from naive import own_logps
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model

from fastdpo.batch import PairBatch
from fastdpo.collate import PaddedCollator
from fastdpo.head import check_head_module, head_logps, logit_scale
from fastdpo.model import attach_scorer, score
from fastdpo.scorer_check import check_scorer


def with_head_adapter(family="llama", **settings):
    settings = {"target_modules": ["lm_head", "q_proj"], "init_lora_weights": False} | settings
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, **settings)
    return get_peft_model(tiny.model(family, tiny.VOCAB), lora)


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2: tied and soft-capped
def test_an_adapter_on_the_head_scores_and_learns_as_pefts_own_logits(family):
    model, inputs = with_head_adapter(family), PaddedCollator(pad_token_id=0)(tiny.ID_PAIRS)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = own_logps(model, inputs)
    grads = torch.autograd.grad(expected.sum(), trained)
    attach_scorer(model)
    check_scorer(model, [5, 6, 7, 8])
    scored = score(model, PairBatch.from_inputs(inputs)).token_logps_C
    torch.testing.assert_close(scored, expected, atol=2e-5, rtol=1e-5)
    for ours, own in zip(torch.autograd.grad(scored.sum(), trained), grads, strict=True):
        torch.testing.assert_close(ours, own, atol=1e-4, rtol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(
            score(model, PairBatch.from_inputs(inputs)).token_logps_C,
            own_logps(model, inputs),
            atol=2e-5,
            rtol=1e-5,
        )


def assert_scored_as_by_its_own_logits(model):
    inputs = PaddedCollator(pad_token_id=0)(tiny.ID_PAIRS)
    attach_scorer(model)
    with torch.no_grad():
        scored = score(model, PairBatch.from_inputs(inputs)).token_logps_C
        torch.testing.assert_close(scored, own_logps(model, inputs), atol=2e-5, rtol=1e-5)


def test_a_merged_adapter_counts_once():
    model = with_head_adapter()
    model.merge_adapter()
    assert_scored_as_by_its_own_logits(model)


def test_a_merged_adapter_that_is_switched_off_counts_no_more():
    model = with_head_adapter()
    model.merge_adapter()
    with model.disable_adapter():
        assert_scored_as_by_its_own_logits(model)
    inputs = PaddedCollator(pad_token_id=0)(tiny.ID_PAIRS)
    score(model, PairBatch.from_inputs(inputs)).token_logps_C.sum().backward()
    assert model.get_output_embeddings().lora_B["default"].weight.grad.abs().max() > 0


def test_of_several_adapters_the_active_ones_count():
    model, settings = with_head_adapter(), {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"], **settings))
    model.add_adapter("elsewhere", LoraConfig(target_modules=["q_proj"], **settings))
    for active in (["default", "second"], ["second"], ["second", "elsewhere"], ["elsewhere"]):
        model.base_model.set_adapter(active)
        assert_scored_as_by_its_own_logits(model)


def test_a_float32_adapter_scores_on_a_bfloat16_head():
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"], init_lora_weights=False)
    model = get_peft_model(tiny.model("llama", tiny.VOCAB, dtype=torch.bfloat16), lora)
    assert model.get_output_embeddings().lora_A["default"].weight.dtype == torch.float32
    attach_scorer(model)
    batch = PairBatch.from_inputs(PaddedCollator(pad_token_id=0)(tiny.ID_PAIRS))
    scored = score(model, batch).token_logps_C
    exact = score(model.float(), batch).token_logps_C
    assert (scored - exact).abs().max() < 0.2  # a layer in bfloat16


def test_models_without_a_body_and_a_linear_head_are_refused():
    no_body, two_layers = tiny.model("llama", tiny.VOCAB), tiny.model("llama", tiny.VOCAB)
    no_body.base_model_prefix = ""  # base_model is then the model itself
    two_layers.lm_head = torch.nn.Sequential(
        two_layers.lm_head, torch.nn.Linear(tiny.VOCAB, tiny.VOCAB)
    )
    for model in (tiny.model("llama", tiny.VOCAB).model, no_body, two_layers):
        with pytest.raises(ValueError, match="want a body and a linear output embedding"):
            attach_scorer(model)


class ScaledHead(torch.nn.Linear):
    """Dory's: a scale of each token's logit, 1 before it is trained."""

    def __init__(self, *sizes, **settings):
        super().__init__(*sizes, **settings)
        self.logit_scale = torch.nn.Parameter(torch.ones(self.out_features))

    def forward(self, hidden):
        return super().forward(hidden) * self.logit_scale


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}], ids=["full", "saved"])
def test_a_head_that_would_not_train_whole_is_refused(settings):
    model = tiny.model("llama", tiny.VOCAB)
    model.lm_head = ScaledHead(model.config.hidden_size, tiny.VOCAB, bias=False)
    if settings:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], **settings))
    with pytest.raises(ValueError, match="of weight and bias alone, ScaledHead has logit_scale"):
        attach_scorer(model)


def test_a_head_adapters_dropout_is_its_own():
    model = with_head_adapter(lora_dropout=0.5, target_modules=["lm_head"])
    inputs = PaddedCollator(pad_token_id=0)(tiny.ID_PAIRS)
    attach_scorer(model)
    batch = PairBatch.from_inputs(inputs)
    first, second = (score(model.train(), batch).token_logps_C for _ in range(2))
    assert (first - second).abs().max() > 1e-3
    logps_N = score(model.eval(), batch).token_logps_C
    torch.testing.assert_close(logps_N, own_logps(model, inputs), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_other_head_adapters_are_refused(settings):
    model = with_head_adapter(**settings)
    with pytest.raises(ValueError, match="no adapter on the output embedding but LoRA"):
        check_head_module(model.get_base_model())


def test_another_head_adapter_beside_one_of_plain_lora_is_refused():
    model = with_head_adapter()
    model.add_adapter("other", LoraConfig(target_modules=["lm_head"], lora_bias=True))
    with pytest.raises(ValueError, match="no adapter on the output embedding but LoRA"):
        check_head_module(model.get_base_model())


ON_THE_HEAD = {"target_modules": ["lm_head"]}
OTHERS = [
    AdaLoraConfig(**ON_THE_HEAD, total_step=10),
    IA3Config(**ON_THE_HEAD, feedforward_modules=[]),
]


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: type(config).__name__)
def test_an_adapter_on_the_head_with_other_weights_than_loras_is_refused(config):
    model = get_peft_model(tiny.model("llama", tiny.VOCAB), config)
    with pytest.raises(ValueError, match="no adapter on the output embedding but LoRA"):
        check_head_module(model.get_base_model())


class Config(dict):
    __getattr__ = dict.get


def test_a_text_config_within_a_models_says_how_logits_are_scaled_and_capped(monkeypatch):
    model = tiny.model("llama", tiny.VOCAB)
    text = Config(model_type="granite", logits_scaling=8.0, final_logit_softcapping=0.5)
    monkeypatch.setattr(type(model.config), "get_text_config", lambda self, **_: text)
    hidden_ND, labels_N = torch.randn(20, model.lm_head.in_features), torch.arange(20)
    logits_NV = model.lm_head(hidden_ND) / 8
    expected_NV = (0.5 * (logits_NV / 0.5).tanh()).log_softmax(1)
    logps_N, _ = head_logps(model, hidden_ND, labels_N)
    torch.testing.assert_close(logps_N, expected_NV[labels_N, labels_N])


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1.0),
        ({"logit_scale": 0.0625}, 0.0625),
        ({"logit_scale": None}, 1.0),
        ({"lm_head_multiplier": 0.5}, 0.5),
        ({"output_multiplier": 0.25}, 0.25),
        ({"logit_scale": 0.5, "model_type": "mpt"}, 1.0),
        ({"logits_mup_width_multiplier": 24.0, "model_type": "inkling"}, 1 / 24),
        ({"logits_scaling": 8.0, "model_type": "granite"}, 0.125),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, 8.0),
    ],
)
def test_logit_scale_of_each_family(settings, scale):
    assert logit_scale(Config(settings)) == scale


@pytest.mark.parametrize("family", ["recurrent_gemma", "xlstm"])
def test_a_cap_by_another_name_counts(family):
    settings = {"recurrent_gemma": {"num_hidden_layers": 3, "logits_soft_cap": 1.0}}
    settings |= {"xlstm": {"output_logit_soft_cap": 1.0, "num_heads": 4}}
    model = families.model(family, torch.float32, vocab_size=tiny.VOCAB, **settings[family])
    attach_scorer(model)
    check_scorer(model, [5, 6, 7, 8])
