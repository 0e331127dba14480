"""Models and adapters that go together; those that do not are in test_trainer_check.py."""

import tiny
from peft import LoraConfig
from trainers import LORA, with_transformers_adapter

from fastdpo.model_check import check_models


def test_new_adapters_may_have_a_reference_whose_own_transformers_put_there():
    ref_model = with_transformers_adapter(tiny.model("llama", tiny.VOCAB))
    check_models(tiny.model("llama", tiny.VOCAB, seed=1), ref_model, LoraConfig(**LORA))
