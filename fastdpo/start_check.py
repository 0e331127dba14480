"""Check that policy and reference agree before the first step.

Then every log-ratio is 0 and the sigmoid loss is ln 2; other losses start elsewhere.
"""

from torch import Tensor, nn
from transformers.utils import logging

from fastdpo.config import DPOConfig
from fastdpo.losses import PairLoss
from fastdpo.model import causal_lm_of
from fastdpo.reference_logps import AdaptersOff, Reference, scorer_of

logger = logging.get_logger(__name__)

# Policy and reference score the same tokens with the same kernels; what a training forward may
# round otherwise costs last digits of a sum over thousands.
TOLERANCE = 1e-2  # nats, of a completion's log-probability


def check_start(
    policy: nn.Module,
    losses: PairLoss,
    reference_logps_S: Tensor,
    reference: Reference,
    args: DPOConfig,
) -> None:
    """Warn, and say why, if the policy's first log-probabilities are not the reference's.

    Reads one number from the device.
    """
    difference = (losses.logps_S - reference_logps_S).abs().max().item()
    if not difference <= TOLERANCE:  # NaN must not pass
        logger.warning(
            "the policy does not start at its reference: a completion's log-probability under the "
            f"policy and under the reference ({reference.source}) differ by up to "
            f"{difference:.3g} nats before the first step. {_why(policy, reference, args)}"
        )


def _why(policy: nn.Module, reference: Reference, args: DPOConfig) -> str:
    if not args.disable_dropout:
        return (
            "The policy may run with dropout and the reference runs without: set "
            "disable_dropout=True, or expect a noisy start."
        )
    if args.neftune_noise_alpha:
        return (
            "NEFTune adds noise to the policy's embeddings and none to the reference's "
            "(neftune_noise_alpha): expect a noisy start."
        )
    config = vars(causal_lm_of(policy).config.get_text_config())
    if jitter := [name for name, value in config.items() if "jitter" in name and value]:
        return (
            "The policy's experts run with random noise and the reference's without "
            f"({', '.join(jitter)}): expect a noisy start."
        )
    if isinstance(scorer_of(reference), AdaptersOff):
        return "The adapters change the model from the start: they are not initialised to zero."
    if args.fp16 or args.bf16:
        return (
            "If the reference is another model or was scored elsewhere, this is expected; if it is "
            "the same model in another dtype, this is the rounding."
        )
    return "If the reference is another model or was scored elsewhere, this is expected."
