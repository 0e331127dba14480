"""The same script under TRL and under fastdpo; needs the `bench` extra, where TRL is a peer."""

import dataclasses

import pytest
import test_config
import test_parser
import tiny
from datasets import Dataset
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig

import fastdpo
from fastdpo.metrics import TOKEN_METRICS
from fastdpo.parser import TrainParser

trl = pytest.importorskip("trl", reason="TRL is not installed (extra: bench)")

VOCABULARY = len(tiny.tokenizer())
LOSSES = {
    "sigmoid_norm": {"loss_type": "sigmoid_norm"},
    "robust": {"loss_type": "robust", "label_smoothing": 0.1},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "exo_pair": {"loss_type": "exo_pair", "label_smoothing": 1e-3},
    "nca_pair": {"loss_type": "nca_pair"},
    "sppo_hard": {"loss_type": "sppo_hard"},
    "apo_zero": {"loss_type": "apo_zero"},
    "apo_down": {"loss_type": "apo_down"},
    "discopop": {"loss_type": "discopop"},
    "bco_pair": {"loss_type": "bco_pair"},
    "aot": {"loss_type": "aot", "label_smoothing": 0.1},
    "aot_unpaired": {"loss_type": "aot_unpaired", "label_smoothing": 0.1},
    "sft": {"loss_type": "sft"},
    "mix-of-a-batch": {
        "loss_type": ["aot", "sigmoid", "aot_unpaired"],
        "loss_weights": [0.5, 1.0, 0.3],
        "ld_alpha": 0.4,
    },
    "mix-with-sft": {
        "loss_type": ["sigmoid", "sft"],
        "f_divergence_type": "js_divergence",
        "ld_alpha": 0.4,
    },
    "mpo": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "mix": {"loss_type": ["sigmoid", "ipo", "apo_zero"], "loss_weights": [0.8, 0.01, -0.3]},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence", "loss_type": "hinge"},
    "alpha_divergence": {
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 0.3,
        "loss_type": "sigmoid_norm",
    },
    "ld_alpha": {"ld_alpha": 0.4},
    "use_weighting": {"use_weighting": True},
    "use_weighting-mix": {
        "use_weighting": True,
        "loss_type": ["ipo", "apo_zero"],
        "loss_weights": [0.01, 1.0],
        "ld_alpha": 0.4,
    },
    "ld_alpha-precomputed": {"ld_alpha": 0.4, "precompute_ref_log_probs": True},
}
ANY = {  # what goes with anything else that is here
    "loss_type": st.lists(
        st.sampled_from(["sigmoid", "ipo", "hinge", "nca_pair", "apo_zero", "discopop", "sft"]),
        min_size=1,
        max_size=3,
        unique=True,
    ),
    "beta": st.sampled_from([0.05, 1.0]),
    "ld_alpha": st.sampled_from([0.0, 0.4]),
    "precompute_ref_log_probs": st.booleans(),
    "gradient_accumulation_steps": st.just(2),
    "gradient_checkpointing": st.just(False),
    "max_length": st.sampled_from([None, 48]),
    "truncation_mode": st.sampled_from(["keep_start", "keep_end"]),
    "pad_to_multiple_of": st.just(16),
    "lr_scheduler_type": st.sampled_from(["cosine", "constant"]),
    "warmup_steps": st.just(1),
    "max_grad_norm": st.sampled_from([0.0, 0.1]),
    "weight_decay": st.just(0.1),
    "optim": st.sampled_from(["sgd", "adafactor"]),
    "seed": st.integers(0, 9),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.model("llama", VOCABULARY).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    return str(path)


def assert_logs_alike(
    model, tmp_path, lora=None, ref_seed=None, rows=None, data_collator=None, but=(), **settings
):
    def run(library):
        trainer = library.DPOTrainer(
            model=model,
            ref_model=None if ref_seed is None else tiny.model("llama", VOCABULARY, seed=ref_seed),
            args=library.DPOConfig(
                output_dir=tmp_path / library.__name__,
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                bf16=False,
                use_cpu=True,
                **settings,
            ),
            train_dataset=Dataset.from_list(rows or tiny.rows()),
            data_collator=data_collator,
            peft_config=lora,
        )
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    for theirs, ours in zip(run(trl), run(fastdpo), strict=True):
        assert set(theirs) == set(ours)
        for name, value in theirs.items():
            if name in but:
                continue
            assert ours[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_changing_the_import_changes_no_logged_number(model, tmp_path, adapters):
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0) if adapters else None
    assert_logs_alike(model, tmp_path, lora, max_steps=6)


@pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
def test_virtual_tokens_log_the_numbers_of_trl(model, tmp_path, kind):
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=3)
    assert_logs_alike(model, tmp_path, config, max_steps=3, gradient_checkpointing=False)


