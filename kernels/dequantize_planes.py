"""Packed planes -> dense rows on a GPU: the exact weights of `gemma4.kernels.dequant`, rounded once to x's dtype.

The planes are contiguous and K is a whole number of blocks, so a weight [N, K] is one flat run of 16-byte
pieces of `qs`; each piece decodes on its own. In float32 the result is bit-identical to gguf-py: scales times
integers are exact in float32 wherever an offset follows, so a fused multiply-add rounds as two operations do.
Used for prefill, where decoded rows go to cuBLAS, and for embeddings, which are some rows of a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from gemma4.kernels.packed_planes import PACKED_FORMATS, check_planes
from gemma4.kernels.packed_tile import float_byte, float_half

BLOCK_PIECES = 256
EMBEDDED_PIECES = 32  # fewer a program: a decode step has one row


@triton.jit
def dequantize_planes_kernel(
    out_ptr,  # [N, K] bfloat16 or float32
    qs_ptr,  # [N, K//2] uint8, or [N, K] int8 for q8_0
    qh_ptr,  # q5_*: [N, K//32] int32; q6_k: [N, K//32, 2] int32
    scale_ptr,  # q4_k, q5_k: codes [N, K//64, 4] uint8; q6_k: scales [N, K//16] int8
    d_ptr,  # d or dm, float16
    ids_ptr,  # [rows of out] int64: which row of the weight each is, read only with HAS_IDS
    PIECES,  # 16-byte pieces of qs that make out
    ROW_PIECES,
    FORMAT: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_IDS: tl.constexpr,
):
    target = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = target < PIECES
    piece = target
    if HAS_IDS:
        piece = tl.load(ids_ptr + target // ROW_PIECES, mask=live, other=0) * ROW_PIECES + target % ROW_PIECES
    j = tl.arange(0, 16)[None, :]
    b = tl.load(qs_ptr + piece[:, None] * 16 + j, mask=live[:, None], other=0).to(tl.int32)
    field = 8 * (j & 3) + (j >> 2)  # of byte 4r+i: 8i+r
    if FORMAT == "q8_0":
        d = tl.load(d_ptr + (piece >> 1), mask=live, other=0.0).to(tl.float32)
        store_sixteen(out_ptr, target * 16, b.to(tl.float32) * d[:, None], live)
    else:
        IS_K: tl.constexpr = FORMAT == "q4_k" or FORMAT == "q5_k" or FORMAT == "q6_k"
        HAS_FIFTH: tl.constexpr = FORMAT == "q5_k" or FORMAT == "q5_0" or FORMAT == "q5_1"
        if HAS_FIFTH:
            qh = tl.load(qh_ptr + piece, mask=live, other=0)[:, None]
        if FORMAT == "q4_k" or FORMAT == "q5_k":
            code = tl.load(scale_ptr.to(tl.pointer_type(tl.int32)) + (piece >> 1), mask=live, other=0)
            dm = tl.load(d_ptr.to(tl.pointer_type(tl.int32)) + (piece >> 3), mask=live, other=0)
        elif FORMAT == "q6_k":
            d = tl.load(d_ptr + (piece >> 3), mask=live, other=0.0).to(tl.float32)
        elif FORMAT == "q4_1" or FORMAT == "q5_1":
            dm = tl.load(d_ptr.to(tl.pointer_type(tl.int32)) + piece, mask=live, other=0)
        else:
            d = tl.load(d_ptr + piece, mask=live, other=0.0).to(tl.float32)
        for high in tl.static_range(2):
            q = (b >> (4 * high)) & 15
            if HAS_FIFTH:
                q |= ((qh >> (field + 4 * high)) & 1) << 4
            if FORMAT == "q4_k" or FORMAT == "q5_k":
                scale = float_half(dm, 0) * float_byte(code, high)
                offset = float_half(dm, 1) * float_byte(code, 2 + high)
                w = q.to(tl.float32) * scale[:, None] - offset[:, None]
            elif FORMAT == "q6_k":
                top = tl.load(qh_ptr + piece * 2 + high, mask=live, other=0)[:, None]
                q |= ((top >> (8 * (j & 3) + 2 * (j >> 2))) & 3) << 4
                code = tl.load(scale_ptr + (piece >> 1) * 4 + 2 * high + (piece & 1), mask=live, other=0)
                w = (q - 32).to(tl.float32) * (d * code.to(tl.float32))[:, None]
            elif FORMAT == "q4_1" or FORMAT == "q5_1":
                w = q.to(tl.float32) * float_half(dm, 0)[:, None] + float_half(dm, 1)[:, None]
            else:
                w = (q - (16 if HAS_FIFTH else 8)).to(tl.float32) * d[:, None]
            first = (target >> 1) * 64 + (target & 1) * 16 + 32 * high if IS_K else target * 32 + 16 * high
            store_sixteen(out_ptr, first, w, live)


@triton.jit
def store_sixteen(out_ptr, first, w, live):
    """Store w [BLOCK, 16] float32 to 16 consecutive weights from `first` on."""
    at = out_ptr + first[:, None] + tl.arange(0, 16)[None, :]
    tl.store(at, w.to(out_ptr.dtype.element_ty), mask=live[:, None])


def dequantize_planes(name: str, planes: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """[N, K] of `dtype`: torch decode on the CPU, one kernel on a GPU. The planes are checked by the caller."""
    if planes[0].device.type == "cpu":
        return PACKED_FORMATS[name].dequantize(*planes).to(dtype)
    return launch_dequantize_planes(name, planes, dtype)


def launch_dequantize_planes(
    name: str, planes: Sequence[Tensor], dtype: torch.dtype, ids: Tensor | None = None
) -> Tensor:
    """Run the kernel, for all rows or for those of ids [T] int64; on CPU tensors only where Triton interprets."""
    fmt = PACKED_FORMATS[name]
    plane = {spec.name: tensor for spec, tensor in zip(fmt.planes, planes, strict=True)}
    qs = plane["qs"]
    rows = qs.shape[0] if ids is None else ids.shape[0]
    block = BLOCK_PIECES if ids is None else EMBEDDED_PIECES
    out = qs.new_empty((rows, qs.shape[1] * fmt.planes[0].weights), dtype=dtype)
    pieces = rows * (qs.shape[1] // 16)
    wrap_triton(dequantize_planes_kernel)[(triton.cdiv(pieces, block),)](
        out_ptr=out,
        qs_ptr=qs,
        qh_ptr=plane.get("qh", qs),
        scale_ptr=plane.get("codes", plane.get("scales", qs)),
        d_ptr=plane.get("dm", plane.get("d", qs)),
        ids_ptr=qs if ids is None else ids,
        PIECES=pieces,
        ROW_PIECES=qs.shape[1] // 16,
        FORMAT=name,
        BLOCK=block,
        HAS_IDS=ids is not None,
        num_warps=4 if ids is None else 1,
    )
    return out


@triton_op("gemma4::packed_embedding", mutates_args={})
def packed_embedding(ids: Tensor, planes: Sequence[Tensor], format_name: str) -> Tensor:
    """float32 [T, K]: rows ids [T] int64 of a packed weight [N, K], exactly decoded in one kernel.

    Raises ValueError on shapes and dtypes that do not fit. Ids are not checked: they stay on the device.
    """
    _check_ids(ids, planes, format_name)
    if ids.device.type == "cpu":
        return PACKED_FORMATS[format_name].dequantize(*(plane[ids] for plane in planes))
    return launch_dequantize_planes(format_name, planes, torch.float32, ids)


@packed_embedding.register_fake
def _(ids: Tensor, planes: Sequence[Tensor], format_name: str) -> Tensor:
    k = _check_ids(ids, planes, format_name)
    return ids.new_empty((ids.shape[0], k), dtype=torch.float32)


def _check_ids(ids: Tensor, planes: Sequence[Tensor], format_name: str) -> int:
    """K of the weight."""
    _, k = check_planes(PACKED_FORMATS[format_name], planes)
    if ids.dim() != 1 or ids.dtype != torch.int64 or ids.device != planes[0].device:
        found = f"{ids.dtype} {list(ids.shape)} on {ids.device}"
        raise ValueError(f"packed_embedding: ids must be int64 [T] on {planes[0].device}, got {found}")
    return k
