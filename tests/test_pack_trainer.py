"""Packs train as whole batches do: with experts, and short of memory."""

import math

import pytest
import tiny
import torch
from datasets import Dataset
from peft import LoraConfig
from trainers import (
    TWO_BATCHES_IN_ORDER,
    RunsOutOfMemory,
    logged,
    make_trainer,
    rows_with_a_longer_one,
    weights,
)
from transformers import Trainer, TrainerCallback

from fastdpo import pack_trainer
from fastdpo.batch import count_pairs
from fastdpo.token_budget import UNBOUNDED


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
def test_packs_train_as_whole_batches_do(tmp_path, tokenizer, layout, loss_type):
    common = {"layout": layout, "loss_type": loss_type, "gradient_accumulation_steps": 2}
    whole = make_trainer(tmp_path, tokenizer, **common)
    whole.train()
    packed = make_trainer(tmp_path, tokenizer, max_tokens_per_forward=120, **common)
    packs = next(iter(packed.get_train_dataloader()))["packs"]
    assert len(packs) > 1
    packed.train()
    for name in ("loss", "grad_norm", "rewards/margins", "num_tokens", "entropy"):
        assert logged(packed, name) == pytest.approx(logged(whole, name), rel=1e-5, abs=1e-6), name
    for name, weight in weights(whole.model).items():
        torch.testing.assert_close(weights(packed.model)[name], weight, rtol=0, atol=1e-6)


def test_a_batch_in_packs_is_no_one_forward(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, max_tokens_per_forward=120)
    inputs = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(ValueError, match="want the inputs of one forward, got a batch in packs"):
        trainer.compute_loss(trainer.model, inputs)
    num_pairs = count_pairs(inputs)
    losses = [
        trainer.compute_loss(trainer.model, pack, num_items_in_batch=num_pairs)
        for pack in inputs["packs"]
    ]
    assert sum(losses).item() == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("loss_type", ["sigmoid", ["aot", "sft"]], ids=str)
def test_packs_balance_experts_as_whole_batches_do(tmp_path, tokenizer, layout, loss_type):
    common = {"layout": layout, "loss_type": loss_type, "gradient_accumulation_steps": 2}
    common |= {"router_aux_loss_coef": 0.5, "rows": tiny.rows(7), "optim": "sgd"}

    def train(**settings):
        model = tiny.model("mixtral", len(tokenizer))
        trainer = make_trainer(tmp_path, tokenizer, model=model, **common, **settings)
        trainer.train()
        return trainer

    whole, packed = train(), train(max_tokens_per_forward=100)
    for name in ("loss", "grad_norm", "aux_loss", "rewards/margins", "num_tokens"):
        assert logged(packed, name) == pytest.approx(logged(whole, name), rel=1e-4, abs=1e-5), name
    for name, weight in weights(whole.model).items():
        torch.testing.assert_close(weights(packed.model)[name], weight, rtol=0, atol=1e-6)


def beside_another_rank(trainer, num_packs, monkeypatch):
    """As under FSDP, a rank that has num_packs in each batch; the list of those told so far."""
    gather, laid_out = trainer.accelerator.gather, []

    def gather_both(of_this_rank):
        is_counts = not of_this_rank.is_floating_point() and of_this_rank.ndim == 1
        laid_out.extend([num_packs] * len(of_this_rank) if is_counts else [])
        other = torch.full_like(of_this_rank, num_packs)
        return torch.cat([of_this_rank, other]) if is_counts else gather(of_this_rank)

    monkeypatch.setattr(trainer, "forwards_are_collective", lambda: True)
    monkeypatch.setattr(trainer.accelerator, "gather", gather_both)
    return laid_out


def test_a_rank_with_fewer_packs_fills_up_and_trains_alike(tmp_path, tokenizer, monkeypatch):
    """Another rank has a pack more than there are pairs in a batch here."""
    settings = {"max_tokens_per_forward": 120, "gradient_accumulation_steps": 2}
    plain, evened = (make_trainer(tmp_path, tokenizer, **settings) for _ in range(2))
    plain.train()
    most = 1 + evened.args.per_device_train_batch_size
    laid_out = beside_another_rank(evened, most, monkeypatch)
    forwards, compute_loss = [], evened.compute_loss
    monkeypatch.setattr(
        evened,
        "compute_loss",
        lambda *args, **more: forwards.append(1) or compute_loss(*args, **more),
    )
    evened.loss_is_scaled_for_ga = True  # it hands num_items_in_batch on
    evened.train()
    assert len(forwards) == sum(laid_out) > 0
    for name in ("loss", "grad_norm", "rewards/margins", "num_tokens", "entropy"):
        assert logged(evened, name) == pytest.approx(logged(plain, name), rel=1e-5, abs=1e-6), name
    for name, weight in weights(plain.model).items():
        torch.testing.assert_close(weights(evened.model)[name], weight, rtol=0, atol=1e-6)


