"""The products of linear_logps: which library takes them, with the same result."""

import pytest
import torch

from fastdpo.kernels import fold, products


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("accumulate", [False, True])
def test_onednns_product_is_torchs_for_any_strides(accumulate):
    """The tiles of the walk: rows of a wider tensor, transposed ones, the same row repeated."""
    torch.manual_seed(0)
    wide_NK, repeated_NK = torch.randn(20, 50), torch.randn(1, 33).expand(20, 33)
    for a in (wide_NK[:, 7:40], torch.randn(33, 20).T, repeated_NK):
        for b in (torch.randn(33, 40)[:, ::2], torch.randn(11, 33).T):
            expected = torch.randn(20, b.shape[1])
            out = expected.clone()
            products.torch_product(a, b, expected, accumulate)
            products.onednn_product(a, b, out, accumulate)
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fast_mkl", "threads", "batch_invariant", "wanted"),
    [(False, 1, False, 1), (True, 1, True, 0), (True, 2, False, 0), (True, 2, True, 1)],
)
def test_float32_products_go_to_onednn_where_it_is_better(
    monkeypatch, fast_mkl, threads, batch_invariant, wanted
):
    monkeypatch.setattr(products, "has_good_onednn", lambda: True)
    monkeypatch.setattr(products, "has_fast_mkl", lambda: fast_mkl)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    taken = []
    monkeypatch.setattr(products, "onednn_product", lambda *args: taken.append(args))
    a, b, out = torch.ones(3, 4), torch.ones(4, 5), torch.ones(3, 5)
    settings = {"accumulate": False, "batch_invariant": batch_invariant}
    products.product(a, b, out, **settings)
    assert len(taken) == wanted
    products.product(a.double(), b.double(), out.double(), **settings)
    products.product(a[:, :0], b[:0], out, **settings)
    assert len(taken) == wanted, "float64 and sums of no term are torch's"
    assert (out == 0).all()


@pytest.mark.parametrize(
    ("capability", "invariant", "good"),
    [("AVX512", True, True), ("AVX512", False, False), ("AVX2", True, False)],
)
def test_onednn_is_good_with_avx512_and_batch_invariance(monkeypatch, capability, invariant, good):
    def product(a, b, out, accumulate):
        out.copy_(a.sum(1, keepdim=True) * b.sum(0) * (1 if invariant else len(a)))

    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "onednn_product", product)
    assert products.has_good_onednn.__wrapped__() == good


@pytest.mark.parametrize(
    ("vendor", "has_mkl", "fast"),
    [("GenuineIntel", True, True), ("GenuineIntel", False, False), ("AuthenticAMD", True, False)],
)
def test_mkl_is_fast_on_intels_cpus(monkeypatch, tmp_path, vendor, has_mkl, fast):
    file = tmp_path / "cpuinfo"
    file.write_text(f"vendor_id : {vendor}\nflags : avx512f")
    monkeypatch.setattr(products, "CPU_INFO", file)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    assert products.has_fast_mkl.__wrapped__() == fast


@pytest.mark.parametrize("fast_mkl", [False, True])
def test_exp_is_as_good_by_either_library(monkeypatch, fast_mkl):
    monkeypatch.setattr(fold, "has_fast_mkl", lambda: fast_mkl)
    torch.manual_seed(0)
    x = -30 * torch.rand(64, 77)
    made, wanted = fold._exp_(x.clone()).double(), x.double().exp()
    assert ((made - wanted).abs() / wanted).max() < 4e-6
    assert torch.equal(fold._exp_(x[5:6].clone()), made[5:6].float()), "whatever the other rows"


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_onednn_is_tried_in_float32_whatever_torchs_default_is():
    before, wanted = torch.get_default_dtype(), products.is_onednn_batch_invariant()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert products.is_onednn_batch_invariant() == wanted
    finally:
        torch.set_default_dtype(before)
