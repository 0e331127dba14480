import pytest
import tiny
from peft import LoraConfig, get_peft_model

from fastdpo.head import check_head_module, logit_scale

VOCAB = 97


def test_a_head_adapter_is_refused():
    lora = LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = get_peft_model(tiny.model("llama", VOCAB), lora)
    with pytest.raises(ValueError, match="no adapter on the output embedding"):
        check_head_module(model.get_base_model())


class Config(dict):
    __getattr__ = dict.get


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1.0),
        ({"logit_scale": 0.0625}, 0.0625),
        ({"logit_scale": None}, 1.0),
        ({"lm_head_multiplier": 0.5}, 0.5),
        ({"logits_scaling": 8.0, "model_type": "granite"}, 0.125),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, 8.0),
    ],
)
def test_logit_scale_of_each_family(settings, scale):
    assert logit_scale(Config(settings)) == scale
