"""The shared parts of the packed matmul for a few rows: how a warp holds W and x for int8 matrix instructions.

Tensors are tiles with dimensions

    [T = 4, G = 8, KW, ...]    lanes of a warp, then warps, then what one thread holds

which is how matrix instructions hold their operands, so that both are loaded where they are used and nothing passes
through shared memory. Lane (t, g) takes bytes 8t to 8t + 7 of each unit of 64 weights of row g: with nibbles, eight
weights of each of two groups of 32. An instruction sums over the four lanes of a row; where they hold weights of two
scales, zeros single those of one out. Its sums of row g with the rows C*t to C*t + C - 1 of x end up in lane (t, g)
again. The order of k inside a group is free, since both operands share it and the sum is an exact integer.

The constants BITS, SUPER and OFFSET are those of `gemma4.kernels.packed_mma`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gemma4.kernels.dp4a import INTERPRETED

MAGIC_BITS = tl.constexpr(0x4B400000)
MAGIC = tl.constexpr(12582912.0)
"""1.5 * 2^23 and its bits: added to an integer below 2^22, the bits of MAGIC give those of MAGIC + the integer."""


@triton.jit
def bytes_of(words):
    """[...] int32 -> [..., 4] int8: the bytes of each word, at no cost on a GPU."""
    if INTERPRETED:
        even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
        odd = tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8))
        out = tl.reshape(tl.join(even, odd), words.shape + [4])  # noqa: RUF005
    else:
        copies = tl.join(words, words)
        copies = tl.reshape(tl.join(copies, copies), words.shape + [4])  # noqa: RUF005
        out = tl.inline_asm_elementwise(
            "mov.b32 $0, $1; // bytes of $1 $2 $3 $4", "=r,r,r,r,r", [copies], dtype=tl.int8, is_pure=True, pack=4
        )
    return out


@triton.jit
def items(x):
    """[..., 2 or 4] -> as many tensors [...]."""
    if x.shape[-1] == 2:
        out = tl.split(x)
    else:
        even, odd = tl.split(tl.reshape(x, x.shape[:-1] + [2, 2]))  # noqa: RUF005
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        out = (first, second, third, fourth)
    return out


@triton.jit
def halves(x):
    """[T, G, KW, n, 4] -> its first and its last two of four: [T, G, KW, n, 2] each."""
    return tl.split(tl.permute(tl.reshape(x, x.shape[:-1] + [2, 2]), (0, 1, 2, 3, 5, 4)))  # noqa: RUF005


@triton.jit
def load_run(ptr, at, index, LIMIT: tl.constexpr, COUNT: tl.constexpr, ALIGNED: tl.constexpr, ahead: tl.constexpr = 0):
    """COUNT tensors like `at`: items at + index + ahead + 0, 1, ... of ptr; zeros from index LIMIT on.

    ALIGNED says that runs are aligned and never cross LIMIT.
    """
    out = ()
    if ALIGNED:
        VECTOR: tl.constexpr = 4 if COUNT % 4 == 0 else 2
        some = tl.arange(0, VECTOR)[None, None, None, None, :]
        for i in tl.static_range(COUNT // VECTOR):
            out = out + items(tl.load(((ptr + at) + index)[:, :, :, :, None] + (ahead + i * VECTOR + some)))
    else:
        for i in tl.static_range(COUNT):
            out = out + (tl.load(ptr + (at + (index + (ahead + i))), mask=index + (ahead + i) < LIMIT, other=0),)  # type: ignore[assignment]  # noqa: RUF005
    return out


@triton.jit
def fetch(ptr):
    """Read packed weights once: first to leave the cache."""
    return tl.load(ptr, eviction_policy="evict_first")


@triton.jit
def fetch_words(qs_ptr, qh_ptr, row, t, unit, ahead: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr):
    """The integer weights of unit + ahead as stored: eight bytes [T, G, KW, R, 2] words, with 8 bits those of both
    groups; then those with further bits, a lane's own lowest.

    Instead of those past the end of a row the last ones are read again, and count for nothing because x is zero there.
    """
    WORDS: tl.constexpr = 8 if BITS == 8 else 4  # of a group
    LAST: tl.constexpr = K // 32 - 1
    two = tl.arange(0, 2)[None, None, None, None, :]
    words = qs_ptr.to(tl.pointer_type(tl.int32)) + row * (K // 32 * WORDS)
    if BITS == 8:
        words += t * 2
        if K % 128 == 0:
            words = (words + unit * 16)[:, :, :, :, None] + (ahead * 16 + two)
            out = (fetch(words), fetch(words + 8))
        else:
            group = (unit + ahead) * 2
            first, last = tl.minimum(group, LAST) * 8, tl.minimum(group + 1, LAST) * 8
            out = (fetch((words + first)[:, :, :, :, None] + two), fetch((words + last)[:, :, :, :, None] + two))
    else:
        EACH: tl.constexpr = BITS - 4
        high = qh_ptr.to(tl.pointer_type(tl.int32)) + row * (K // 32 * EACH)
        if K % 128 == 0:
            words = (words + t * 2 + unit * 8)[:, :, :, :, None] + (ahead * 8 + two)
            high = high + (t >> 1) * EACH + unit * (2 * EACH) + ahead * (2 * EACH)
        else:
            group = tl.minimum((unit + ahead) * 2 + (t >> 1), LAST)
            words = (words + (t & 1) * 2 + group * 4)[:, :, :, :, None] + two
            high = high + group * EACH
        out = (fetch(words),)  # type: ignore[assignment]
        if BITS == 5:
            out = out + (fetch(high) >> (t & 1) * 2,)  # type: ignore[assignment]  # noqa: RUF005
        elif BITS == 6:
            first, last = items(fetch(high[:, :, :, :, None] + two))
            out = out + (first >> (t & 1) * 4, last >> (t & 1) * 4)  # type: ignore[assignment]  # noqa: RUF005
    return out


@triton.jit
def fetch_scales(scales_ptr, d_ptr, row, span, K: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr):
    """Scales as stored: four words of codes and the factor of a K-quant's two spans, otherwise those of four groups."""
    d_ptr = d_ptr.to(tl.pointer_type(tl.int32)) if OFFSET else d_ptr
    if SUPER:
        codes = scales_ptr.to(tl.pointer_type(tl.int32))
        factor = tl.load((d_ptr + row * (K // 256)) + (span >> 1))
        out = load_run(codes, row * (K // 64), span * 2, K // 64, 4, True) + (factor,)  # noqa: RUF005
    else:
        out = load_run(d_ptr, row * (K // 32), span * 4, K // 32, 4, K % 128 == 0)
    return out


@triton.jit
def integers(words, NIBBLE: tl.constexpr, BITS: tl.constexpr, SHIFT: tl.constexpr):
    """[T, G, KW, R, 2] words of bytes q: low or high nibbles of `fetch_words`, with 8 bits its first or second words.

    With SHIFT the bytes are (q - 2^(BITS-1)) << SHIFT, which is q moved to the top of its byte and its sign flipped.
    """
    if BITS == 8:
        q = words[NIBBLE]
    else:
        RIGHT: tl.constexpr = 4 * NIBBLE - SHIFT
        q = words[0] >> RIGHT if RIGHT >= 0 else words[0] << -RIGHT
        q &= 0x0F0F0F0F << SHIFT if SHIFT < 4 else -0x0F0F0F10
        if BITS > 4:
            EACH: tl.constexpr = BITS - 4
            high = words[1] >> 4 * NIBBLE if BITS == 5 else words[1 + NIBBLE]
            high = tl.join(high, high >> EACH)
            q |= (high & (0x01010101 if BITS == 5 else 0x03030303)) << (4 + SHIFT)
        if SHIFT > 0:
            q ^= -0x7F7F7F80
    return q


@triton.jit
def fetch_activations(x_ptr, t, ahead: tl.constexpr, M: tl.constexpr, IN_ORDER: tl.constexpr, PLANE: tl.constexpr):
    """Two int8 [KW, 32, 8 * tiles]: a unit's x as the first and as the second `integers` of its weights meet it.

    PLANE: words from one plane to the next where tiles are planes, otherwise 0.
    """
    if IN_ORDER:
        words = x_ptr[:, :, :, :, None] + (ahead * (M * 16) + tl.arange(0, 4)[None, None, None, None, :])
        if PLANE > 0:
            words += tl.arange(0, 2)[None, None, None, :, None] * PLANE
        first, last = halves(tl.load(words))
    else:
        # Low nibbles are the first sixteen of a group, which the lanes of its half of the unit share.
        words = (x_ptr + ((t & 1) * 4 + (t >> 1) * 2 - t * 4))[:, :, :, :, None] + ahead * (M * 16)
        words += tl.arange(0, 2)[None, None, None, None, :]
        if PLANE > 0:
            words += tl.arange(0, 2)[None, None, None, :, None] * PLANE
        first, last = tl.load(words), tl.load(words + 8)
    return activation_operand(first), activation_operand(last)


@triton.jit
def weight_operand(pair):
    """[T, G, KW, R, 2] words of weights -> int8 [KW, 8R, 32]."""
    q = tl.permute(bytes_of(pair), (2, 3, 1, 0, 4, 5))
    return tl.reshape(q, (q.shape[0], q.shape[1] * 8, 32))


@triton.jit
def activation_operand(pair):
    """[T, G, KW, tiles, 2] words of x -> int8 [KW, 32, 8 * tiles]."""
    x = tl.permute(bytes_of(pair), (2, 0, 4, 5, 3, 1))
    return tl.reshape(x, (x.shape[0], 32, x.shape[4] * 8))


@triton.jit
def joined_planes(dot, R: tl.constexpr, C: tl.constexpr, PLANES: tl.constexpr):
    """[KW, 8R, 8 * tiles] int32 sums from MAGIC_BITS on -> [T, G, KW, R, C] float32 products with both planes."""
    KW: tl.constexpr = dot.shape[0]
    dot = dot.to(tl.float32, bitcast=True)
    if C * PLANES == 4:
        dot = tl.permute(tl.reshape(dot, (KW, R, 8, 2, 4, 2)), (4, 2, 0, 1, 5, 3))
    else:
        dot = tl.permute(tl.reshape(dot, (KW, R, 8, 4, C, PLANES)), (3, 2, 0, 1, 4, 5))
    if PLANES == 1:
        out = tl.reshape(dot - MAGIC, (4, 8, KW, R, C))
    else:
        # 256 * (high - MAGIC) + (low - MAGIC) in two exact steps.
        high, low = tl.split(dot)
        out = (high - (MAGIC + MAGIC / 256.0)) * 256.0 + low
    return out


@triton.jit
def row_factor(x):
    """[T, G, KW, R] -> [T, G, KW, R, 1]."""
    return x[:, :, :, :, None]


@triton.jit
def column_factor(x):
    """[T, G, KW, C] -> [T, G, KW, 1, C]."""
    return x[:, :, :, None, :]


@triton.jit
def zero_after_loads(step):
    """0, after what loads are not moved across: a compiler would move them down to where they are used."""
    if INTERPRETED:
        out = step * 0
    else:
        out = tl.inline_asm_elementwise(
            "bar.warp.sync -1; mov.b32 $0, 0; // $1", "=r,r", [step], dtype=tl.int32, is_pure=False, pack=1
        )
    return out


@triton.jit
def hidden(x):
    """x, of which the compiler knows nothing."""
    if INTERPRETED:
        out = x
    else:
        out = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    return out


@triton.jit
def half_masks(t):
    """Two masks [T, G, KW, 1, 1] of the first and of the last two of four lanes."""
    first = hidden(-(t < 2).to(tl.int32))[:, :, :, :, None]
    return (first, ~first)


@triton.jit
def scaled_sums(codes, xsum_ptr, block, t, g, M: tl.constexpr, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """[T, G, KW, R, C]: min codes of a K-quant's block times the sums of x, by a matrix instruction in TF32.

    The sums go in as two numbers, whose own sum is right to 2^-22.
    """
    KW: tl.constexpr = t.shape[2]
    code = tl.where(t < 2, tl.where(t == 0, codes[0], codes[1]), tl.where(t == 2, codes[2], codes[3]))
    mins = tl.join(((code >> 16) & 0xFF).to(tl.float32), ((code >> 24) & 0xFF).to(tl.float32))
    mins = tl.permute(tl.join(mins, mins), (2, 3, 1, 4, 0, 5))
    m = tl.minimum(g if C == 2 else g // 2, M - 1)
    at = (xsum_ptr + (m * (K // 16) + t * 4)) + block * 16
    sums = tl.load(at[:, :, :, :, None] + tl.arange(0, 4)[None, None, None, None, :])
    high = (sums.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)
    low = sums - high
    if C == 2:
        parts = tl.reshape(tl.join(high, low), (4, 8, KW, 2, 2, 2))
    else:
        parts = tl.reshape(tl.where((g % 2 == 0)[:, :, :, :, None], high, low), (4, 8, KW, 2, 2, 1))
    parts = tl.permute(parts, (2, 3, 0, 4, 5, 1))
    products = tl.dot(tl.reshape(mins, (KW, R * 8, 16)), tl.reshape(parts, (KW, 16, C * 8)), input_precision="tf32")
    if C == 2:
        products = tl.permute(tl.reshape(products, (KW, R, 8, 2, 4, 2)), (4, 2, 0, 1, 5, 3))
    else:
        products = tl.permute(tl.reshape(products, (KW, R, 8, 4, 1, 2)), (3, 2, 0, 1, 4, 5))
    first, second = tl.split(products)
    return first + second
