"""Split a model's body from its head; model + PairBatch -> log-probabilities.

All that scoring asks of a model:

    body      `base_model`: model inputs -> last_hidden_state (S, L, D)
    head      what head.py knows of its output embedding
    experts   router_logits, for a load-balancing loss (experts.py)

(layout.py asks which attention and layers it has, pair_check.py its positions, policy.py its
dropout; layout_check.py runs the body to find a layer; scorer_check.py compares the scores with the
model's own logits.)

`attach_scorer` teaches a causal language model's forward one more keyword, `scored_rows`. With
it, the head sees those rows alone and answers with log-probabilities instead of logits; the call
goes through the model as before, so PEFT, DDP, FSDP and autocast wrap it as they wrap any other.
Without it, the forward is the model's own, and `generate` works as it did.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from fastdpo.attention import attend_along_trees
from fastdpo.batch import PairBatch
from fastdpo.experts import ExpertCounts, balancing_loss, experts_per_token
from fastdpo.head import check_head_module, head_logps
from fastdpo.kernels.linear_logps import HEAD_CACHE_BYTES

TOKEN_STATS = ("entropy", "mean_logit", "is_top1")  # what metrics are made of


@dataclass
class ScoredOutput(ModelOutput):
    """What a forward with `scored_rows` returns: a value per scored row, which `score` expands to
    one per completion token.

    token_logps_C: float32, carries the gradient. entropy_C, mean_logit_C, log_sum_p2_C (log of the
    sum of the vocabulary's squared probabilities): float32, is_top1_C: bool, no gradient, None
    unless asked for. aux_loss, expert_counts: the load-balancing loss of a mixture-of-experts model
    and where its tokens went; None unless asked for.
    """

    token_logps_C: Tensor | None = None
    entropy_C: Tensor | None = None
    mean_logit_C: Tensor | None = None
    is_top1_C: Tensor | None = None
    log_sum_p2_C: Tensor | None = None
    aux_loss: Tensor | None = None
    expert_counts: ExpertCounts | None = None

    def of_rows(self, rows_C: Tensor) -> "ScoredOutput":
        """The values of these rows, some perhaps more than once."""
        whole = {name: self[name] for name in ("aux_loss", "expert_counts") if name in self}
        per_row = {name: value for name, value in self.items() if name not in whole}
        rows = {name: value.index_select(0, rows_C) for name, value in per_row.items()}
        return ScoredOutput(**whole, **rows)


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PEFT wrapper, or `model` itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def has_adapters(model: nn.Module) -> bool:
    """Whether `model`, be it a PEFT wrapper or not, has adapters in its layers."""
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def attach_scorer(
    model: nn.Module, *, head_cache_bytes: int = HEAD_CACHE_BYTES, skip_below: float = 0.0
) -> None:
    """Let `model(..., scored_rows=..., scored_labels=..., stats=...)` answer with a ScoredOutput.

    head_cache_bytes, skip_below: as kernels.linear_logps has them; a second call changes these
    alone. ValueError for a head that head.py does not know.
    """
    causal_lm = causal_lm_of(model)
    check_head_module(causal_lm)
    causal_lm._head_settings = {"head_cache_bytes": head_cache_bytes, "skip_below": skip_below}
    causal_lm._virtual_tokens = _virtual_tokens(model)
    if _is_scorer(causal_lm.forward):
        return
    # an attribute, not a closure: a deep copy of the model then calls the copy; and a list, as
    # another library's forward may by now be around an earlier scorer
    earlier = getattr(causal_lm, "_unscored_forwards", [])
    causal_lm._unscored_forwards = [*earlier, causal_lm.forward]

    @functools.wraps(type(causal_lm).forward)  # generate() reads the signature
    def forward(self, *args, scored_rows=None, scored_labels=None, stats=(), **kwargs):
        if scored_rows is None:
            return self._unscored_forwards[len(earlier)](*args, **kwargs)
        return _score(self, scored_rows, scored_labels, stats, **kwargs)

    forward.is_scorer = True
    causal_lm.forward = types.MethodType(forward, causal_lm)


def _is_scorer(forward: Callable | None) -> bool:
    """Whether `forward` is attach_scorer's, perhaps within accelerate's autocast."""
    while forward is not None and not hasattr(forward, "is_scorer"):
        forward = getattr(forward, "__wrapped__", None)
    return forward is not None


def _virtual_tokens(model: nn.Module) -> int:
    """How many tokens of its own the model puts before each row, or before each layer's keys."""
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return 0
    return model.active_peft_config.num_virtual_tokens


def score(
    model: nn.Module,
    batch: PairBatch,
    *,
    stats: tuple[str, ...] = (),
    aux_loss: bool = False,
    batch_counts: ExpertCounts | None = None,
) -> ScoredOutput:
    """`model`, wrapped or not, on `batch`: a value per completion token; stats: of ScoredOutput.

    batch_counts: of the batch that this one is a pack of; aux_loss is then its part.
    """
    router = {}
    if aux_loss:
        router = {"token_uses": batch.token_uses, "batch_counts": batch_counts}
        router["output_router_logits"] = True
    scored = model(
        **batch.model_inputs,
        scored_rows=batch.scored_rows_N,
        scored_labels=batch.labels_N,
        stats=stats,
        use_cache=False,
        **router,
    )
    return scored if batch.completion_rows_C is None else scored.of_rows(batch.completion_rows_C)


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Within, `model` has no gradient, dropout or checkpointing, whatever mode it is in.

    In one walk over its modules, and past their slow __setattr__: 1.4 ms for the 2001 modules of 24
    layers with LoRA, where eval() and train() take 7.
    """
    training = [vars(module) for module in model.modules() if module.training]
    try:
        for attributes in training:
            attributes["training"] = False
        with torch.no_grad():
            yield
    finally:
        for attributes in training:
            attributes["training"] = True


def token_logps_without_grad(model: nn.Module, batch: PairBatch) -> Tensor:
    """token_logps_C of `model` as it is in inference."""
    with inference(model):
        return score(model, batch).token_logps_C


def _score(
    causal_lm, scored_rows_N, labels_N, stats, *, token_uses=None, batch_counts=None, **inputs
) -> ScoredOutput:
    """The forward with `scored_rows`: token_uses ask for aux_loss, and weigh its tokens."""
    inputs = {name: value for name, value in inputs.items() if value is not None}
    if "tree" in inputs:  # set_attn_implementation may have been called since the last forward
        attend_along_trees(causal_lm)
    outputs = causal_lm.base_model(**inputs)
    # with tokens of its own before each row, PEFT calls it with embeddings; not with keys
    num_virtual = causal_lm._virtual_tokens if "inputs_embeds" in inputs else 0
    hidden_SLD = outputs.last_hidden_state[:, num_virtual:]
    device = scored_rows_N.device
    hidden_ND = hidden_SLD.flatten(0, 1).index_select(0, scored_rows_N.to(hidden_SLD.device))
    token_logps_N, stats_N = head_logps(
        causal_lm, hidden_ND, labels_N, stats, **causal_lm._head_settings
    )
    aux_loss = expert_counts = None
    if token_uses is not None:
        uses = nn.functional.pad(token_uses, (num_virtual, 0), value=1)
        top_k = experts_per_token(causal_lm)
        aux_loss, expert_counts = balancing_loss(outputs.router_logits, top_k, uses, batch_counts)
    # named _C though still of the N scored rows: `score` expands them. The head of a model on
    # several GPUs may be on another than the batch.
    stats_N = {f"{name}_C": value_N.to(device) for name, value_N in stats_N.items()}
    return ScoredOutput(
        token_logps_C=token_logps_N.to(device),
        aux_loss=aux_loss,
        expert_counts=expert_counts,
        **stats_N,
    )
