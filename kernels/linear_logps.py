"""linear_logps: hidden states, head, labels -> log-probabilities; the (N, V) logits never exist.

    z_NV   = cap(scale * (hidden_ND headᵀ + bias_V))        cap(x) = softcap * tanh(x / softcap)
    logp_N = z[n, label] - lse[n]                            lse = log sum_v exp(z)

The vocabulary is walked once, a tile of columns at a time, with a running maximum
(arXiv:1805.02867). The gradient needs the loss in one number a row only,

    dlogp / dhidden = scale * (c[label] head[label] - sum_v p_v c_v head_v)   c = 1 - (z / softcap)²

so the walk sums its second term as well (attention with the head as keys and values), and the
backward of a frozen head is one row scale: two products in all. A trained head takes a third, and
a fourth for the tiles of p that did not fit `head_cache_bytes`. Derivation: README.md.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.kernels.tiles import BLOCK_V, FOLDS, Rows

TILE_ROWS = {"cpu": 1024, "cuda": 8192}
TILE_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}  # float32; the CPU's stays in its cache
HEAD_CACHE_BYTES = 512 << 20
STATS = ("lse", "entropy", "mean_logit", "is_top1")


class _Settings(NamedTuple):
    """What linear_logps was asked for, as its docstring says, and what follows from it."""

    scale: float
    softcap: float | None
    stats: tuple[str, ...]
    head_cache_bytes: int
    fold: str
    operand_dtype: torch.dtype  # of the products' operands
    hidden_grad: bool
    head_grad: bool
    bias_grad: bool

    @property
    def wide(self) -> torch.dtype:
        """Of logits and sums."""
        return torch.float64 if self.operand_dtype == torch.float64 else torch.float32

    @property
    def trained(self) -> bool:
        return self.head_grad or self.bias_grad


class _Tiles:
    """The (row block, vocabulary tile) pieces of one call, and how p of each is made."""

    def __init__(self, hidden_ND, head_VD, bias_V, labels_N, settings: _Settings):
        device, N, V = hidden_ND.device, len(hidden_ND), len(head_VD)
        rows = max(1, min(N, TILE_ROWS.get(device.type, TILE_ROWS["cuda"])))
        columns = TILE_BYTES.get(device.type, TILE_BYTES["cuda"]) // (4 * rows)
        columns = min(V, max(BLOCK_V, columns // BLOCK_V * BLOCK_V))
        firsts = range(0, max(1, N), rows)  # no row is one block of none
        self.row_blocks = [slice(n, min(n + rows, N)) for n in firsts]
        self.columns = [slice(v, min(v + columns, V)) for v in range(0, V, columns)]
        self._hidden_ND, self._head_VD = hidden_ND.to(settings.operand_dtype), head_VD
        self._bias_V, self._labels_N, self._settings = bias_V, labels_N, settings
        self._z = torch.empty(rows * columns, dtype=settings.wide, device=device)
        self._is_narrow = settings.operand_dtype != settings.wide
        self._p = (
            torch.empty_like(self._z, dtype=settings.operand_dtype) if self._is_narrow else self._z
        )

    def head(self, columns: slice) -> Tensor:
        return self._head_VD[columns].to(self._settings.operand_dtype)

    def fold(self, block: slice, columns: slice, head_TD: Tensor, rows: Rows, keep: bool) -> Tensor:
        """Take one piece into `rows` and return its p, in memory of its own if it is to be kept."""
        settings = self._settings
        shape = (block.stop - block.start, columns.stop - columns.start)
        z_NT = self._z[: shape[0] * shape[1]].view(shape)
        p_NT = self._p[: shape[0] * shape[1]].view(shape) if self._is_narrow else z_NT
        if keep:
            p_NT = torch.empty(shape, dtype=self._p.dtype, device=self._p.device)
            z_NT = z_NT if self._is_narrow else p_NT
        _product(self._hidden_ND[block], head_TD.T, out=z_NT)
        bias_T = None if self._bias_V is None else self._bias_V[columns].to(settings.wide)
        labels_N, scale, softcap = self._labels_N[block], settings.scale, settings.softcap
        FOLDS[settings.fold](z_NT, p_NT, bias_T, labels_N, columns.start, rows, scale, softcap)
        return p_NT


def _product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b: accumulated and left in out's dtype, never rounded before."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


class _LinearLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, bias_V, labels_N, settings: _Settings):
        tiles = _Tiles(hidden_ND, head_VD, bias_V, labels_N, settings)
        is_plain = settings.softcap is None and bias_V is None
        needs_sums = bool({"entropy", "mean_logit"} & set(settings.stats)) and not (
            is_plain and settings.hidden_grad
        )
        rows = Rows.start(len(hidden_ND), settings.wide, hidden_ND.device, needs_sums)
        u_ND, kept = _walk(tiles, rows, hidden_ND, settings)

        lse_N = rows.peak_N + rows.total_N.log()
        c_target_N = torch.ones_like(lse_N)
        if settings.softcap is not None:
            c_target_N -= (rows.target_N / settings.softcap).square()
        found = _stats(settings, rows, lse_N, u_ND, hidden_ND, head_VD)
        if u_ND is not None:
            # now scale * (c[label] head[label] - u / total): dhidden is a row scale of it
            target_ND = head_VD[labels_N].to(settings.wide).mul_(c_target_N[:, None])
            u_ND.div_(-rows.total_N[:, None]).add_(target_ND).mul_(settings.scale)
        inputs = (hidden_ND, head_VD, bias_V, labels_N, lse_N, c_target_N)
        ctx.save_for_backward(u_ND, *(inputs if settings.trained else ()))
        ctx.settings, ctx.kept, ctx.hidden_dtype = settings, kept, hidden_ND.dtype
        ctx.mark_non_differentiable(*found)
        return (rows.target_N - lse_N, *found)

    @staticmethod
    def backward(ctx, dlogps_N, *_):
        direction_ND, *inputs = ctx.saved_tensors
        dhidden_ND = dhead_VD = dbias_V = None
        with torch.autocast(dlogps_N.device.type, enabled=False):
            if direction_ND is not None:
                dhidden_ND = (direction_ND * dlogps_N[:, None]).to(ctx.hidden_dtype)
            if inputs:
                dhead_VD, dbias_V = _head_gradients(dlogps_N, inputs, ctx.settings, ctx.kept)
        return dhidden_ND, dhead_VD, dbias_V, None, None


def _walk(tiles: _Tiles, rows: Rows, hidden_ND: Tensor, settings: _Settings):
    """Take every tile into `rows`; u_ND (None without dhidden), and the pieces of p that fit.

    A piece is kept under (row block, tile) with the peak that it was made with.
    """
    u_ND, kept, budget = None, {}, settings.head_cache_bytes
    if settings.hidden_grad:
        u_ND = torch.zeros_like(hidden_ND, dtype=settings.wide)
    for c, columns in enumerate(tiles.columns):
        head_TD = tiles.head(columns)
        for r, block in enumerate(tiles.row_blocks):
            size = (block.stop - block.start) * len(head_TD) * settings.operand_dtype.itemsize
            keep = settings.trained and size <= budget
            at = rows.block(block)
            p_NT = tiles.fold(block, columns, head_TD, at, keep)
            if u_ND is not None:
                u_ND[block].mul_(at.rescale_N[:, None])
                _product(p_NT, head_TD, out=u_ND[block], accumulate=True)
            if keep:
                kept[r, c] = (p_NT, at.peak_N.clone())
                budget -= size
    return u_ND, kept


def _head_gradients(dlogps_N: Tensor, inputs: list, settings: _Settings, kept: dict):
    """dhead = -(p - onehot)ᵀ (dlogp * scale * hidden) and dbias, a tile at a time."""
    hidden_ND, head_VD, bias_V, labels_N, lse_N, c_target_N = inputs
    tiles = _Tiles(hidden_ND, head_VD, bias_V, labels_N, settings)
    wide = settings.wide
    dz_N = dlogps_N.to(wide) * -settings.scale
    weighted_ND = (hidden_ND.to(wide) * dz_N[:, None]).to(settings.operand_dtype)
    dhead_VD = torch.empty_like(head_VD) if settings.head_grad else None
    dbias_V = torch.zeros_like(bias_V, dtype=wide) if settings.bias_grad else None
    # summed where it is to be, unless that is too narrow to sum in
    in_place = settings.head_grad and head_VD.dtype == wide
    for c, columns in enumerate(tiles.columns):
        head_TD = tiles.head(columns)
        dhead_TD = dhead_VD[columns] if in_place else torch.empty_like(head_TD, dtype=wide)
        for r, block in enumerate(tiles.row_blocks):
            if (r, c) in kept:
                p_NT, peak_N = kept[r, c]
            else:
                fresh = Rows.start(block.stop - block.start, wide, lse_N.device, sums=False)
                p_NT = tiles.fold(block, columns, head_TD, fresh, keep=False)
                peak_N = fresh.peak_N
            dlogits_NT = _less_onehot(
                p_NT, peak_N - lse_N[block], labels_N[block] - columns.start, c_target_N[block]
            )
            if settings.head_grad:
                _product(dlogits_NT.T, weighted_ND[block], out=dhead_TD, accumulate=r > 0)
            if settings.bias_grad:
                dbias_V[columns].addmv_(dlogits_NT.T.to(wide), dz_N[block])
        if settings.head_grad and not in_place:
            dhead_VD[columns] = dhead_TD
    return dhead_VD, None if dbias_V is None else dbias_V.to(bias_V.dtype)


def _less_onehot(p_NT: Tensor, log_rescale_N: Tensor, column_N: Tensor, c_target_N: Tensor):
    """p brought from its tile's peak to lse, less c in the label's column where it is here."""
    dlogits_NT = p_NT * torch.exp(log_rescale_N)[:, None].to(p_NT.dtype)
    is_here_N = (column_N >= 0) & (column_N < p_NT.shape[1])
    onehot_N = -(c_target_N * is_here_N).to(p_NT.dtype)
    column_N = column_N.clamp(0, p_NT.shape[1] - 1)
    return dlogits_NT.scatter_add_(1, column_N[:, None], onehot_N[:, None])


def _stats(settings: _Settings, rows: Rows, lse_N, u_ND, hidden_ND, head_VD) -> list[Tensor]:
    """The statistics asked for, in order. Without sums, a plain head's come from products."""
    h_ND, found = hidden_ND.to(settings.wide), []
    for name in settings.stats:
        if name == "lse":
            found.append(lse_N.clone())
        elif name == "is_top1":
            found.append(rows.target_N >= rows.peak_N)
        elif name == "entropy" and rows.weighted_N is not None:
            found.append(lse_N - rows.weighted_N / rows.total_N)
        elif name == "entropy":
            found.append(lse_N - settings.scale * torch.linalg.vecdot(h_ND, u_ND) / rows.total_N)
        elif rows.sum_N is not None:
            found.append(rows.sum_N / len(head_VD))
        else:
            found.append(settings.scale * (h_ND @ head_VD.mean(0, dtype=settings.wide)))
    return found


