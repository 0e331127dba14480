import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import assert_as_accurate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastdpo.kernels import reference, vocabulary_walk
from fastdpo.kernels.linear_logps import STATS, linear_logps
from fastdpo.kernels.tiles import BLOCK_V

SHAPES = {
    "no-row": (0, 8, 40),
    "one-cell": (1, 1, 1),
    "one-block": (4, 16, BLOCK_V),
    "ragged-last-block": (5, 16, BLOCK_V + 7),
    "ragged-last-tile-and-rows": (11, 16, 5 * BLOCK_V + 1),
}
FOLDS = ["torch", "triton"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 4 rows by 2 blocks, so that a test's few rows are walked as thousands are."""
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(vocabulary_walk.TILE_ROWS, device, 4)
        monkeypatch.setitem(vocabulary_walk.TILE_COLUMNS, device, 2 * BLOCK_V)


def inputs(shape, dtype, device="cpu", bias=False, seed=0):
    N, D, V = shape
    random = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(N, D, generator=random)
    head_VD = torch.randn(V, D, generator=random)
    labels_N = torch.randint(0, V, (N,), generator=random)
    bias_V = torch.randn(V, generator=random).to(device, dtype) if bias else None
    return hidden_ND.to(device, dtype), head_VD.to(device, dtype), labels_N.to(device), bias_V


def run(function, hidden_ND, head_VD, labels_N, bias_V, dtype, trained=True, **settings):
    """Value, gradients of a weighted sum, and statistics, with the inputs in `dtype`."""
    leaves = {"hidden": hidden_ND, "head": head_VD} | ({} if bias_V is None else {"bias": bias_V})
    leaves = {name: x.to(dtype).detach().clone() for name, x in leaves.items()}
    for name, leaf in leaves.items():
        leaf.requires_grad_(trained or name == "hidden")
    token_logps_N, stats = function(
        leaves["hidden"],
        leaves["head"],
        labels_N,
        bias_V=leaves.get("bias"),
        stats=STATS,
        **settings,
    )
    weights_N = torch.arange(
        1.0, len(labels_N) + 1, device=labels_N.device, dtype=token_logps_N.dtype
    )
    (token_logps_N * weights_N).sum().backward()
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {"token_logps": token_logps_N.detach()} | grads | stats


def assert_all_as_accurate(ours, same_dtype, truth, times):
    assert ours.keys() == truth.keys()
    for name, exact in truth.items():
        if exact.dtype == torch.bool:
            assert torch.equal(ours[name], exact), name
        elif name in ("entropy", "mean_logit"):
            # small numbers made of thousands of logits, which are rounded at their own size
            largest = truth["lse"].abs().max() if exact.numel() else 1.0
            torch.testing.assert_close(ours[name].double(), exact, rtol=0, atol=5e-6 * largest)
        else:
            assert_as_accurate(ours[name], same_dtype[name], exact, times)


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_value_and_gradients_are_as_accurate_as_pytorch(fold, shape, trained, device):
    args = inputs(shape, torch.float32, device)
    ours = run(linear_logps, *args, torch.float32, trained, fold=fold)
    same = run(reference.linear_logps, *args, torch.float32, trained)
    truth = run(reference.linear_logps, *args, torch.float64, trained)
    # 4: sums over tiles are rescaled to each new maximum, a rounding a tile
    assert_all_as_accurate(ours, same, truth, times=4)


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "capped"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_heads_of_every_kind_are_as_accurate(fold, softcap, bias, scale, device):
    args = inputs(SHAPES["ragged-last-tile-and-rows"], torch.float32, device, bias)
    kind = {"softcap": softcap, "scale": scale}
    ours = run(linear_logps, *args, torch.float32, fold=fold, **kind)
    same = run(reference.linear_logps, *args, torch.float32, **kind)
    truth = run(reference.linear_logps, *args, torch.float64, **kind)
    assert_all_as_accurate(ours, same, truth, times=4)


@pytest.mark.parametrize("fold", FOLDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_keep_float32_logits(fold, dtype, device):
    hidden_ND, head_VD, labels_N, _ = inputs(SHAPES["ragged-last-block"], dtype, device)
    ours = linear_logps(hidden_ND, head_VD, labels_N, fold=fold)
    truth = reference.linear_logps(hidden_ND.double(), head_VD.double(), labels_N)
    assert ours.dtype == torch.float32
    assert (ours - truth).abs().max() < 1e-4  # logits rounded to bfloat16 are off by 0.03
    grads = run(linear_logps, hidden_ND, head_VD, labels_N, None, dtype, fold=fold)
    wide = run(reference.linear_logps, hidden_ND, head_VD, labels_N, None, torch.float64)
    for name in ("dhidden", "dhead"):
        assert grads[name].dtype == dtype
        # on a GPU the second product takes p in the inputs' dtype: a rounding of each, as of this
        bound = 2 * torch.finfo(dtype).eps * wide[name].abs().max()
        assert (grads[name] - wide[name]).abs().max() <= bound, name


@pytest.mark.parametrize("fold", FOLDS)
def test_the_cache_changes_no_gradient(fold, device):
    args = inputs(SHAPES["ragged-last-tile-and-rows"], torch.float32, device, bias=True)
    tile_bytes = 4 * 4 * 2 * BLOCK_V
    none, some, all_of_it = (
        run(linear_logps, *args, torch.float32, fold=fold, head_cache_bytes=budget, softcap=5.0)
        for budget in (0, 2 * tile_bytes, 1 << 30)
    )
    for name in ("token_logps", "dhidden", "dhead", "dbias"):
        bound = 8 * torch.finfo(torch.float32).eps * none[name].abs().max()
        assert (none[name] - some[name]).abs().max() <= bound, name
        assert (none[name] - all_of_it[name]).abs().max() <= bound, name


PRODUCTS = {
    "no-grad": ({"grad": False}, 1),
    "frozen": ({"head": False}, 2),
    "trained-and-cached": ({"head": True, "cache": 1 << 30}, 3),
    "trained-not-cached": ({"head": True, "cache": 0}, 4),
}


@pytest.mark.parametrize(("kind", "products"), PRODUCTS.values(), ids=PRODUCTS)
def test_products_are_as_few_as_promised(kind, products):
    N, D, V = shape = (16, 16, 4 * BLOCK_V)
    hidden_ND, head_VD, labels_N, _ = inputs(shape, torch.float32)
    head_VD.requires_grad_(kind.get("head", False))
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(kind.get("grad", True)):
        logps_N = linear_logps(
            hidden_ND.requires_grad_(),
            head_VD,
            labels_N,
            fold="torch",
            head_cache_bytes=kind.get("cache", 0),
        )
        if logps_N.requires_grad:
            logps_N.sum().backward()
    assert counter.get_total_flops() == products * 2 * N * V * D


class Watch(TorchDispatchMode):
    """Fails on what makes the CPU wait for a GPU, and keeps the size of the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(name in func.__name__ for name in ("_local_scalar_dense", "nonzero")), func
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.nbytes)
        return out


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_nothing_waits_and_no_logits_are_held(trained):
    shape = (64, 16, 64 * BLOCK_V)
    hidden_ND, head_VD, labels_N, _ = inputs(shape, torch.float32)
    head_VD.requires_grad_(trained)
    with Watch() as watch:
        linear_logps(
            hidden_ND.requires_grad_(), head_VD, labels_N, fold="torch", head_cache_bytes=0
        ).sum().backward()
    logits = 4 * 64 * 64 * BLOCK_V
    assert watch.largest <= (head_VD.nbytes if trained else logits // 50)


def test_the_default_workspace_of_a_frozen_head_is_bounded(monkeypatch):
    monkeypatch.undo()
    N, D, V = shape = (600, 8, 40_000)
    hidden_ND, head_VD, labels_N, _ = inputs(shape, torch.float32)

    class Total(TorchDispatchMode):
        live = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and func.__name__.startswith("empty"):
                self.live += out.untyped_storage().nbytes()
            return out

    with Total() as total:
        linear_logps(hidden_ND.requires_grad_(), head_VD, labels_N, fold="torch")
    assert 0 < total.live <= 4 * N * D + (32 << 20) < 4 * N * V


@pytest.mark.parametrize("fold", FOLDS)
def test_the_same_inputs_give_the_same_bits(fold, device):
    args = inputs(SHAPES["ragged-last-tile-and-rows"], torch.float32, device, bias=True)
    first, second = (run(linear_logps, *args, torch.float32, fold=fold) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("fold", FOLDS)
def test_large_logits_neither_overflow_nor_vanish(fold, device):
    hidden_ND, head_VD, labels_N, _ = inputs((3, 4, 3 * BLOCK_V), torch.float32, device)
    ours = run(
        linear_logps, 100 * hidden_ND, 100 * head_VD, labels_N, None, torch.float32, fold=fold
    )
    truth = run(
        reference.linear_logps, 100 * hidden_ND, 100 * head_VD, labels_N, None, torch.float64
    )
    for name in ("token_logps", "dhidden", "dhead", "lse"):
        assert ours[name].isfinite().all(), name
        bound = 1e-5 * truth[name].abs().max()
        assert (ours[name] - truth[name]).abs().max() <= bound, name


def test_gradcheck_in_float64():
    hidden_ND, head_VD, labels_N, bias_V = inputs((5, 3, 9), torch.float64, bias=True)
    leaves = [x.requires_grad_() for x in (hidden_ND, head_VD, bias_V)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logps(
            h, w, labels_N, bias_V=b, scale=0.5, softcap=2.0, fold="torch", head_cache_bytes=0
        ),
        leaves,
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 3 * BLOCK_V), st.integers(0, 99))
def test_any_shape_agrees(N, D, V, seed):
    args = inputs((N, D, V), torch.float32, seed=seed)
    truth = run(reference.linear_logps, *args, torch.float64)
    same = run(reference.linear_logps, *args, torch.float32)
    for fold in FOLDS:
        ours = run(linear_logps, *args, torch.float32, fold=fold)
        del ours["is_top1"]  # two logits may be closer than float32 can tell
        exact = {name: truth[name] for name in ours}
        assert_all_as_accurate(ours, same, exact, times=8)


def test_autocast_on_a_cpu_keeps_float32():
    hidden_ND, head_VD, labels_N, _ = inputs((4, 8, 100), torch.float32)
    expected = linear_logps(hidden_ND, head_VD, labels_N, fold="torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_logps(hidden_ND, head_VD, labels_N, fold="torch"), expected)


WRONG = {
    "widths-differ": ({"hidden_ND": torch.zeros(3, 4)}, "want hidden"),
    "labels-too-few": ({"labels_N": torch.zeros(2, dtype=torch.int64)}, "want hidden"),
    "labels-of-another-dtype": ({"labels_N": torch.zeros(3, dtype=torch.int32)}, "int64"),
    "bias-too-short": ({"bias_V": torch.zeros(5)}, "want bias"),
    "unknown-statistic": ({"stats": ("mode",)}, "want stats"),
    "unknown-fold": ({"fold": "cuda"}, "want stats"),
    "float64-in-triton": (
        {"hidden_ND": torch.zeros(3, 5).double(), "fold": "triton"},
        "fold='torch'",
    ),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
def test_inputs_that_do_not_fit_are_refused(wrong, message):
    right = {
        "hidden_ND": torch.zeros(3, 5),
        "head_VD": torch.zeros(7, 5),
        "labels_N": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        linear_logps(**(right | wrong))
