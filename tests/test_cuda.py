"""A step's device code on CUDA: traced on fake tensors everywhere, run where there is a GPU."""

import contextlib
import functools
import math
import os

import pytest
import tiny
import torch
from accelerate.utils import send_to_device
from fake_backward import run_backward
from numerics import assert_as_accurate
from tiny_heads import inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM
from watches import Watch

from fastdpo import attention
from fastdpo.attention import attend_along_trees
from fastdpo.batch import PairBatch
from fastdpo.collate import LAYOUTS, make_collator
from fastdpo.columns import Cut
from fastdpo.kernels import dlogits, fold, reference, second_product, vocabulary_walk
from fastdpo.kernels import pair_loss as pair_loss_module
from fastdpo.kernels.linear_logps import linear_logps
from fastdpo.kernels.products import has_good_onednn
from fastdpo.kernels.reference import completion_sums
from fastdpo.losses import pair_loss, pair_weights
from fastdpo.metrics import MetricSums, pair_metrics
from fastdpo.model import TOKEN_STATS, attach_scorer, score, token_logps_without_grad
from fastdpo.token_budget import UNBOUNDED

with_cuda = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="torch without CUDA has no fake GPU either"
)
GPU = torch.device("cuda", 0)
LOSS_TYPES = [("sigmoid", "ipo"), ("sigmoid", "aot", "sft")]  # the kernel's, and its twin's
STATS = (*TOKEN_STATS, "log_sum_p2")
ROWS = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 11], "rejected_ids": [9, 12]},
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [13, 14], "rejected_ids": [9, 10, 11]},
    {"prompt_ids": [15], "chosen_ids": [16], "rejected_ids": [17, 18, 19, 20]},
]


COLLATED = {
    layout: make_collator(layout, Cut(), pad_token_id=0, pad_to_multiple_of=None)(ROWS)
    for layout in LAYOUTS
}


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TYPES_READ = {  # by a kernel, of its arguments by name; of all others float32
    **dict.fromkeys(("p_ptr", "w_ptr", "out_ptr", "bias_ptr"), FLOATS),
    **dict.fromkeys(("labels_ptr", "order_ptr", "counts_ptr"), (torch.int64,)),
    **dict.fromkeys(("cu_seqlens_ptr", "reached_ptr"), (torch.int32,)),
}


class FakeLaunch:
    """Stands for a Triton kernel: its tensors are on one GPU, and of the types that it reads."""

    def __init__(self, kernel):
        self.names = kernel.arg_names

    def __getitem__(self, grid):
        assert min(grid) > 0
        return self.launched

    def launched(self, *arguments, **constants):
        named = zip(self.names, arguments, strict=False)
        tensors = {name: x for name, x in named if isinstance(x, torch.Tensor)}
        for name, x in tensors.items():
            assert x.dtype in TYPES_READ.get(name, (torch.float32,)), (name, x.dtype)
        tensors = [*tensors.values()]
        assert {x.device for x in tensors} == {tensors[0].device} and tensors[0].is_cuda
        assert all(x.stride(-1) == 1 for x in tensors if x.ndim)


def product(a, b, out, *, accumulate, batch_invariant=False):
    """As torch has it on CUDA: one GPU, one dtype, and float32 the only other that may leave."""
    assert a.device == b.device == out.device and a.dtype == b.dtype
    assert out.dtype in (a.dtype, torch.float32) and out.stride(1) == 1 and out.stride(0) % 16 == 0
    assert (a.shape[0], b.shape[1]) == out.shape and a.shape[1] == b.shape[0]


@pytest.fixture
def fake_cuda(monkeypatch):
    """Fake tensors on a GPU: devices that differ and values that are read raise."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_of", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    for module in (vocabulary_walk, second_product):
        monkeypatch.setattr(module, "product", product)
    for module in (fold, dlogits, second_product, pair_loss_module):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, FakeLaunch(getattr(module, name)))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@contextlib.contextmanager
def autocast(dtype):
    """torch.autocast without a look at whether there is a GPU; None leaves it as it is."""
    if dtype is None:
        yield
        return
    torch.set_autocast_dtype("cuda", dtype)
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.fixture
def trainers():
    """tests/trainers.py, where there is what a trainer reads its rows with."""
    pytest.importorskip("datasets")
    import trainers

    return trainers


@pytest.fixture
def varlen_calls(monkeypatch):
    """Queries' and keys' lengths of each launch of variable-length attention, which is torch's."""
    calls, run = [], attention.varlen_attn

    def varlen_attn(query, key, value, cu_q, cu_k, max_q, max_k, **settings):
        assert {x.dtype for x in (query, key, value)} < {torch.float16, torch.bfloat16}
        assert all(x.stride(-1) == 1 for x in (query, key, value))
        assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
        assert cu_q.is_contiguous() and {type(max_q), type(max_k)} == {int}
        assert len({x.device for x in (query, key, value, cu_q, cu_k)}) == 1
        calls.append((len(query), len(key)))
        return run(query, key, value, cu_q, cu_k, max_q, max_k, **settings)

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    return calls


