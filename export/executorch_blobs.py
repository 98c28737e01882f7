"""The blobs of ExecuTorch's data file, each read from where it lies when the file is written.

ExecuTorch's CUDA backend copies every weight of every method to a file of its own and hashes it, to see that methods
agree. Here a blob is known by what it holds, and its bytes are asked for once. Two private names of ExecuTorch 1.5 are
replaced for that and others are used; a version without them is refused. Importing this module imports ExecuTorch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, BinaryIO, Final

import torch
from executorch.backends.cuda import cuda_backend, cuda_weight_collector
from executorch.exir._serialize._cord import FileBackedData
from executorch.exir.tensor import scalar_type_enum
from torch import Tensor

from gemma4.export.host_tensors import HostTensors
from gemma4.export.low_memory import untouched_zeros
from gemma4.quant.errors import UnsupportedFeatureError

_CHUNK_BYTES: Final = 64 << 20
# Where what is replaced or used is found.
_NAMES: Final = (
    (cuda_backend, "_full_zeros_preserving_strides"),
    (cuda_weight_collector.CudaWeightCollector, "materialize"),
    (cuda_weight_collector, "CudaWeightArtifact"),
    (cuda_weight_collector, "CudaWeightEntry"),
    (cuda_weight_collector, "_storage_key"),
)


class TensorBlob(FileBackedData):  # type: ignore[misc]
    """A tensor's bytes for ExecuTorch's writer. content: the same for blobs with the same bytes."""

    def __init__(self, content: str, nbytes: int, read: Callable[[], Tensor]) -> None:
        self._digest = hashlib.sha256(content.encode()).digest()
        self._nbytes = nbytes
        self._read = read

    def __len__(self) -> int:
        return self._nbytes

    def prefix(self, size: int) -> bytes:
        """Tells blobs apart, as `sha256` does."""
        return self._digest[:size]

    def sha256(self) -> bytes:
        """Of what the blob is known by."""
        return self._digest

    def to_bytes(self) -> bytes:
        return b"".join(self._chunks())

    def write_to_file(self, outfile: BinaryIO) -> None:
        for chunk in self._chunks():
            outfile.write(chunk)

    def close(self) -> None:
        pass

    def _chunks(self) -> Iterator[memoryview]:
        flat = in_memory_order(self._read())
        assert flat.numel() == self._nbytes
        for start in range(0, self._nbytes, _CHUNK_BYTES):
            yield memoryview(flat[start : start + _CHUNK_BYTES].numpy())  # type: ignore[arg-type]


def in_memory_order(tensor: Tensor) -> Tensor:
    """The bytes of a tensor without gaps, uint8 [nbytes], a view."""
    assert sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) == tensor.numel() - 1
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


@contextmanager
def blobs_from(tensors: HostTensors) -> Iterator[None]:
    """While the block runs, the CUDA backend takes weights by name from `tensors`, which must outlive what it makes.

    Raises UnsupportedFeatureError for an ExecuTorch without the names that are replaced.
    """

    def materialize(collector: object, weights: Any, directory: str, device_type_of: Callable[[Tensor], int]) -> Any:
        artifact = cuda_weight_collector.CudaWeightArtifact(entries=[], storages={})
        for name, (tensor, _) in weights.items():
            blob, owner = _blob(name, tensor, tensors)
            entry = cuda_weight_collector.CudaWeightEntry(
                fqn=name,
                storage_key=cuda_weight_collector._storage_key(name, device_type_of(tensor), owner),
                storage_nbytes=tensor.nbytes,
                dtype=int(scalar_type_enum(tensor.dtype)),
                device_type=device_type_of(tensor),
                storage_offset=0,
                sizes=tuple(tensor.shape),
                strides=tuple(tensor.stride()),
            )
            artifact.entries.append(entry)
            artifact.storages[entry.storage_key] = blob
        return artifact

    missing = [name for owner, name in _NAMES if not hasattr(owner, name)]
    if missing:
        raise UnsupportedFeatureError(f"its CUDA backend lacks {', '.join(missing)}", field="executorch")
    replacements = (lambda x, device: untouched_zeros(x), materialize)
    with ExitStack() as stack:
        for (owner, name), replacement in zip(_NAMES, replacements, strict=False):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield


def _blob(name: str, tensor: Tensor, tensors: HostTensors) -> tuple[TensorBlob, str | None]:
    """A tensor's blob, and what its key names beside it where methods use one name for several tensors."""
    if name in tensors:
        return TensorBlob(tensors.content(name), tensor.nbytes, lambda: tensors[name]), None
    # A number in the graph, which tracing named.
    copy = tensor.detach().to("cpu", copy=True)
    content = hashlib.sha256(in_memory_order(copy).numpy().tobytes()).hexdigest()
    return TensorBlob(content, copy.nbytes, lambda: copy), content
