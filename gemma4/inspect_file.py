"""What is in a GGUF file of any architecture, or a Hugging Face checkpoint: from headers, without torch.

report = inspect_file("model.gguf")
report.parameters, report.tensor_types, report.plan
json.dumps(report.to_json())
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gemma4.config import Gemma4Config
from gemma4.drafter_config import DRAFTER_ARCHITECTURES, DrafterConfig, plan_drafter
from gemma4.mapping import plan_load
from gemma4.open_weights import open_weights
from gemma4.progress import progress_bar
from gemma4.quant.errors import Gemma4Error
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.gguf_file import GGUFFile, MetadataValue, TensorInfo
from gemma4.quant.plan import Fusion, LoadPlan

if TYPE_CHECKING:
    from gemma4.quant.non_finite import NonFinite
    from gemma4.quant.weight_file import WeightFile

MAX_LISTED: Final = 64
"""Arrays with more entries are summarised by type and length."""

_GATE_UP: Final = "gate+up"
_TYPE_NAMES: Final = {str: "string", bool: "bool", int: "int", float: "float"}


@dataclass(frozen=True, slots=True)
class TypeTotal:
    """All tensors of one storage type. parameters: their weights; bytes: as stored."""

    tensors: int
    parameters: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.parameters


@dataclass(frozen=True, slots=True)
class FileReport:
    """The header of one GGUF file or split set, or of a checkpoint's shards, and whether this library runs it.

    gguf_version: None for a checkpoint.
    config, plan: None where the file is not one this library runs; `unsupported` then says why.
    non_finite: tensors that hold infinities or NaNs; None where the weights were not read.
    """

    path: Path
    paths: tuple[Path, ...]
    gguf_version: int | None
    file_bytes: int
    metadata: Mapping[str, MetadataValue]
    tensors: tuple[TensorInfo, ...]
    config: Gemma4Config | None
    plan: LoadPlan | None
    unsupported: Gemma4Error | None
    non_finite: tuple[NonFinite, ...] | None = None

    @property
    def architecture(self) -> str | None:
        return self._string("general.architecture")

    @property
    def name(self) -> str | None:
        return self._string("general.name")

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Of all tensors as stored, without header and padding."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float | None:
        """None for a file without tensors."""
        return 8 * self.bytes / self.parameters if self.tensors else None

    @property
    def types(self) -> dict[GGMLType, TypeTotal]:
        """Totals by storage type, most bytes first."""
        totals: dict[GGMLType, TypeTotal] = {}
        for tensor in self.tensors:
            old = totals.get(tensor.type, TypeTotal(0, 0, 0))
            totals[tensor.type] = TypeTotal(
                old.tensors + 1, old.parameters + math.prod(tensor.shape), old.bytes + tensor.nbytes
            )
        return dict(sorted(totals.items(), key=lambda item: -item[1].bytes))

    @property
    def gate_up(self) -> Fusion | None:
        """Which layers compute gate and up as one product; None where there is no plan."""
        fusions = self.plan.fusions if self.plan else ()
        return next((fusion for fusion in fusions if fusion.label == _GATE_UP), None)

    def to_json(self, *, list_tensors: bool = False) -> dict[str, Any]:
        """The report as JSON values; non-finite floats become strings. list_tensors: add the key `tensors`.

        The key `non_finite` is there where the weights were read.
        """
        gate_up, unsupported = self.gate_up, self.unsupported
        report: dict[str, Any] = {
            "path": str(self.path),
            "architecture": self.architecture,
            "name": self.name,
            "gguf_version": self.gguf_version,
            "parts": [str(path) for path in self.paths],
            "file_bytes": self.file_bytes,
            "bytes": self.bytes,
            "parameters": self.parameters,
            "bits_per_weight": self.bits_per_weight,
            "tensor_types": {kind.name: total.tensors for kind, total in self.types.items()},
            "fused_gate_up": None if gate_up is None else len(gate_up.fused),
            "unfused_gate_up": None if gate_up is None else len(gate_up.left),
            "decoded_types": None if self.plan is None else [kind.name for kind in self.plan.decoded_types],
            "not_loaded": None if self.plan is None else {g.what: len(g.names) for g in self.plan.not_loaded},
            "config": None if self.config is None else _config_json(self.config),
            "unsupported": unsupported and {"code": unsupported.code, "message": str(unsupported)},
            "metadata": {key: _json_value(value) for key, value in self.metadata.items()},
        }
        if list_tensors:
            report["tensors"] = [
                {"name": t.name, "shape": list(t.shape), "type": t.type.name, "bytes": t.nbytes, "part": t.part}
                for t in self.tensors
            ]
        if self.non_finite is not None:
            report["non_finite"] = [
                {"name": t.name, "type": t.type.name, "blocks": t.blocks, "total": t.total} for t in self.non_finite
            ]
        return report

    def _string(self, key: str) -> str | None:
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None


def inspect_file(path: str | Path, *, check: bool = False) -> FileReport:
    """Reads the headers at `path`. A file that cannot be run is still reported, with the reason in `unsupported`.

    check: read the weights too, for `non_finite`. Raises the errors of `open_weights`.
    """
    config: Gemma4Config | None = None
    plan: LoadPlan | None = None
    unsupported: Gemma4Error | None = None
    with open_weights(path) as file:
        try:
            if file.metadata.get("general.architecture") in DRAFTER_ARCHITECTURES:
                drafter = DrafterConfig.from_gguf(file)
                config, plan = drafter, plan_drafter(file, drafter)
            else:
                config = Gemma4Config.from_gguf(file)
                plan = plan_load(file, config)
        except Gemma4Error as error:
            unsupported = error
        return FileReport(
            path=file.path,
            paths=file.paths,
            gguf_version=file.version if isinstance(file, GGUFFile) else None,
            file_bytes=file.file_bytes,
            metadata=file.metadata,
            tensors=tuple(file.tensors.values()),
            config=config,
            plan=plan,
            unsupported=unsupported,
            non_finite=_check_weights(file) if check else None,
        )


def _check_weights(file: WeightFile) -> tuple[NonFinite, ...]:
    from gemma4.quant.non_finite import find_non_finite

    total = sum(tensor.nbytes for tensor in file.tensors.values())
    with progress_bar(f"checking {file.path.name}", total) as progress:
        return find_non_finite(file, progress)


def element_type(array: Sequence[MetadataValue]) -> str:
    """The type of a metadata array's entries, from its first: string, bool, int, float or array."""
    return _TYPE_NAMES.get(type(array[0]), "array")


def _json_value(value: MetadataValue) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str | int | float):
        return value
    if len(value) > MAX_LISTED:
        return {"type": element_type(value), "length": len(value)}
    return [_json_value(item) for item in value]


def _config_json(config: Gemma4Config) -> dict[str, Any]:
    factors = config.rope_freq_factors
    return config.model_dump(mode="json") | {"rope_freq_factors": None if factors is None else _json_value(factors)}
