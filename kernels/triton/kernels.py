"""The Triton kernels: attention over packed rows whose mask is one interval of keys per query.

A program visits key tiles of three kinds: tiles of the shared prefix and of the two ragged ends of the interval
(masked), and tiles that every query of the block sees in full (no mask, no bounds check). Where they lie follows
from two scalar loads, so there are no index lists and nothing to rebuild per layer:

        keys →      0    BN   2BN  3BN  4BN
    query block    [s]   .   [left][full][right]        s: shared prefix

The transpose of an interval mask is an interval mask too: key j is seen by the queries first_query[j] <= i <
last_query[j], which is what the dK/dV kernel walks. No atomics: a rerun is bitwise equal.

Letters: B rows, H query heads, G query heads per key head, T positions, D head dim (BLOCK_D: its next power of
two). Logits are kept in base 2: exp(x) = exp2(x · log2 e). Prefixes: p_ pointer, b_ block in registers. The mask on
tiles is in `mask`, logits and weights are in `scoring`.
"""

import triton
import triton.language as tl

from sinkbed.kernels.triton.mask import (
    key_block_tiles,
    load_interval,
    load_queries,
    masked_tile,
    masked_tiles,
    query_block_tiles,
    visible,
)
from sinkbed.kernels.triton.order import place
from sinkbed.kernels.triton.scoring import (
    LN2,
    LOG2E,
    exponents,
    finish,
    logit_gradient,
    raw,
    scores,
    start,
    step,
    through_cap,
    weight,
)


@triton.jit
def _at_tile(p, stride, position):
    """Pointer to a position of a head."""
    return p + tl.cast(position, tl.int64) * stride


@triton.jit
def _load_tile(
    p, stride, first, T, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, MASKED: tl.constexpr
):
    """[BLOCK, BLOCK_D] from p, which is position `first` of a head; zero outside D, and if MASKED outside T."""
    n = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    inside = (d < D)[None, :]
    if MASKED:  # here the sum of the offsets would take registers that the mask needs
        p = p + n[:, None] * stride + d[None, :]
        inside = inside & (first + n < T)[:, None]
    else:
        # The offsets' sum first, in 32 bits: the compiler keeps it, and does not add d to each pointer in every tile.
        p = p + (n[:, None] * stride + d[None, :])
    if MASKED or not EVEN_D:
        return tl.load(p, mask=inside, other=0.0)
    else:
        return tl.load(p)


