"""How the Triton kernels score keys, and what makes weights of the scores: `kernels.scoring` on tiles.

A score is a logit divided by `scale`, so that a plain one is the product q·k itself; times `scale2` = scale · log2 e it
is the logit in base 2, called x. `cap`, `slope` and `bias` are in the unit of scores; None compiles to nothing.

A normaliser is what the functions below do for its name, a constexpr:

    softmax    exp(logit − lse)
    softpick   relu(exp(logit) − 1) / Σ |exp(logit) − 1|
    sigmoid    sigmoid(logit)
    elu        elu(logit) + 1

NORMALIZED divides the last two by their sum. The logarithm of what a row is divided by is kept as `lse2`: from it the
backward pass computes the weights again.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Where a row's maximum starts: low enough for any logit, finite so that −inf − max is never NaN.
_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def scores(b_a, b_b, b_distance, cap, slope, bias, PRECISION: tl.constexpr):
    """Scores a · bᵀ of a tile, and the tanh of their softcap, which `through_cap` needs (anything without one).

    b_distance: query position − key position, as the tile.
    """
    b_s = tl.dot(b_a, tl.trans(b_b), input_precision=PRECISION)
    b_tanh = b_s
    if cap is not None:
        b_tanh = 1.0 - 2.0 / (1.0 + tl.math.exp2(b_s * (2.0 * LOG2E / cap)))
        b_s = b_tanh * cap
    if slope is not None:
        b_s -= slope * b_distance.to(tl.float32)
    if bias is not None:
        b_s += bias
    return b_s, b_tanh


@triton.jit
def through_cap(b_ds, b_tanh, cap):
    """Gradient of the products from that of the scores."""
    if cap is not None:
        b_ds = b_ds * (1.0 - b_tanh * b_tanh)
    return b_ds


@triton.jit
def start(BLOCK_M: tl.constexpr, WGMMA: tl.constexpr, NORMALIZER: tl.constexpr):
    """Of rows that have seen nothing: maximum [BLOCK_M]; sum, and sum of the weights, [BLOCK_M, PARTS].

    A lane of sm_90 holds two of every eight columns of a tile: in eight parts, lanes exchange nothing before the last
    tile. On sm_80 that takes registers which are worth more, and sm_100 issues more instructions with it.
    """
    PARTS: tl.constexpr = 8 if WGMMA else 1
    b_zero = tl.zeros([BLOCK_M, PARTS], tl.float32)
    return tl.full([BLOCK_M], _LOWEST if NORMALIZER == "softmax" else 0.0, tl.float32), b_zero, b_zero


@triton.jit
def exponents(b_s, scale2, b_max, NORMALIZER: tl.constexpr):
    """Logits in base 2, less b_max where the normaliser has a maximum."""
    if NORMALIZER == "softmax" or NORMALIZER == "softpick":
        return b_s * scale2 - b_max
    else:
        return b_s * scale2


@triton.jit
def raw(b_x, b_max, NORMALIZER: tl.constexpr):
    """Weights before division, from `exponents`."""
    if NORMALIZER == "softmax":
        return tl.math.exp2(b_x)
    elif NORMALIZER == "softpick":
        return tl.maximum(tl.math.exp2(b_x) - tl.math.exp2(-b_max), 0.0)
    elif NORMALIZER == "sigmoid":
        return 1.0 / (1.0 + tl.math.exp2(-b_x))
    else:
        return tl.where(b_x > 0, b_x * LN2 + 1.0, tl.math.exp2(b_x))


@triton.jit
def _accumulated(b_parts, b_keep, b_x):
    """[rows, PARTS], times b_keep [rows], plus the sums of b_x [rows, columns] over every PARTS-th column."""
    PARTS: tl.constexpr = b_parts.shape[1]
    b_x = tl.reshape(b_x, [b_x.shape[0], b_x.shape[1] // PARTS, PARTS])
    return b_parts * b_keep[:, None] + tl.sum(b_x, 1)


@triton.jit
def step(b_s, scale2, b_max, b_sum, b_total, NORMALIZER: tl.constexpr, STATISTICS: tl.constexpr):
    """Raw weights of a tile of scores; the new maximum, sum and sum of the weights (in parts, as `start` makes them);
    the factor of what came before.

    The softmax's is the online one (arXiv 2205.14135). Softpick divides by another sum than that of its weights.
    """
    b_new, b_keep = b_max, tl.full(b_max.shape, 1.0, tl.float32)
    if NORMALIZER == "softmax" or NORMALIZER == "softpick":
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale2)
        b_keep = tl.math.exp2(b_max - b_new)
    b_x = exponents(b_s, scale2, b_new[:, None], NORMALIZER)
    b_p = raw(b_x, b_new[:, None], NORMALIZER)
    b_part = b_p
    if NORMALIZER == "softpick":
        b_part = tl.abs(tl.math.exp2(b_x) - tl.math.exp2(-b_new)[:, None])
        if STATISTICS:
            b_total = _accumulated(b_total, b_keep, b_p)
    b_sum = _accumulated(b_sum, b_keep, b_part)
    return b_p, b_new, b_sum, b_total, b_keep


@triton.jit
def finish(b_max, b_sum, b_inside, eps, NORMALIZER: tl.constexpr, NORMALIZED: tl.constexpr):
    """What raw weights are divided by, and lse2; b_inside: the rows that are no padding."""
    if NORMALIZER == "softmax":
        b_divisor = tl.where(b_inside, b_sum, 1.0)
    elif NORMALIZER == "softpick" or NORMALIZED:
        b_divisor = b_sum + eps
    else:
        b_divisor = tl.full(b_sum.shape, 1.0, tl.float32)
    return b_divisor, b_max + tl.math.log2(b_divisor)


@triton.jit
def weight(b_x, b_lse2, NORMALIZER: tl.constexpr, NORMALIZED: tl.constexpr):
    """Weights, from the `exponents` less lse2."""
    b_p = raw(b_x, b_lse2, NORMALIZER)
    return b_p * tl.math.exp2(-b_lse2) if NORMALIZED else b_p


@triton.jit
def logit_gradient(b_x, b_lse2, b_p, b_dp, b_delta, NORMALIZER: tl.constexpr, NORMALIZED: tl.constexpr):
    """Gradient of the logits from that of the weights p; delta = Σ p · dp over the row."""
    if NORMALIZER == "softmax":
        return b_p * (b_dp - b_delta)
    elif NORMALIZER == "softpick":
        b_e = tl.math.exp2(b_x)
        b_one = tl.math.exp2(-b_lse2)
        return b_e * tl.where(b_e > b_one, b_dp - b_delta, tl.where(b_e < b_one, b_delta, 0.0))
    else:
        if NORMALIZED:
            b_dp = b_dp - b_delta
        if NORMALIZER == "sigmoid":
            return b_p * (1.0 - raw(b_x, b_lse2, NORMALIZER)) * b_dp
        else:
            return tl.minimum(b_p, tl.math.exp2(-b_lse2) if NORMALIZED else 1.0) * b_dp
