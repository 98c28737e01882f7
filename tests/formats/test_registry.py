"""The registry of formats: every type has one container or a refusal that names it, every byte of a block one plane."""

from __future__ import annotations

import gguf
import pytest
import torch

from gemma4.quant.errors import UnsupportedTypeError
from gemma4.quant.formats import QuantTensor, container_for, register_format
from gemma4.quant.ggml_types import BLOCK_FORMATS, GGMLType

DENSE = ("F32", "F16", "BF16")
# Q8_K and Q1_0 are types of weights in ggml, which gguf-py does not decode.
DECODABLE = [t.name for t in GGMLType if int(t) in map(int, gguf.quants._type_traits)] + ["Q8_K", "Q1_0"]
SUPPORTED = sorted({*DENSE, *DECODABLE})


@pytest.mark.parametrize("ggml_type", list(GGMLType), ids=lambda t: t.name)
def test_every_type_has_a_container_or_a_typed_refusal(ggml_type: GGMLType) -> None:
    if ggml_type.name in SUPPORTED:
        assert issubclass(container_for(ggml_type), QuantTensor)
    else:
        with pytest.raises(UnsupportedTypeError, match=rf"{ggml_type.name} \({int(ggml_type)}\)") as caught:
            container_for(ggml_type)
        assert all(name in str(caught.value) for name in SUPPORTED)


@pytest.mark.parametrize("name", SUPPORTED)
def test_every_byte_of_a_block_belongs_to_one_plane(name: str) -> None:
    container, block = container_for(GGMLType[name]), BLOCK_FORMATS[GGMLType[name]]
    spans = sorted((plane.start, plane.stop) for plane in container.planes.values())
    assert [start for start, _ in spans] == [0, *(stop for _, stop in spans[:-1])]
    assert spans[-1][1] == block.type_size
    for plane in container.planes.values():
        items = torch.empty(plane.trailing(block.block_size), dtype=plane.dtype)
        assert items.nbytes == plane.stop - plane.start or (plane.dtype == torch.uint8 and plane.items == 4)


def test_a_type_is_registered_once() -> None:
    with pytest.raises(AssertionError, match="Q4_K is registered twice"):
        register_format(GGMLType.Q4_K)(container_for(GGMLType.Q4_K))