@triton.jit
def _load_values(p, first, T, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """[BLOCK] from p, which is position `first` of a head: a value a position, if MASKED zero outside T."""
    n = tl.arange(0, BLOCK)
    if MASKED:
        return tl.load(p + n, mask=first + n < T, other=0.0)
    else:
        return tl.load(p + n)


@triton.jit
def _forward_step(
    b_q, b_o, b_max, b_sum, b_total, p_k, p_v, stride_kt, stride_vt, key0, T, D, scale2, cap, head_slope, bias,
    rows, b_first, b_end, shared_from, shared_to,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, MASKED: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_END: tl.constexpr, STATISTICS: tl.constexpr, NORMALIZER: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys."""
    keys = key0 + tl.arange(0, BLOCK_N)
    b_k = _load_tile(p_k, stride_kt, key0, T, D, BLOCK_N, BLOCK_D, EVEN_D, MASKED)
    b_v = _load_tile(p_v, stride_vt, key0, T, D, BLOCK_N, BLOCK_D, EVEN_D, MASKED)
    b_s, _tanh = scores(b_q, b_k, rows[:, None] - keys[None, :], cap, head_slope, bias, PRECISION)  # [BLOCK_M, BLOCK_N]
    if MASKED:
        seen = visible(rows[:, None], keys[None, :], b_first[:, None], b_end[:, None], shared_from, shared_to,
                       HAS_FIRST, HAS_END)  # fmt: skip
        # Softpick gives a logit of 0 no weight, and no part in the sum.
        b_s = tl.where(seen, b_s, 0.0 if NORMALIZER == "softpick" else float("-inf"))
    b_p, b_max, b_sum, b_total, b_keep = step(b_s, scale2, b_max, b_sum, b_total, NORMALIZER, STATISTICS)
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_keep[:, None], input_precision=PRECISION)
    return b_o, b_max, b_sum, b_total


@triton.jit
def _load_rows(p, rows, stride, T, D, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D], zero outside T and D."""
    d = tl.arange(0, BLOCK_D)
    inside = (rows < T)[:, None] & (d < D)[None, :]
    return tl.load(p + rows.to(tl.int64)[:, None] * stride + d[None, :], mask=inside, other=0.0)


@triton.jit
def forward_kernel(
    q, k, v, o, lse, first_key_mass, document_mass, learned_sink_mass, row_sum, first_key, end_key,
    doc_start, doc_end, sink_logit, slopes, q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, o_b, o_h, o_t,
    H, G, T, D, section, shared_from, shared_to, scale, cap, bias, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_END: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_SINK: tl.constexpr,
    STATISTICS: tl.constexpr, NORMALIZER: tl.constexpr, NORMALIZED: tl.constexpr, WGMMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Output, lse (natural log; of a normaliser, that of its divisor) and statistics of BLOCK_M queries of one head.

    Grid: B·H · query blocks.
    """
    blocks = tl.cdiv(T, BLOCK_M)
    bh, turn = place(tl.program_id(0), tl.num_programs(0) // blocks, blocks, section)
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    row0 = (blocks - 1 - turn) * BLOCK_M  # the last query block has the most keys
    rows = row0 + tl.arange(0, BLOCK_M)
    q += b * q_b + h * q_h
    k += b * k_b + (h // G) * k_h
    v += b * v_b + (h // G) * v_h
    o += b * o_b + h * o_h
    if HAS_FIRST:
        first_key += b * T
    if HAS_END:
        end_key += b * T
    scale2 = scale * LOG2E

    b_q = _load_rows(q, rows, q_t, T, D, BLOCK_D)
    b_first, b_end = load_interval(first_key, end_key, rows, T, HAS_FIRST, HAS_END)
    head_slope = None if slopes is None else tl.load(slopes + h) / scale
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max, b_sum, b_total = start(BLOCK_M, WGMMA, NORMALIZER)
    shared_count, shared, left, full, right, end = query_block_tiles(
        first_key, end_key, row0, T, shared_from, shared_to, BLOCK_M, BLOCK_N, HAS_FIRST, HAS_END
    )
    for t in range(0, masked_tiles(shared_count, left, full, right, end, WGMMA and not HAS_END)):
        key0 = masked_tile(t, shared_count, shared, left, full, right) * BLOCK_N
        p_k, p_v = _at_tile(k, k_t, key0), _at_tile(v, v_t, key0)
        b_o, b_max, b_sum, b_total = _forward_step(
            b_q, b_o, b_max, b_sum, b_total, p_k, p_v, k_t, v_t, key0, T, D, scale2, cap, head_slope, bias,
            rows, b_first, b_end, shared_from, shared_to, BLOCK_N, BLOCK_D, EVEN_D, True, HAS_FIRST, HAS_END,
            STATISTICS, NORMALIZER, PRECISION,
        )  # fmt: skip
    p_k, p_v = _at_tile(k, k_t, full * BLOCK_N), _at_tile(v, v_t, full * BLOCK_N)
    for t in range(0, right - full):
        b_o, b_max, b_sum, b_total = _forward_step(
            b_q, b_o, b_max, b_sum, b_total, p_k, p_v, k_t, v_t, (full + t) * BLOCK_N, T, D, scale2, cap, head_slope,
            bias, rows, b_first, b_end, shared_from, shared_to, BLOCK_N, BLOCK_D, EVEN_D, False, HAS_FIRST, HAS_END,
            STATISTICS, NORMALIZER, PRECISION,
        )  # fmt: skip
        p_k += BLOCK_N * tl.cast(k_t, tl.int64)
        p_v += BLOCK_N * tl.cast(v_t, tl.int64)

    b_sum, b_total = tl.sum(b_sum, 1), tl.sum(b_total, 1)
    if HAS_SINK:
        sink2 = tl.load(sink_logit + h).to(tl.float32) * LOG2E
        b_new = tl.maximum(b_max, sink2)
        b_keep = tl.math.exp2(b_max - b_new)
        b_p = tl.math.exp2(sink2 - b_new)
        b_sum = b_sum * b_keep + b_p
        b_o = b_o * b_keep[:, None]
        b_max = b_new
    b_divisor, b_lse2 = finish(b_max, b_sum, rows < T, eps, NORMALIZER, NORMALIZED)
    d = tl.arange(0, BLOCK_D)
    inside = (rows < T)[:, None] & (d < D)[None, :]
    b_o = b_o / b_divisor[:, None]
    tl.store(o + rows.to(tl.int64)[:, None] * o_t + d[None, :], b_o.to(o.dtype.element_ty), mask=inside)
    at = bh.to(tl.int64) * T + rows
    tl.store(lse + at, b_lse2 * LN2, mask=rows < T)

    if STATISTICS and HAS_SINK:
        tl.store(learned_sink_mass + at, b_p / b_divisor, mask=rows < T)
    if STATISTICS and NORMALIZER != "softmax":
        tl.store(row_sum + at, (b_total if NORMALIZER == "softpick" else b_sum) / b_divisor, mask=rows < T)
    if STATISTICS:
        # One 16-wide product per document that the block touches: its first column is the logit of the first key.
        # The mass comes from the running maximum and sum: exp(logit − lse) would lose digits at large logits.
        b_start = tl.zeros([BLOCK_M], tl.int32)
        at0 = 0
        if HAS_DOCS:
            doc_start += b * T
            doc_end += b * T
            b_start = tl.load(doc_start + rows, mask=rows < T, other=-1)
            at0 = tl.load(doc_start + row0)
        row1 = tl.minimum(row0 + BLOCK_M, T) - 1
        n = tl.arange(0, 16)
        b_row = tl.zeros([BLOCK_M], tl.float32)
        b_document = tl.zeros([BLOCK_M], tl.float32)
        anchor = row0 * 0
        while anchor <= row1:
            b_k = _load_rows(k, anchor + n, k_t, T, D, BLOCK_D)  # [16, BLOCK_D]
            b_s, _tanh = scores(b_q, b_k, rows[:, None] - (anchor + n)[None, :], cap, head_slope, bias, PRECISION)
            b_s = tl.sum(tl.where((n == 0)[None, :], b_s, 0.0), 1)
            b_mass = raw(exponents(b_s, scale2, b_max, NORMALIZER), b_max, NORMALIZER) / b_divisor
            b_row = tl.where(anchor == 0, b_mass, b_row)
            b_document = tl.where(b_start == anchor, b_mass, b_document)
            if HAS_DOCS:
                following = tl.load(doc_end + anchor)
                following = tl.where((anchor == 0) & (at0 > 0), at0, following)
                anchor = tl.maximum(following, anchor + 1)  # ends, whatever the tensors hold
            else:
                anchor = T
        if HAS_FIRST:
            shows_row = (b_first <= 0) | ((shared_from <= 0) & (shared_to > 0))
            shows_document = (b_first <= b_start) | ((b_start >= shared_from) & (b_start < shared_to))
            b_row = tl.where(shows_row, b_row, 0.0)
            b_document = tl.where(shows_document, b_document, 0.0)
        tl.store(first_key_mass + at, b_row, mask=rows < T)
        tl.store(document_mass + at, b_document, mask=rows < T)


@triton.jit
def delta_kernel(
    o, grad_o, grad_lse, delta, o_b, o_h, o_t, g_b, g_h, g_t, H, T, D,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """delta_i = Σ_d dO_id O_id − dlse_i, so that dS = P ∘ (dP − delta). Grid: B·H · query blocks."""
    blocks = tl.cdiv(T, BLOCK_M)
    bh = tl.program_id(0) // blocks
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    rows = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    b_o = _load_rows(o + b * o_b + h * o_h, rows, o_t, T, D, BLOCK_D).to(tl.float32)
    b_g = _load_rows(grad_o + b * g_b + h * g_h, rows, g_t, T, D, BLOCK_D).to(tl.float32)
    b_delta = tl.sum(b_o * b_g, 1)
    at = bh.to(tl.int64) * T + rows
    if HAS_GRAD_LSE:
        b_delta -= tl.load(grad_lse + at, mask=rows < T, other=0.0)
    tl.store(delta + at, b_delta, mask=rows < T)


@triton.jit
def _dq_step(
    b_q, b_g, b_dq, b_lse2, b_delta, p_k, p_v, stride_kt, stride_vt, key0, T, D, scale2, cap, head_slope, bias,
    rows, b_first, b_end, shared_from, shared_to,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, MASKED: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_END: tl.constexpr, NORMALIZER: tl.constexpr, NORMALIZED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    keys = key0 + tl.arange(0, BLOCK_N)
    b_k = _load_tile(p_k, stride_kt, key0, T, D, BLOCK_N, BLOCK_D, EVEN_D, MASKED)
    b_v = _load_tile(p_v, stride_vt, key0, T, D, BLOCK_N, BLOCK_D, EVEN_D, MASKED)
    b_s, b_tanh = scores(b_q, b_k, rows[:, None] - keys[None, :], cap, head_slope, bias, PRECISION)
    b_x = exponents(b_s, scale2, b_lse2[:, None], NORMALIZER)
    if MASKED:
        seen = visible(rows[:, None], keys[None, :], b_first[:, None], b_end[:, None], shared_from, shared_to,
                       HAS_FIRST, HAS_END)  # fmt: skip
        b_x = tl.where(seen, b_x, float("-inf"))
    b_p = weight(b_x, b_lse2[:, None], NORMALIZER, NORMALIZED)
    b_dp = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION)
    b_ds = logit_gradient(b_x, b_lse2[:, None], b_p, b_dp, b_delta[:, None], NORMALIZER, NORMALIZED)
    b_ds = through_cap(b_ds, b_tanh, cap)
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def dq_kernel(
    q, k, v, grad_o, lse, delta, dq, first_key, end_key, slopes,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, dq_b, dq_h, dq_t,
    H, G, T, D, section, shared_from, shared_to, scale, cap, bias,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_END: tl.constexpr, NORMALIZER: tl.constexpr, NORMALIZED: tl.constexpr,
    WGMMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of BLOCK_M queries of one head. Grid: B·H · query blocks."""
    blocks = tl.cdiv(T, BLOCK_M)
    bh, turn = place(tl.program_id(0), tl.num_programs(0) // blocks, blocks, section)
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    row0 = (blocks - 1 - turn) * BLOCK_M
    rows = row0 + tl.arange(0, BLOCK_M)
    k += b * k_b + (h // G) * k_h
    v += b * v_b + (h // G) * v_h
    if HAS_FIRST:
        first_key += b * T
    if HAS_END:
        end_key += b * T
    scale2 = scale * LOG2E
    b_q = _load_rows(q + b * q_b + h * q_h, rows, q_t, T, D, BLOCK_D)
    b_g = _load_rows(grad_o + b * g_b + h * g_h, rows, g_t, T, D, BLOCK_D)
    at = bh.to(tl.int64) * T + rows
    b_lse2 = tl.load(lse + at, mask=rows < T, other=0.0) * LOG2E
    b_delta = tl.load(delta + at, mask=rows < T, other=0.0)
    b_first, b_end = load_interval(first_key, end_key, rows, T, HAS_FIRST, HAS_END)
    head_slope = None if slopes is None else tl.load(slopes + h) / scale
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    shared_count, shared, left, full, right, end = query_block_tiles(
        first_key, end_key, row0, T, shared_from, shared_to, BLOCK_M, BLOCK_N, HAS_FIRST, HAS_END
    )
    for t in range(0, masked_tiles(shared_count, left, full, right, end, WGMMA and not HAS_END)):
        key0 = masked_tile(t, shared_count, shared, left, full, right) * BLOCK_N
        p_k, p_v = _at_tile(k, k_t, key0), _at_tile(v, v_t, key0)
        b_dq = _dq_step(
            b_q, b_g, b_dq, b_lse2, b_delta, p_k, p_v, k_t, v_t, key0, T, D, scale2, cap, head_slope, bias,
            rows, b_first, b_end, shared_from, shared_to, BLOCK_N, BLOCK_D, EVEN_D, True, HAS_FIRST, HAS_END,
            NORMALIZER, NORMALIZED, PRECISION,
        )  # fmt: skip
    p_k, p_v = _at_tile(k, k_t, full * BLOCK_N), _at_tile(v, v_t, full * BLOCK_N)
    for t in range(0, right - full):
        b_dq = _dq_step(
            b_q, b_g, b_dq, b_lse2, b_delta, p_k, p_v, k_t, v_t, (full + t) * BLOCK_N, T, D, scale2, cap, head_slope,
            bias, rows, b_first, b_end, shared_from, shared_to, BLOCK_N, BLOCK_D, EVEN_D, False, HAS_FIRST, HAS_END,
            NORMALIZER, NORMALIZED, PRECISION,
        )  # fmt: skip
        p_k += BLOCK_N * tl.cast(k_t, tl.int64)
        p_v += BLOCK_N * tl.cast(v_t, tl.int64)
    d = tl.arange(0, BLOCK_D)
    inside = (rows < T)[:, None] & (d < D)[None, :]
    p_dq = dq + b * dq_b + h * dq_h + rows.to(tl.int64)[:, None] * dq_t + d[None, :]
    tl.store(p_dq, (b_dq * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit
def _dkv_step(
    b_k, b_v, b_dk, b_dv, p_q, p_g, p_lse, p_delta, q_t, g_t, row0, T, D, scale2, cap, head_slope, bias, keys,
    b_from, b_to,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, MASKED: tl.constexpr,
    NORMALIZER: tl.constexpr, NORMALIZED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of queries, to whose first the pointers point."""
    rows = row0 + tl.arange(0, BLOCK_M)
    b_lse2 = _load_values(p_lse, row0, T, BLOCK_M, MASKED) * LOG2E
    b_delta = _load_values(p_delta, row0, T, BLOCK_M, MASKED)
    b_q = _load_tile(p_q, q_t, row0, T, D, BLOCK_M, BLOCK_D, EVEN_D, MASKED)
    b_g = _load_tile(p_g, g_t, row0, T, D, BLOCK_M, BLOCK_D, EVEN_D, MASKED)
    b_st, b_tanh = scores(b_k, b_q, rows[None, :] - keys[:, None], cap, head_slope, bias, PRECISION)
    b_xt = exponents(b_st, scale2, b_lse2[None, :], NORMALIZER)  # [BLOCK_N, BLOCK_M]
    if MASKED:
        seen = (rows[None, :] >= b_from[:, None]) & (rows[None, :] < b_to[:, None])
        b_xt = tl.where(seen, b_xt, float("-inf"))
    b_pt = weight(b_xt, b_lse2[None, :], NORMALIZER, NORMALIZED)
    b_dv = tl.dot(b_pt.to(b_g.dtype), b_g, b_dv, input_precision=PRECISION)
    b_dpt = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION)
    b_dst = logit_gradient(b_xt, b_lse2[None, :], b_pt, b_dpt, b_delta[None, :], NORMALIZER, NORMALIZED)
    b_dst = through_cap(b_dst, b_tanh, cap)
    b_dk = tl.dot(b_dst.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def dkv_kernel(
    q, k, v, grad_o, lse, delta, dk, dv, first_query, last_query, slopes,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t, g_b, g_h, g_t, dk_b, dk_h, dk_t, dv_b, dv_h, dv_t,
    H, G, T, D, section, shared_from, shared_to, scale, cap, bias,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_END: tl.constexpr, GROUPED: tl.constexpr, NORMALIZER: tl.constexpr,
    NORMALIZED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one key head, summed over its G query heads. Grid: B·H/G · key blocks."""
    blocks = tl.cdiv(T, BLOCK_N)
    bh, block = place(tl.program_id(0), tl.num_programs(0) // blocks, blocks, section)
    heads = H // G
    b = (bh // heads).to(tl.int64)
    hkv = bh % heads
    key0 = block * BLOCK_N  # the first key block has the most queries
    keys = key0 + tl.arange(0, BLOCK_N)
    if HAS_FIRST:
        last_query += b * T
    if HAS_END:
        first_query += b * T
    b_from, b_to = load_queries(first_query, last_query, keys, T, shared_from, shared_to, HAS_FIRST, HAS_END)
    head = hkv.to(tl.int64)
    b_k = _load_rows(k + b * k_b + head * k_h, keys, k_t, T, D, BLOCK_D)
    b_v = _load_rows(v + b * v_b + head * v_h, keys, v_t, T, D, BLOCK_D)
    scale2 = scale * LOG2E
    # From here on these are those of the group.
    q += b * q_b + head * G * q_h
    grad_o += b * g_b + head * G * g_h
    lse += (b * H + head * G) * T
    delta += (b * H + head * G) * T
    if slopes is not None:
        slopes += head * G
    stride_qh, stride_gh = tl.cast(q_h, tl.int64), tl.cast(g_h, tl.int64)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    left, full, right, end = key_block_tiles(
        first_query, last_query, key0, T, shared_from, shared_to, BLOCK_M, BLOCK_N, HAS_FIRST, HAS_END
    )
    # The query heads of the group follow one another in one loop: of two nested ones the inner is filled and drained
    # anew for each head, and takes more registers.
    count = (full - left) + (end - right)
    g, t = 0, 0
    for _n in range(0, count * G if GROUPED else count):
        row0 = masked_tile(t, 0, 0, left, full, right) * BLOCK_M
        head_slope = None if slopes is None else tl.load(slopes + g) / scale
        b_dk, b_dv = _dkv_step(
            b_k, b_v, b_dk, b_dv, _at_tile(q + g * stride_qh, q_t, row0), _at_tile(grad_o + g * stride_gh, g_t, row0),
            lse + g * T + row0, delta + g * T + row0, q_t, g_t, row0, T, D, scale2, cap, head_slope, bias, keys,
            b_from, b_to, BLOCK_M, BLOCK_D, EVEN_D, True, NORMALIZER, NORMALIZED, PRECISION,
        )  # fmt: skip
        t += 1
        if GROUPED:
            g = tl.where(t == count, g + 1, g)
            t = tl.where(t == count, 0, t)
    # Here the pointers move on by themselves: a tile, or to the first of the next head.
    count = right - full
    row0 = full * BLOCK_M
    p_q, p_g = _at_tile(q, q_t, row0), _at_tile(grad_o, g_t, row0)
    step_q, step_g = BLOCK_M * tl.cast(q_t, tl.int64), BLOCK_M * tl.cast(g_t, tl.int64)
    next_q, next_g = q_h - (count - 1) * step_q, g_h - (count - 1) * step_g
    at, t, g = row0, 0, 0
    for _n in range(0, count * G if GROUPED else count):
        head_slope = None if slopes is None else tl.load(slopes + g) / scale
        b_dk, b_dv = _dkv_step(
            b_k, b_v, b_dk, b_dv, p_q, p_g, lse + at, delta + at, q_t, g_t, row0 + t * BLOCK_M, T, D, scale2, cap,
            head_slope, bias, keys, b_from, b_to, BLOCK_M, BLOCK_D, EVEN_D, False, NORMALIZER, NORMALIZED, PRECISION,
        )  # fmt: skip
        t += 1
        if GROUPED:
            ends = t == count
            t = tl.where(ends, 0, t)
            g = tl.where(ends, g + 1, g)
            p_q += tl.where(ends, next_q, step_q)
            p_g += tl.where(ends, next_g, step_g)
            at += tl.where(ends, T - (count - 1) * BLOCK_M, BLOCK_M)
        else:
            p_q, p_g, at = p_q + step_q, p_g + step_g, at + BLOCK_M
    d = tl.arange(0, BLOCK_D)
    inside = (keys < T)[:, None] & (d < D)[None, :]
    at = keys.to(tl.int64)[:, None]
    tl.store(dk + b * dk_b + head * dk_h + at * dk_t + d[None, :], (b_dk * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + b * dv_b + head * dv_h + at * dv_t + d[None, :], b_dv.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def _received_step(
    b_k, b_received, p_q, p_lse, stride_qt, row0, T, D, scale2, keys, b_from, b_to,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = row0 + tl.arange(0, BLOCK_M)
    b_lse2 = _load_values(p_lse + row0, row0, T, BLOCK_M, MASKED) * LOG2E
    b_q = _load_tile(_at_tile(p_q, stride_qt, row0), stride_qt, row0, T, D, BLOCK_M, BLOCK_D, EVEN_D, MASKED)
    b_st, _tanh = scores(b_k, b_q, rows[None, :] - keys[:, None], None, None, None, PRECISION)  # [BLOCK_N, BLOCK_M]
    b_xt = exponents(b_st, scale2, b_lse2[None, :], "softmax")
    if MASKED:
        seen = (rows[None, :] >= b_from[:, None]) & (rows[None, :] < b_to[:, None])
        b_xt = tl.where(seen, b_xt, float("-inf"))
    return b_received + tl.sum(weight(b_xt, b_lse2[None, :], "softmax", False), 1)


@triton.jit
def received_kernel(
    q, k, lse, received, first_query, last_query, q_b, q_h, q_t, k_b, k_h, k_t,
    H, G, T, D, section, shared_from, shared_to, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr,
    HAS_FIRST: tl.constexpr, HAS_END: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention that BLOCK_N keys receive from one query head. Grid: B·H · key blocks."""
    blocks = tl.cdiv(T, BLOCK_N)
    bh, block = place(tl.program_id(0), tl.num_programs(0) // blocks, blocks, section)
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    key0 = block * BLOCK_N
    keys = key0 + tl.arange(0, BLOCK_N)
    if HAS_FIRST:
        last_query += b * T
    if HAS_END:
        first_query += b * T
    b_from, b_to = load_queries(first_query, last_query, keys, T, shared_from, shared_to, HAS_FIRST, HAS_END)
    scale2 = scale * LOG2E
    b_k = _load_rows(k + b * k_b + (h // G) * k_h, keys, k_t, T, D, BLOCK_D)
    b_received = tl.zeros([BLOCK_N], tl.float32)
    p_q = q + b * q_b + h * q_h
    p_lse = lse + bh.to(tl.int64) * T
    left, full, right, end = key_block_tiles(
        first_query, last_query, key0, T, shared_from, shared_to, BLOCK_M, BLOCK_N, HAS_FIRST, HAS_END
    )
    for t in range(0, (full - left) + (end - right)):
        row0 = masked_tile(t, 0, 0, left, full, right) * BLOCK_M
        b_received = _received_step(
            b_k, b_received, p_q, p_lse, q_t, row0, T, D, scale2, keys, b_from, b_to, BLOCK_M, BLOCK_D,
            EVEN_D, True, PRECISION,
        )  # fmt: skip
    for tile in range(full, right):
        b_received = _received_step(
            b_k, b_received, p_q, p_lse, q_t, tile * BLOCK_M, T, D, scale2, keys, b_from, b_to, BLOCK_M,
            BLOCK_D, EVEN_D, False, PRECISION,
        )  # fmt: skip
    tl.store(received + bh.to(tl.int64) * T + keys, b_received, mask=keys < T)