def test_fillers_balance_no_experts(tmp_path, tokenizer, monkeypatch):
    settings = {"max_tokens_per_forward": 120, "max_steps": 1, "router_aux_loss_coef": 0.5}
    plain, filled = (
        make_trainer(tmp_path, tokenizer, model=tiny.model("mixtral", len(tokenizer)), **settings)
        for _ in range(2)
    )
    beside_another_rank(filled, 5, monkeypatch)
    for trainer in (plain, filled):
        trainer.train()
    for name in ("loss", "grad_norm", "aux_loss"):
        assert logged(filled, name) == pytest.approx(logged(plain, name), rel=1e-4), name


def test_flops_are_transformers_and_those_of_all_packs(tmp_path, tokenizer):
    def flops(**settings):
        trainer = make_trainer(tmp_path, tokenizer, layout="packed", **settings)
        whole = trainer.data_collator([*trainer.train_dataset])
        assert trainer.floating_point_ops(whole) == Trainer.floating_point_ops(trainer, whole)
        trainer.train()
        return trainer.state.total_flos

    assert flops(max_tokens_per_forward=120) == flops() > 0


def short_from_the_second_update_on(trainer):
    memory = RunsOutOfMemory(trainer.model, UNBOUNDED, in_backward=False)

    class AfterTheFirst(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            memory.most = 230

    trainer.add_callback(AfterTheFirst())
    return memory


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
def test_an_update_that_runs_out_of_memory_is_run_again_in_smaller_packs(
    tmp_path, tokenizer, in_backward
):
    common = {**TWO_BATCHES_IN_ORDER, "rows": rows_with_a_longer_one(), "max_steps": 3}
    plain = make_trainer(tmp_path, tokenizer, **common)
    plain.train()
    trainer = make_trainer(tmp_path, tokenizer, max_tokens_per_forward="auto", **common)
    memory = RunsOutOfMemory(trainer.model, 230, in_backward)
    trainer.train()
    assert memory.raised and memory.tokens[0] == 221 and trainer.budget.max_tokens <= 230
    run, once = trainer.counts.tokens, plain.counts.tokens  # a pack may share less than its batch
    assert run.run + run.shared == once.run + once.shared
    for name in ("loss", "grad_norm", "rewards/margins", "num_tokens"):
        assert logged(trainer, name) == pytest.approx(logged(plain, name), rel=1e-4, abs=1e-5), name
    for name, weight in weights(plain.model).items():
        torch.testing.assert_close(weights(trainer.model)[name], weight, rtol=0, atol=1e-5)


def test_an_update_that_runs_out_of_memory_twice_counts_its_first_batch_once(tmp_path, tokenizer):
    short = [{"prompt": f"{i} is", "chosen": " one.", "rejected": " two."} for i in range(4)]
    long = [row | {"prompt": 3 * row["prompt"]} for row in tiny.rows(4)]
    common = {**TWO_BATCHES_IN_ORDER, "rows": short + long, "max_steps": 1}
    plain = make_trainer(tmp_path, tokenizer, **common)
    plain.train()
    trainer = make_trainer(tmp_path, tokenizer, max_tokens_per_forward="auto", **common)
    memory = RunsOutOfMemory(trainer.model, 130, in_backward=False)
    trainer.train()
    assert memory.raised == 2
    for name in ("loss", "rewards/margins", "num_tokens", "logps/chosen", "entropy"):
        assert logged(trainer, name) == pytest.approx(logged(plain, name), rel=1e-4, abs=1e-5), name


def test_an_update_that_is_run_again_logs_the_loss_of_its_own_batches(tmp_path, tokenizer):
    common = {**TWO_BATCHES_IN_ORDER, "rows": rows_with_a_longer_one(), "learning_rate": 1e-2}
    plain = make_trainer(tmp_path, tokenizer, max_steps=3, **common)
    plain.train()
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=3, max_tokens_per_forward="auto", **common
    )
    memory = short_from_the_second_update_on(trainer)
    trainer.train()
    assert memory.raised
    assert logged(trainer) == pytest.approx(logged(plain), rel=1e-4)


def test_an_update_that_is_run_again_keeps_what_a_stream_left_over(tmp_path, tokenizer):
    """Passes of three batches: an update of two, and one that joins the next pass's first."""
    rows = [*rows_with_a_longer_one(), *tiny.rows(4)]

    def train(**settings):
        stream = Dataset.from_list(rows).to_iterable_dataset()
        settings |= {"train_dataset": stream, "gradient_accumulation_steps": 2, "max_steps": 2}
        trainer = make_trainer(tmp_path, tokenizer, optim="sgd", **settings)
        memory = short_from_the_second_update_on(trainer)
        trainer.train()
        return trainer, memory

    plain, _ = train(max_tokens_per_forward=200)
    trainer, memory = train(max_tokens_per_forward="auto")
    assert memory.raised
    assert logged(trainer, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-4)


