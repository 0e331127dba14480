"""Who takes part in a comparison of heads: hidden states, head and labels -> DPO's loss.

    WAYS[name](hidden_ND, head_VD, labels_N) -> loss, logps_S

The N rows are the tokens of S = 2B completions of one length, B chosen and then B rejected, without
prompts or padding. The reference's log-probabilities are 0, and the loss is the sigmoid. All ways
but Liger's DPO loss make log-probabilities of tokens and share what comes after them. Each runs
as its library has it, and where other settings are faster, with these too.
"""

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.measure import CUDA
from fastdpo import ops
from fastdpo.model import TOKEN_STATS

PAIRS = 4  # B
BETA = 0.1
ROWS = 128  # of a chunk, where the library leaves it to the caller


def dpo_loss(token_logps_N: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(token_logps_N.dtype, torch.float32)
    logps_S = token_logps_N.view(2 * PAIRS, -1).sum(1, dtype=wide)
    chosen_B, rejected_B = logps_S.chunk(2)
    return -F.logsigmoid(BETA * (chosen_B - rejected_B)).mean(), logps_S


def fastdpo(**settings):
    return lambda *inputs: ops.linear_logps(*inputs, **settings)


def fastdpo_with_statistics(*inputs):
    """As a training step has it, whose metrics are made of them."""
    token_logps_N, _ = ops.linear_logps(*inputs, stats=TOKEN_STATS)
    return token_logps_N


def naive(hidden_ND, head_VD, labels_N):
    logps_NV = (hidden_ND @ head_VD.T).float().log_softmax(-1)
    return logps_NV.gather(1, labels_N[:, None]).squeeze(1)


compiled_naive = torch.compile(naive, dynamic=False)


def checkpointed_naive(hidden_ND, head_VD, labels_N):
    chunks = zip(hidden_ND.split(ROWS), labels_N.split(ROWS), strict=True)
    return torch.cat(
        [checkpoint(naive, rows, head_VD, labels, use_reentrant=False) for rows, labels in chunks]
    )


def torch_plain(hidden_ND, head_VD, labels_N):
    return -F.linear_cross_entropy(hidden_ND, head_VD, labels_N, reduction="none")


def torch_chunked(batch_chunk_size: int | None):
    """None: torch's own choice, of 1 to 32 rows for these heads."""

    def logps(hidden_ND, head_VD, labels_N):
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=batch_chunk_size)
        return -F.linear_cross_entropy(
            hidden_ND, head_VD, labels_N, reduction="none", options=options
        )

    return logps


def trl(hidden_ND, head_VD, labels_N):
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as columns

    bias_V, temperature, softcap, scale, statistics = None, 1.0, None, 1.0, ()
    return ChunkedLogProbFunction.apply(
        hidden_ND, head_VD, bias_V, labels_N, temperature, columns, softcap, scale, statistics
    )[0]


def liger_cross_entropy(hidden_ND, head_VD, labels_N):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return -liger_fused_linear_cross_entropy(hidden_ND, head_VD, labels_N, reduction="none")


def cut_cross_entropy(**settings):
    def logps(*inputs):
        from cut_cross_entropy import linear_cross_entropy

        return -linear_cross_entropy(*inputs, reduction="none", **settings)

    return logps


def liger_dpo(chunk_size: int):
    """Liger's loss, `chunk_size` pairs at a time; it makes its gradients in its forward."""

    def loss(hidden_ND, head_VD, labels_N):
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        loss_of = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False, chunk_size=chunk_size)
        hidden_SLD = hidden_ND.view(2 * PAIRS, -1, hidden_ND.shape[1])
        loss, (chosen_B, rejected_B, *_) = loss_of(
            head_VD, hidden_SLD, labels_N.view(2 * PAIRS, -1)
        )
        return loss, torch.cat([chosen_B, rejected_B])

    return loss


CACHE_WAYS = {"fastdpo, no cache": fastdpo(head_cache_bytes=0)}
if CUDA:
    CACHE_WAYS["fastdpo, 2 GiB of tiles"] = fastdpo(head_cache_bytes=2 << 30)
    CUT_WAYS = {  # by default its gradient leaves out blocks of tokens all less likely than 2**-12
        "Cut Cross-Entropy kernel, filtered by default": cut_cross_entropy(impl="cce"),
        "Cut Cross-Entropy kernel, exact": cut_cross_entropy(impl="cce", filter_eps=None),
    }
else:  # its kernel is for a GPU; without one its users get torch.compile of all logits
    CUT_WAYS = {"Cut Cross-Entropy, its torch.compile": cut_cross_entropy(impl="torch_compile")}
TOKEN_WAYS = {
    "fastdpo": fastdpo(),
    "fastdpo, with a step's statistics": fastdpo_with_statistics,
    **CACHE_WAYS,
    "naive": naive,
    "torch.compile of naive": compiled_naive,
    "naive, checkpointed chunks of rows": checkpointed_naive,
    "torch linear_cross_entropy": torch_plain,
    "torch linear_cross_entropy, chunked": torch_chunked(None),
    f"torch linear_cross_entropy, {ROWS} rows a chunk": torch_chunked(ROWS),
    "TRL ChunkedLogProbFunction": trl,
    "Liger fused linear cross entropy": liger_cross_entropy,
    **CUT_WAYS,
}


def _with_loss(token_logps):
    return lambda *inputs: dpo_loss(token_logps(*inputs))


WAYS = {name: _with_loss(token_logps) for name, token_logps in TOKEN_WAYS.items()} | {
    "Liger DPO loss": liger_dpo(1),
    "Liger DPO loss, all pairs at once": liger_dpo(PAIRS),
}
MODULES = {"TRL": "trl", "Liger": "liger_kernel", "Cut": "cut_cross_entropy"}


def reason_to_skip(way: str, mode: str) -> str | None:
    """Why this way has no cell in this column; None where it has one."""
    if way in CACHE_WAYS and mode != "trained":
        return "only a trained head keeps tiles"
    if way == "Cut Cross-Entropy kernel, exact" and mode == "forward":
        return "only its gradient is ever filtered"
    module = next((MODULES[word] for word in MODULES if way.startswith(word)), None)
    if module and importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    if way.startswith("torch linear") and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return f"torch {torch.__version__} has none"
    if way == "Liger fused linear cross entropy" and mode != "forward":
        return "it scales every row's gradient by the first row's, as for a sum of losses"
    if way == "Liger fused linear cross entropy" and not CUDA:
        return "written in Triton for a GPU, and there is none"
    return None
