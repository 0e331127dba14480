"""What linear_logps takes: products, memory, no wait for a GPU; and what a row's bits rest on."""

import math
from types import SimpleNamespace

import pytest
import torch
from tiny_heads import inputs
from torch._subclasses.fake_tensor import FakeTensorMode
from watches import Live, Watch, counting_flops

from fastdpo.kernels import linear_logps as module
from fastdpo.kernels import reference, second_product, tiles, vocabulary_walk
from fastdpo.kernels.fold import BLOCK_T
from fastdpo.kernels.linear_logps import linear_logps
from fastdpo.kernels.products import has_fast_mkl, has_good_onednn, use_onednn
from fastdpo.kernels.row_statistics import STATS
from fastdpo.quantised import FourBitRows, Int8Rows

PRODUCTS = {  # hidden states need grad, head needs grad, D (of 16 rows), cache bytes, products
    "no-grad": (False, False, 16, 1 << 30, 1),
    "frozen": (True, False, 16, 1 << 30, 2),
    "trained": (True, True, 3, 1 << 30, 3),
    "trained-kept-in-the-gradient": (True, True, 16, 0, 3),
    "trained-in-part": (True, True, 8, 0, 3.5),
    "trained-not-kept": (True, True, 3, 0, 4),
}


@pytest.fixture(autouse=True, scope="module")
def onednn_is_known():
    """has_good_onednn tries two products when first asked, which no test here is to count."""
    has_good_onednn()


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("grad", "trained", "D", "cache", "wanted"), PRODUCTS.values(), ids=PRODUCTS
)
def test_products_are_as_few_as_promised(grad, trained, D, cache, wanted):
    N, V = 16, 4 * BLOCK_T
    hidden_ND, head_VD, labels_N, _ = inputs((N, D, V), torch.float32)
    hidden_ND.requires_grad_(grad)
    head_VD.requires_grad_(trained)
    with counting_flops() as counter:
        logps_N = linear_logps(
            hidden_ND, head_VD, labels_N, backend="torch", head_cache_bytes=cache
        )
        if grad:
            logps_N.sum().backward()
    assert counter.get_total_flops() == wanted * 2 * N * V * D


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("cache", "wanted"), [(1 << 30, 2), (0, 3)])
def test_an_adapter_on_a_frozen_head_takes_thin_products_only(cache, wanted):
    N, D, V, R = 16, 32, 4 * BLOCK_T, 2
    hidden_ND, head_VD, labels_N, _ = inputs((N, D, V), torch.float32)
    low_rank = torch.randn(N, R, requires_grad=True), torch.randn(V, R, requires_grad=True)
    with counting_flops() as counter:
        linear_logps(
            hidden_ND.requires_grad_(),
            head_VD,
            labels_N,
            low_rank=low_rank,
            backend="torch",
            head_cache_bytes=cache,
        ).sum().backward()
    assert counter.get_total_flops() == 2 * N * V * (wanted * D + (wanted + 1) * R)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_nothing_waits_and_no_logits_are_held(trained):
    shape = (64, 16, 64 * BLOCK_T)
    hidden_ND, head_VD, labels_N, _ = inputs(shape, torch.float32)
    head_VD.requires_grad_(trained)
    with Watch() as watch:
        linear_logps(
            hidden_ND.requires_grad_(), head_VD, labels_N, backend="torch", head_cache_bytes=0
        ).sum().backward()
    logits = 4 * 64 * 64 * BLOCK_T
    assert watch.largest <= (head_VD.nbytes if trained else logits // 50)


def int8_rows(V, D):
    return Int8Rows(torch.empty(V, D, dtype=torch.int8), torch.empty(V), torch.bfloat16)


def four_bit_rows(V, D):
    numbers = {"code": torch.empty(16), "absmax": torch.empty(V * D // 64)}
    state = SimpleNamespace(shape=(V, D), blocksize=64, nested=False, **numbers)
    packed = torch.empty(V * D // 2, 1, dtype=torch.uint8)
    return FourBitRows(packed, state, torch.bfloat16)


SIDE = tiles.TILE_COLUMNS["cpu"] // 1024  # of a tile: 1, on Intel's CPUs 2
MORE_WORKSPACE = {  # settings, and the MiB that kernels/README.md has for them
    "plain": ({}, lambda D: 0),
    "statistics": ({"stats": ("entropy", "mean_logit")}, lambda D: 4 * SIDE**2),
    "capped": ({"softcap": 30.0}, lambda D: 4 * SIDE**2),
    "filtered": ({"skip_below": 2**-12}, lambda D: 2 * SIDE**2 + SIDE * D / 256),
}


@pytest.mark.parametrize(
    "kind",
    [torch.float32, torch.bfloat16, int8_rows, four_bit_rows],
    ids=["float32", "bfloat16", "int8", "4 bits"],
)
@pytest.mark.parametrize("D", [512, 2048])
@pytest.mark.parametrize(("settings", "more"), MORE_WORKSPACE.values(), ids=MORE_WORKSPACE)
def test_a_frozen_heads_workspace_is_that_of_the_readme(settings, more, D, kind):
    """In full tiles, two of rows by two of columns."""
    N, V = 2 * tiles.TILE_ROWS["cpu"], 2 * tiles.TILE_COLUMNS["cpu"]
    dtype = kind if isinstance(kind, torch.dtype) else torch.bfloat16
    hidden_ND, head_VD, labels_N, _ = inputs((N, D, V), dtype)
    head_VD = head_VD if dtype is kind else kind(V, D)
    hidden_ND.requires_grad_()
    mib = 16 if has_fast_mkl() else max(4, 2 + D / 512)
    mib += (SIDE * 3 * D / 512 if dtype != torch.float32 else 0) + more(D)
    most = mib * 2**20 + 32 * N  # and a few numbers a row
    with Live() as live:
        scored = linear_logps(hidden_ND, head_VD, labels_N, backend="torch", **settings)
        assert live.peak <= 4 * N * D + most
        (scored[0] if "stats" in settings else scored).sum().backward()
    assert live.peak <= 4 * N * D + max(most, hidden_ND.nbytes + (1 << 20))


def test_without_a_gradient_there_is_no_sum_of_head_rows():
    hidden_ND, head_VD, labels_N, _ = inputs((1100, 4096, 1500), torch.float32)
    with Live() as live, torch.no_grad():
        linear_logps(hidden_ND.requires_grad_(), head_VD, labels_N, backend="torch")
    assert live.peak <= 4 << 20 < hidden_ND.nbytes


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_are_kept_within_their_budget(dtype):
    hidden_ND, head_VD, labels_N, _ = inputs((64, 8, 32 * BLOCK_T), dtype)
    head_VD.requires_grad_()

    def peak(head_cache_bytes):
        with Live() as live:
            settings = {"backend": "torch", "head_cache_bytes": head_cache_bytes}
            linear_logps(hidden_ND, head_VD, labels_N, **settings).sum().backward()
        return live.peak

    budget, peaks = 1 << 20, 64 * 8
    assert budget // 2 < peak(budget) - peak(0) <= budget + 16 * peaks
    assert peak(1 << 45) <= peak(0) + 4 * 64 * 32 * BLOCK_T + 64 * peaks, "no more than there is"


@pytest.mark.parametrize(
    ("hidden_needs", "head_needs", "D", "is_read"),
    [
        (False, False, 16, False),
        (True, False, 16, True),
        (False, True, 16, False),
        (False, True, 32, True),  # the gradient's memory has room for them
    ],
    ids=["no-grad", "frozen", "head-alone", "head-alone-kept"],
)
def test_no_probabilities_are_written_that_nothing_reads(
    monkeypatch, hidden_needs, head_needs, D, is_read
):
    hidden_ND, head_VD, labels_N, _ = inputs((20, D, 3000), torch.float32)
    made, fold = [], vocabulary_walk.FOLDS["torch"]

    def noted(z_NT, p_NT, *others):
        made.append(p_NT is not None)
        fold(z_NT, p_NT, *others)

    monkeypatch.setitem(vocabulary_walk.FOLDS, "torch", noted)
    hidden_ND.requires_grad_(hidden_needs)
    head_VD.requires_grad_(head_needs)
    linear_logps(hidden_ND, head_VD, labels_N, backend="torch", head_cache_bytes=0)
    assert {*made} == {is_read}


class NoLaunch:
    """Stands for a Triton kernel, and does nothing."""

    def __getitem__(self, grid):
        return lambda *arguments, **constants: None


def head_in(dtype, trains=False):
    return lambda V, D: torch.empty(V, D, dtype=dtype, requires_grad=trains)


GPU_HEADS = {  # dtype of the hidden states, head, settings, MiB beside u and the gradients
    "frozen": (torch.bfloat16, head_in(torch.bfloat16), {}, 256),
    "filtered": (torch.bfloat16, head_in(torch.bfloat16), {"skip_below": 2**-12}, 256),
    "wide": (torch.bfloat16, head_in(torch.float32), {}, 310),
    "int8": (torch.bfloat16, int8_rows, {}, 310),
    "4 bits": (torch.bfloat16, four_bit_rows, {}, 310),
    "autocast": (torch.float32, head_in(torch.float32), {}, 340),
    "trained": (torch.bfloat16, head_in(torch.bfloat16, True), {"head_cache_bytes": 0}, 448),
    "trained, autocast": (
        torch.float32,
        head_in(torch.float32, True),
        {"head_cache_bytes": 0},
        520,
    ),
}


@pytest.fixture
def gpu_folds(monkeypatch):
    """A GPU's tiling and dtypes without any arithmetic; returns the shapes folded so far."""
    folds = []
    monkeypatch.setitem(vocabulary_walk.FOLDS, "triton", lambda *args: folds.append(args[0].shape))
    monkeypatch.setitem(vocabulary_walk.DLOGITS, "triton", lambda *args: None)
    for user in (vocabulary_walk, second_product):
        monkeypatch.setattr(user, "product", lambda *args, **kinds: None)
    for kernel in ("_rescale_kernel", "_reached_kernel", "_reached_product_kernel"):
        monkeypatch.setattr(second_product, kernel, NoLaunch())
    tile_shape = tiles.tile_shape
    monkeypatch.setattr(tiles, "tile_shape", lambda _, *args: tile_shape("cuda", *args))
    monkeypatch.setattr(module, "_operand_dtypes", lambda hidden_ND: (torch.bfloat16, None))
    return folds


@pytest.mark.usefixtures("gpu_folds")
@pytest.mark.parametrize("D", [4096, 8192])
@pytest.mark.parametrize("N", [512, 4096, 8192, 16383, 16384, 20000])
@pytest.mark.parametrize(("dtype", "head", "settings", "mib"), GPU_HEADS.values(), ids=GPU_HEADS)
def test_a_heads_workspace_on_a_gpu_is_bounded(N, D, dtype, head, settings, mib):
    """At a real size, on tensors without memory."""
    V = 20_011  # a few tiles
    with FakeTensorMode(), Live() as live:
        hidden_ND = torch.empty(N, D, dtype=dtype, requires_grad=True)
        head_VD = head(V, D)
        labels_N = torch.empty(N, dtype=torch.int64)
        before = live.live
        logps_N = linear_logps(hidden_ND, head_VD, labels_N, **settings)
        forward = live.peak - before
        logps_N.backward(torch.empty_like(logps_N))
    trains = isinstance(head_VD, torch.Tensor) and head_VD.requires_grad
    dhead = head_VD.nbytes if trains else 0
    most = 4 * N * D + dhead + (mib << 20)
    assert 4 * N * D < forward <= most
    assert live.peak - before <= most + hidden_ND.nbytes


@pytest.mark.usefixtures("gpu_folds")
@pytest.mark.parametrize("N", [512, 8192, 20000])
def test_a_gpus_forward_alone_has_memory_for_logits_and_none_for_probabilities(N):
    with FakeTensorMode(), Live() as live, torch.no_grad():
        hidden_ND = torch.empty(N, 4096, dtype=torch.bfloat16)
        head_VD = torch.empty(20_011, 4096, dtype=torch.bfloat16)
        labels_N = torch.empty(N, dtype=torch.int64)
        before = live.live
        linear_logps(hidden_ND, head_VD, labels_N)
    assert live.peak - before <= 130 << 20


@pytest.mark.parametrize(
    ("N", "D", "room", "shape"),
    [
        (8192, 4096, 0, (4096, 8192)),
        (5000, 896, 0, (2500, 8192)),
        (4096, 8192, 0, (4096, 4096)),  # no more of a head's elements than of logits
        (1024, 896, 0, (1024, 32768)),  # few rows: fewer launches
        (8192, 1024, 1023, (4096, 8192)),
        (8192, 1024, 1024, (1024, 32768)),  # just enough rows of a trained head
        (8192, 4096, 4096, (4096, 8192)),
        (8192, 4096, 8192, (8192, 4096)),  # all of a trained head's p may stay
    ],
)
def test_a_gpus_tile_is_wide_so_that_u_is_read_seldom(N, D, room, shape):
    assert tiles.tile_shape("cuda", N, 131072, D, room) == shape


@pytest.mark.parametrize(
    ("N", "room", "rows"), [(1024, 0, 1024), (1024, 896, 512), (1100, 576, 550), (1024, 256, 1024)]
)
def test_a_cpus_tile_fits_where_p_may_be_kept(monkeypatch, N, room, rows):
    monkeypatch.setitem(tiles.TILE_ROWS, "cpu", 1024)
    assert tiles.tile_shape("cpu", N, 131072, 896, room)[0] == rows


@pytest.mark.parametrize(
    ("N", "D", "head_dtype", "rows", "kept"),
    [
        (8192, 4096, torch.bfloat16, 4096, 1 / 2),
        (8192, 2048, torch.bfloat16, 2048, 1 / 4),
        (8192, 4096, torch.float32, 8192, 1),
        (4096, 4096, torch.bfloat16, 4096, 1),
        (8192, 896, torch.bfloat16, 4096, 0),  # tiles of so few rows would not be worth it
    ],
)
def test_a_gpus_tiles_fit_the_memory_of_a_heads_gradient(gpu_folds, N, D, head_dtype, rows, kept):
    V = 4 * 8192
    with FakeTensorMode():
        hidden_ND = torch.empty(N, D, dtype=torch.bfloat16, requires_grad=True)
        head_VD = torch.empty(V, D, dtype=head_dtype, requires_grad=True)
        labels_N = torch.empty(N, dtype=torch.int64)
        logps_N = linear_logps(hidden_ND, head_VD, labels_N, head_cache_bytes=0)
        logits = sum(map(math.prod, gpu_folds))
        logps_N.backward(torch.empty_like(logps_N))
    assert logits == N * V and sum(map(math.prod, gpu_folds)) == N * V * (2 - kept)
    assert {shape[0] for shape in gpu_folds} == {rows}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_in_the_gradients_own_memory_take_no_other(dtype):
    """Of as many rows as the memory has room for, and of too many."""
    makes_results = use_onednn(batch_invariant=False)  # its products cannot write into memory
    for N in (16, 64):
        hidden_ND, head_VD, labels_N, _ = inputs((N, 16, 32 * BLOCK_T), dtype)
        head_VD.requires_grad_()
        with Live() as live:
            settings = {"backend": "torch", "head_cache_bytes": 0}
            linear_logps(hidden_ND, head_VD, labels_N, **settings).sum().backward()
        results = 2 + makes_results  # of products, a tile's columns of the head large
        kept = 3 * 4 * 4 * 2 * BLOCK_T + results * 4 * 16 * 2 * BLOCK_T
        assert live.peak <= head_VD.nbytes + kept + 32 * (4 * N * 8)


def test_a_gradient_is_right_wherever_its_memory_had_tiles():
    """A head that is not contiguous, one whose rows are of an odd width, and a narrow one."""
    wide_VD = torch.randn(1031, 2 * 31, generator=torch.Generator().manual_seed(0))
    for head_VD in (wide_VD[:, ::2], wide_VD[:, :31].contiguous(), wide_VD[:, :31].bfloat16()):
        hidden_ND, _, labels_N, _ = inputs((20, 31, 1031), head_VD.dtype)
        found = []
        for score in (linear_logps, reference.linear_logps):
            weight_VD = head_VD.detach().requires_grad_()
            settings = {"backend": "torch"} if score is linear_logps else {}
            score(hidden_ND, weight_VD, labels_N, **settings).square().sum().backward()
            found.append(weight_VD.grad.float())
        error = (found[0] - found[1]).abs().max() / found[1].abs().max()
        assert error < (1e-5 if head_VD.dtype == torch.float32 else 1e-2)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1], indirect=True)
def test_a_row_keeps_its_bits_where_tiles_are_no_whole_number_of_vectors(threads):
    """The mass is in the last columns, which are not a whole number of vectors."""
    hidden_ND, head_VD, labels_N, _ = inputs((95, 32, 1057), torch.float32)
    bias_V = torch.zeros(1057)
    bias_V[-33:] = 20.0
    together_N = linear_logps(hidden_ND, head_VD, labels_N, bias_V=bias_V, backend="torch")
    for rows in range(17, 95):
        args = hidden_ND[:rows], head_VD, labels_N[:rows]
        alone_N = linear_logps(*args, bias_V=bias_V, backend="torch")
        assert torch.equal(alone_N, together_N[:rows])


@pytest.mark.parametrize("threads", [1], indirect=True)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_row_keeps_its_bits_beside_statistics(threads, softcap):
    """In a vocabulary that is not one whole vector; the fold sums the entropy, which may differ."""
    hidden_ND, head_VD, labels_N, _ = inputs((500, 32, 9), torch.float32)
    settings = {"stats": STATS, "softcap": softcap, "backend": "torch"}
    together_N, stats = linear_logps(3 * hidden_ND, head_VD, labels_N, **settings)
    for rows in range(17, 500, 7):
        alone_N, found = linear_logps(3 * hidden_ND[:rows], head_VD, labels_N[:rows], **settings)
        assert torch.equal(alone_N, together_N[:rows])
        for name in {*STATS} - {"entropy"}:
            assert torch.equal(found[name], stats[name][:rows]), name


@pytest.mark.usefixtures("small_tiles")
def test_tiles_that_were_kept_go_with_the_backward():
    hidden_ND, head_VD, labels_N, _ = inputs((64, 8, 32 * BLOCK_T), torch.float32)
    head_VD.requires_grad_()
    with Live() as live:
        loss = linear_logps(hidden_ND, head_VD, labels_N, backend="torch").sum()
        held = live.live
        loss.backward(retain_graph=True)
        assert held - live.live > 64 * 32 * BLOCK_T * 4 - head_VD.nbytes, "a loss is often kept"
    first = head_VD.grad.clone()
    loss.backward()
    torch.testing.assert_close(head_VD.grad, 2 * first)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("D", "V"), [(96, 2500), (896, 2096)])  # MKL's threads split sums of 896
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_answer_does_not_depend_on_the_others(dtype, D, V):
    if torch.get_num_threads() > 1 and has_fast_mkl() and not has_good_onednn():
        pytest.skip("MKL's threads split sums, and oneDNN of this torch has two orders of its own")
    hidden_ND, head_VD, labels_N, _ = inputs((1030, D, V), dtype)  # two blocks; 5 to 1029, one
    together_N = linear_logps(hidden_ND, head_VD, labels_N, backend="torch")
    for rows in (slice(0, 1), slice(3, 10), slice(700, 723), slice(5, 1029), slice(1029, 1030)):
        alone_N = linear_logps(hidden_ND[rows], head_VD, labels_N[rows], backend="torch")
        assert torch.equal(alone_N, together_N[rows]), rows


@pytest.mark.parametrize("N", [513, 1030, 261_633])
def test_no_block_of_rows_is_left_with_a_few(N):
    blocks = tiles.even_slices(N, 512)
    assert [0, *(block.stop for block in blocks)] == [*(block.start for block in blocks), N]
    sizes = {block.stop - block.start for block in blocks}
    assert max(sizes) <= 512 and max(sizes) - min(sizes) <= 1