def test_pairs_that_a_stream_left_over_weigh_as_those_they_join(tmp_path, tokenizer):
    """Passes of 3, 3 and 2 pairs: an update of six, and one of the last two and the next six."""
    rows = Dataset.from_list(tiny.rows())
    settings = {"learning_rate": 0.0, "per_device_train_batch_size": 3, "max_steps": 3}
    settings |= {"train_sampling_strategy": "sequential"}
    streamed = make_trainer(
        tmp_path,
        tokenizer,
        train_dataset=rows.to_iterable_dataset(),
        gradient_accumulation_steps=2,
        **settings,
    )
    streamed.train()
    kept = make_trainer(tmp_path, tokenizer, gradient_accumulation_steps=3, **settings)
    kept.train()
    for name in ("loss", "grad_norm"):
        assert logged(streamed, name)[1:] == pytest.approx(logged(kept, name)[1:], rel=1e-4), name
    first = logged(streamed)[0]
    streamed._left_over = 2  # of a training that ended with its stream
    streamed.train()
    assert logged(streamed)[0] == first


@pytest.mark.parametrize(("is_shared", "of_a_rank"), [(False, 4), (True, 2)])
def test_what_a_stream_left_over_joins_a_ranks_part(tmp_path, tokenizer, is_shared, of_a_rank):
    config = {"split_batches": is_shared}
    trainer = make_trainer(tmp_path, tokenizer, accelerator_config=config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer.args), "world_size", 2)
        assert trainer._pairs_of_update(1, num_missing=1) == 1 + of_a_rank


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_auto_looks_at_training_steps_of_more_and_more_pairs(
    tmp_path, tokenizer, monkeypatch, gradient_checkpointing
):
    found, layers, autocast = {}, [], set()

    def tokens_that_fit(run, probes, device, *, kept_bytes):
        found.update(pairs=[*map(count_pairs, probes)], kept_bytes=kept_bytes)
        layers.clear()
        run(probes[-1])
        found.update(were_training=list(layers))
        return 77

    monkeypatch.setattr(pack_trainer, "tokens_that_fit", tokens_that_fit)
    model = tiny.model("llama", len(tokenizer)).eval()
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda mlp, _: layers.append(mlp.training))
        layer.mlp.register_forward_pre_hook(
            lambda *_: autocast.add(torch.is_autocast_enabled("cpu"))
        )
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        model=model,
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
        max_tokens_per_forward="auto",
        gradient_checkpointing=gradient_checkpointing,
        bf16=True,
    )
    autocast.clear()  # without it, a model is looked at when the trainer is made
    assert "packs as large as memory has room for" in trainer.summary() and not found
    trainer.train()
    num_trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    # Adam's two moments, and under DDP the bucket that a gradient is sent in
    assert found["kept_bytes"] == 8 * num_trained and found["pairs"] == [1, 2, 4, 8]
    # each layer once more where its activations are not kept
    assert found["were_training"] == [True] * len(model.model.layers) * (1 + gradient_checkpointing)
    assert trainer.budget.max_tokens == 77 and autocast == {True}
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    trainer._tokens_that_fit()
    assert found["kept_bytes"] == 12 * num_trained


def test_auto_is_the_least_budget_of_all_ranks(tmp_path, tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer, max_tokens_per_forward="auto", max_steps=1)
    monkeypatch.setattr(trainer, "_tokens_that_fit", lambda: 900)
    monkeypatch.setattr(
        pack_trainer, "least_of_ranks", lambda count, _: {900: 600}.get(count, count)
    )
    trainer.train()
    assert trainer.budget.max_tokens == 600


def test_an_update_that_starts_again_draws_the_dropout_of_its_first_start(tmp_path, tokenizer):
    def dropping(**settings):
        model = tiny.model("llama", len(tokenizer))
        for layer in model.model.layers:
            layer.self_attn.o_proj = torch.nn.Sequential(
                layer.self_attn.o_proj, torch.nn.Dropout(0.2)
            )
        return make_trainer(
            tmp_path,
            tokenizer,
            model=model,
            rows=rows_with_a_longer_one(),
            disable_dropout=False,
            max_steps=2,
            **TWO_BATCHES_IN_ORDER,
            **settings,
        )

    again = dropping(max_tokens_per_forward="auto")
    memory = RunsOutOfMemory(again.model, 230, in_backward=False)
    again.train()
    assert memory.raised and memory.tokens[0] == 221
    once = dropping(max_tokens_per_forward=again.budget.max_tokens)
    once.train()
    assert logged(again, "grad_norm") == logged(once, "grad_norm")
    whole = dropping()
    whole.train()
    assert logged(again, "grad_norm") != pytest.approx(logged(whole, "grad_norm"), rel=1e-3)


