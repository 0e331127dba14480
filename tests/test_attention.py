"""Attention along a tree by variable-length kernels, which run on a GPU alone: here their plan."""

import inspect
from types import SimpleNamespace

import families
import pytest
import torch
from test_layouts_agree import ROWS
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastdpo import attention
from fastdpo.attention import attend_along_trees, attend_as_before
from fastdpo.batch import PairBatch
from fastdpo.collate import PackedCollator
from fastdpo.model import attach_scorer, score


def flash(query, key, value, cu_q, cu_k, max_q, max_k, scale, window, causal=True, softcap=0.0):
    """What variable-length flash attention computes: causal, aligned at the bottom right."""
    assert causal and window[1] in (0, -1) and cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
    times = query.shape[1] // key.shape[1]
    outputs = []
    for q, k, v in zip(
        query.split(cu_q.diff().tolist()),
        key.split(cu_k.diff().tolist()),
        value.split(cu_k.diff().tolist()),
        strict=True,
    ):
        distance = torch.arange(len(k))[None] - torch.arange(len(q))[:, None] - len(k) + len(q)
        seen = (distance <= 0) & ((window[0] < 0) | (distance >= -window[0]))
        q, k, v = (
            q.transpose(0, 1),
            *(x.transpose(0, 1).repeat_interleave(times, 0) for x in (k, v)),
        )
        scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        if softcap:
            scores = softcap * (scores / softcap).tanh()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)


def torch_2_10(query, key, value, *bounds, is_causal=False):
    return flash(query, key, value, *bounds, None, (-1, 0), is_causal)


def torch_2_11(query, key, value, *bounds, scale=None, window_size=(-1, -1)):
    assert window_size[1] == 0
    return flash(query, key, value, *bounds, scale, window_size)


def torch_2_12(query, key, value, *bounds, scale=None, window_size=(-1, -1), enable_gqa=False):
    assert enable_gqa == (query.shape[1] != key.shape[1]) and window_size[1] == 0
    return flash(query, key, value, *bounds, scale, window_size)


def flash_attn(
    query,
    key,
    value,
    *bounds,
    dropout_p,
    softmax_scale,
    causal,
    window_size,
    softcap,
    deterministic,
):
    assert dropout_p == 0.0
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    assert isinstance(softcap, float)  # its operator takes no None
    return flash(query, key, value, *bounds, softmax_scale, window_size, causal, softcap)


VERSIONS = {"2.10": torch_2_10, "2.11": torch_2_11, "2.12": torch_2_12, "flash-attn": flash_attn}


def logps_and_gradients(model, rows):
    batch = PairBatch.from_inputs(PackedCollator(share=True)(rows))
    model.zero_grad()
    with families.all_in_float64():
        token_logps_C = score(model, batch).token_logps_C
        token_logps_C.sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    return token_logps_C.detach(), gradients


def by_varlen(monkeypatch, version):
    """Take the variable-length plan on this device, with the signature of a torch version."""
    function = VERSIONS[version]
    if function is flash_attn:
        monkeypatch.setattr(attention, "flash_attn_varlen_func", function)
    else:
        names = frozenset(inspect.signature(function).parameters)
        monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
        monkeypatch.setattr(attention, "varlen_attn", function)
        monkeypatch.setattr(attention, "VARLEN_ARGUMENTS", names)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    choose, chosen = attention._varlen_kernel, []

    def on_a_gpu(query, value, *settings):
        half = SimpleNamespace(is_cuda=True, device=None, dtype=torch.bfloat16, shape=query.shape)
        chosen.append(choose(half, half, *settings))
        return chosen[-1]

    monkeypatch.setattr(attention, "_varlen_kernel", on_a_gpu)
    return chosen


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("family", ["llama", "mistral", "granite", "gemma2"])
@pytest.mark.parametrize("rows", [ROWS, ROWS[-1:]], ids=["branches", "trunks-alone"])
def test_the_variable_length_plan_equals_attention_by_segments(family, version, rows, monkeypatch):
    model = families.model(family)
    attach_scorer(model)
    attend_along_trees(model)
    segments = logps_and_gradients(model, rows)
    chosen = by_varlen(monkeypatch, version)
    for ours, theirs in zip(logps_and_gradients(model, rows), segments, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    can = {"llama": VERSIONS, "granite": VERSIONS, "mistral": [*VERSIONS][1:]}  # a window
    can = can.get(family, ["flash-attn"])  # and a cap
    assert [kernel is not None for kernel in chosen] == [version in can] * 2


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3"])
def test_autocast_rules_all_three_inputs_of_attention(family, monkeypatch):
    """Else float32 weights, whose rotated queries are float32, would keep flash attention away."""
    model = families.model(family, torch.float32)
    attach_scorer(model)
    attend_along_trees(model)
    dtypes = set()

    def by_segments(*qkv, **settings):
        dtypes.update(x.dtype for x in qkv[:3])
        return run_by_segments(*qkv, **settings)

    run_by_segments = attention._by_segments
    monkeypatch.setattr(attention, "_by_segments", by_segments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        score(model, PairBatch.from_inputs(PackedCollator(share=True)(ROWS)))
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize(
    ("changed", "runs"),
    [
        ({}, True),
        ({"dtype": torch.float16, "K": 256}, True),
        ({"dtype": torch.float32}, False),
        ({"K": 12}, False),
        ({"K": 264}, False),
        ({"value_K": 32}, False),  # latent attention
        ({"device": "cpu"}, False),
        ({"capability": (7, 5)}, False),
        ({"dropout": 0.1}, False),
        ({"softcap": 50.0}, False),
    ],
)
def test_only_what_flash_attention_can_run_is_handed_to_it(changed, runs, monkeypatch):
    case = {"dtype": torch.bfloat16, "K": 64, "device": "cuda", "capability": (9, 0), **changed}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case["capability"])
    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    with FakeTensorMode():
        query, value = (
            torch.empty(1, 2, 3, K, dtype=case["dtype"], device=case["device"])
            for K in (case["K"], case.get("value_K", case["K"]))
        )
    rest = None, case.get("softcap"), case.get("dropout", 0.0)
    assert (attention._varlen_kernel(query, value, *rest) is not None) == runs


@pytest.mark.parametrize("chooses", [True, False])
def test_torchs_own_kernel_is_flash_attention_alone(chooses, monkeypatch):
    """cuDNN, which torch 2.15 prefers, would make a plan for the lengths of each batch."""
    monkeypatch.setattr(attention, "CHOOSES_BACKEND", chooses)
    enabled = []

    def varlen(query, *arguments, **settings):
        enabled.append((torch._C._get_flash_sdp_enabled(), torch._C._get_cudnn_sdp_enabled()))
        return query

    monkeypatch.setattr(attention, "varlen_attn", varlen)
    x, settings = torch.zeros(3, 2, 8), {"window_size": (-1, 0), "softcap": None, "dropout": 0.0}
    attention._torch_varlen(x, x, x, scale=1.0, **settings)
    assert enabled == [(True, not chooses)]


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["plain", "capped"])
def test_attention_drops_weights_and_scales_by_the_heads_size(softcap):
    tree = PackedCollator(share=True)(ROWS)["tree"]
    T = tree.branches[-1].stop
    query, key, value = torch.randn(1, 4, T, 8), torch.randn(1, 2, T, 8), torch.ones(1, 2, T, 8)

    def attend(value, **settings):
        settings = {"tree": tree, "softcap": softcap} | settings
        module = torch.nn.Module()
        return attention.tree_attention(
            module, query, key, value, None, native=sdpa_attention_forward, **settings
        )[0]

    assert (attend(value) - 1).abs().max() < 1e-6
    dropped = attend(value, dropout=0.5)
    assert dropped.std() > 0.1 and abs(dropped.mean() - 1) < 0.1
    value = torch.randn_like(value)
    assert torch.equal(attend(value), attend(value, scaling=8**-0.5))


