"""linear_logps: hidden states, head, labels -> log-probabilities; the (N, V) logits never exist.

    z_NV   = cap(scale * (hidden_ND headᵀ + bias_V))        cap(x) = softcap * tanh(x / softcap)
    logp_N = z[n, label] - lse[n]                            lse = log sum_v exp(z)

The vocabulary is walked once, a tile of columns at a time, with a running maximum
(arXiv:1805.02867). The gradient depends on the loss only through one number a row, dlogp:

    dlogp / dhidden = scale * (c[label] (1 - p[label]) head[label] - sum_v p_v c_v head_v)
                                                     v not the label, c = 1 - (z / softcap)²

so the walk sums its second term as well (attention with the head as keys and values, the label left
out), and the backward of a frozen head is one row scale: two products in all. A trained head takes
a third, and a fourth for the tiles of p that were not kept. An adapter on the head adds a term
down_NR upᵀ to the products, as thin as its rank R. Derivation: README.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.kernels.fold import FOLDS, RunningSoftmax
from fastdpo.kernels.kept_tiles import KeptTiles
from fastdpo.kernels.products import HeadRows
from fastdpo.kernels.row_statistics import STATS, statistics, stats_with_sums
from fastdpo.kernels.tiles import Settings, Tiles
from fastdpo.kernels.vocabulary_walk import walk, weight_gradients

MIN_ROWS = 16  # fewer are padded: a product of fewer rows may sum in another order
# with the gradient's own memory, room for all p of 8192 rows of a bfloat16 head of 131072 x 4096
HEAD_CACHE_BYTES = 1 << 30


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings: Settings, labels_N, bias_V, *factors):
        """factors: x_NK and w_VK of each term, one after the other."""
        tiles = Tiles(settings.terms(*factors), bias_V, labels_N, settings)
        softmax = RunningSoftmax.start(
            len(labels_N), settings.wide, labels_N.device, stats_with_sums(tiles)
        )
        kept = KeptTiles(tiles)
        u_of_terms = walk(tiles, softmax, kept)
        token_logps_N, log_total_N, dlogp_dlabel_N = _logps_and_slopes(tiles, softmax)
        lse_N = softmax.peak_N + log_total_N
        stats = statistics(tiles, softmax, lse_N, u_of_terms)  # before u is overwritten
        dlogp_dx_of_terms = _finish_dlogp_dx(u_of_terms, tiles, softmax.total_N, dlogp_dlabel_N)

        for_weights = ()
        if settings.any_weight_needs_grad:
            tensors = (x if isinstance(x, Tensor) else None for x in factors)
            for_weights = labels_N, bias_V, softmax.peak_N, log_total_N, dlogp_dlabel_N, *tensors
        ctx.save_for_backward(*dlogp_dx_of_terms, *for_weights)
        # a HeadRows is no tensor: save_for_backward would refuse it
        ctx.head_rows = None if isinstance(factors[1], Tensor) else factors[1]
        ctx.settings, ctx.kept, ctx.x_dtypes = settings, kept, [x.dtype for x in factors[::2]]
        ctx.mark_non_differentiable(*stats)
        return (token_logps_N, *stats)

    @staticmethod
    def backward(ctx, dlogps_N, *_):
        if torch.is_grad_enabled():  # by create_graph=True
            raise RuntimeError("linear_logps has no second derivative: want create_graph=False")
        settings, num_terms = ctx.settings, len(ctx.x_dtypes)
        saved = ctx.saved_tensors  # read once: a checkpoint hands them out no more often
        dlogp_dx_of_terms, for_weights = saved[:num_terms], saved[num_terms:]
        dfactors, dbias_V = [None] * 2 * num_terms, None
        for k, dlogp_dx_NK in enumerate(dlogp_dx_of_terms):
            if dlogp_dx_NK is not None:
                dx_NK = torch.empty_like(dlogp_dx_NK, dtype=ctx.x_dtypes[k])
                dfactors[2 * k] = torch.mul(dlogp_dx_NK, dlogps_N[:, None], out=dx_NK)
        if settings.any_weight_needs_grad:
            labels_N, bias_V, peak_N, log_total_N, dlogp_dlabel_N, *factors = for_weights
            if ctx.head_rows is not None:
                factors[1] = ctx.head_rows
            tiles = Tiles(settings.terms(*factors), bias_V, labels_N, settings)
            # where a row's answer is NaN, so are all gradients
            p_coefficient_N = dlogps_N * -settings.scale + 0 * dlogp_dlabel_N
            # dbias_V is float32: autograd casts it to the bias's dtype
            dfactors[1::2], dbias_V = weight_gradients(
                tiles, p_coefficient_N, peak_N, log_total_N, dlogp_dlabel_N, ctx.kept
            )
        return None, None, dbias_V, *dfactors


def _logps_and_slopes(tiles: Tiles, softmax: RunningSoftmax) -> tuple[Tensor, Tensor, Tensor]:
    """token_logps_N; log_total_N, the log of the softmax's sum; and dlogp_dlabel_N.

    The last is c (1 - p), the slope of logp in the label's logit before the cap.
    """
    settings, log_total_N = tiles.settings, softmax.total_N.log()
    if settings.softcap is not None:
        # tanh makes a finite logit of an infinite hidden state: 0 * inf puts the NaN back
        for term in tiles.terms:
            norm_N = torch.linalg.vector_norm(term.x_NK, torch.inf, 1, dtype=settings.wide)
            log_total_N += 0 * norm_N
    # the peak first: lse has the rounding of a logit, which may be larger than logp
    token_logps_N = softmax.label_logit_N - softmax.peak_N - log_total_N
    dlogp_dlabel_N = -token_logps_N.expm1()  # NaN as token_logps_N
    if settings.softcap is not None:
        dlogp_dlabel_N *= 1 - (softmax.label_logit_N / settings.softcap).square()
    return token_logps_N, log_total_N, dlogp_dlabel_N


def _finish_dlogp_dx(
    u_of_terms: list[Tensor | None], tiles: Tiles, total_N, dlogp_dlabel_N
) -> list[Tensor | None]:
    """Each u, overwritten by dlogp/dx = scale * (dlogp_dlabel * w[label] - u / total)."""
    for term, u_NK in zip(tiles.terms, u_of_terms, strict=True):
        if u_NK is None:
            continue
        for chunk in tiles.row_chunks(term):
            u_NK[chunk].div_(total_N[chunk, None] / -tiles.settings.scale).addcmul_(
                term.w_pieces.at(tiles.labels_N[chunk].clamp(0, tiles.V - 1)),
                dlogp_dlabel_N[chunk, None] * tiles.settings.scale,
            )
    return u_of_terms


def linear_logps(
    hidden_ND: Tensor,
    head_VD: Tensor | HeadRows,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    stats: tuple[str, ...] = (),
    head_cache_bytes: int = HEAD_CACHE_BYTES,
    skip_below: float = 0.0,
    backend: str = "triton",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probability of each row's label: float32 (N,), from float32 logits.

    hidden_ND, head_VD: float16, bfloat16 or float32 (float64 with backend="torch", which then
    returns it). head_VD may be a HeadRows, which is dequantised tile by tile, and the labels' rows
    a second time at the end. On a GPU head_VD is converted to hidden_ND's dtype, or to autocast's.
    labels_N: int64 in [0, V), unchecked: looking would make the CPU wait for the GPU. A label
    outside, or a hidden state that is not finite, makes its row's answer NaN, its gradient too, and
    those of head and bias. Gradients flow to hidden_ND, head_VD, bias_V and low_rank, summed in
    float32. Under autocast the products' operands are narrowed as in any matmul. On a GPU, products
    of float32 operands obey torch's TF32 switch, which transformers may set with torch_compile.

    low_rank: (down_NR, up_VR), a term down_NR upᵀ beside hidden headᵀ; for a LoRA adapter with
        matrices A, B and scale s, pass (s * hidden Aᵀ, B).
    scale, softcap: logits are softcap * tanh(scale * (hidden headᵀ + down upᵀ + bias) / softcap).
        For a temperature T, pass scale / T and softcap / T.
    stats: of "lse", "entropy", "mean_logit", "log_sum_p2" (log sum_v p_v²), float32, and
        "is_top1" (bool; True in a tie), from the same pass and without gradient; the answer is
        then (token_logps_N, {name: (N,)}).
    head_cache_bytes: for tiles of p kept from the forward for a trained weight's gradient, beyond
        those that fit into the gradient's own memory (p of up to D rows, where both have the same
        dtype; on a CPU in tiles of up to 512 or 1024 rows, on a GPU of about 1024 or more). A tile
        that is not kept costs one more product. Results differ by rounding alone.
    skip_below: leave columns of the vocabulary out of the second product whose p c is less than
        this in every row of a block (Cut Cross-Entropy, arXiv:2411.09009, has 2**-12).
        Log-probabilities and the gradients of head_VD, up_VR and bias_V do not change; a row of
        hidden_ND's by at most |dlogp| * scale * (the probability left out) * (the norm of the
        longest head row), and of down_NR's with up_VR's rows. The label's part stays exact. Measure
        before use: bench/results/cpu.md, "The gradient filter".
    backend: "triton" (a GPU, or Triton's interpreter) or "torch"; products of whole tiles are
        torch's in both.

    Memory beside the result, frozen: (N, D) in float32, kept for the backward, and the tiles, some
    MiB on a CPU, 256 MiB on a GPU (340 where operands are converted). A trained weight also keeps
    its inputs, its gradient's memory and the cache until the backward. README.md counts all of it.

    Deterministic: the same inputs give the same bits. On a CPU a row's log-probability, and its
    statistics except the entropy, are also batch-invariant: the same bits whatever rows are scored
    with it, with one thread, or on Intel's CPUs with any number from torch 2.13 on. Its entropy and
    its gradient may differ in the last bits, and on a GPU all may. README.md, "The same bits",
    explains why.

    ValueError for shapes, dtypes or settings that do not fit; RuntimeError for create_graph=True:
    there is no second derivative. The same with full logits: reference.linear_logps.
    """
    _check(hidden_ND, head_VD, labels_N, bias_V, low_rank, stats, backend)
    _check_settings(softcap, head_cache_bytes, skip_below)
    num_rows, device = len(labels_N), hidden_ND.device
    labels_N = labels_N.contiguous()
    factors = [hidden_ND, head_VD, *(low_rank or ())]
    if num_rows < MIN_ROWS:
        fill = (0, MIN_ROWS - num_rows)
        labels_N = F.pad(labels_N, fill)
        factors[::2] = [F.pad(x_NK, (0, 0, *fill)) for x_NK in factors[::2]]
    need_grad = [_needs_grad(factor) for factor in factors]
    operand_dtype, rounded_to = _operand_dtypes(hidden_ND)
    settings = Settings(
        scale=float(scale),  # Triton would compile an int 1 into the kernel
        softcap=None if softcap is None else float(softcap),
        stats=tuple(stats),
        head_cache_bytes=head_cache_bytes,
        skip_below=float(skip_below),
        backend=backend,
        operand_dtype=operand_dtype,
        rounded_to=rounded_to,
        terms_need_grad=tuple(zip(need_grad[::2], need_grad[1::2], strict=True)),
        bias_needs_grad=_needs_grad(bias_V),
    )
    with torch.autocast(device.type, enabled=False):
        answers = _LinearLogps.apply(settings, labels_N, bias_V, *factors)
    if num_rows < MIN_ROWS:
        answers = [answer_N[:num_rows] for answer_N in answers]
    return (answers[0], dict(zip(stats, answers[1:], strict=True))) if stats else answers[0]


