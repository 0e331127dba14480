"""What a reference gave to pairs in an earlier run: found again, and only where it would be so."""

import logging

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from trainers import LORA, logged, make_trainer, trained_before
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

import fastdpo
from fastdpo import precompute
from fastdpo.collate import PaddedCollator
from fastdpo.columns import REFERENCE_COLUMNS, Cut
from fastdpo.reference_cache import PROBE, RECORD, ReferenceCache, open_cache, probe_pairs
from fastdpo.reference_logps import AdaptersOff, FrozenModel

COLUMNS = [*REFERENCE_COLUMNS]


@pytest.fixture
def scored(monkeypatch):
    """How many pairs a reference has scored, batch by batch, but for the probe."""
    counts, probes = [], []

    def probe_pairs(causal_lm, own=fastdpo.trainer.probe_pairs):
        probes.append(own(causal_lm))
        return probes[-1]

    monkeypatch.setattr(fastdpo.trainer, "probe_pairs", probe_pairs)
    for kind in (AdaptersOff, FrozenModel):

        def logps(self, policy, batch, ld_alpha=None, own=kind.logps):
            counts.append(batch.num_pairs)
            if probes:
                assert counts.pop() == len(probes.pop())
            return own(self, policy, batch, ld_alpha)

        monkeypatch.setattr(kind, "logps", logps)
    return counts


def start(tmp_path, tokenizer, **settings):
    return make_trainer(tmp_path, tokenizer, precompute_ref_log_probs=True, **settings)


def logps_of(trainer):
    columns = trainer.train_dataset.select_columns(COLUMNS).to_dict()
    return {name: np.array(values) for name, values in columns.items()}


def only_reference(cache):
    (file,) = cache.glob("reference-*")
    return file


def test_another_run_with_other_hyperparameters_scores_nothing(tmp_path, tokenizer, scored):
    first = start(tmp_path, tokenizer)
    assert sum(scored) == len(first.train_dataset) == 8
    assert "cache" not in first.summary()
    scored.clear()
    model = tiny.model("llama", len(tokenizer))
    model.config.name_or_path = "moved/elsewhere"
    second = start(
        tmp_path,
        tokenizer,
        model=model,
        learning_rate=1e-2,
        beta=0.3,
        loss_type="ipo",
        per_device_train_batch_size=3,
        head_cache_bytes=0,
        seed=7,
    )
    assert scored == []
    assert "all rows scored before training (8 found in the cache)" in second.summary()
    for column, values in logps_of(first).items():
        assert np.array_equal(values, logps_of(second)[column])
    first.train()
    assert logged(first)[0] == pytest.approx(np.log(2), abs=1e-6)


def test_the_reference_scores_as_many_pairs_at_a_time_as_asked(
    tmp_path, tokenizer, scored, monkeypatch
):
    monkeypatch.setattr("fastdpo.trainer.is_caching_enabled", lambda: False)
    rows = tiny.rows()
    settings = {"rows": rows[:5], "per_device_eval_batch_size": 2}
    settings["eval_dataset"] = Dataset.from_list(rows[5:])
    start(tmp_path, tokenizer, **settings)
    start(tmp_path, tokenizer, precompute_ref_batch_size=3, **settings)
    assert scored == [4, 1, 2, 1, 3, 2, 3]


