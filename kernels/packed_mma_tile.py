"""The shared parts of the packed matmul for a few rows: how a warp holds W and x for int8 matrix instructions.

Tensors are tiles with dimensions

    [T = 4, G = 8, KW, ...]    lanes of a warp, then warps, then what one thread holds

which is how matrix instructions hold their operands, so that both are loaded where they are used and nothing passes
through shared memory. Along K a warp takes a span of 128 weights. Lane (t, g) loads sixteen neighbouring bytes of row g
of W: the four lanes of a row read 64 bytes together, as the memory system likes, but then hold different groups
of 32. An instruction sums over all four; x with zeros for the lanes outside a group singles that group out. Its
sums of row g with the rows C*t to C*t + C - 1 of x end up in lane (t, g) again. The order of k inside a group is free,
since both operands share it and the sum is an exact integer.

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
def load_run(ptr, at, index, live, LIMIT: tl.constexpr, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
    """COUNT tensors like `at`: items at + index + 0, 1, ... of ptr; zeros from index LIMIT on and where not `live`.

    ALIGNED says that runs are aligned and never cross LIMIT; `live` may then be None.
    """
    out = ()
    if ALIGNED:
        VECTOR: tl.constexpr = 4 if COUNT % 4 == 0 else 2
        some = tl.arange(0, VECTOR)[None, None, None, None, :]
        for i in tl.static_range(COUNT // VECTOR):
            address = ptr + (at + (index + i * VECTOR))[:, :, :, :, None] + some
            if live is None:
                out = out + items(tl.load(address))
            else:
                out = out + items(tl.load(address, mask=live[:, :, :, :, None], other=0))
    else:
        for i in tl.static_range(COUNT):
            out = out + (tl.load(ptr + (at + (index + i)), mask=index + i < LIMIT, other=0),)  # type: ignore[assignment]  # noqa: RUF005
    return out


@triton.jit
def fetch(ptr, live):
    """Read packed weights once: first to leave the cache."""
    return tl.load(ptr, mask=live, eviction_policy="evict_first")


@triton.jit
def fetch_words(qs_ptr, qh_ptr, row, t, span, K: tl.constexpr, BITS: tl.constexpr):
    """A span's integer weights as stored: [T, G, KW, R, 4] words, with 8 bits twice; then those with further bits.

    Past the end of a row they are undefined, and count for nothing because x or the scale is zero there.
    """
    PIECES: tl.constexpr = K // (16 if BITS == 8 else 32)
    words = qs_ptr.to(tl.pointer_type(tl.int32)) + (row * (PIECES * 4))[:, :, :, :, None]
    words += tl.arange(0, 4)[None, None, None, None, :]
    piece = span * 8 + (t >> 1) * 4 + (t & 1) if BITS == 8 else span * 4 + t
    live = piece < PIECES
    out = (fetch(words + (piece * 4)[:, :, :, :, None], live[:, :, :, :, None]),)
    if BITS == 8:
        out = out + (fetch(words + (piece * 4 + 8)[:, :, :, :, None], (piece + 2 < PIECES)[:, :, :, :, None]),)  # type: ignore[assignment]  # noqa: RUF005
    elif BITS > 4:
        EACH: tl.constexpr = BITS - 4
        high = qh_ptr.to(tl.pointer_type(tl.int32)) + (row * (PIECES * EACH) + piece * EACH)
        if BITS == 5:
            out = out + (fetch(high, live),)  # type: ignore[assignment]  # noqa: RUF005
        else:
            high = high[:, :, :, :, None] + tl.arange(0, 2)[None, None, None, None, :]
            out = out + items(fetch(high, live[:, :, :, :, None]))
    return out


@triton.jit
def fetch_scales(scales_ptr, d_ptr, row, span, K: tl.constexpr, SUPER: tl.constexpr, OFFSET: tl.constexpr):
    """A span's scales as stored: two words of codes and the factor of a K-quant, otherwise those of four groups."""
    d_ptr = d_ptr.to(tl.pointer_type(tl.int32)) if OFFSET else d_ptr
    live = span < K // 128
    if SUPER:
        codes = scales_ptr.to(tl.pointer_type(tl.int32))
        factor = tl.load(d_ptr + (row * (K // 256) + (span >> 1)), mask=live, other=0)
        out = load_run(codes, row * (K // 64), span * 2, live, K // 64, 2, True) + (factor,)  # noqa: RUF005
    else:
        out = load_run(d_ptr, row * (K // 32), span * 4, live, K // 32, 4, K % 128 == 0)
    return out


@triton.jit
def integers(words, NIBBLE: tl.constexpr, BITS: tl.constexpr, SHIFT: tl.constexpr):
    """[T, G, KW, R, 4] words of bytes q: low or high nibbles of `fetch_words`, with 8 bits its first or second words.

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
            even, odd = tl.join(high, high >> 2 * EACH), tl.join(high >> EACH, high >> 3 * EACH)
            high = tl.reshape(tl.join(even, odd), q.shape)
            q |= (high & (0x01010101 if BITS == 5 else 0x03030303)) << (4 + SHIFT)
        if SHIFT > 0:
            q ^= -0x7F7F7F80
    return q


@triton.jit
def weight_operand(pair):
    """[T, G, KW, R, 2] words of weights -> int8 [KW, 8R, 32]."""
    q = tl.permute(bytes_of(pair), (2, 3, 1, 0, 4, 5))
    return tl.reshape(q, (q.shape[0], q.shape[1] * 8, 32))


@triton.jit
def activation_operand(pair, chosen):
    """[T, G, KW, tiles, 2] words of x -> int8 [KW, 32, 8 * tiles], zero but for the lanes with `chosen` -1."""
    x = tl.permute(bytes_of(pair & chosen[:, :, :, :, None]), (2, 0, 4, 5, 3, 1))
    return tl.reshape(x, (x.shape[0], 32, x.shape[4] * 8))


@triton.jit
def joined_planes(dot, R: tl.constexpr, C: tl.constexpr, PLANES: tl.constexpr):
    """[KW, 8R, 8 * tiles] int32 sums from MAGIC_BITS on -> [T, G, KW, R, C] float32 products with both planes."""
    KW: tl.constexpr = dot.shape[0]
    dot = dot.to(tl.float32, bitcast=True) - MAGIC
    if C * PLANES == 4:
        dot = tl.permute(tl.reshape(dot, (KW, R, 8, 2, 4, 2)), (4, 2, 0, 1, 5, 3))
    else:
        dot = tl.permute(tl.reshape(dot, (KW, R, 8, 4, C, PLANES)), (3, 2, 0, 1, 4, 5))
    if PLANES == 1:
        out = tl.reshape(dot, (4, 8, KW, R, C))
    else:
        high, low = tl.split(dot)
        out = high * 256.0 + low
    return out


@triton.jit
def row_factor(x):
    """[T, G, KW, R] -> [T, G, KW, R, 1]."""
    return x[:, :, :, :, None]


@triton.jit
def column_factor(x):
    """[T, G, KW, C] -> [T, G, KW, 1, C]."""
    return x[:, :, :, None, :]
