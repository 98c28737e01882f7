"""A Hugging Face Gemma 4 checkpoint directory, read as if it were a GGUF file of the same model.

    with HFCheckpoint.open("gemma-4-31B-it") as file:
        config = Gemma4Config.from_gguf(file)
        plan = plan_load(file, config)

`config.json` becomes `gemma4.*` metadata, the tokenizer's files `tokenizer.ggml.*`, and every tensor has its GGUF name;
what follows, checks, plan and loading, is the same for both formats. The shards are mapped, nothing is copied.
"""

from __future__ import annotations

import array
import errno
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, Self

from gemma4.hf_config import metadata_from_config
from gemma4.hf_tokenizer import metadata_from_files
from gemma4.mapping import gguf_names
from gemma4.quant.errors import (
    FileMissingError,
    FileUnreadableError,
    MalformedError,
    MetadataError,
    MissingTensorError,
    UnexpectedTensorError,
    UnsupportedTypeError,
)
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.gguf_header import MetadataValue
from gemma4.quant.gguf_tensors import TensorInfo
from gemma4.quant.safetensors_file import SafetensorsFile

INDEX_NAME: Final = "model.safetensors.index.json"
SINGLE_NAME: Final = "model.safetensors"
ROPE_FACTORS: Final = "rope_freqs.weight"

_TYPES: Final = {"F32": GGMLType.F32, "F16": GGMLType.F16, "BF16": GGMLType.BF16}
_TEXT_PREFIXES: Final = ("model.language_model.", "language_model.model.", "model.", "language_model.")
# As GGUF files that hold everything name these parts, so that the plan leaves them aside.
_OTHER_PREFIXES: Final = {
    "vision_tower.": "v.",
    "audio_tower.": "a.",
    "embed_vision.": "mm.",
    "embed_audio.": "mm.a.",
}
_TOKENIZER_FILES: Final = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


class HFCheckpoint:
    """An open directory. A context manager.

    path: as given to `open`. paths: of its shards, in order. file_bytes: of all shards.
    metadata, tensors: under the names a GGUF file has for them.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, MetadataValue],
        shards: tuple[SafetensorsFile, ...],
        tensors: Mapping[str, TensorInfo],
        stored_names: Mapping[str, str],
        rope_factors: list[float],
    ) -> None:
        self.path = path
        self.paths = tuple(shard.path for shard in shards)
        self.file_bytes = sum(shard.file_bytes for shard in shards)
        self.metadata = MappingProxyType(dict(metadata))
        self.tensors = MappingProxyType(dict(tensors))
        self._shards = shards
        self._stored_names = stored_names
        self._rope_factors = rope_factors

    @classmethod
    def open(cls, path: str | Path) -> HFCheckpoint:
        """Opens `config.json`, the tokenizer's files and all shards of a directory.

        Raises FileMissingError, FileUnreadableError, TruncatedError, MalformedError, MetadataError, TokenizerError,
        UnsupportedArchitectureError, UnsupportedFeatureError, UnsupportedTypeError or UnexpectedTensorError.
        """
        path = Path(path)
        config = _read_json(path / "config.json")
        metadata, factors = metadata_from_config(config, path / "config.json")
        shards = _open_shards(path)
        text = config.get("text_config", config)
        is_tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", True)))
        tensors, stored_names = _tensors(shards, metadata["gemma4.block_count"], is_tied)
        tensors[ROPE_FACTORS] = TensorInfo(ROPE_FACTORS, (len(factors),), GGMLType.F32, 4 * len(factors), 0, 0)
        if "token_embd.weight" not in tensors:
            raise MissingTensorError(
                "no shard holds the token embeddings", path=path, field="model.embed_tokens.weight"
            )
        files = {name: _read(path / name) for name in _TOKENIZER_FILES if (path / name).is_file()}
        metadata |= metadata_from_files(files, tensors["token_embd.weight"].shape[0], path)
        metadata["general.name"] = path.resolve().name
        return cls(path, metadata, shards, tensors, stored_names, factors)

    def data(self, name: str) -> memoryview:
        """The bytes of one tensor, writable and copy-on-write. Raises MissingTensorError or TruncatedError."""
        if name == ROPE_FACTORS:
            return memoryview(bytearray(array.array("f", self._rope_factors)))
        if name not in self.tensors:
            raise MissingTensorError("no tensor of this name is in the checkpoint", path=self.path, field=name)
        return self._shards[self.tensors[name].part].data(self._stored_names[name])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The maps close with the last view on them.
        self._shards = ()


def _tensors(
    shards: tuple[SafetensorsFile, ...], num_layers: int, is_tied: bool
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """What the shards hold, by GGUF name, and the name each has in its shard."""
    names = gguf_names(num_layers)
    tensors: dict[str, TensorInfo] = {}
    stored_names: dict[str, str] = {}
    for part, shard in enumerate(shards):
        for stored_name, stored in shard.tensors.items():
            name = _gguf_name(stored_name, names)
            if name == "output.weight" and is_tied:
                continue
            if name in tensors:
                raise UnexpectedTensorError(f"the checkpoint holds {name} twice", path=shard.path, field=stored_name)
            if stored.dtype not in _TYPES:
                if name.startswith(tuple(_OTHER_PREFIXES.values())):
                    continue
                message = f"found {stored.dtype}, expected {', '.join(_TYPES)}: is the checkpoint quantized?"
                raise UnsupportedTypeError(message, path=shard.path, field=stored_name)
            nbytes = stored.stop - stored.start
            tensors[name] = TensorInfo(name, stored.shape, _TYPES[stored.dtype], nbytes, part, stored.start)
            stored_names[name] = stored_name
    return tensors, stored_names


def _gguf_name(stored_name: str, names: Mapping[str, str]) -> str:
    """The GGUF name of a stored tensor; its own where nothing of the model has that name."""
    candidates = [stored_name.removeprefix(p) for p in _TEXT_PREFIXES if stored_name.startswith(p)] + [stored_name]
    for candidate in candidates:
        if candidate in names:
            return names[candidate]
        for theirs, ours in _OTHER_PREFIXES.items():
            if candidate.startswith(theirs):
                return ours + candidate.removeprefix(theirs)
    return stored_name


def _open_shards(path: Path) -> tuple[SafetensorsFile, ...]:
    index_path = path / INDEX_NAME
    if not index_path.exists():
        return (SafetensorsFile.open(path / SINGLE_NAME),)
    weight_map = _read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise MetadataError("found no object of file names", path=index_path, field="weight_map")
    files = list(dict.fromkeys(weight_map.values()))
    for name in files:
        if Path(name).name != name:
            raise MetadataError(f"found {name!r:.80}, expected a file in the same directory", path=index_path)
    shards = tuple(SafetensorsFile.open(path / name) for name in files)
    for name, file in weight_map.items():
        if name not in shards[files.index(file)].tensors:
            raise MissingTensorError(f"the index says that {file} holds the tensor", path=index_path, field=name)
    return shards


def _read(path: Path) -> Any:
    return _read_text(path) if path.suffix == ".jinja" else _read_json(path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileMissingError("there is no file at this path; expected a checkpoint directory", path=path) from error
    except UnicodeDecodeError as error:
        raise MalformedError(f"not UTF-8: {error}", path=path) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileUnreadableError(f"cannot read: {reason}", path=path, os_errno=error.errno or errno.EIO) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise MalformedError(f"not JSON: {error}", path=path) from error
    if not isinstance(value, dict):
        raise MalformedError("expected a JSON object", path=path)
    return value
