"""The gradient of a head's bias, summed over all rows."""

import pytest
import torch
from tiny_heads import inputs
from watches import counting_flops

from fastdpo.kernels import reference, tiles
from fastdpo.kernels.linear_logps import linear_logps

pytestmark = pytest.mark.usefixtures("small_tiles")


def dbias(function, hidden_ND, head_VD, labels_N, bias_V, **settings):
    leaf = bias_V.clone().requires_grad_()
    function(hidden_ND, head_VD, labels_N, bias_V=leaf, **settings).sum().backward()
    return leaf.grad


def exact_dbias(hidden_ND, head_VD, labels_N, bias_V):
    wide = hidden_ND.double(), head_VD.double(), labels_N, bias_V.double()
    return dbias(reference.linear_logps, *wide)


def test_a_bias_trains_where_it_alone_does(backend, device):
    args = inputs((5, 8, 100), torch.float32, device, bias=True)
    ours, plain = dbias(linear_logps, *args, backend=backend), dbias(reference.linear_logps, *args)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)


def test_a_frozen_head_with_a_bias_takes_two_products_and_keeps_what_its_backward_reads():
    N, D, V = 16, 16, 2 * tiles.TILE_COLUMNS["cpu"]
    hidden_ND, head_VD, labels_N, bias_V = inputs((N, D, V), torch.float32, bias=True)
    hidden_ND.requires_grad_()
    with counting_flops() as counter:
        logps_N = linear_logps(
            hidden_ND, head_VD, labels_N, bias_V=bias_V, backend="torch", head_cache_bytes=0
        )
        kept = [x for x in logps_N.grad_fn.saved_tensors if x is not None]
        logps_N.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * N * V * D
    assert sum(x.nbytes for x in kept) == 4 * N * D


def test_a_narrow_biass_gradient_is_summed_in_float32(device):
    """Over many blocks of rows: in bfloat16 a sum stops growing at 256 times what is added."""
    args = inputs((4000, 4, 8), torch.bfloat16, device, bias=True)
    exact_V = exact_dbias(*args)
    error = (dbias(linear_logps, *args, backend="torch") - exact_V).abs().max()
    assert error <= torch.finfo(torch.bfloat16).eps * exact_V.abs().max()


@pytest.mark.usefixtures("narrow_operands")
def test_a_wide_biass_gradient_keeps_its_digits_on_a_gpu(monkeypatch, device):
    """p is in bfloat16, and its roundings average out; a sum in bfloat16 would have its own."""
    monkeypatch.setitem(tiles.TILE_ROWS, device.type, 4096)
    hidden_ND, head_VD, labels_N, _ = inputs((4000, 4, 8), torch.bfloat16, device)
    args = hidden_ND, head_VD, labels_N, torch.zeros(8, device=device)
    exact_V = exact_dbias(*args)
    error = (dbias(linear_logps, *args, backend="torch") - exact_V).abs().max()
    assert error < 2**-11 * exact_V.abs().max()