def _check(hidden_ND, head_VD, labels_N, bias_V, low_rank, stats, backend) -> None:
    N, D = hidden_ND.shape if hidden_ND.ndim == 2 else (-1, -1)
    if len(head_VD.shape) != 2 or head_VD.shape[1] != D or labels_N.shape != (N,):
        came = f"{(*hidden_ND.shape,)}, {(*head_VD.shape,)}, {(*labels_N.shape,)}"
        raise ValueError(f"want hidden (N, D), head (V, D), labels (N,), got {came}")
    if bias_V is not None and bias_V.shape != head_VD.shape[:1]:
        raise ValueError(f"want bias ({head_VD.shape[0]},), got {(*bias_V.shape,)}")
    if low_rank is not None:
        down_NR, up_VR = low_rank
        ranks = down_NR.shape[1:], up_VR.shape[1:]
        if (len(down_NR), len(up_VR)) != (N, head_VD.shape[0]) or len({*ranks}) != 1:
            came = f"{(*down_NR.shape,)}, {(*up_VR.shape,)}"
            raise ValueError(f"want low_rank ({N}, R) and ({head_VD.shape[0]}, R), got {came}")
    if not set(stats) <= set(STATS):
        raise ValueError(f"want stats among {STATS}, got {stats}")
    if backend not in FOLDS:
        raise ValueError(f"want a backend of {(*FOLDS,)}, got {backend!r}")
    _check_dtypes(labels_N, hidden_ND, head_VD, bias_V, *(low_rank or ()))
    if hidden_ND.dtype == torch.float64 and backend != "torch":
        raise ValueError(f"want backend='torch' for float64, got {backend!r}")


