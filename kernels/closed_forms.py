"""Every loss and every f-divergence of pair_loss as @triton.jit: its value and its slopes.

    pair_term    a loss by name: (value, d value / d chosen, d value / d rejected)
    score        an f-divergence by name: (score of a log-ratio, d score / d log-ratio)

chosen and rejected are beta * scores: the rewards, where no f-divergence is asked for. A name is a
constant of the compiled kernel, so one branch is left of each chain below. A tuple of functions
would read better, but Triton (tried: 3.6 and 3.9) keys its cache on disk by the names in such a
tuple and not by the functions' text: with a formula changed, it would go on running the old one.
Papers and equations are in reference.py, with each twin.
"""

import triton
import triton.language as tl

# libdevice has log1p and expm1, but Triton's interpreter does not run it


@triton.jit
def _log1p(x):
    # log(1 + x) has lost the digits of x that 1 + x rounds away; the quotient restores them
    rounded = 1.0 + x
    step = tl.where(rounded == 1.0, 1.0, rounded - 1.0)
    return tl.where(rounded == 1.0, x, tl.log(rounded) * (x / step))


@triton.jit
def _expm1(x):
    # the same, the other way round: u - 1 belongs to log(u), which exp(x) was rounded from;
    # for x below 88: where exp(x) is inf, so is log_u, and inf * (x / inf) is NaN
    u = tl.exp(x)
    is_one, is_negligible = u == 1.0, u - 1.0 == -1.0
    log_u = tl.log(tl.where(is_one | is_negligible, 2.0, u))
    return tl.where(is_one, x, tl.where(is_negligible, -1.0, (u - 1.0) * (x / log_u)))


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - _log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _logistic(x):
    decay = tl.exp(-tl.abs(x))  # never overflows
    return tl.where(x < 0, decay, 1.0) / (1.0 + decay)


@triton.jit
def _sigmoid(chosen, rejected, label_smoothing):
    margin = chosen - rejected
    right_way = (1.0 - label_smoothing) * _log_sigmoid(margin)
    # by _logistic(-margin), which keeps its digits where _logistic(margin) rounds to 1
    slope = label_smoothing - _logistic(-margin)
    return -right_way - label_smoothing * _log_sigmoid(-margin), slope, -slope


@triton.jit
def _sigmoid_norm(chosen, rejected, chosen_length, rejected_length):
    loss, slope, _ = _sigmoid(chosen / chosen_length, rejected / rejected_length, 0.0)
    return loss, slope / chosen_length, -slope / rejected_length


@triton.jit
def _robust(chosen, rejected, label_smoothing):
    margin = chosen - rejected
    right_way = (1.0 - label_smoothing) * _log_sigmoid(margin)
    scale = 1.0 / (1.0 - 2.0 * label_smoothing)
    kept = (1.0 - label_smoothing) * _logistic(-margin)
    slope = -scale * (kept + label_smoothing * _logistic(margin))
    return scale * (label_smoothing * _log_sigmoid(-margin) - right_way), slope, -slope


@triton.jit
def _hinge(chosen, rejected):
    margin = chosen - rejected
    slope = tl.where(margin < 1.0, -1.0, 0.0)
    return tl.maximum(1.0 - margin, 0.0, propagate_nan=tl.PropagateNan.ALL), slope, -slope


@triton.jit
def _ipo(chosen, rejected, chosen_length, rejected_length, beta):
    margin = chosen / chosen_length - rejected / rejected_length
    distance = (margin - 0.5) / beta
    slope = 2.0 * distance / beta
    return distance * distance, slope / chosen_length, -slope / rejected_length


@triton.jit
def _exo_pair(chosen, rejected, label_smoothing):
    margin = chosen - rejected
    log_kept, log_flipped = _log1p(-label_smoothing), tl.log(label_smoothing)
    right, wrong = _logistic(margin), _logistic(-margin)
    loss = right * (_log_sigmoid(margin) - log_kept) + wrong * (_log_sigmoid(-margin) - log_flipped)
    slope = right * wrong * (margin - log_kept + log_flipped)
    return loss, slope, -slope


