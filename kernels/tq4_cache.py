"""The tensors of a TurboQuant cache of one layer, as its kernels take them.

    k_codes, v_codes   uint8 [1, Hkv, L, C * bits / 8]   codes, as `gemma4.kernels.turboquant` defines them
    k_scale, v_scale   float32 [1, Hkv, L]               their scales
    first_key          float32 [1, Hkv, W]               the key of position 0 itself, rotated

Position p is slot p. v has C = D. k has C = D, too, and W = D; or, where values serve as keys in the dimensions that
rotary embedding leaves (`gemma4.kernels.tq4_rotation`), C < D, and first_key holds the value beside: W = C + D.

Many heads look at position 0 all the time (the attention sink of Xiao et al., 2023, arXiv 2309.17453), so the error of
that one key would be in nearly every softmax. Its score is computed without codes; its value has codes like all others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gemma4.kernels.turboquant import BITS, MIN_DIM


class TQ4Cache(NamedTuple):
    """See above. The slots of a head lie one after the other; between heads there may be room for more of them."""

    k_codes: Tensor
    k_scale: Tensor
    v_codes: Tensor
    v_scale: Tensor
    first_key: Tensor

    @property
    def kv_heads(self) -> int:
        return int(self.k_codes.shape[1])

    @property
    def length(self) -> int:
        """Slots of a head that may be read."""
        return int(self.k_codes.shape[2])

    @property
    def room(self) -> int:
        """Slots from one head to the next."""
        return int(self.k_scale.stride(1))

    def widths(self, head_dim: int) -> tuple[int, int]:
        """(bits of a code, dimensions of k that have codes) of a cache for heads of `head_dim`."""
        bits = int(self.v_codes.shape[-1]) * 8 // head_dim
        return bits, int(self.k_codes.shape[-1]) * 8 // max(bits, 1)

    def first_slots(self, end: int) -> TQ4Cache:
        """A view of the slots before `end`."""
        k_codes, k_scale, v_codes, v_scale = (x[:, :, :end] for x in self[:4])
        return TQ4Cache(k_codes, k_scale, v_codes, v_scale, self.first_key)

    def pointers(self) -> dict[str, Tensor]:
        """The arguments of a kernel that takes all five."""
        return {f"{name}_ptr": tensor for name, tensor in zip(self._fields, self, strict=True)}

    def check(self, head_dim: int, kv_heads: int) -> None:
        """Raise ValueError unless it is a cache for `kv_heads` heads of `head_dim`."""
        if head_dim < MIN_DIM or head_dim & (head_dim - 1):
            raise ValueError(f"head_dim must be a power of two from {MIN_DIM} on, got {head_dim}")
        bits, turned = self.widths(head_dim)
        if bits not in BITS or not MIN_DIM <= turned <= head_dim or turned & (turned - 1):
            sizes = " or ".join(str(head_dim * b // 8) for b in BITS)
            raise ValueError(
                f"v_codes must have {sizes} bytes for each of {head_dim} dimensions and k_codes as many or fewer by a "
                f"power of two, got {self.v_codes.shape[-1]} and {self.k_codes.shape[-1]}"
            )
        heads, room = (1, kv_heads, self.length), self.room
        key_bytes, value_bytes = turned * bits // 8, head_dim * bits // 8
        width = turned + head_dim if turned < head_dim else head_dim
        shapes = ((*heads, key_bytes), heads, (*heads, value_bytes), heads, (1, kv_heads, width))
        of_key, of_value = (room * key_bytes, key_bytes, 1), (room * value_bytes, value_bytes, 1)
        for name, tensor, shape in zip(self._fields, self, shapes, strict=True):
            dtype = torch.uint8 if name.endswith("codes") else torch.float32
            if tensor.shape != shape or tensor.dtype != dtype:
                found = f"{tensor.dtype} {list(tensor.shape)}"
                raise ValueError(f"{name} must be {str(dtype).removeprefix('torch.')} {list(shape)}, got {found}")
        strides = (of_key, (room, 1), of_value, (room, 1), (width, 1))
        for name, tensor, expected in zip(self._fields, self, strides, strict=True):
            if tensor.stride()[1:] != expected:
                raise ValueError(f"{name}: expected strides {expected} of heads and slots, got {tensor.stride()[1:]}")