def test_memory_for_less_than_a_pair_ends_the_run(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, max_tokens_per_forward="auto")
    RunsOutOfMemory(trainer.model, 1, in_backward=False)
    with pytest.raises(torch.OutOfMemoryError, match="pretended"):
        trainer.train()


def test_a_budget_asked_for_by_number_is_kept(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, max_tokens_per_forward=100)
    RunsOutOfMemory(trainer.model, 60, in_backward=False)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert trainer.budget.max_tokens == 100


def test_batches_made_before_the_budget_shrank_are_laid_out_anew(tmp_path, tokenizer):
    rows = rows_with_a_longer_one()[4:]
    trainer = make_trainer(tmp_path, tokenizer, rows=rows, max_tokens_per_forward="auto")
    trainer.budget.max_tokens = 130
    batches, num_pairs = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, "cpu")
    trainer.budget.max_tokens = 90
    memory = RunsOutOfMemory(trainer.model, UNBOUNDED, in_backward=False)
    trainer.training_step(trainer.model, batches[0], num_pairs)
    assert memory.tokens == [124, 86, 33]  # a pair alone; and the others, in one pack before


def test_the_loaders_workers_see_the_budget_shrink(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        rows=tiny.rows(64),
        max_tokens_per_forward="auto",
        dataloader_num_workers=1,
        dataloader_prefetch_factor=2,
    )
    batches = iter(trainer.get_train_dataloader())
    assert len(next(batches)["packs"]) == 1
    trainer.budget.max_tokens = 90
    *_, last = batches
    assert len(last["packs"]) > 1 and all(map(trainer.budget.fits, last["packs"]))


def test_a_setting_that_would_put_a_collective_into_a_forward_is_refused(tmp_path, tokenizer):
    for budget in ("auto", 100):
        settings = {"max_tokens_per_forward": budget, "ddp_broadcast_buffers": True}
        with pytest.raises(ValueError, match=f"unset with max_tokens_per_forward={budget!r}"):
            make_trainer(tmp_path, tokenizer, **settings)


@pytest.mark.parametrize(
    ("backend", "wanted", "got"),
    [("fsdp", "as a number under FSDP", "auto"), ("deepspeed", "unset under DeepSpeed", 100)],
)
def test_what_cannot_run_in_packs_is_refused(tmp_path, tokenizer, backend, wanted, got):
    trainer = make_trainer(tmp_path, tokenizer)
    setattr(trainer, f"is_{backend}_enabled", True)  # neither runs on a CPU
    trainer.args.max_tokens_per_forward = got
    with pytest.raises(ValueError, match=f"want max_tokens_per_forward {wanted}, got {got!r}"):
        trainer._choose_budget()


def test_a_probe_that_runs_out_of_memory_leaves_no_gradient(tmp_path, tokenizer, monkeypatch):
    def tokens_that_fit(run, probes, device, *, kept_bytes):
        run(probes[0])

    monkeypatch.setattr(pack_trainer, "tokens_that_fit", tokens_that_fit)
    trainer = make_trainer(tmp_path, tokenizer)
    RunsOutOfMemory(trainer.model, most=0, in_backward=True)
    with pytest.raises(torch.OutOfMemoryError):
        trainer._tokens_that_fit()
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_a_probe_makes_the_statistics_that_a_step_makes(tmp_path, tokenizer):
    trainer, made = make_trainer(tmp_path, tokenizer, use_weighting=True), []
    trainer.model.register_forward_pre_hook(
        lambda module, args, kwargs: made.append(kwargs["stats"]), with_kwargs=True
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer._run_once(inputs)
    trainer.compute_loss(trainer.model, inputs)
    assert len(made) == 2 and made[0] == made[1] != ()


def test_a_pair_weighs_alike_where_ranks_have_unequal_numbers(tmp_path, tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path, tokenizer)
    batches = iter(trainer.get_train_dataloader())
    trainer.args.train_sampling_strategy = "batch_rebalance"
    others = {"mean": 2.0}  # pairs that the other of two ranks has less
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda count, kind: count - others[kind] / 2)
    taken, num_pairs = trainer.get_batch_samples(batches, 1, trainer.args.device)
    assert num_pairs == sum(map(count_pairs, taken)) - 1  # DDP averages what ranks divided by it