@triton.jit
def _nca_pair(chosen, rejected):
    pull = -_log_sigmoid(chosen)
    push = -0.5 * (_log_sigmoid(-chosen) + _log_sigmoid(-rejected))
    return pull + push, 0.5 * _logistic(chosen) - _logistic(-chosen), 0.5 * _logistic(rejected)


@triton.jit
def _bco_pair(chosen, rejected):
    loss = -_log_sigmoid(chosen) - _log_sigmoid(-rejected)
    return loss, -_logistic(-chosen), _logistic(rejected)


@triton.jit
def _sppo_hard(chosen, rejected, beta):
    chosen_error, rejected_error = (chosen - 0.5) / beta, (rejected + 0.5) / beta
    loss = chosen_error * chosen_error + rejected_error * rejected_error
    return loss, 2.0 * chosen_error / beta, 2.0 * rejected_error / beta


@triton.jit
def _apo_zero(chosen, rejected):
    loss = _logistic(-chosen) + _logistic(rejected)
    dchosen = -_logistic(chosen) * _logistic(-chosen)
    return loss, dchosen, _logistic(rejected) * _logistic(-rejected)


@triton.jit
def _apo_down(chosen, rejected):
    margin = chosen - rejected
    dmargin = -_logistic(margin) * _logistic(-margin)
    dchosen = _logistic(chosen) * _logistic(-chosen)
    return _logistic(chosen) + _logistic(-margin), dchosen + dmargin, -dmargin


@triton.jit
def _discopop(chosen, rejected, tau):
    margin = chosen - rejected
    log_sigmoid = _log_sigmoid(margin)
    gate, shut = _logistic(margin / tau), _logistic(-margin / tau)
    # gate * exp(-margin), whose exp alone overflows where the gate is shut
    exponential = tl.exp(_log_sigmoid(margin / tau) - margin)
    slope = shut * (log_sigmoid * gate / tau - _logistic(-margin))
    slope += exponential * (shut / tau - 1.0)
    return exponential - shut * log_sigmoid, slope, -slope


@triton.jit
def pair_term(
    NAME: tl.constexpr,
    chosen,
    rejected,
    chosen_length,
    rejected_length,
    beta,
    label_smoothing,
    discopop_tau,
):
    """One loss of a pair's beta * scores. Lengths: tokens of the completions, at least 1."""
    if NAME == "sigmoid":
        return _sigmoid(chosen, rejected, label_smoothing)
    elif NAME == "sigmoid_norm":
        return _sigmoid_norm(chosen, rejected, chosen_length, rejected_length)
    elif NAME == "robust":
        return _robust(chosen, rejected, label_smoothing)
    elif NAME == "hinge":
        return _hinge(chosen, rejected)
    elif NAME == "ipo":
        return _ipo(chosen, rejected, chosen_length, rejected_length, beta)
    elif NAME == "exo_pair":
        return _exo_pair(chosen, rejected, label_smoothing)
    elif NAME == "nca_pair":
        return _nca_pair(chosen, rejected)
    elif NAME == "bco_pair":
        return _bco_pair(chosen, rejected)
    elif NAME == "sppo_hard":
        return _sppo_hard(chosen, rejected, beta)
    elif NAME == "apo_zero":
        return _apo_zero(chosen, rejected)
    elif NAME == "apo_down":
        return _apo_down(chosen, rejected)
    else:
        tl.static_assert(NAME == "discopop", "unknown loss")
        return _discopop(chosen, rejected, discopop_tau)


@triton.jit
def _power_score(logratio, exponent):
    power = exponent * logratio
    bounded = tl.minimum(power, 80.0, propagate_nan=tl.PropagateNan.ALL)
    return _expm1(bounded) / exponent, tl.where(power > 80.0, 0.0, tl.exp(bounded))


@triton.jit
def score(NAME: tl.constexpr, logratio, alpha):
    """The score of one completion's log-ratio; beta times it is what a loss compares."""
    if NAME == "reverse_kl":
        return logratio, 1.0
    elif NAME == "forward_kl":
        return _power_score(logratio, -1.0)
    elif NAME == "js_divergence":
        log_2 = 0.6931471805599453
        return log_2 + _log_sigmoid(logratio), _logistic(-logratio)
    else:
        tl.static_assert(NAME == "alpha_divergence", "unknown f-divergence")
        return _power_score(logratio, alpha - 1.0)
