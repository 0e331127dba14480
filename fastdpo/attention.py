"""Attention along a Tree, for every model that asks transformers' attention interface for one.

`attend_along_trees` puts it in place of a model's own attention. A forward that passes `tree=` then
attends along it; any other attends as the model did before.

    by segments     each trunk and each branch by itself; any device
    varlen          one launch of variable-length flash attention; CUDA, 16 bits or autocast to 16

In both, a branch's queries see the keys of its trunk's beginning and then its own, aligned at the
bottom right; autograd adds the beginning's gradients up.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastdpo.tree import Tree

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # not installed, or built for another torch
    flash_attn_varlen_func = None

PREFIX = "fastdpo_"
HALF = (torch.float16, torch.bfloat16)
VARLEN_ARGUMENTS = frozenset(inspect.signature(varlen_attn).parameters)  # they grew with torch
# varlen_attn picks one of several kernels, unless sdpa_kernel says which. (torch.__version__ is a
# TorchVersion, so that this compares versions and not texts.)
CHOOSES_BACKEND = torch.__version__ >= "2.15"


def attend_along_trees(causal_lm: PreTrainedModel) -> None:
    """Let `causal_lm` attend along a Tree where its forward is given one, else as it does now."""
    name = causal_lm.config.get_text_config()._attn_implementation
    if name.startswith(PREFIX):
        return
    if not _is_looked_up(name):
        _register(name)
        causal_lm.set_attn_implementation(PREFIX + name)
    elif not _is_ours(native := ALL_ATTENTION_FUNCTIONS[name]):
        AttentionInterface.register(name, functools.partial(tree_attention, native=native))


def _register(name: str) -> None:
    native = _eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    ours = functools.partial(tree_attention, native=native)
    AttentionInterface.register(PREFIX + name, ours)
    # where there is no tree, its masks are made as before
    AttentionMaskInterface.register(PREFIX + name, AttentionMaskInterface()[name])


def attend_as_before(causal_lm: PreTrainedModel) -> None:
    """Undo attend_along_trees."""
    name = causal_lm.config.get_text_config()._attn_implementation
    if not _is_looked_up(name):
        causal_lm.set_attn_implementation(name.removeprefix(PREFIX))
    elif _is_ours(ALL_ATTENTION_FUNCTIONS[name]):
        AttentionInterface.register(name, ALL_ATTENTION_FUNCTIONS[name].keywords["native"])


def _is_looked_up(name: str) -> bool:
    """Whether transformers imports what this name stands for: flash attention, a kernel of the Hub.

    Such a name must stay as it is, so that ours is registered in its place, for all models alike.
    """
    return "flash" in name or "/" in name


def _is_ours(attend: Callable) -> bool:
    return isinstance(attend, functools.partial) and attend.func is tree_attention


def _eager(module: nn.Module, *arguments: Any, **settings: Any) -> tuple[Tensor, Tensor | None]:
    """A function of each modelling file, registered nowhere."""
    attend = sys.modules[type(module).__module__].eager_attention_forward
    return attend(module, *arguments, **settings)


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    native: Callable,
    **settings: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' attention functions return; along a tree (1, T, H, K), and no weights.

    query: (1, H, T, K); key, value: (1, G, T, K); settings: tree, scaling, dropout, sliding_window
    and softcap, and whatever else a model passes. native: what attends where there is no tree.
    ValueError for attention that a Tree does not describe: sinks, biases by position, two
    directions, a window that is in the mask alone.
    """
    if settings.get("tree") is None:
        return native(module, query, key, value, attention_mask, **settings)
    for name in ("s_aux", "position_bias"):
        if settings.get(name) is not None:
            raise ValueError(f"want attention by dot products alone, got {name}")
    if not settings.get("is_causal", getattr(module, "is_causal", True)):
        raise ValueError("want causal attention, got attention in both directions")
    window = settings.get("sliding_window")
    if window is None and (in_mask := _window_of(module)) is not None:
        raise ValueError(f"want a sliding window as an argument, got {in_mask} in the mask alone")
    scaling = settings.get("scaling")
    output = _along_tree(
        query,
        key,
        value,
        settings["tree"],
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=settings.get("dropout") or 0.0,
        window=window,
        softcap=settings.get("softcap"),
    )
    return output, None


