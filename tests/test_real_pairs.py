"""30 optimizer steps on real pairs: fastdpo against the loop of naive.py, every step."""

import copy
import json

import datasets
import naive
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from trainers import LORA, make_trainer

from bench.cases import no_real_pairs
from bench.length_profiles import REAL_PAIRS

pytestmark = no_real_pairs

# a float32 sum of logps is good to 1 in 2**24: sequences this short keep rewards good to 1e-5
STEPS, BATCH, MAX_LENGTH, BETA, LR = 30, 2, 64, 0.1, 2e-4


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """One for all tests here: the rows, most of which are too long, are tokenised once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def real_rows():
    return [json.loads(line) for line in REAL_PAIRS.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer(real_rows):
    texts = [row[side][0]["content"] for row in real_rows for side in ("chosen", "rejected")]
    return tiny.tokenizer(texts, vocab_size=4000)


@pytest.fixture(scope="module")
def pairs(real_rows, tokenizer):
    """The pairs of the first steps, tokenised by hand, cut where the trainer is to cut them."""
    pairs = []
    for row in real_rows:
        prompt_ids = _ids(tokenizer, row["prompt"], add_generation_prompt=True)
        if len(prompt_ids) >= MAX_LENGTH:
            continue
        pair = {"prompt_ids": prompt_ids}
        for side in ("chosen", "rejected"):
            whole = _ids(tokenizer, row["prompt"] + row[side])
            assert whole[: len(prompt_ids)] == prompt_ids, row
            pair[f"{side}_ids"] = whole[len(prompt_ids) : MAX_LENGTH]
        pairs.append(pair)
    assert len(pairs) >= STEPS * BATCH
    return pairs


def _ids(tokenizer, messages, **kwargs):
    text = tokenizer.apply_chat_template(messages, tokenize=False, **kwargs)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama", "shared"),
        ("llama", "packed"),
        ("llama", "padded"),
        ("qwen2", "shared"),
        ("gemma2", "shared"),
        ("gemma2", "padded"),
    ],
)
def test_thirty_steps_train_as_the_naive_loop_does(
    family, layout, adapters, real_rows, tokenizer, pairs, tmp_path
):
    policy = tiny.model(family, len(tokenizer))
    lora = LoraConfig(**LORA) if adapters else None
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        model=copy.deepcopy(policy),
        rows=real_rows,
        peft_config=lora,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        max_length=MAX_LENGTH,
        layout=layout,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        adam_epsilon=1e-6,
        beta=BETA,
        train_sampling_strategy="sequential",
    )
    if adapters:
        twin = get_peft_model(policy, lora)
        twin.load_state_dict(trainer.model.state_dict())  # the same random start
        start = _without_adapters(twin)
    else:
        twin, start = policy, copy.deepcopy(policy)
    trainable = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LR, eps=1e-6, weight_decay=0.0)
    batches = [pairs[i : i + BATCH] for i in range(0, STEPS * BATCH, BATCH)]

    def reference_logps(batch):
        prompts = [row["prompt_ids"] for row in batch]
        with torch.no_grad():
            return [
                naive.sequence_logps(start, prompts, [row[side] for row in batch], 0)
                for side in ("chosen_ids", "rejected_ids")
            ]

    expected = naive.train(twin, reference_logps, batches, optimizer, BETA, pad_token_id=0)
    trainer.train()

    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == STEPS
    for step, (ours, theirs) in enumerate(zip(logged, expected, strict=True)):
        for name, value in theirs.items():
            scale = max(1.0, abs(value))  # logps are sums of hundreds of tokens
            assert abs(ours[name] - value) <= 1e-5 * scale, (step, name, ours[name], value)
    assert expected[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert max(abs(step["rewards/chosen"]) for step in expected) > 0.005  # it did move
    weights = dict(trainer.model.named_parameters())
    for name, parameter in twin.named_parameters():
        assert (weights[name] - parameter).abs().max() <= 1e-5, name


def _without_adapters(peft_model):
    """The base model's forward, run with the adapters switched off."""

    def forward(**inputs):
        with peft_model.disable_adapter():
            return peft_model(**inputs)

    return forward
