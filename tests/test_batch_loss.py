"""A batch in packs, by a loss that mixes its pairs: loss and gradients are those of the whole."""

import itertools

import pytest
import tiny
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from processes import logged_by
from torch._subclasses.fake_tensor import FakeTensorMode
from trainers import LORA, RunsOutOfMemory, logged, make_trainer, weights
from watches import Watch

from fastdpo import ops
from fastdpo.batch_loss import PackLogps, pack_losses, with_pack_losses
from fastdpo.kernels.reference import completion_sums
from fastdpo.losses import LOSS_TYPES, pair_loss

SETTINGS = {"beta": 0.3, "label_smoothing": 0.1, "discopop_tau": 0.4}
MIX = {"loss_type": ["aot", "sigmoid", "sft"], "loss_weights": [1.0, 0.5, 0.1]}


def made(lengths, seed=0, dtype=torch.float64):
    """Random PackLogps of chosen and rejected completions of these lengths."""
    random = torch.Generator().manual_seed(seed)
    lengths = [length for side in zip(*lengths, strict=True) for length in side]
    token_logps_C = -torch.rand(sum(lengths), generator=random, dtype=dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    noise_S = 4 * torch.rand(len(lengths), generator=random, dtype=dtype) - 2
    logps_S = completion_sums(token_logps_C, cu_seqlens)
    return PackLogps(token_logps_C, cu_seqlens, logps_S + noise_S)


def taken_out(batch, pairs):
    """The PackLogps of some of a batch's pairs."""
    B = len(batch.reference_logps_S) // 2
    completions = [b + side for side in (0, B) for b in pairs]
    tokens = batch.token_logps_C.split(batch.cu_seqlens.diff().tolist())
    lengths = torch.tensor([len(tokens[s]) for s in completions])
    return PackLogps(
        torch.cat([tokens[s] for s in completions]),
        torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
        batch.reference_logps_S[completions],
    )


@given(
    # two completions without a token that weighs tie with two others, and may change places
    lengths=st.lists(st.tuples(*[st.integers(0, 5)] * 2).filter(any), min_size=1, max_size=9),
    places=st.randoms(use_true_random=False),
    loss_types=st.lists(st.sampled_from(LOSS_TYPES), min_size=1, max_size=3),
    ld_alpha=st.sampled_from([None, 0.0, 0.7]),
)
@settings(deadline=None, derandomize=True)
def test_packs_have_the_loss_and_the_slopes_of_their_batch(lengths, places, loss_types, ld_alpha):
    assume(ld_alpha != 0 or all(map(all, lengths)))  # or tokens beside an empty one tie
    B, batch = len(lengths), made(lengths)
    order = places.sample(range(B), B)
    cuts = sorted({0, B, *(places.randrange(B) for _ in range(3))})
    packs = [order[a:b] for a, b in itertools.pairwise(cuts)]
    changed = {"loss_type": tuple(loss_types), "ld_alpha": ld_alpha}
    parts = pack_losses([taken_out(batch, pack) for pack in packs], **SETTINGS | changed)

    token_logps_C = batch.token_logps_C.clone().requires_grad_()
    whole = pair_loss(
        token_logps_C, batch.cu_seqlens, batch.reference_logps_S, **SETTINGS | changed
    )
    whole.loss_B.sum().backward()
    slopes = batch._replace(token_logps_C=token_logps_C.grad)
    for pack, part in zip(packs, parts, strict=True):
        mine = taken_out(batch, pack)
        token_logps_C = mine.token_logps_C.clone().requires_grad_()
        losses = part.with_gradient(token_logps_C, mine.cu_seqlens)
        torch.testing.assert_close(losses.loss_B, whole.loss_B[pack])
        torch.testing.assert_close(losses.metrics_MB, whole.metrics_MB[:, pack])
        losses.loss_B.sum().backward()
        torch.testing.assert_close(token_logps_C.grad, taken_out(slopes, pack).token_logps_C)
        assert part.reference_logps_S.equal(mine.reference_logps_S)


def test_nothing_waits_for_the_device_or_is_made_elsewhere(monkeypatch):
    monkeypatch.setattr(ops, "_check_lengths", lambda *_: None)  # of tensors on a CPU, as these are
    packs = [made([(3, 2), (0, 4)], dtype=torch.float32), made([(1, 5)], 1, torch.float32)]
    mix = {name: tuple(value) for name, value in MIX.items()}
    # fake tensors have no values to ask for; what is made without a word is on another device
    with FakeTensorMode() as fake, torch.device("meta"), Watch():
        packs = [PackLogps(*map(fake.from_tensor, pack)) for pack in packs]
        for pack, part in zip(packs, pack_losses(packs, **SETTINGS | mix), strict=True):
            part.with_gradient(
                pack.token_logps_C.requires_grad_(), pack.cu_seqlens
            ).loss_B.sum().backward()


def test_a_filler_is_the_last_pack_again_and_mixes_with_none():
    packs = [made([(3, 2), (1, 4)]), made([(1, 5)], seed=1)]
    mix = {name: tuple(value) for name, value in MIX.items()}
    parts = pack_losses(packs, **SETTINGS | mix)
    inputs = [{"logps": pack} for pack in packs]
    inputs += [inputs[-1] | {"is_filler": True}] * 2
    run = []
    found = with_pack_losses(
        inputs, lambda pack: run.append(pack) or pack["logps"], **SETTINGS | mix
    )
    assert run == inputs  # a rank runs as many forwards as any
    for pack, part, made_of in zip(found, [*parts, parts[-1], parts[-1]], inputs, strict=True):
        torch.testing.assert_close(pack["pack_loss"].pairs.loss_B, part.pairs.loss_B)
        assert {**pack, "pack_loss": None} == {**made_of, "pack_loss": None}


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("loss", "layout"),
    [
        (MIX | {"ld_alpha": 0.5}, "shared"),
        ({"loss_type": "aot_unpaired", "label_smoothing": 0.1}, "packed"),
        ({"loss_type": "sft", "precompute_ref_log_probs": True}, "padded"),
    ],
    ids=["mix", "aot_unpaired", "sft"],
)
def test_a_mix_in_packs_trains_as_whole_batches_do(tmp_path, tokenizer, loss, layout, adapters):
    """In float64, where nothing but the order of sums can differ, over accumulated batches."""

    def train(**more):
        model = tiny.model("llama", len(tokenizer), torch.float64)
        if adapters:
            model = get_peft_model(model, LoraConfig(**LORA))
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            model=model,
            layout=layout,
            gradient_accumulation_steps=2,
            **loss,
            **more,
        )
        trainer.train()
        return trainer

    whole, packed = train(), train(max_tokens_per_forward=120)
    assert len(next(iter(packed.get_train_dataloader()))["packs"]) > 1
    for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "num_tokens", "entropy"):
        assert logged(packed, name) == pytest.approx(logged(whole, name), rel=1e-6), name
    for name, weight in weights(whole.model).items():
        torch.testing.assert_close(weights(packed.model)[name], weight, rtol=0, atol=1e-7)