def _window_of(module: nn.Module) -> int | None:
    """The sliding window that this layer has by its config."""
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    kinds = getattr(config, "layer_types", None)
    if kinds and layer is not None and kinds[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


@torch.compiler.disable  # lengths differ from batch to batch: it would be compiled again for each
def _along_tree(query, key, value, tree: Tree, *, scale, dropout, window, softcap) -> Tensor:
    query, key, value = _autocast(query, key, value)
    varlen = _varlen_kernel(query, value, window, softcap, dropout)
    settings = {"scale": scale, "window": window, "softcap": softcap, "dropout": dropout}
    return (_by_segments if varlen is None else varlen)(query, key, value, tree, **settings)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast makes of attention's inputs; varlen kernels are not among those it knows.

    Float32 weights under autocast give values in 16 bits, but queries and keys in float32: the
    rotation by position, in the embeddings' dtype, widens them.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def _varlen_kernel(query: Tensor, value, window, softcap, dropout) -> Callable | None:
    """The variable-length kernel that can run this attention, None for none."""
    if not (query.is_cuda and query.dtype in HALF):
        return None
    K, is_ampere = query.shape[-1], torch.cuda.get_device_capability(query.device) >= (8, 0)
    # torch's operator does not pad head sizes to multiples of 8, and wants one for all three
    if K > 256 or K % 8 or value.shape[-1] != K or not is_ampere:
        return None
    if flash_attn_varlen_func is not None:
        return functools.partial(_by_varlen, kernel=_flash_attn)
    if softcap is None and not dropout and (window is None or "window_size" in VARLEN_ARGUMENTS):
        return functools.partial(_by_varlen, kernel=_torch_varlen)
    return None


def _by_segments(query, key, value, tree: Tree, **settings) -> Tensor:
    """Each trunk and each branch by itself; (1, T, H, K)."""
    lengths = [s.stop - s.start for s in (*tree.trunks, *tree.branches)]
    # one split and one cat: a slice's backward writes zeros for all that it left out
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    trunk_at = {trunk.start: i for i, trunk in enumerate(tree.trunks)}
    outputs = []
    for i, segment in enumerate((*tree.trunks, *tree.branches)):
        seen_key, seen_value = keys[i], values[i]
        if i >= len(tree.trunks):
            t = trunk_at[segment.trunk_start]
            seen_key, seen_value = (
                torch.cat([x[t][:, :, : segment.shared], x[i]], dim=2) for x in (keys, values)
            )
        outputs.append(_attend(queries[i], seen_key, seen_value, **settings).transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _attend(query, key, value, *, scale, window, softcap, dropout) -> Tensor:
    """Causal attention of (1, H, n, K) queries that are the last n of their keys; as query."""
    n, seen = query.shape[2], key.shape[2]
    if softcap is not None:
        mask = _causal_mask(n, seen, window, query.device)
        return _softcapped(query, key, value, mask, scale, softcap, dropout)
    is_causal = n == seen and (window is None or window >= seen)
    mask = None if is_causal else _causal_mask(n, seen, window, query.device)
    if query.is_cuda and (mask is not None or query.dtype not in HALF):
        # sdpa has only its slowest kernel for grouped heads with a mask or in float32
        key, value = _ungrouped(query, key, value)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _causal_mask(n: int, seen: int, window: int | None, device: torch.device) -> Tensor:
    """(n, seen), True where the last n of `seen` positions look: back to `window`, themselves
    included."""
    mask = torch.ones(n, seen, dtype=torch.bool, device=device).tril_(seen - n)
    return mask if window is None else mask.triu_(seen - n - window + 1)


def _ungrouped(query, key, value) -> tuple[Tensor, Tensor]:
    """A key and a value head for every query head."""
    times = query.shape[1] // key.shape[1]
    return key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)


def _softcapped(query, key, value, mask, scale, softcap, dropout) -> Tensor:
    """As Gemma 2's own: scores capped by tanh, softmax in float32."""
    key, value = _ungrouped(query, key, value)
    scores = softcap * torch.tanh(query @ key.mT * (scale / softcap))
    scores = scores.masked_fill(~mask, -float("inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(query.dtype, torch.float32))
    return F.dropout(weights.to(query.dtype), dropout) @ value


def _by_varlen(query, key, value, tree: Tree, *, kernel, window, **settings) -> Tensor:
    """All trunks and branches at once, over gathered keys; (1, T, H, K)."""
    # (T, heads, K); in a backward, x[0] would write zeros and then a copy
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    if tree.branches:
        key, value = (x.index_select(0, tree.key_indices) for x in (key, value))
    bounds = tree.cu_seqlens_q, tree.cu_seqlens_k, tree.max_seqlen_q, tree.max_seqlen_k
    settings["window_size"] = (-1 if window is None else window - 1, 0)
    return kernel(query, key, value, *bounds, **settings)[None]


def _torch_varlen(query, key, value, *bounds, scale, window_size, softcap, dropout) -> Tensor:
    """torch's varlen_attn; arguments that this torch does not have yet are emulated."""
    if "window_size" in VARLEN_ARGUMENTS:
        settings = {"scale": scale, "window_size": window_size}
    else:  # torch 2.10
        query, settings = query * (scale * query.shape[-1] ** 0.5), {"is_causal": True}
    if "enable_gqa" in VARLEN_ARGUMENTS:  # else grouped heads pass unasked
        settings["enable_gqa"] = query.shape[1] != key.shape[1]
    # torch 2.15 would take cuDNN for the trunks: a plan of its own for each batch's lengths, and a
    # backward that torch.use_deterministic_algorithms does not control. (Asking costs 10 us of CPU
    # time, so older ones, which take flash attention for causal windows, are not asked.)
    asked = sdpa_kernel(SDPBackend.FLASH_ATTENTION) if CHOOSES_BACKEND else nullcontext()
    with asked:
        return varlen_attn(query, key, value, *bounds, **settings)


def _flash_attn(query, key, value, *bounds, scale, window_size, softcap, dropout) -> Tensor:
    """The flash-attn package's: it has soft-capping and dropout.

    Its backward adds in one order only where it is asked to, torch's where torch is.
    """
    return flash_attn_varlen_func(
        query,
        key,
        value,
        *bounds,
        dropout_p=dropout,
        softmax_scale=scale,
        causal=True,
        window_size=window_size,
        softcap=softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


for name in ("eager", "sdpa"):  # a model that was pickled once trained asks for these names
    _register(name)