@pytest.mark.parametrize("settings", LOSSES.values(), ids=LOSSES)
def test_every_loss_logs_the_numbers_of_trl(model, tmp_path, settings):
    assert_logs_alike(model, tmp_path, max_steps=3, **settings)


@hypothesis_settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # each run writes tmp_path anew
)
@given(settings=st.fixed_dictionaries({}, optional=ANY))
def test_any_settings_together_log_the_numbers_of_trl(model, tmp_path, settings):
    # over accumulated batches TRL takes the mean of each batch's mean per token
    but = TOKEN_METRICS if "gradient_accumulation_steps" in settings else ()
    assert_logs_alike(model, tmp_path, ref_seed=1, but=but, max_steps=3, **settings)


@pytest.mark.parametrize("ref_seed", [None, 1], ids=["a copy", "another model"])
def test_a_reference_follows_the_policy_as_under_trl(model, tmp_path, ref_seed):
    settings = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.7}
    assert_logs_alike(model, tmp_path, ref_seed=ref_seed, max_steps=6, **settings)


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired", "sft"])
def test_accumulated_batches_are_mixed_each_on_its_own(model, tmp_path, loss_type):
    settings = {"loss_type": loss_type, "gradient_accumulation_steps": 2, "max_steps": 3}
    # another reference than the policy, and completions of one length, for log-ratios that the two
    # models rank differently
    rows = [row | {"rejected": row["chosen"][::-1]} for row in tiny.rows()]
    # TRL takes the mean of each batch's mean per token, fastdpo that of all tokens
    assert_logs_alike(model, tmp_path, ref_seed=1, rows=rows, but=TOKEN_METRICS, **settings)


@pytest.mark.parametrize(
    "settings, told",
    [({"logging_steps": 2}, "num_tokens"), ({"eval_strategy": "steps"}, "eval_num_tokens")],
    ids=["a step after the last log", "evaluation"],
)
def test_logs_have_the_names_of_trl(model, tmp_path, settings, told):
    def names(library):
        defaults = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
        trainer = library.DPOTrainer(
            model=model,
            args=library.DPOConfig(
                output_dir=tmp_path, bf16=False, use_cpu=True, **defaults | settings
            ),
            train_dataset=Dataset.from_list(tiny.rows()),
            eval_dataset=Dataset.from_list(tiny.rows(4)),
        )
        trainer.train()
        return [{n for n in each if "tokens/" not in n} for each in trainer.state.log_history]

    theirs = names(trl)
    assert told in set.union(*theirs[-2:])
    assert names(fastdpo) == theirs


def test_every_flag_of_trl_dpo_is_one_here():
    kinds = trl.ScriptArguments, trl.DPOConfig, trl.ModelConfig, trl.DatasetMixtureConfig
    theirs, ours = (
        {flag for action in parser._actions for flag in action.option_strings}
        for parser in (trl.TrlParser(kinds), TrainParser(prog="fastdpo train"))
    )
    assert theirs <= ours


def test_the_defaults_that_other_tests_hold_are_those_of_trl(tmp_path):
    made = trl.DPOConfig(output_dir=tmp_path, bf16=False, use_cpu=True, report_to="none")
    for name, default in test_config.TRL_DEFAULTS.items():
        assert getattr(made, name) == default, name
    for kind, defaults in test_parser.TRL_DEFAULTS.items():
        assert dataclasses.asdict(getattr(trl, kind.__name__)()) == defaults


def test_trls_collator_trains_alike(model, tmp_path):
    collator = trl.trainer.dpo_trainer.DataCollatorForPreference(pad_token_id=0)
    assert_logs_alike(model, tmp_path, data_collator=collator, max_steps=2)


def test_neftune_adds_the_noise_of_trl(model, tmp_path):
    assert_logs_alike(model, tmp_path, max_steps=2, neftune_noise_alpha=5)
