"""linear_logps against its twin in float64: values, gradients, statistics, refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_heads import assert_all_as_accurate, inputs, run
from torch.utils.checkpoint import checkpoint

from fastdpo.kernels import reference
from fastdpo.kernels.fold import BLOCK_T, FOLDS
from fastdpo.kernels.linear_logps import linear_logps
from fastdpo.kernels.row_statistics import STATS

SHAPES = {
    "no-row": (0, 8, 40),
    "one-cell": (1, 1, 1),
    "one-block": (4, 16, BLOCK_T),
    "one-row-of-padding": (15, 8, 40),
    "ragged-last-block": (5, 16, BLOCK_T + 7),
    "ragged-last-tile-and-rows": (11, 16, 5 * BLOCK_T + 1),
}
pytestmark = pytest.mark.usefixtures("small_tiles")
TIMES = 4  # sums over tiles are rescaled to each new maximum, a rounding a tile


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_value_and_gradients_are_as_accurate_as_pytorch(backend, shape, trained, device):
    args = inputs(shape, torch.float32, device)
    ours = run(linear_logps, *args, torch.float32, trained, backend=backend)
    same = run(reference.linear_logps, *args, torch.float32, trained)
    truth = run(reference.linear_logps, *args, torch.float64, trained)
    assert_all_as_accurate(ours, same, truth, times=TIMES)


@pytest.mark.parametrize("softcap", [None, 3.0, 30.0, 1000.0])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_heads_of_every_kind_are_as_accurate(backend, softcap, bias, scale, device):
    args = inputs(SHAPES["ragged-last-tile-and-rows"], torch.float32, device, bias)
    kind = {"softcap": softcap, "scale": scale}
    ours = run(linear_logps, *args, torch.float32, backend=backend, **kind)
    same = run(reference.linear_logps, *args, torch.float32, **kind)
    truth = run(reference.linear_logps, *args, torch.float64, **kind)
    assert_all_as_accurate(ours, same, truth, times=TIMES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_keep_float32_logits(backend, dtype, device):
    shape = SHAPES["ragged-last-block"]
    hidden_ND, head_VD, labels_N, bias_V = inputs(shape, dtype, device, bias=True)
    ours = linear_logps(hidden_ND, head_VD, labels_N, backend=backend)
    truth = reference.linear_logps(hidden_ND.double(), head_VD.double(), labels_N)
    assert ours.dtype == torch.float32
    assert (ours - truth).abs().max() < 1e-4  # logits rounded to bfloat16 are off by 0.03
    grads = run(linear_logps, hidden_ND, head_VD, labels_N, bias_V, dtype, backend=backend)
    wide = run(reference.linear_logps, hidden_ND, head_VD, labels_N, bias_V, torch.float64)
    for name in ("dhidden", "dhead", "dbias"):
        assert grads[name].dtype == dtype
        # on a GPU the second product takes p in the inputs' dtype: a rounding of each, as of this
        bound = 2 * torch.finfo(dtype).eps * wide[name].abs().max()
        assert (grads[name] - wide[name]).abs().max() <= bound, name


@pytest.mark.usefixtures("narrow_operands")
@pytest.mark.parametrize("head_cache_bytes", [0, 1 << 30])
def test_a_gpus_tiles_of_narrow_operands_are_as_accurate(backend, head_cache_bytes, device):
    args = inputs(SHAPES["ragged-last-tile-and-rows"], torch.bfloat16, device, bias=True)
    settings = {"backend": backend, "head_cache_bytes": head_cache_bytes, "softcap": 5.0}
    ours = run(linear_logps, *args, torch.bfloat16, **settings)
    truth = run(reference.linear_logps, *args, torch.float64, softcap=5.0)
    assert (ours["token_logps"] - truth["token_logps"]).abs().max() < 1e-4
    for name in ("dhidden", "dhead", "dbias"):
        bound = 4 * torch.finfo(torch.bfloat16).eps * truth[name].abs().max()  # p, and the answer
        assert (ours[name] - truth[name]).abs().max() <= bound, name


@pytest.mark.usefixtures("narrow_operands")
@pytest.mark.parametrize("softcap", [None, 30.0], ids=["plain", "capped"])
def test_a_sure_models_gradients_are_not_rounded_away(backend, softcap, device):
    """Where p of the label is 0.99, its part in the gradient is 1 - p: in 16 bits 0 or 1 / 128."""
    N, D, V = 11, 64, 5 * BLOCK_T + 1
    _, head_VD, labels_N, _ = inputs((N, D, V), torch.float32, device)
    head_VD = (head_VD / 8).bfloat16()
    hidden_ND = 22 * head_VD[labels_N]
    args = (hidden_ND, head_VD, labels_N, None)
    ours = run(linear_logps, *args, torch.bfloat16, backend=backend, softcap=softcap)
    truth = run(reference.linear_logps, *args, torch.float64, softcap=softcap)
    assert truth["token_logps"].exp().mean() > 0.98
    for name in ("dhidden", "dhead"):
        error = (ours[name] - truth[name]).norm() / truth[name].norm()
        assert error < 0.01, f"{name} is off by {error:.1%}"


def test_logits_far_beyond_their_cap_are_at_it(backend, device):
    hidden_ND, head_VD, labels_N, _ = inputs((3, 4, 40), torch.float32, device)
    args = 100 * hidden_ND, 100 * head_VD, labels_N, None
    ours = run(linear_logps, *args, torch.float32, backend=backend, softcap=5.0)
    truth = run(reference.linear_logps, *args, torch.float64, softcap=5.0)
    assert (ours["token_logps"] - truth["token_logps"]).abs().max() < 1e-5
    assert ours["dhidden"].isfinite().all() and ours["dhead"].isfinite().all()


def test_inputs_may_lie_any_way_in_memory(backend, device):
    args = inputs((17, 24, BLOCK_T + 7), torch.float32, device, bias=True)
    strided = [args[0].T.contiguous().T, args[1].T.contiguous().T]
    strided += [torch.stack([x, x], 1).flatten()[::2] for x in args[2:]]
    assert not any(x.is_contiguous() for x in strided)
    straight = run(linear_logps, *args, torch.float32, backend=backend)
    leaves = [strided[0].requires_grad_(), strided[1].requires_grad_()]
    logps_N = linear_logps(*leaves, strided[2], bias_V=strided[3], backend=backend)
    (logps_N * torch.arange(1.0, 18.0, device=device)).sum().backward()
    found = {"token_logps": logps_N, "dhidden": leaves[0].grad, "dhead": leaves[1].grad}
    for name, ours in found.items():
        torch.testing.assert_close(ours, straight[name], atol=1e-4, rtol=1e-5, msg=name)


def test_a_single_column_of_any_stride_has_a_gradient(backend, device):
    hidden_ND = torch.ones(3, 1, dtype=torch.float16, device=device)
    head_VD = torch.ones(2, 3, dtype=torch.float16, device=device)[:1, ::3].requires_grad_()
    assert head_VD.is_contiguous() and head_VD.stride(-1) == 3
    labels_N = torch.zeros(3, dtype=torch.int64, device=device)
    linear_logps(hidden_ND, head_VD, labels_N, backend=backend).sum().backward()
    assert head_VD.grad.item() == 0.0


def test_the_cache_changes_no_gradient(backend, device):
    args = inputs(SHAPES["ragged-last-tile-and-rows"], torch.float32, device, bias=True)
    tile_bytes = 4 * 4 * 2 * BLOCK_T
    none, some, all_of_it = (
        run(
            linear_logps,
            *args,
            torch.float32,
            backend=backend,
            head_cache_bytes=budget,
            softcap=5.0,
        )
        for budget in (0, 2 * tile_bytes, 1 << 30)
    )
    for name in ("token_logps", "dhidden", "dhead", "dbias"):
        bound = 8 * torch.finfo(torch.float32).eps * none[name].abs().max()
        assert (none[name] - some[name]).abs().max() <= bound, name
        assert (none[name] - all_of_it[name]).abs().max() <= bound, name


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "capped"])
@pytest.mark.parametrize("broken", ["label-below", "label-above", "nan", "inf"])
def test_a_broken_row_is_nan_and_no_other(backend, softcap, broken, device):
    hidden_ND, head_VD, labels_N, _ = inputs((9, 16, 2 * BLOCK_T + 7), torch.float32, device)
    whole = run(
        linear_logps,
        hidden_ND,
        head_VD,
        labels_N,
        None,
        torch.float32,
        backend=backend,
        softcap=softcap,
    )
    if broken.startswith("label"):
        labels_N[4] = -1 - len(head_VD) if broken == "label-below" else len(head_VD)
    else:
        hidden_ND[4, 3] = float(broken)
    args = (hidden_ND, head_VD, labels_N, None, torch.float32)
    found = run(linear_logps, *args, backend=backend, softcap=softcap)
    others = torch.arange(9, device=device) != 4
    for name in ("token_logps", "dhidden"):
        assert found[name][4].isnan().all(), name
        assert torch.equal(found[name][others], whole[name][others]), name
    assert found["dhead"].isnan().all()


@pytest.mark.parametrize("head_cache_bytes", [0, 1 << 30])
@pytest.mark.parametrize("head_grad", [False, True], ids=["frozen", "trained"])
def test_a_low_rank_term_is_as_accurate(backend, head_cache_bytes, head_grad, device):
    hidden_ND, head_VD, labels_N, _ = inputs((11, 16, 2 * BLOCK_T + 7), torch.float32, device)
    A_RD, B_VR = (x.to(device) for x in (torch.randn(3, 16), torch.randn(len(head_VD), 3)))

    def answers(function, dtype, **settings):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (hidden_ND, A_RD, B_VR, head_VD)]
        h, A, B, head = leaves
        head.requires_grad_(head_grad)
        low_rank = (0.5 * h @ A.T, B)
        logps_N, stats = function(h, head, labels_N, low_rank=low_rank, stats=STATS, **settings)
        logps_N.sum().backward()
        grads = {f"d{i}": x.grad for i, x in enumerate(leaves) if x.requires_grad}
        return {"token_logps": logps_N.detach()} | grads | stats

    ours = answers(linear_logps, torch.float32, backend=backend, head_cache_bytes=head_cache_bytes)
    same = answers(reference.linear_logps, torch.float32)
    truth = answers(reference.linear_logps, torch.float64)
    assert_all_as_accurate(ours, same, truth, times=TIMES)


@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "capped"])
def test_a_low_rank_term_that_is_not_finite_breaks_its_row_alone(backend, softcap, device):
    hidden_ND, head_VD, labels_N, _ = inputs((5, 4, 40), torch.float32, device)
    down_NR, up_VR = torch.ones(5, 2, device=device), torch.ones(40, 2, device=device)
    down_NR[3, 1] = torch.inf
    settings = {"backend": backend, "softcap": softcap, "low_rank": (down_NR, up_VR)}
    logps_N = linear_logps(hidden_ND, head_VD, labels_N, **settings)
    assert logps_N.isnan().tolist() == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("backend", "peakedness"), [("torch", 1.0), ("torch", 6.0), ("triton", 6.0), ("triton", 12.0)]
)
@pytest.mark.parametrize("likely", [True, False], ids=["chosen-like", "rejected-like"])
def test_skipping_unlikely_tokens_keeps_its_bound(backend, peakedness, likely, device):
    hidden_ND, head_VD, labels_N, _ = inputs((11, 16, 3 * BLOCK_T + 7), torch.float32, device)
    p_NV = (peakedness * hidden_ND.double() @ head_VD.double().T / 4).softmax(1)
    labels_N = p_NV.argmax(1) if likely else p_NV.argmin(1)
    args = (hidden_ND, head_VD * peakedness / 4, labels_N, None, torch.float32)
    whole = run(linear_logps, *args, backend=backend)
    some = run(linear_logps, *args, backend=backend, skip_below=2**-12)
    for name in whole.keys() - {"dhidden", "entropy", "mean_logit"}:
        assert torch.equal(some[name], whole[name]), name
    for name in ("entropy", "mean_logit"):
        torch.testing.assert_close(some[name], whole[name], atol=1e-4, rtol=1e-5)
    left_out_N = (p_NV * (p_NV < 2**-12)).sum(1)
    weights_N = torch.arange(1, 12, device=device)
    bound_N = weights_N * left_out_N * args[1].norm(dim=1).max()
    error_N = (some["dhidden"] - whole["dhidden"]).norm(dim=1)
    assert error_N.max() > 1e-4, "nothing was skipped"
    assert (error_N <= bound_N + 1e-4).all()


def test_skipping_what_no_token_is_changes_nothing(backend, device):
    args = inputs(SHAPES["ragged-last-tile-and-rows"], torch.float32, device, bias=True)
    some = run(linear_logps, *args, torch.float32, backend=backend, skip_below=1e-30)
    same = run(reference.linear_logps, *args, torch.float32)
    truth = run(reference.linear_logps, *args, torch.float64)
    assert_all_as_accurate(some, same, truth, times=TIMES)


@pytest.mark.parametrize("skip_below", [0.0, 2**-12])
def test_the_same_inputs_give_the_same_bits(backend, skip_below, device):
    args = inputs((5, 16, 2 * BLOCK_T + 7), torch.float32, device, bias=True)
    settings = {"backend": backend, "skip_below": skip_below}
    torch.use_deterministic_algorithms(False)  # which would hide an operator that is not
    first, second = (run(linear_logps, *args, torch.float32, **settings) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_large_logits_neither_overflow_nor_vanish(backend, device):
    hidden_ND, head_VD, labels_N, _ = inputs((3, 4, 3 * BLOCK_T), torch.float32, device)
    ours = run(
        linear_logps, 100 * hidden_ND, 100 * head_VD, labels_N, None, torch.float32, backend=backend
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
            h, w, labels_N, bias_V=b, scale=0.5, softcap=2.0, backend="torch", head_cache_bytes=0
        ),
        leaves,
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 9), st.integers(1, 9), st.integers(1, 3 * BLOCK_T), st.integers(0, 99))
def test_any_shape_agrees(N, D, V, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = inputs((N, D, V), torch.float32, device, seed=seed)
    truth = run(reference.linear_logps, *args, torch.float64)
    same = run(reference.linear_logps, *args, torch.float32)
    for backend in FOLDS:
        ours = run(linear_logps, *args, torch.float32, backend=backend)
        del ours["is_top1"]  # two logits may be closer than float32 can tell
        exact = {name: truth[name] for name in ours}
        assert_all_as_accurate(ours, same, exact, times=TIMES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_narrows_operands_and_not_logits(dtype):
    hidden_ND, head_VD, labels_N, _ = inputs((20, 8, 100), torch.float32)
    operands = hidden_ND.to(dtype).double(), head_VD.to(dtype).double()
    rounded = reference.linear_logps(*operands, labels_N)
    with torch.autocast("cpu", dtype=dtype):
        ours, stats = linear_logps(
            hidden_ND.requires_grad_(), head_VD, labels_N, backend="torch", stats=("entropy",)
        )
        exact = linear_logps(hidden_ND.double(), head_VD.double(), labels_N, backend="torch")
    assert ours.dtype == torch.float32 and (ours - rounded).abs().max() < 1e-5
    wide = reference.linear_logps(hidden_ND.double(), head_VD.double(), labels_N)
    assert (exact - wide).abs().max() < 1e-12, "float64 is not narrowed"
    log_p_NV = (operands[0] @ operands[1].T).log_softmax(1)
    assert (stats["entropy"] + (log_p_NV.exp() * log_p_NV).sum(1)).abs().max() < 1e-5
    ours.sum().backward()
    h = operands[0].requires_grad_()
    reference.linear_logps(h, operands[1], labels_N).sum().backward()
    assert (hidden_ND.grad - h.grad).abs().max() < 1e-5


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_temperature_divides_scale_and_cap(softcap):
    hidden_ND, head_VD, labels_N, _ = inputs((7, 8, 40), torch.float64)
    z_NV = hidden_ND @ head_VD.T
    z_NV = z_NV if softcap is None else softcap * torch.tanh(z_NV / softcap)
    expected_N = (z_NV / 0.7).log_softmax(1).gather(1, labels_N[:, None]).squeeze(1)
    kind = {"scale": 1 / 0.7, "softcap": softcap and softcap / 0.7, "backend": "torch"}
    torch.testing.assert_close(linear_logps(hidden_ND, head_VD, labels_N, **kind), expected_N)


WRONG = {
    "widths-differ": ({"hidden_ND": torch.zeros(3, 4)}, "want hidden"),
    "labels-too-few": ({"labels_N": torch.zeros(2, dtype=torch.int64)}, "want hidden"),
    "labels-of-another-dtype": ({"labels_N": torch.zeros(3, dtype=torch.int32)}, "int64"),
    "hidden-of-integers": ({"hidden_ND": torch.zeros(3, 5).long()}, "want floats"),
    "head-of-integers": ({"head_VD": torch.zeros(7, 5, dtype=torch.int8)}, "want floats"),
    "float64-for-some": ({"bias_V": torch.zeros(7).double()}, "for all or for none"),
    "no-cap": ({"softcap": float("inf")}, "want a finite softcap"),
    "cap-of-0": ({"softcap": 0.0}, "want a finite softcap"),
    "cache-below-0": ({"head_cache_bytes": -1}, "want head_cache_bytes from 0"),
    "low-rank-of-other-rows": ({"low_rank": (torch.zeros(2, 1), torch.zeros(7, 1))}, "low_rank"),
    "wide-low-rank": ({"low_rank": (torch.zeros(3, 1), torch.zeros(7, 1).double())}, "for all or"),
    "low-rank-of-two-ranks": ({"low_rank": (torch.zeros(3, 1), torch.zeros(7, 2))}, "low_rank"),
    "bias-too-short": ({"bias_V": torch.zeros(5)}, "want bias"),
    "unknown-statistic": ({"stats": ("mode",)}, "want stats"),
    "unknown-backend": ({"backend": "cuda"}, "want a backend of"),
    "everything-unlikely": ({"skip_below": 1.0}, "want skip_below in"),
    "skip-below-negative": ({"skip_below": -0.1}, "want skip_below in"),
    "float64-in-triton": (
        {"hidden_ND": torch.zeros(3, 5).double(), "head_VD": torch.zeros(7, 5).double()},
        "backend='torch'",
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


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_it_runs_under_a_checkpoint(trained, use_reentrant):
    def gradients(score):
        hidden_ND, head_VD, labels_N, _ = inputs((20, 8, 3000), torch.float32)
        leaves = [hidden_ND.requires_grad_(), head_VD.requires_grad_(trained)]
        score(*leaves, labels_N).square().sum().backward()
        return [x.grad for x in leaves if x.requires_grad]

    def score(*args):
        return linear_logps(*args, backend="torch")

    made = gradients(lambda *args: checkpoint(score, *args, use_reentrant=use_reentrant))
    for gradient, wanted in zip(made, gradients(score), strict=True):
        assert torch.equal(gradient, wanted)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_gradient_of_the_gradient_is_an_error(trained):
    hidden_ND, head_VD, labels_N, _ = inputs((5, 4, 30), torch.float32)
    logps_N = linear_logps(
        hidden_ND.requires_grad_(), head_VD.requires_grad_(trained), labels_N, backend="torch"
    )
    with pytest.raises(RuntimeError, match="want create_graph=False"):
        torch.autograd.grad(logps_N.sum(), hidden_ND, create_graph=True)


def test_a_first_tile_that_is_masked_out_breaks_nothing(backend, device):
    hidden_ND, head_VD, labels_N, _ = inputs((6, 4, 5 * BLOCK_T), torch.float32, device)
    labels_N = labels_N % BLOCK_T + 3 * BLOCK_T
    bias_V = torch.zeros(5 * BLOCK_T, device=device)
    bias_V[: 2 * BLOCK_T] = -float("inf")
    args = hidden_ND, head_VD, labels_N, bias_V
    ours = run(linear_logps, *args, torch.float32, backend=backend)
    truth = run(reference.linear_logps, *args, torch.float64)
    assert (ours["token_logps"] - truth["token_logps"]).abs().max() < 1e-5
    assert (ours["dhidden"] - truth["dhidden"]).abs().max() < 1e-5


def test_weights_gradients_are_as_accurate_where_logits_are_large():
    D = 64
    random = torch.Generator().manual_seed(0)
    hidden_ND = 1000 + torch.randn(50, D, generator=random)
    labels_N = torch.randint(0, D, (50,), generator=random)
    args = hidden_ND, torch.eye(D), labels_N, torch.zeros(D)
    ours = run(linear_logps, *args, torch.float32, backend="torch")
    same = run(reference.linear_logps, *args, torch.float32)
    truth = run(reference.linear_logps, *args, torch.float64)
    assert_all_as_accurate(ours, same, truth, times=TIMES)
