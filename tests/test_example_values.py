"""What the compiler tries kernels with while a model without memory is compiled: little memory, and nothing random."""

from __future__ import annotations

import torch
from torch._inductor.select_algorithm import AlgorithmSelectorCache

from gemma4.export.low_memory import patched_compiler


def test_large_values_share_memory_and_indices_have_their_own() -> None:
    original = vars(AlgorithmSelectorCache)["generate_example_value"]
    with patched_compiler():
        make = AlgorithmSelectorCache.generate_example_value
        weight = make((1024, 2048), (2048, 1), "cpu", torch.float32, 0)
        transposed = make((2048, 1024), (1, 2048), "cpu", torch.bfloat16, 64)
        assert weight.data_ptr() == transposed.data_ptr()
        assert (weight.shape, weight.stride(), weight.dtype) == ((1024, 2048), (2048, 1), torch.float32)
        assert (transposed.shape, transposed.stride(), transposed.dtype) == ((2048, 1024), (1, 2048), torch.bfloat16)
        positions = make((32,), (1,), "cpu", torch.int64, 0, (40,))
        weight.fill_(7)
        assert not bool(positions.any())
        assert positions.shape == (32,)
        assert make((3, 0), (1, 1), "cpu", torch.int32, 0).shape == (3, 0)
    assert vars(AlgorithmSelectorCache)["generate_example_value"] is original
