"""The shared parts of the packed matvec kernels: how a program's threads cover W, and the inner product.

Every kernel computes y[m, n] = sum_k x[m, k] * W[n, k] for a block of rows n and all M rows of x, M below
FRAGMENT_ROWS (`gemma4.kernels.activations`, which has the layout of x). A program
holds a tile of W with dimensions

    [KL, RL, KW, R]    KL lanes of a warp along K, RL lanes (then warps) along N, KW warps along K,
                       R rows per thread; KL * RL * KW = 32 * num_warps

and steps along K, each thread taking one unit of each of its rows per step: 64 weights of a K-quant, 32 of
another format. The order of dimensions matters: Triton gives lanes, then warps, then registers to them from
first to last, so every tensor below lands in one register layout and nothing passes through shared memory
before the final reduction.

The sum over K of one output depends on KL, KW and the order of steps, never on N, R or on the other rows of
the launch: fused and separate projections agree bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4.kernels.activations import activation_runs
from gemma4.kernels.dependent_launch import await_inputs
from gemma4.kernels.dp4a import dot4_signed, dot4_unsigned


@triton.jit
def tile_unit(KL: tl.constexpr, RL: tl.constexpr, KW: tl.constexpr):
    """[KL, RL, KW, 1] int32: which of the KL * KW neighbouring units of a row a thread reads."""
    # The masks change no value: they hide from Triton that lanes are contiguous, which would change layouts.
    unit = (tl.arange(0, KL) & (KL - 1))[:, None, None, None]
    unit += KL * (tl.arange(0, KW) & (KW - 1))[None, None, :, None]
    return unit + tl.zeros((KL, RL, KW, 1), tl.int32)


@triton.jit
def tile_start(RL: tl.constexpr, R: tl.constexpr):
    """int64: first row of W of this program."""
    return tl.program_id(0).to(tl.int64) * (R * RL)


@triton.jit
def tile_row(start, N, RL: tl.constexpr, R: tl.constexpr, EVEN_N: tl.constexpr):
    """[1, RL, 1, R] int64: rows of W a thread reads, counted from `start`; the last one again past the end."""
    row = tl.arange(0, R)[None, None, None, :] * RL + tl.arange(0, RL)[None, :, None, None]
    row = row.to(tl.int64)
    if not EVEN_N:
        row = tl.minimum(row, N - 1 - start)
    return row


@triton.jit
def inside(unit, UNITS: tl.constexpr, EVEN_K: tl.constexpr):
    """Units of the row: the last one again past the end, where `add_group` counts it as zero."""
    if not EVEN_K:
        unit = tl.minimum(unit, UNITS - 1)
    return unit


@triton.jit
def load_weights(ptr):
    """Read packed weights once: first to leave the cache."""
    return tl.load(ptr, eviction_policy="evict_first")


@triton.jit
def load_piece(ptr, row, piece, ROW_BYTES: tl.constexpr):
    """[KL, RL, KW, R, 4] int32: the four words of 16-byte piece `piece` of each row of a byte plane."""
    words = ptr.to(tl.pointer_type(tl.int32)) + (row * (ROW_BYTES // 4) + piece * 4)[:, :, :, :, None]
    return load_weights(words + tl.arange(0, 4)[None, None, None, None, :])


@triton.jit
def load_word(ptr, row, word, ROW_WORDS: tl.constexpr):
    """[KL, RL, KW, R] int32: 32-bit word `word` of each row."""
    return load_weights(ptr.to(tl.pointer_type(tl.int32)) + (row * ROW_WORDS + word))


@triton.jit
def load_word_pair(ptr, row, pair, ROW_PAIRS: tl.constexpr):
    """[KL, RL, KW, R] int64: words 2 * pair (low half) and 2 * pair + 1 (high half) of each row."""
    return load_weights(ptr.to(tl.pointer_type(tl.int64)) + (row * ROW_PAIRS + pair))


@triton.jit
def load_half(ptr, row, item, ROW_ITEMS: tl.constexpr):
    """[KL, RL, KW, R] float32: float16 `item` of each row."""
    return load_weights(ptr + (row * ROW_ITEMS + item)).to(tl.float32)


@triton.jit
def nibbles(w, HIGH: tl.constexpr):
    """The low or high four bits of every byte of each word."""
    return (w >> (4 * HIGH)) & 0x0F0F0F0F


@triton.jit
def fifth_bits(qh, HIGH: tl.constexpr):
    """[KL, RL, KW, R] words of a 5th-bit plane -> [KL, RL, KW, R, 4]: bit 4 of every byte of the piece."""
    r = tl.arange(0, 4)[None, None, None, None, :]
    return ((qh[:, :, :, :, None] >> (r + 4 * HIGH)) & 0x01010101) << 4


@triton.jit
def top_bits(qh):
    """[KL, RL, KW, R] words of a top-2-bits plane -> [KL, RL, KW, R, 4]: bits 4 and 5 of every byte."""
    r = tl.arange(0, 4)[None, None, None, None, :]
    return ((qh[:, :, :, :, None] >> (2 * r)) & 0x03030303) << 4


@triton.jit
def low_word(pair):
    """The low 32 bits of each int64."""
    return pair.to(tl.int32)


@triton.jit
def high_word(pair):
    """The high 32 bits of each int64."""
    return (pair >> 32).to(tl.int32)


@triton.jit
def float_word(word):
    """The float32 whose bits an int32 holds."""
    return word.to(tl.float32, bitcast=True)


@triton.jit
def float_byte(word, i: tl.constexpr):
    """Unsigned byte i of each word, as float32."""
    return ((word >> (8 * i)) & 0xFF).to(tl.float32)


@triton.jit
def float_half(word, i: tl.constexpr):
    """The float16 in half i of each word, as float32."""
    return ((word >> (16 * i)) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def add_group(
    sums,  # tuple of M tensors [KL, RL, KW, R] float32
    first,  # [KL, RL, KW, R, 4] int32: the first 16 integer weights q of a group of 32, one a byte
    second,  # [KL, RL, KW, R, 4] int32: the other 16
    scale,  # [KL, RL, KW, R] float32
    offset,  # [KL, RL, KW, R] float32, read only with HAS_OFFSET
    group,  # [KL, RL, KW, 1] int32: index of the group along K
    live,  # [KL, RL, KW, 1] bool: whether the group counts, read only without EVEN_K
    xq_ptr,
    xs_ptr,
    xsum_ptr,
    K: tl.constexpr,
    M: tl.constexpr,
    PLANES: tl.constexpr,
    SIGNED: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """Per row m of x: sums[m] + the sum over a group of (scale * q + offset) * x[m]."""
    out = ()
    for m in tl.static_range(M):
        products = dot_sixteen(first, xq_ptr, 0, m, group * 2, M, K, SIGNED, None)
        dot = tl.sum(dot_sixteen(second, xq_ptr, 0, m, group * 2 + 1, M, K, SIGNED, products), axis=4)
        if PLANES == 2:
            products = dot_sixteen(first, xq_ptr, 1, m, group * 2, M, K, SIGNED, None)
            products = dot_sixteen(second, xq_ptr, 1, m, group * 2 + 1, M, K, SIGNED, products)
            dot = dot * 256 + tl.sum(products, axis=4)
        xs = load_shared(xs_ptr + m * (K // 32) + group, live, EVEN_K)
        total = sums[m] + scale * (xs * dot.to(tl.float32))
        if HAS_OFFSET:
            xsum = load_sums(xsum_ptr, m, group, live, K, EVEN_K)
            total += offset * (float_word(low_word(xsum)) + float_word(high_word(xsum)))
        out = out + (total,)  # type: ignore[assignment]  # noqa: RUF005
    return out


@triton.jit
def add_group_of_halves(
    sums,
    first,
    second,
    first_scale,  # [KL, RL, KW, R] float32: of the first 16 weights
    second_scale,  # [KL, RL, KW, R] float32: of the other 16
    ZERO: tl.constexpr,
    group,
    live,
    xq_ptr,
    xs_ptr,
    xsum_ptr,
    K: tl.constexpr,
    M: tl.constexpr,
    PLANES: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """As `add_group`, for unsigned q with a scale for each 16 weights: w = scale * (q - ZERO)."""
    out = ()
    for m in tl.static_range(M):
        one = tl.sum(dot_sixteen(first, xq_ptr, 0, m, group * 2, M, K, False, None), axis=4)
        two = tl.sum(dot_sixteen(second, xq_ptr, 0, m, group * 2 + 1, M, K, False, None), axis=4)
        if PLANES == 2:
            one = one * 256 + tl.sum(dot_sixteen(first, xq_ptr, 1, m, group * 2, M, K, False, None), axis=4)
            two = two * 256 + tl.sum(dot_sixteen(second, xq_ptr, 1, m, group * 2 + 1, M, K, False, None), axis=4)
        xs = load_shared(xs_ptr + m * (K // 32) + group, live, EVEN_K)
        xsum = load_sums(xsum_ptr, m, group, live, K, EVEN_K)
        one = xs * one.to(tl.float32) - ZERO * float_word(low_word(xsum))
        two = xs * two.to(tl.float32) - ZERO * float_word(high_word(xsum))
        total = sums[m] + first_scale * one + second_scale * two
        out = out + (total,)  # type: ignore[assignment]  # noqa: RUF005
    return out


@triton.jit
def load_shared(ptr, live, EVEN_K: tl.constexpr):
    """Read scales or sums of x, which every program shares: zero where not live."""
    return tl.load(ptr) if EVEN_K else tl.load(ptr, mask=live, other=0)


@triton.jit
def load_sums(xsum_ptr, m, group, live, K: tl.constexpr, EVEN_K: tl.constexpr):
    """[KL, RL, KW, 1] int64: the float32 sums of both halves of a group of row m, the first half low."""
    return load_shared(xsum_ptr.to(tl.pointer_type(tl.int64)) + m * (K // 32) + group, live, EVEN_K)


@triton.jit
def dot_sixteen(
    w,  # [KL, RL, KW, R, 4] int32: 16 weights, one a byte
    xq_ptr,
    plane,
    m,
    sixteenth,  # [KL, RL, KW, 1] int32: index along K of the 16
    M: tl.constexpr,
    K: tl.constexpr,
    SIGNED: tl.constexpr,
    acc,  # [KL, RL, KW, R, 4] int32 to add to, or None
):
    """[KL, RL, KW, R, 4] int32: four partial dot products of 16 weights with 16 activations."""
    first, _ = activation_runs(plane, m, sixteenth, M, K)  # of so few rows the second follows it
    words = xq_ptr.to(tl.pointer_type(tl.int32)) + first * 2 + tl.arange(0, 4)[None, None, None, :]
    x = tl.broadcast_to(tl.load(words)[:, :, :, None, :], w.shape)
    if acc is None:
        acc = tl.zeros(w.shape, tl.int32)
    return dot4_signed(w, x, acc) if SIGNED else dot4_unsigned(w, x, acc)


@triton.jit
def multiply_rows(
    fetch: tl.constexpr,  # (planes, row, unit, K) -> the packed words of one unit of each row
    add: tl.constexpr,  # (sums, words, unit, live, xq_ptr, xs_ptr, xsum_ptr, K, M, PLANES, EVEN) -> sums with them
    planes,  # pointers to the first row of this program
    row,  # [1, RL, 1, R] int64
    xq_ptr,
    xs_ptr,
    xsum_ptr,
    UNITS: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    PLANES: tl.constexpr,
    KL: tl.constexpr,
    RL: tl.constexpr,
    KW: tl.constexpr,
    R: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tuple of M tensors [KL, RL, KW, R] float32: what each thread sums of x times its rows of W.

    The words of the first EARLY steps are fetched before the activations are awaited.
    """
    STEP: tl.constexpr = KL * KW
    lane = tile_unit(KL, RL, KW)
    early = ()
    for step in tl.static_range(EARLY):
        unit = inside(step * STEP + lane, UNITS, (step + 1) * STEP <= UNITS)
        early = early + (fetch(planes, row, unit, K),)  # type: ignore[assignment]  # noqa: RUF005
    await_inputs(PDL)
    sums = (tl.zeros((KL, RL, KW, R), tl.float32),) * M
    for step in tl.static_range(EARLY):
        unit = inside(step * STEP + lane, UNITS, (step + 1) * STEP <= UNITS)
        live = step * STEP + lane < UNITS
        sums = add(sums, early[step], unit, live, xq_ptr, xs_ptr, xsum_ptr, K, M, PLANES, (step + 1) * STEP <= UNITS)
    for step in tl.range(EARLY, tl.cdiv(UNITS, STEP)):
        unit = inside(step * STEP + lane, UNITS, UNITS % STEP == 0)
        live = step * STEP + lane < UNITS
        words = fetch(planes, row, unit, K)
        sums = add(sums, words, unit, live, xq_ptr, xs_ptr, xsum_ptr, K, M, PLANES, UNITS % STEP == 0)
    return sums


@triton.jit
def store_rows(y_ptr, sums, start, N, M: tl.constexpr, RL: tl.constexpr, R: tl.constexpr):
    """Sum M tensors [KL, RL, KW, R] over K and store them to y [M, N]."""
    row = start + tl.arange(0, R)[None, :] * RL + tl.arange(0, RL)[:, None]
    for m in tl.static_range(M):
        y = tl.sum(tl.sum(sums[m], axis=0), axis=1)
        at = y_ptr + tl.cast(m, tl.int64) * N + row
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=row < N)
