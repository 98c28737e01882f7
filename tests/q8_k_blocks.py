"""Q8_K in numpy: for weights x of a block, d = x[m] / -127 with m where |x| is largest, and q = round(x / d).

A block is float32 d, int8 q[256], and int16 sums of each 16 q. Neither gguf-py nor libgguf encodes or decodes the type.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK = np.dtype([("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)])
assert BLOCK.itemsize == 292


def encode(weights: NDArray[np.float32]) -> NDArray[np.uint8]:
    """float32 [N, K] -> uint8 [N, K / 256 * 292]."""
    groups = weights.reshape(-1, 256)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(1)[:, None], 1)
    blocks = np.zeros(len(groups), BLOCK)
    blocks["d"] = (largest / np.float32(-127))[:, 0]
    blocks["qs"] = np.clip(np.rint(groups / blocks["d"][:, None]), -127, 127).astype(np.int8)
    blocks["bsums"] = blocks["qs"].reshape(-1, 16, 16).sum(-1, dtype=np.int16)
    return blocks.view(np.uint8).reshape(len(weights), -1)


def decode(blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 [N, K / 256 * 292] -> float32 [N, K]."""
    rows = np.ascontiguousarray(blocks).view(BLOCK)
    with np.errstate(over="ignore", invalid="ignore"):
        return (rows["d"][..., None] * rows["qs"].astype(np.float32)).reshape(len(blocks), -1)