def test_rows_have_their_own_scores_however_many_are_kept_at_once(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("fastdpo.trainer.is_caching_enabled", lambda: False)
    together = logps_of(start(tmp_path, tokenizer))
    monkeypatch.setattr("fastdpo.precompute.BATCHES_AT_ONCE", 1)
    apart = logps_of(start(tmp_path, tokenizer, precompute_ref_batch_size=3))
    for column, values in apart.items():
        assert values == pytest.approx(together[column], abs=1e-4)


def test_rows_that_were_scored_are_found_among_others(tmp_path, tokenizer, scored):
    rows = tiny.rows()
    first = start(tmp_path, tokenizer, rows=rows[:5], eval_dataset=Dataset.from_list(rows[5:7]))
    trained, evaluated = logps_of(first), first.eval_dataset
    assert sum(scored) == 7
    scored.clear()
    few = {"eval_dataset": Dataset.from_list(rows[:2])}
    second = start(tmp_path, tokenizer, rows=[rows[i] for i in (7, 3, 5, 0, 3)], **few)
    again = logps_of(second)
    assert scored == [1] and "(6 found in the cache)" in second.summary()
    for column, values in again.items():
        there = [trained[column][3], evaluated[column][0], trained[column][0], trained[column][3]]
        assert np.array_equal(values[1:], np.array(there)) and np.isfinite(values).all()


def test_new_adapters_have_the_reference_of_a_run_in_full(tmp_path, tokenizer, scored):
    start(tmp_path, tokenizer)
    scored.clear()
    for seed in (1, 2):
        lora = LoraConfig(**LORA, modules_to_save=["lm_head"])
        start(tmp_path, tokenizer, peft_config=lora, seed=seed)
    reference = tiny.model("llama", len(tokenizer))
    reference.config.pad_token_id = None  # nothing is padded with it
    start(tmp_path, tokenizer, ref_model=reference)
    assert scored == []


def other_weight(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3


def other_activation(model):
    model.config.hidden_act = "gelu"


def other_frequencies(model):
    model.model.rotary_emb.inv_freq[0] += 0.1  # a buffer that no checkpoint has


def steered(model):
    model.model.layers[1].register_forward_hook(lambda module, args, hidden: 1.01 * hidden)


CHANGES = {
    "a weight": {"change": other_weight},
    "the order of layers": {
        "change": lambda model: model.model.layers.insert(0, model.model.layers.pop(1))
    },
    "the configuration": {"change": other_activation},
    "the rotation": {"change": other_frequencies},
    "a buffer": {"change": lambda model: model.register_buffer("more", torch.ones(1))},
    "a hook": {"change": steered},
    "the dtype": {"change": lambda model: model.to(torch.bfloat16)},
    "autocast": {"bf16": True},
    "ld_alpha": {"ld_alpha": 0.5},
    "the cut": {"max_length": 8},
    "the end that is cut": {"max_length": 8, "truncation_mode": "keep_end"},
}


@pytest.mark.parametrize("changed", CHANGES)
def test_what_changes_the_numbers_has_pairs_scored_again(tmp_path, tokenizer, scored, changed):
    settings = dict(CHANGES[changed])
    change = settings.pop("change", lambda model: None)
    start(tmp_path, tokenizer)
    if changed == "the end that is cut":
        start(tmp_path, tokenizer, max_length=8)
    scored.clear()
    model = tiny.model("llama", len(tokenizer))
    change(model)
    again = start(tmp_path, tokenizer, model=model, **settings)
    assert sum(scored) == len(again.train_dataset) > 0


def test_adapters_that_are_on_are_part_of_the_reference(tmp_path, tokenizer, scored):
    def started(scale):
        torch.manual_seed(0)
        model = trained_before(tokenizer, LoraConfig(**LORA, lora_alpha=scale))
        return logps_of(start(tmp_path, tokenizer, model=model))

    first, other = started(4), started(8)
    assert sum(scored) == 16 and not np.array_equal(first[COLUMNS[0]], other[COLUMNS[0]])
    started(8)
    assert sum(scored) == 16


def test_adapters_that_are_switched_off_are_none(tmp_path, tokenizer, scored):
    def started(*, off):
        reference = trained_before(tokenizer, LoraConfig(**LORA))
        if off:
            reference.base_model.disable_adapter_layers()
        start(tmp_path, tokenizer, ref_model=reference)

    for times, off in enumerate((False, True), start=1):
        started(off=off)
        assert sum(scored) == 8 * times


class Counting(torch.nn.Identity):
    """A module whose state is no tensor."""

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


def test_a_module_may_have_a_state_of_its_own(tmp_path, tokenizer, scored):
    for _ in range(2):
        model = tiny.model("llama", len(tokenizer))
        model.model.norm = torch.nn.Sequential(model.model.norm, Counting())
        start(tmp_path, tokenizer, model=model)
    assert sum(scored) == 8


def test_a_run_that_was_killed_goes_on_where_it_stopped(tmp_path, tokenizer, scored, monkeypatch):
    monkeypatch.setattr(precompute, "BATCHES_AT_ONCE", 2)
    own = FrozenModel.logps

    def killed(self, policy, batch, ld_alpha=None):
        if len(scored) == 3:
            raise KeyboardInterrupt
        return own(self, policy, batch, ld_alpha)

    with monkeypatch.context() as patch:
        patch.setattr(FrozenModel, "logps", killed)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path, tokenizer, per_device_train_batch_size=2)
    assert scored == [2, 2, 2]
    scored.clear()
    start(tmp_path, tokenizer, per_device_train_batch_size=2)
    assert scored == [2, 2]


@pytest.mark.parametrize("harm", ["torn", "changed", "zeroed", "another's", "no records"])
def test_a_record_that_is_not_whole_is_not_taken(tmp_path, tokenizer, scored, cache, harm):
    first = start(tmp_path, tokenizer)
    file = only_reference(cache)
    data = bytearray(file.read_bytes())
    assert len(data) == 8 * RECORD.size
    lost = 1
    if harm == "torn":
        del data[-5:]
    elif harm == "changed":
        data[RECORD.size + 18] ^= 1
    elif harm == "zeroed":
        data[2 * RECORD.size : 3 * RECORD.size] = bytes(RECORD.size)
    elif harm == "another's":
        start(tmp_path, tokenizer, ld_alpha=0.2)
        (other,) = set(cache.glob("reference-*")) - {file}
        data[:] = other.read_bytes()
        lost = 8
    else:
        data[:] = b"not at all" * 50
        lost = 8
    file.write_bytes(data)
    scored.clear()
    for times in (1, 0):  # and what was appended is found
        again = start(tmp_path, tokenizer)
        assert sum(scored) == times * lost
        scored.clear()
        for column, values in logps_of(first).items():
            assert np.array_equal(values, logps_of(again)[column])


def test_pairs_of_the_same_tokens_have_keys_of_their_own(tmp_path):
    rows = [
        {"prompt_ids": [5], "chosen_ids": [5, 5], "rejected_ids": [5]},
        {"prompt_ids": [5], "chosen_ids": [5], "rejected_ids": [5, 5]},
    ]
    pairs = Dataset.from_list(rows).with_format("numpy")
    assert len({*ReferenceCache(tmp_path, Cut()).keys(pairs)}) == 2


def test_a_pair_is_known_by_what_is_left_of_it_once_it_is_cut(tmp_path):
    ids = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 9], "rejected_ids": [7]}
    pairs = Dataset.from_list([ids, ids | {"chosen_ids": [7, 8]}])
    (whole, short), (cut, same) = (
        ReferenceCache(tmp_path, Cut(max_length=most)).keys(pairs) for most in (None, 4)
    )
    assert whole != short == cut == same


