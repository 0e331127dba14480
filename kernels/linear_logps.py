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

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_V = 1024  # columns of a tile that one program of the fold reads at a time
TILE_ROWS = {"cpu": 1024, "cuda": 8192}
TILE_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}  # float32; the CPU's stays in its cache
HEAD_CACHE_BYTES = 512 << 20
STATS = ("lse", "entropy", "mean_logit", "is_top1")


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the walk knows of each row so far; float32, or float64 for float64 inputs."""

    peak_N: Tensor  # largest logit
    total_N: Tensor  # sum of exp(z - peak)
    target_N: Tensor  # logit of the label
    rescale_N: Tensor  # exp(peak before the last tile - peak after it)
    weighted_N: Tensor | None  # sum of exp(z - peak) * z, for the entropy
    sum_N: Tensor | None  # sum of z, for the mean logit

    @classmethod
    def start(cls, N: int, dtype: torch.dtype, device: torch.device, sums: bool) -> "_Rows":
        zeros = [torch.zeros(N, dtype=dtype, device=device) for _ in range(5 if sums else 3)]
        peak_N = torch.full((N,), -float("inf"), dtype=dtype, device=device)
        return cls(peak_N, *zeros[:3], *(zeros[3:] or (None, None)))

    def block(self, rows: slice) -> "_Rows":
        parts = (getattr(self, field.name) for field in fields(self))
        return _Rows(*(None if part is None else part[rows] for part in parts))


def _torch_fold(z_NT, p_NT, bias_T, labels_N, start, rows, scale, softcap):
    """Take the products z_NT of one tile into `rows`, and leave p_NT = exp(z - peak) * c."""
    if bias_T is not None:
        z_NT.add_(bias_T)
    if scale != 1.0:
        z_NT.mul_(scale)
    if softcap is not None:
        z_NT.div_(softcap).tanh_().mul_(softcap)
    column_N = labels_N - start
    is_here_N = (column_N >= 0) & (column_N < z_NT.shape[1])
    target_N = z_NT.gather(1, column_N.clamp(0, z_NT.shape[1] - 1)[:, None]).squeeze(1)
    torch.where(is_here_N, target_N, rows.target_N, out=rows.target_N)

    peak_N = torch.maximum(rows.peak_N, z_NT.amax(1))
    torch.exp(rows.peak_N - peak_N, out=rows.rescale_N)
    rows.peak_N.copy_(peak_N)
    c_NT = None if softcap is None else (z_NT / softcap).square_().neg_().add_(1.0)
    if rows.sum_N is not None:
        rows.sum_N.add_(z_NT.sum(1))
        exp_NT = torch.exp(z_NT - peak_N[:, None])
        rows.weighted_N.mul_(rows.rescale_N).add_(torch.linalg.vecdot(exp_NT, z_NT))
        z_NT.copy_(exp_NT)
    else:
        z_NT.sub_(peak_N[:, None]).exp_()
    rows.total_N.mul_(rows.rescale_N).add_(z_NT.sum(1))
    if c_NT is not None:
        z_NT.mul_(c_NT)
    if p_NT is not z_NT:
        p_NT.copy_(z_NT)


@triton.jit
def _logit(z_ptr, bias_ptr, v, mask, scale, softcap, HAS_BIAS: tl.constexpr, CAP: tl.constexpr):
    z_V = tl.load(z_ptr + v, mask=mask, other=0.0)
    if HAS_BIAS:
        z_V += tl.load(bias_ptr + v, mask=mask, other=0.0).to(tl.float32)
    z_V *= scale
    if CAP:
        # softcap * tanh(z / softcap), with an exp that cannot overflow
        decay_V = tl.exp(-2.0 * tl.abs(z_V) / softcap)
        tanh_V = (1.0 - decay_V) / (1.0 + decay_V)
        z_V = softcap * tl.where(z_V < 0, -tanh_V, tanh_V)
    return z_V


@triton.jit
def _fold_kernel(
    z_ptr,
    p_ptr,
    bias_ptr,
    labels_ptr,
    peak_ptr,
    total_ptr,
    target_ptr,
    rescale_ptr,
    weighted_ptr,
    sum_ptr,
    start,
    width,
    z_stride,
    p_stride,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    CAP: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # n * z_stride outgrows int32 from 16k rows of 128k
    z_ptr += n * z_stride
    p_ptr += n * p_stride
    old_peak = tl.load(peak_ptr + n)
    tile_peak_V = tl.full((BLOCK_V,), -float("inf"), tl.float32)
    for first in range(0, width, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        z_V = _logit(z_ptr, bias_ptr, v, v < width, scale, softcap, HAS_BIAS, CAP)
        tile_peak_V = tl.maximum(tile_peak_V, tl.where(v < width, z_V, -float("inf")))
    peak = tl.maximum(old_peak, tl.max(tile_peak_V))
    rescale = tl.exp(old_peak - peak)

    column = tl.load(labels_ptr + n) - start
    target_V = tl.zeros((BLOCK_V,), tl.float32)
    total_V = tl.zeros((BLOCK_V,), tl.float32)
    weighted_V = tl.zeros((BLOCK_V,), tl.float32)
    sum_V = tl.zeros((BLOCK_V,), tl.float32)
    for first in range(0, width, BLOCK_V):
        v = first + tl.arange(0, BLOCK_V)
        z_V = _logit(z_ptr, bias_ptr, v, v < width, scale, softcap, HAS_BIAS, CAP)
        target_V += tl.where(v == column, z_V, 0.0)
        exp_V = tl.where(v < width, tl.exp(z_V - peak), 0.0)
        total_V += exp_V
        if SUMS:
            weighted_V += exp_V * z_V
            sum_V += tl.where(v < width, z_V, 0.0)
        if CAP:
            exp_V *= 1.0 - (z_V / softcap) * (z_V / softcap)
        tl.store(p_ptr + v, exp_V.to(p_ptr.dtype.element_ty), mask=v < width)
    if (column >= 0) & (column < width):
        tl.store(target_ptr + n, tl.sum(target_V))
    tl.store(peak_ptr + n, peak)
    tl.store(rescale_ptr + n, rescale)
    tl.store(total_ptr + n, tl.load(total_ptr + n) * rescale + tl.sum(total_V))
    if SUMS:
        tl.store(weighted_ptr + n, tl.load(weighted_ptr + n) * rescale + tl.sum(weighted_V))
        tl.store(sum_ptr + n, tl.load(sum_ptr + n) + tl.sum(sum_V))


def _triton_fold(z_NT, p_NT, bias_T, labels_N, start, rows, scale, softcap):
    """As _torch_fold, in one launch: a program a row."""
    _fold_kernel[(z_NT.shape[0],)](
        z_NT,
        p_NT,
        bias_T,
        labels_N,
        rows.peak_N,
        rows.total_N,
        rows.target_N,
        rows.rescale_N,
        rows.weighted_N,
        rows.sum_N,
        start,
        z_NT.shape[1],
        z_NT.stride(0),
        p_NT.stride(0),
        scale,
        1.0 if softcap is None else softcap,
        HAS_BIAS=bias_T is not None,
        CAP=softcap is not None,
        SUMS=rows.sum_N is not None,
        BLOCK_V=BLOCK_V,
    )


FOLDS = {"torch": _torch_fold, "triton": _triton_fold}


class _Tiles:
    """The (row block, vocabulary tile) pieces of one call, and the memory they are made in."""

    def __init__(self, hidden_ND: Tensor, head_VD: Tensor, operand_dtype: torch.dtype):
        device = hidden_ND.device.type
        self.N, self.V = len(hidden_ND), len(head_VD)
        rows = max(1, min(self.N, TILE_ROWS.get(device, TILE_ROWS["cuda"])))
        columns = TILE_BYTES.get(device, TILE_BYTES["cuda"]) // (4 * rows)
        columns = min(self.V, max(BLOCK_V, columns // BLOCK_V * BLOCK_V))
        firsts = range(0, max(1, self.N), rows)  # no row is one block of none
        self.row_blocks = [slice(n, min(n + rows, self.N)) for n in firsts]
        self.columns = [slice(v, min(v + columns, self.V)) for v in range(0, self.V, columns)]
        self.operand_dtype = operand_dtype
        wide = torch.float64 if operand_dtype == torch.float64 else torch.float32
        self.wide = wide
        self._z = torch.empty(rows * columns, dtype=wide, device=hidden_ND.device)
        self._p = (
            self._z if operand_dtype == wide else torch.empty_like(self._z, dtype=operand_dtype)
        )

    def scratch(self, rows: slice, columns: slice, keep: bool) -> tuple[Tensor, Tensor]:
        """z and p of one piece; p is apart from z where it is kept, or of a narrower dtype."""
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        size = shape[0] * shape[1]
        if keep:
            p = torch.empty(shape, dtype=self._p.dtype, device=self._p.device)
            return (p if self._p is self._z else self._z[:size].view(shape)), p
        z = self._z[:size].view(shape)
        return z, (z if self._p is self._z else self._p[:size].view(shape))


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
    def forward(ctx, hidden_ND, head_VD, bias_V, labels_N, settings):
        scale, softcap, stats, cache_bytes, fold, operand_dtype, grads = settings
        tiles = _Tiles(hidden_ND, head_VD, operand_dtype)
        device, (N, D) = hidden_ND.device, hidden_ND.shape
        plain = softcap is None and bias_V is None
        wants_sums = bool({"entropy", "mean_logit"} & set(stats)) and not (plain and grads[0])
        rows = _Rows.start(N, tiles.wide, device, wants_sums)
        u_ND = torch.zeros(N, D, dtype=tiles.wide, device=device) if grads[0] else None
        kept = {}  # (row block, tile) -> p and the peak it was made with

        h_ND = hidden_ND.to(operand_dtype)
        for c, columns in enumerate(tiles.columns):
            head_TD = head_VD[columns].to(operand_dtype)
            bias_T = None if bias_V is None else bias_V[columns].to(tiles.wide)
            for r, block in enumerate(tiles.row_blocks):
                size = (block.stop - block.start) * len(head_TD) * operand_dtype.itemsize
                keep = (grads[1] or grads[2]) and size <= cache_bytes
                z_NT, p_NT = tiles.scratch(block, columns, keep)
                _product(h_ND[block], head_TD.T, out=z_NT)
                at = rows.block(block)
                FOLDS[fold](z_NT, p_NT, bias_T, labels_N[block], columns.start, at, scale, softcap)
                if u_ND is not None:
                    u_ND[block].mul_(at.rescale_N[:, None])
                    _product(p_NT, head_TD, out=u_ND[block], accumulate=True)
                if keep:
                    kept[r, c] = (p_NT, at.peak_N.clone())
                    cache_bytes -= size

        lse_N = rows.peak_N + rows.total_N.log()
        c_target_N = None if softcap is None else 1 - (rows.target_N / softcap).square()
        direction_ND = None
        found = _stats(stats, rows, lse_N, u_ND, h_ND, head_VD, scale)
        if u_ND is not None:
            # u becomes scale * (c[label] head[label] - u), what dhidden is a row scale of
            target_ND = head_VD[labels_N].to(tiles.wide)
            if c_target_N is not None:
                target_ND.mul_(c_target_N[:, None])
            direction_ND = u_ND.div_(-rows.total_N[:, None]).add_(target_ND).mul_(scale)
        trained = grads[1] or grads[2]
        ctx.save_for_backward(
            direction_ND,
            labels_N,
            *((hidden_ND, head_VD, bias_V, lse_N, c_target_N) if trained else ()),
        )
        ctx.settings, ctx.tiles, ctx.kept = settings, tiles if trained else None, kept
        ctx.dtypes = (hidden_ND.dtype, head_VD.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(*found)
        return (rows.target_N - lse_N, *found)

    @staticmethod
    def backward(ctx, dlogps_N, *_):
        direction_ND, _labels_N, *trained = ctx.saved_tensors
        hidden_dtype, *_ = ctx.dtypes
        with torch.autocast(dlogps_N.device.type, enabled=False):
            dhidden_ND = dhead_VD = dbias_V = None
            if direction_ND is not None:
                dhidden_ND = (direction_ND * dlogps_N[:, None]).to(hidden_dtype)
            if trained:
                dhead_VD, dbias_V = _head_gradients(ctx, dlogps_N)
        return dhidden_ND, dhead_VD, dbias_V, None, None


def _head_gradients(ctx, dlogps_N: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """dhead = -(p - onehot)ᵀ (dlogp * scale * hidden), a tile of the vocabulary at a time."""
    _, labels_N, hidden_ND, head_VD, bias_V, lse_N, c_target_N = ctx.saved_tensors
    scale, softcap, _, _, fold, operand_dtype, (_, head_grad, bias_grad) = ctx.settings
    tiles = ctx.tiles
    h_ND = hidden_ND.to(operand_dtype)
    dz_N = dlogps_N.to(tiles.wide) * -scale
    weighted_ND = (hidden_ND.to(tiles.wide) * dz_N[:, None]).to(operand_dtype)
    onehot_N = torch.ones_like(lse_N) if c_target_N is None else c_target_N
    dhead_VD = torch.empty_like(head_VD) if head_grad else None
    dbias_V = torch.empty_like(bias_V) if bias_grad else None
    unused = _Rows.start(tiles.N, tiles.wide, lse_N.device, sums=False)
    for c, columns in enumerate(tiles.columns):
        head_TD = head_VD[columns].to(operand_dtype)
        bias_T = None if bias_V is None else bias_V[columns].to(tiles.wide)
        # summed where it is to be, unless that is too narrow to sum in
        in_place = head_grad and dhead_VD.dtype == tiles.wide
        dhead_TD = dhead_VD[columns] if in_place else torch.empty_like(head_TD, dtype=tiles.wide)
        dbias_T = torch.zeros(len(head_TD), dtype=tiles.wide, device=head_TD.device)
        for r, block in enumerate(tiles.row_blocks):
            # a tile's peak stands in for lse until its rows are brought to sum to one
            if (r, c) in ctx.kept:
                p_NT, peak_N = ctx.kept[r, c]
            else:
                z_NT, p_NT = tiles.scratch(block, columns, keep=False)
                _product(h_ND[block], head_TD.T, out=z_NT)
                at = unused.block(block)
                at.peak_N.fill_(-float("inf"))
                FOLDS[fold](z_NT, p_NT, bias_T, labels_N[block], columns.start, at, scale, softcap)
                peak_N = at.peak_N
            dlogit_NT = p_NT * torch.exp(peak_N - lse_N[block])[:, None].to(p_NT.dtype)
            column_N = labels_N[block] - columns.start
            is_here_N = (column_N >= 0) & (column_N < len(head_TD))
            column_N = column_N.clamp(0, len(head_TD) - 1)
            onehot = (onehot_N[block] * is_here_N).to(dlogit_NT.dtype)
            dlogit_NT.scatter_add_(1, column_N[:, None], -onehot[:, None])
            if head_grad:
                _product(dlogit_NT.T, weighted_ND[block], out=dhead_TD, accumulate=r > 0)
            if bias_grad:
                dbias_T.addmv_(dlogit_NT.T.to(tiles.wide), dz_N[block])
        if head_grad and not in_place:
            dhead_VD[columns] = dhead_TD
        if bias_grad:
            dbias_V[columns] = dbias_T
    return dhead_VD, dbias_V


def _stats(stats, rows, lse_N, u_ND, h_ND, head_VD, scale) -> list[Tensor]:
    """The statistics asked for, in order. Without sums, a plain head's come from products."""
    wide = lse_N.dtype
    found = []
    for name in stats:
        if name == "lse":
            found.append(lse_N.clone())
        elif name == "is_top1":
            found.append(rows.target_N >= rows.peak_N)
        elif rows.sum_N is not None:
            sums = {"entropy": lse_N - rows.weighted_N / rows.total_N}
            sums["mean_logit"] = rows.sum_N / len(head_VD)
            found.append(sums[name])
        elif name == "entropy":
            mean_z_N = scale * torch.linalg.vecdot(h_ND.to(wide), u_ND) / rows.total_N
            found.append(lse_N - mean_z_N)
        else:
            found.append(scale * (h_ND.to(wide) @ head_VD.mean(0, dtype=wide)))
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
    operand_dtype = _operand_dtype(hidden_ND)
    tensors = (hidden_ND, head_VD, bias_V)
    grads = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in tensors)
    settings = (scale, softcap, tuple(stats), head_cache_bytes, fold, operand_dtype, grads)
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
