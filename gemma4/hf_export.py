"""A GGUF file written as a Hugging Face checkpoint in bfloat16, for servers that read nothing else.

Weights are decoded exactly and rounded once; scales of NVFP4 matrices are multiplied in. A slice of one tensor is in
memory at a time. The directory appears under its name when all of it is on the disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from gemma4.config import Gemma4Config
from gemma4.hf_checkpoint import INDEX_NAME, SINGLE_NAME
from gemma4.hf_config import config_from_model
from gemma4.hf_tokenizer import tokenizer_files
from gemma4.mapping import hf_name, plan_load
from gemma4.progress import progress_bar
from gemma4.quant.atomic_directory import atomic_directory
from gemma4.quant.formats import container_for
from gemma4.quant.ggml_types import row_bytes
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.plan import LoadEntry
from gemma4.quant.safetensors_file import header_bytes
from gemma4.quant.weight_file import WeightFile
from gemma4.vocabulary import MODEL_KEY, vocabulary_from_metadata

__all__ = ["export_hf"]

SHARD_BYTES: Final = 5 * 10**9
_SLICE_WEIGHTS: Final = 4 << 20
_DTYPE: Final = "BF16"
_ITEM_BYTES: Final = 2


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows [start, stop) of one weight of the plan, times its scales where it has some: of groups of rows in order."""

    entry: LoadEntry
    scales: LoadEntry | None
    start: int
    stop: int

    def read(self, file: WeightFile) -> Iterator[Tensor]:
        """bfloat16 [rows, K], a bounded number of rows at a time."""
        k, total = self.entry.shape[-1], prod(self.entry.shape[:-1])
        width, step = row_bytes(self.entry.file_type, k), max(1, _SLICE_WEIGHTS // k)
        data = file.data(self.entry.parts[0].source)
        for start in range(self.start, self.stop, step):
            stop = min(start + step, self.stop)
            blocks = torch.frombuffer(data[start * width : stop * width], dtype=torch.uint8).view(stop - start, width)
            weights = container_for(self.entry.file_type).from_blocks(blocks, k).dequantize()
            if self.scales is not None:
                factors = torch.frombuffer(file.data(self.scales.parts[0].source), dtype=torch.float32)
                weights *= factors[torch.arange(start, stop) // (total // len(factors))][:, None]
            yield weights.to(torch.bfloat16)


@dataclass(frozen=True, slots=True)
class _Output:
    """One tensor to write: the rows of `pieces`, in order."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[_Rows, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _ITEM_BYTES


def export_hf(path: str | Path, folder: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes the Gemma 4 GGUF file at `path` as a checkpoint directory `folder`, which must not exist or be empty.

    shard_bytes: size of a safetensors file at most, but for one tensor that is larger.
    Raises the errors of `GGUFFile.open` and `plan_load`, UnsupportedFeatureError for a model the format cannot
    describe, and FileUnwritableError; then `folder` is as it was.
    """
    with GGUFFile.open(path) as file:
        config = Gemma4Config.from_gguf(file)
        settings = config_from_model(config, file.path)
        outputs = list(_outputs(plan_load(file, config, fuse=False).by_target(), config))
        shards = _shards(outputs, shard_bytes)
        texts: dict[str, str] = {}
        if file.metadata.get(MODEL_KEY, "none") != "none":
            texts = tokenizer_files(vocabulary_from_metadata(file.metadata, file.path), file.metadata)
            generation = json.loads(texts["generation_config.json"])
            settings |= {key: generation[key] for key in ("bos_token_id", "eos_token_id")}
        total = sum(output.nbytes for output in outputs)
        with atomic_directory(folder) as made, progress_bar(f"writing {Path(folder).name}", total) as progress:
            for name, shard in shards.items():
                _write_shard(made / name, shard, file, progress)
            if len(shards) > 1:
                texts[INDEX_NAME] = json.dumps(_index(shards), indent=2)
            texts["config.json"] = json.dumps(settings, indent=2)
            for name, text in texts.items():
                (made / name).write_text(text + "\n" if name.endswith(".json") else text, encoding="utf-8")


def _outputs(entries: Mapping[str, LoadEntry], config: Gemma4Config) -> Iterator[_Output]:
    """Every tensor of the checkpoint: the plan's weights, gate and up projections of experts joined."""
    experts = config.num_experts
    bases = {target.removesuffix(".weight"): entry for target, entry in entries.items() if target.endswith(".weight")}
    scales = {base: entries[f"{base}.scale"] for base in bases if f"{base}.scale" in entries}
    for target, entry in entries.items():
        base, rows = target.removesuffix(".weight"), prod(entry.shape[:-1])
        if target.removesuffix(".scale") in scales or base.endswith("experts.up_proj"):
            continue
        if base.endswith("experts.gate_proj"):
            # Gate rows before up rows in each expert.
            up, size = base.replace("gate_proj", "up_proj"), rows // experts
            pieces = tuple(
                _Rows(bases[part], scales.get(part), e * size, (e + 1) * size)
                for e in range(experts)
                for part in (base, up)
            )
            name = _full_name(target.replace("gate_proj", "gate_up_proj"))
            yield _Output(name, (experts, 2 * size, entry.shape[-1]), pieces)
            continue
        shape = (experts, rows // experts, entry.shape[-1]) if ".experts." in target else entry.shape
        yield _Output(_full_name(target), shape, (_Rows(entry, scales.get(base), 0, rows),))


def _full_name(target: str) -> str:
    name = hf_name(target)
    return name if name.startswith("lm_head.") else f"model.{name}"


def _shards(outputs: Sequence[_Output], shard_bytes: int) -> dict[str, list[_Output]]:
    """File name -> tensors, in order, each file as large as `shard_bytes` allows."""
    groups: list[list[_Output]] = []
    room = 0
    for output in outputs:
        if not groups or output.nbytes > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(output)
        room -= output.nbytes
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_shard(path: Path, outputs: Sequence[_Output], file: WeightFile, progress: Callable[[int], None]) -> None:
    with open(path, "wb") as out:
        out.write(header_bytes({output.name: (_DTYPE, output.shape) for output in outputs}))
        for output in outputs:
            for piece in output.pieces:
                for weights in piece.read(file):
                    out.write(weights.view(torch.uint8).numpy().data)
                    progress(weights.nbytes)


def _index(shards: Mapping[str, Sequence[_Output]]) -> dict[str, Any]:
    total = sum(output.nbytes for outputs in shards.values() for output in outputs)
    weight_map = {output.name: name for name, outputs in shards.items() for output in outputs}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