def test_a_pair_that_is_cut_behind_the_probes_length_is_scored_again(tmp_path, tokenizer, scored):
    rows = tiny.rows(2)
    rows[1]["chosen"] *= 60
    start(tmp_path, tokenizer, rows=rows, max_length=280)
    scored.clear()
    start(tmp_path, tokenizer, rows=rows, max_length=300)
    assert scored == [1]


def test_the_probe_has_the_references_tokens_where_the_policy_has_more(tmp_path, tokenizer):
    policy, reference = (tiny.model("llama", len(tokenizer) + more) for more in (100, 0))
    trainer = start(tmp_path, tokenizer, model=policy, ref_model=reference)
    assert np.isfinite(logps_of(trainer)[COLUMNS[0]]).all()


def test_the_probe_keeps_to_a_models_positions_and_tokens():
    model = GPT2LMHeadModel(GPT2Config(n_positions=32, n_embd=8, n_head=2, n_layer=1, vocab_size=7))
    for pair, length in zip(probe_pairs(model), PROBE, strict=True):
        assert len(pair["prompt_ids"]) + len(pair["chosen_ids"]) == min(32, 1 + length)
        assert len(pair["rejected_ids"]) == len(pair["chosen_ids"])
        assert max(map(max, pair.values())) < 7
    unbounded = BloomForCausalLM(BloomConfig(vocab_size=7, hidden_size=8, n_layer=1, n_head=2))
    assert [len(pair["chosen_ids"]) for pair in probe_pairs(unbounded)] == [3, 15, 63, 254]


def test_weights_that_are_not_at_hand_have_no_cache():
    model = tiny.model("llama", tiny.VOCAB)
    settings = {"cut": Cut(), "probe_logps_S": torch.zeros(8), "adapters_off": False}
    assert open_cache(model, **settings) is not None
    model.lm_head.to("meta")  # as accelerate offloads it
    assert open_cache(model, **settings) is None


def test_a_nan_score_is_computed_again_and_never_cached(tmp_path, tokenizer, scored, cache):
    for times in (1, 2):
        model = tiny.model("llama", len(tokenizer))
        with torch.no_grad():  # a letter that not all rows have
            model.get_input_embeddings().weight[tokenizer("cat").input_ids[0]] = torch.nan
        logps = logps_of(start(tmp_path, tokenizer, model=model))
        bad = int(np.isnan(np.stack([*logps.values()])).any(0).sum())
        assert 0 < bad < 8 and sum(scored) == (8 if times == 1 else 8 + bad)
        assert only_reference(cache).stat().st_size == (8 - bad) * RECORD.size


def test_a_run_without_caching_or_with_its_own_collator_keeps_nothing(
    tmp_path, tokenizer, scored, cache, monkeypatch
):
    own = PaddedCollator(pad_token_id=tokenizer.pad_token_id)
    start(tmp_path, tokenizer, data_collator=own)
    monkeypatch.setattr("fastdpo.trainer.is_caching_enabled", lambda: False)
    start(tmp_path, tokenizer)
    assert not list(cache.glob("reference-*"))
    assert sum(scored) == 16


def test_a_cache_that_cannot_be_read_or_written_ends_no_run(
    tmp_path, tokenizer, scored, cache, caplog
):
    start(tmp_path, tokenizer)
    file = only_reference(cache)
    file.unlink()
    file.mkdir()
    with caplog.at_level(logging.WARNING):
        start(tmp_path, tokenizer)
    assert "of earlier runs: [Errno 21]" in caplog.text
    assert "are not kept for the next run: [Errno 21]" in caplog.text
    assert sum(scored) == 16
