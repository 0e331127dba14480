"""Heads of bitsandbytes' layers, dequantised a tile at a time."""

from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

from fastdpo import ops
from fastdpo.kernels import products, tiles
from fastdpo.policy import make_ready
from fastdpo.quantised import forbid_repacking, quantised_rows

V, D, BLOCK, OUTER = 40, 64, 32, 32  # 80 blocks in three outer ones, the last one ragged


def int8_layer(weight_VD):
    largest_V = weight_VD.abs().amax(1)
    codes_VD = (weight_VD / largest_V[:, None] * 127).round().to(torch.int8)
    weight = nn.Parameter(codes_VD, requires_grad=False)
    weight.SCB = largest_V
    return SimpleNamespace(weight=weight), codes_VD * largest_V[:, None] / 127


def four_bit_layer(weight_VD, nested=False, kept_in=torch.uint8):
    code = torch.linspace(-1, 1, 16)
    blocks = weight_VD.view(-1, BLOCK)
    largest, state2, offset = blocks.abs().amax(1), None, None
    absmax = largest
    if nested:
        code2, offset = torch.linspace(-1, 1, 256), largest.mean()
        scales = torch.stack([block.abs().max() for block in (largest - offset).split(OUTER)])
        scale = scales.repeat_interleave(OUTER)[: len(largest)]
        absmax = ((largest - offset) / scale + 1).mul(127.5).round().to(torch.uint8)
        state2 = SimpleNamespace(code=code2, absmax=scales, blocksize=OUTER)
        largest = code2[absmax.long()] * scale + offset
    bits = (blocks / largest[:, None] - code[:, None, None]).abs().argmin(0)
    packed = (bits.view(-1)[::2] << 4 | bits.view(-1)[1::2]).to(torch.uint8)[:, None]
    weight = nn.Parameter(packed.view(-1).view(kept_in)[:, None], requires_grad=False)
    weight.quant_state = SimpleNamespace(
        shape=torch.Size([V, D]),
        code=code,
        absmax=absmax,
        blocksize=BLOCK,
        nested=nested,
        state2=state2,
        offset=offset,
    )
    return SimpleNamespace(weight=weight), (code[bits] * largest[:, None]).view(V, D)


LAYERS = {
    "int8": int8_layer,
    "4-bit": four_bit_layer,
    "4-bit-nested": lambda weight_VD: four_bit_layer(weight_VD, nested=True),
    "4-bit-kept-as-bfloat16": lambda weight_VD: four_bit_layer(weight_VD, kept_in=torch.bfloat16),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_quantised_head_answers_as_its_dequantised_self(make, monkeypatch):
    monkeypatch.setitem(tiles.TILE_COLUMNS, "cpu", 16)  # three tiles, the last one ragged
    monkeypatch.setitem(products.MADE_AT_ONCE, "cpu", 5 * D)  # a few rows of each at a time
    torch.manual_seed(0)
    layer, head_VD = make(torch.randn(V, D))
    rows = quantised_rows(layer, torch.float32)
    torch.testing.assert_close(rows[3:17], head_VD[3:17])
    labels_N = torch.randint(0, V, (20,))
    torch.testing.assert_close(rows[labels_N], head_VD[labels_N])

    answers = []
    for head in (rows, head_VD):
        hidden_ND = torch.linspace(-1, 1, 20 * D).view(20, D).requires_grad_()
        up_VR = torch.linspace(-1, 1, V * 2).view(V, 2).requires_grad_()
        logps_N, stats = ops.linear_logps(
            hidden_ND,
            head,
            labels_N,
            low_rank=(hidden_ND[:, :2], up_VR),
            stats=("mean_logit", "entropy"),
            head_cache_bytes=0,
        )
        logps_N.sum().backward()
        answers.append((logps_N, hidden_ND.grad, up_VR.grad, *stats.values()))
    for ours, own in zip(*answers, strict=True):
        torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_autocast_narrows_a_quantised_head_as_it_does_any(make):
    layer, head_VD = make(torch.randn(V, D))
    hidden_ND, labels_N = torch.randn(20, D), torch.randint(0, V, (20,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = [
            ops.linear_logps(hidden_ND, head, labels_N)
            for head in (quantised_rows(layer, torch.float32), head_VD)
        ]
    torch.testing.assert_close(*logps, atol=1e-4, rtol=1e-5)


def test_an_int8_layers_largest_values_are_found_where_its_forward_puts_them():
    layer, head_VD = int8_layer(torch.randn(V, D))
    layer.state = SimpleNamespace(SCB=layer.weight.SCB)
    layer.weight.SCB = None
    torch.testing.assert_close(quantised_rows(layer, torch.float32)[:], head_VD)


def test_what_cannot_be_read_is_refused():
    layer, _ = four_bit_layer(torch.randn(V, D))
    layer.weight.quant_state.packing_format_for_cpu = True  # bitsandbytes' own forward does that
    with pytest.raises(ValueError, match="int8 or 4 bits"):
        quantised_rows(layer, torch.float32)
    layer, _ = four_bit_layer(torch.randn(V, D))
    layer.weight.quant_state.blocksize = 128
    with pytest.raises(ValueError, match="whole blocks"):
        quantised_rows(layer, torch.float32)
    layer.weight.quant_state = None
    with pytest.raises(ValueError, match="int8 or 4 bits"):
        quantised_rows(layer, torch.float32)
    assert quantised_rows(nn.Linear(3, 4), torch.float32) is None


def test_a_forward_leaves_the_4_bit_layers_of_a_policy_as_they_are():
    layer = nn.Linear(3, 4)
    layer.support_avx512bf16_for_cpu = 1  # as bitsandbytes' layers say where the CPU can
    policy = tiny.model("llama", 300)
    policy.extra = layer
    make_ready(policy, None, pad_token_id=0, without_dropout=True)
    assert not layer.support_avx512bf16_for_cpu


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_layers_train_after_a_forward_that_does_not(nested):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(2 * D, D, bias=False, compress_statistics=nested).to("cpu")
    layer.support_avx512bf16_for_cpu = True
    forbid_repacking(layer)
    hidden_ND = torch.randn(3, 2 * D)
    with torch.no_grad():
        output_ND = layer.eval()(hidden_ND)
    rows = quantised_rows(layer, torch.float32)[:]
    torch.testing.assert_close(output_ND, hidden_ND @ rows.T, atol=1e-4, rtol=1e-4)
    layer.train()(hidden_ND.requires_grad_()).sum().backward()
    torch.testing.assert_close(hidden_ND.grad[0], rows.sum(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4", "nf4-nested"])
def test_bitsandbytes_layers_are_read_as_it_reads_them(kind):
    bnb = pytest.importorskip("bitsandbytes")
    weight_VD = torch.randn(V, 2 * D)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(2 * D, V, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight_VD, requires_grad=False, has_fp16_weights=False)
        layer.to("cpu")
        truth_VD = layer.weight.data.float() * layer.weight.SCB[:, None] / 127
    else:
        layer = bnb.nn.Linear4bit(2 * D, V, bias=False)
        layer.weight = bnb.nn.Params4bit(
            weight_VD,
            requires_grad=False,
            quant_type=kind[:3],
            compress_statistics=kind.endswith("nested"),
        )
        layer.to("cpu")
        truth_VD = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    torch.testing.assert_close(quantised_rows(layer, torch.float32)[:], truth_VD)