def test_a_compiler_leaves_each_batchs_tree_alone():
    tree = PackedCollator(share=True)(ROWS)["tree"]
    x = torch.randn(1, 2, tree.branches[-1].stop, 8)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    def attend(x):
        return attention.tree_attention(
            None, 2 * x, x, x, None, native=sdpa_attention_forward, tree=tree
        )[0]

    assert torch.equal(torch.compile(attend, backend=backend)(x), attend(x))
    calls = [node.name for g in graphs for node in g.graph.nodes if node.op.startswith("call")]
    assert calls == ["mul"]


@pytest.mark.parametrize(
    ("settings", "module_is_causal", "message"),
    [
        ({"s_aux": torch.zeros(4)}, True, "got s_aux"),
        ({"position_bias": torch.zeros(1)}, True, "got position_bias"),
        ({"is_causal": False}, True, "want causal attention"),
        ({}, False, "want causal attention"),
    ],
)
def test_attention_that_a_tree_does_not_describe_is_refused(settings, module_is_causal, message):
    tree, module = PackedCollator(share=True)(ROWS)["tree"], torch.nn.Module()
    module.is_causal = module_is_causal
    x = torch.zeros(1, 4, 3, 8)
    with pytest.raises(ValueError, match=message):
        attention.tree_attention(
            module, x, x, x, None, native=sdpa_attention_forward, tree=tree, **settings
        )


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn2"])
def test_attention_that_transformers_imports_by_name_keeps_its_name(name, monkeypatch):
    model = families.model("llama")
    attach_scorer(model)
    attend_along_trees(model)
    expected = logps_and_gradients(model, ROWS)
    attend_as_before(model)
    calls = []

    def flash(module, query, key, value, attention_mask, **settings):
        calls.append(settings.get("tree"))
        return sdpa_attention_forward(module, query, key, value, None, **settings)

    for mapping in (AttentionInterface._global_mapping, ALL_ATTENTION_FUNCTIONS._global_mapping):
        monkeypatch.setitem(mapping, name, flash)
    model.config._attn_implementation_internal = name
    attend_along_trees(model)
    attend_along_trees(model)
    assert model.config._attn_implementation == name
    for ours, theirs in zip(logps_and_gradients(model, ROWS), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert calls == []
    with families.all_in_float64():
        model(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))
    assert calls == [None] * 2
    attend_as_before(model)
    attend_as_before(model)  # a reference's, after the policy's: the name is of both
    assert ALL_ATTENTION_FUNCTIONS[name] is flash


def test_attention_that_two_trainers_have_replaced_is_put_back_at_once():
    model = families.model("llama")
    name = model.config._attn_implementation
    attend_along_trees(model)
    attend_along_trees(model)
    attend_as_before(model)
    assert model.config._attn_implementation == name


def test_a_window_that_a_model_keeps_in_its_mask_is_refused():
    """A Tree is no mask: pairs longer than the window would see past it."""
    settings = {"sliding_window": 6, "num_local_experts": 4, **families.EXPERTS}
    model = families.model("phimoe", torch.float32, **settings)
    attach_scorer(model)
    attend_along_trees(model)
    with pytest.raises(ValueError, match="sliding window as an argument, got 6 in the mask alone"):
        score(model, PairBatch.from_inputs(PackedCollator(share=True)(ROWS)))