def _check_dtypes(labels_N: Tensor, hidden_ND: Tensor, *weights: Tensor | HeadRows | None) -> None:
    if labels_N.dtype != torch.int64:
        raise ValueError(f"want int64 labels, got {labels_N.dtype}")
    dtypes = [x.dtype for x in (hidden_ND, *weights) if x is not None]
    is_wide = {dtype == torch.float64 for dtype in dtypes}
    if not all(dtype.is_floating_point for dtype in dtypes) or len(is_wide) > 1:
        raise ValueError(f"want floats, and float64 for all or for none of them, got {dtypes}")


def _check_settings(softcap: float | None, head_cache_bytes: int, skip_below: float) -> None:
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"want a finite softcap above 0, or None, got {softcap}")
    if head_cache_bytes < 0:
        raise ValueError(f"want head_cache_bytes from 0, got {head_cache_bytes}")
    if not 0 <= skip_below < 1:
        raise ValueError(f"want skip_below in [0, 1), got {skip_below}")


def _needs_grad(x: Tensor | HeadRows | None) -> bool:
    return isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled()


def _operand_dtypes(hidden_ND: Tensor) -> tuple[torch.dtype, torch.dtype | None]:
    """(dtype of the products' operands, dtype to round them to first or None).

    On a GPU hidden_ND's or autocast's, and None; on a CPU at least float32, and autocast's.
    """
    device, dtype, autocast = hidden_ND.device.type, hidden_ND.dtype, None
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        autocast = torch.get_autocast_dtype(device)
    if device == "cpu":
        return torch.promote_types(dtype, torch.float32), autocast
    return autocast or dtype, None