def model_on(body_device, head_device=GPU, trained_head=True, **head_settings):
    config = tiny.config("llama", 300)
    with torch.device(body_device):
        model = AutoModelForCausalLM.from_config(config)
    with torch.device(head_device):
        model.lm_head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)
    model.lm_head.requires_grad_(trained_head)
    attach_scorer(model, **head_settings)
    attend_along_trees(model)
    return model.train()


def step(model, batch, dtype=None, **settings):
    """Reference, policy, loss and metrics of a training step; the loss."""
    with autocast(dtype):
        reference_logps_S = completion_sums(
            token_logps_without_grad(model, batch), batch.cu_seqlens
        )
    with autocast(dtype):
        scored = score(model, batch, stats=STATS)
    tokens = scored.token_logps_C, batch.cu_seqlens
    losses = pair_loss(*tokens, reference_logps_S, beta=0.1, **settings)
    weight_B = pair_weights(scored.token_logps_C, scored.log_sum_p2_C, batch.cu_seqlens)
    MetricSums().add(pair_metrics(batch, scored, losses))
    loss = (losses.loss_B * weight_B).sum() / batch.num_pairs
    assert batch.num_tokens.device == loss.device
    return loss


@with_cuda
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("trained_head", [False, True], ids=["frozen-head", "trained-head"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_keeps_to_one_gpu_and_reads_nothing_from_it(
    layout, trained_head, loss_type, fake_cuda, varlen_calls
):
    model = model_on(GPU, trained_head=trained_head)
    batch = PairBatch.from_inputs(send_to_device(COLLATED[layout], GPU))
    loss = step(model, batch, torch.bfloat16, loss_type=loss_type)
    assert loss.device == GPU and loss.dtype == torch.float32
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert set(run_backward(loss)) == trained
    # flash attention: two forwards of two layers, a launch each
    assert len(varlen_calls) == (0 if layout == "padded" else 2 * 2)


@with_cuda
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_heads_filter_reads_nothing_from_the_gpu(dtype, fake_cuda):
    model = model_on(GPU, skip_below=2**-12)
    batch = PairBatch.from_inputs(send_to_device(COLLATED["packed"], GPU))
    loss = step(model, batch, dtype)
    assert loss.device == GPU and set(run_backward(loss)) == {*model.parameters()}


@with_cuda
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="this GPU is the only one")
def test_a_head_on_another_gpu_answers_where_the_batch_is(fake_cuda):
    model = model_on(GPU, head_device=torch.device("cuda", 1))
    batch = PairBatch.from_inputs(send_to_device(COLLATED["shared"], GPU))
    loss = step(model, batch, torch.bfloat16)
    assert loss.device == GPU and set(run_backward(loss)) == {*model.parameters()}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_makes_no_tensor_where_its_batch_is_not(layout, loss_type):
    """The batch's device is the CPU, and what is made without a word about its device is not."""
    has_good_onednn()  # looks once, at tensors of its own
    model, batch = model_on("cpu", "cpu"), PairBatch.from_inputs(COLLATED[layout])
    # transformers looks whether padded rows' positions are of one sequence each
    with torch.device("meta"), contextlib.nullcontext() if layout == "padded" else Watch():
        step(model, batch, loss_type=loss_type).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_of_several_gpus_tests_see_one():
    assert "," not in os.environ["CUDA_VISIBLE_DEVICES"]


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 3, 700])
def test_flash_attention_along_a_tree_is_as_accurate_as_by_segments(window, dtype):
    """Values and gradients of both, against float32 on the CPU."""
    torch.manual_seed(0)
    lengths = [(400, 290, 310), (1, 5, 600), (33, 1, 128)]  # of prompt, chosen and rejected
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows = [
        {name: torch.randint(9, (n,)).tolist() for name, n in zip(names, each, strict=True)}
        for each in lengths
    ]
    tree = make_collator("shared", Cut(), pad_token_id=0, pad_to_multiple_of=None)(rows)["tree"]
    T = max(segment.stop for segment in (*tree.trunks, *tree.branches))
    heads = (4, 2, 2)  # of queries, keys and values
    qkv = [torch.randn(1, H, T, 64, dtype=torch.float64).to(dtype) for H in heads]
    weights = torch.randn(1, T, 4, 64)

    def run(attend, device, dtype):
        leaves = [x.to(device, dtype, copy=True).requires_grad_() for x in qkv]
        settings = {"scale": 0.2, "window": window, "softcap": None, "dropout": 0.0}
        output = attend(*leaves, tree.to(device), **settings)
        (output * weights.to(device, dtype)).sum().backward()
        return [x.detach().float().cpu() for x in (output, *(leaf.grad for leaf in leaves))]

    truth = run(attention._by_segments, "cpu", torch.float32)
    segments = run(attention._by_segments, GPU, dtype)
    flash = run(attention._along_tree, GPU, dtype)
    for ours, theirs, exact in zip(flash, segments, truth, strict=True):
        # 4: flash attention rounds p to the dtype of the values
        assert_as_accurate(ours.to(dtype), theirs.to(dtype), exact, times=4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("skip_below", [0.0, 1e-30], ids=["whole", "nothing-below"])
def test_a_head_of_several_row_blocks_and_tiles_agrees_with_float64(skip_below, trained, dtype):
    N, D, V = 8192 + 77, 64, 3 * 4096 + 5
    hidden_ND, head_VD, labels_N, _ = inputs((N, D, V), dtype, GPU)
    found = []
    ours = functools.partial(linear_logps, skip_below=skip_below)
    for function, wide in ((ours, dtype), (reference.linear_logps, torch.float64)):
        h, w = (x.to(wide).detach().requires_grad_() for x in (hidden_ND / 4, head_VD / 4))
        w.requires_grad_(trained)
        logps_N = function(h, w, labels_N)
        logps_N.sum().backward()
        found.append([logps_N.detach(), h.grad, *([w.grad] if trained else [])])
    for name, ours, exact in zip(("logps", "dhidden", "dhead"), *found, strict=False):
        bound = 1e-4 if name == "logps" else 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert (ours - exact).abs().max() <= bound, name


@pytest.mark.gpu
def test_a_tile_of_more_than_2_to_the_31_logits_is_addressed():
    N, V = 16385, 2**17
    z_NT = torch.zeros(N, V, device=GPU)
    z_NT[-1, -2:] = 7.0
    softmax = fold.RunningSoftmax.start(N, torch.float32, GPU)
    labels_N = torch.full((N,), V - 1, device=GPU)
    fold.FOLDS["triton"](z_NT, z_NT, None, labels_N, 0, softmax, 1.0, None)
    assert (
        softmax.peak_N[-1] == softmax.label_logit_N[-1] == 7.0 and softmax.peak_N[:-1].eq(0).all()
    )
    p_N = z_NT[-1]  # written over the logits: 0 for the label
    assert (
        p_N[-1] == 0.0 and p_N[-2] == 1.0 and p_N[0].item() == pytest.approx(math.exp(-7), rel=1e-5)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("skip_below", [0.0, 2**-12])
def test_a_step_on_a_gpu_waits_for_nothing(skip_below, layout, loss_type):
    model = model_on(GPU, skip_below=skip_below)
    batch = PairBatch.from_inputs(send_to_device(COLLATED[layout], GPU))

    def run():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = step(model, batch, loss_type=loss_type)
        loss.backward()
        return loss

    torch.use_deterministic_algorithms(False)  # whose index_put looks at its indices
    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [{}, {"layout": "padded"}, {"bf16": False}, {"fp16": True}, {"head_skip_below": 2**-12}],
)
def test_a_trainer_on_a_gpu_starts_at_ln_2_and_learns(settings, trainers, tmp_path):
    defaults = {"use_cpu": False, "max_steps": 20, "per_device_train_batch_size": 8}
    budget = {"max_tokens_per_forward": "auto"}
    trainer = trainers.make_trainer(tmp_path, tiny.tokenizer(), **defaults, **budget, **settings)
    assert trainer.layout.name == settings.get("layout", "shared"), trainer.layout.line
    trainer.train()
    assert 0 < trainer.budget.max_tokens < UNBOUNDED
    losses = trainers.logged(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=2e-2)
    assert losses[-1] < 0.5


@pytest.mark.gpu
def test_an_update_that_runs_out_of_a_gpus_memory_is_run_again(trainers, tmp_path, monkeypatch):
    trainer = trainers.make_trainer(
        tmp_path,
        tiny.tokenizer(),
        rows=tiny.rows(8),
        use_cpu=False,
        per_device_train_batch_size=8,
        max_tokens_per_forward="auto",
    )
    most = max(pack["tokens"].run for pack in next(iter(trainer.get_train_dataloader()))["packs"])
    embedding = trainer.model.get_input_embeddings()
    monkeypatch.setattr(trainer, "_tokens_that_fit", lambda: UNBOUNDED)  # else a probe runs out
    updates = []  # that ran out of memory

    def take_too_much(module, inputs, output):
        if output.requires_grad and output.shape[1] >= most:
            updates.append(trainer.state.global_step)
            torch.empty(2**50, dtype=torch.uint8, device=GPU)

    embedding.register_forward_hook(take_too_much)
    trainer.train()
    assert updates == [0] and trainer.budget.max_tokens == most // 2
    assert len(trainers.logged(trainer)) == 4