def linear_logps(
    hidden_ND: Tensor,
    head_VD: Tensor,
    labels_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    stats: tuple[str, ...] = (),
    head_cache_bytes: int = HEAD_CACHE_BYTES,
    fold: str = "triton",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Log-probability of each row's label: float32 (N,), from float32 logits.

    hidden_ND, head_VD: float16, bfloat16 or float32 (float64 with fold="torch", which then
    returns it). labels_N: int64 in [0, V), unchecked: looking would make the CPU wait for the
    GPU. Gradients flow to hidden_ND, head_VD and bias_V, accumulated in float32. Under autocast
    the products take its dtype on a GPU, and float32 on a CPU.

    scale, softcap: logits are softcap * tanh(scale * (hidden headᵀ + bias) / softcap).
    stats: of "lse", "entropy", "mean_logit" (float32) and "is_top1" (bool; a tie counts), from
        the same pass and without gradient; the answer is then (token_logps_N, {name: (N,)}).
    head_cache_bytes: tiles of p kept for a trained head's gradient; the others cost a product
        more. No setting changes the result by more than rounding.
    fold: "triton" (a GPU, or Triton's interpreter) or "torch" takes a tile into the result.

    Backward keeps (N, D) in float32, for a trained head also its inputs and the cache. A row's
    value may depend on N in its last bits, as far as the matrix product does. ValueError for
    shapes, dtypes or names that do not fit. The same with full logits: reference.linear_logps.
    """
    N, D = hidden_ND.shape if hidden_ND.ndim == 2 else (-1, -1)
    if head_VD.ndim != 2 or head_VD.shape[1] != D or labels_N.shape != (N,):
        came = f"{(*hidden_ND.shape,)}, {(*head_VD.shape,)}, {(*labels_N.shape,)}"
        raise ValueError(f"want hidden (N, D), head (V, D), labels (N,), got {came}")
    if bias_V is not None and bias_V.shape != head_VD.shape[:1]:
        raise ValueError(f"want bias ({len(head_VD)},), got {(*bias_V.shape,)}")
    if not set(stats) <= set(STATS) or fold not in FOLDS:
        raise ValueError(f"want stats of {STATS}, fold of {(*FOLDS,)}, got {stats}, {fold!r}")
    if labels_N.dtype != torch.int64 or not hidden_ND.is_floating_point():
        raise ValueError(
            f"want float hidden, int64 labels, got {hidden_ND.dtype}, {labels_N.dtype}"
        )
    if hidden_ND.dtype == torch.float64 and fold != "torch":
        raise ValueError(f"want fold='torch' for float64, got {fold!r}")
    grads = (
        torch.is_grad_enabled() and x is not None and x.requires_grad
        for x in (hidden_ND, head_VD, bias_V)
    )
    operand_dtype = _operand_dtype(hidden_ND)
    settings = _Settings(
        scale, softcap, tuple(stats), head_cache_bytes, fold, operand_dtype, *grads
    )
    with torch.autocast(hidden_ND.device.type, enabled=False):
        logps_N, *found = _LinearLogps.apply(hidden_ND, head_VD, bias_V, labels_N, settings)
    return (logps_N, dict(zip(stats, found, strict=True))) if stats else logps_N


def _operand_dtype(hidden_ND: Tensor) -> torch.dtype:
    """What the products multiply: the inputs' or autocast's dtype; no CPU gains by a narrow one."""
    device = hidden_ND.device.type
    if hidden_ND.dtype == torch.float64:
        return torch.float64
    if device == "cpu":
        return torch.float32
    return (
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_ND.dtype
    )