@pytest.mark.parametrize("loss_type", ["sigmoid", "aot"])
def test_a_batch_of_one_pack_is_run_once(tmp_path, tokenizer, loss_type):
    settings = {"loss_type": loss_type, "max_steps": 1, "max_tokens_per_forward": 4000}
    trainer = make_trainer(tmp_path, tokenizer, **settings)
    memory = RunsOutOfMemory(trainer.model, 4000, in_backward=False)
    trainer.train()
    assert len(memory.tokens) == 1


def test_the_reference_scores_each_pack_once(tmp_path, tokenizer):
    settings = {"loss_type": "aot", "max_steps": 1, "max_tokens_per_forward": 120}
    trainer = make_trainer(tmp_path, tokenizer, **settings)
    num_packs = len(next(iter(trainer.get_train_dataloader()))["packs"])
    reference = RunsOutOfMemory(trainer.ref_model, 4000, in_backward=False)
    trainer.train()
    assert len(reference.tokens) == num_packs > 1


@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
def test_an_update_that_runs_out_of_memory_has_the_same_mix_again(tmp_path, tokenizer, in_backward):
    plain = make_trainer(tmp_path, tokenizer, max_steps=2, **MIX)
    plain.train()
    trainer = make_trainer(tmp_path, tokenizer, max_steps=2, max_tokens_per_forward="auto", **MIX)
    memory = RunsOutOfMemory(trainer.model, 120, in_backward)
    trainer.train()
    assert memory.raised and trainer.budget.max_tokens <= 120
    for name in ("loss", "grad_norm", "rewards/margins"):
        assert logged(trainer, name) == pytest.approx(logged(plain, name), rel=1e-4), name


def test_each_of_two_ranks_mixes_its_own_batch(tmp_path):
    """As one process mixes each of the batches that it accumulates."""
    common = MIX | {"per_device_train_batch_size": 4}
    one = logged_by(1, tmp_path, gradient_accumulation_steps=2, **common)
    two = logged_by(2, tmp_path, max_tokens_per_forward=90, **common)
    for ours, theirs in zip(two, one, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logps/chosen", "num_tokens"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name
