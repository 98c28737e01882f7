"""From an open file to a model with its weights: where it runs, whether it fits, how it is loaded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch

from gemma4.config import CacheKind, Gemma4Config
from gemma4.mapping import PER_LAYER_TABLE, plan_load
from gemma4.memory_plan import CONTEXT_BYTES, MemoryModel, check_fits
from gemma4.model import TextModel
from gemma4.progress import progress_bar
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.loader import load_weights
from gemma4.quant.plan import LoadPlan
from gemma4.quant.weight_file import WeightFile

logger = logging.getLogger(__name__)

_DENSE_TYPES = {torch.float32: GGMLType.F32, torch.bfloat16: GGMLType.BF16}


def placement(device: str | torch.device | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    """Defaults: cuda if there is one; bfloat16 there, float32 on a CPU. Raises ValueError for another dtype."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    if dtype not in _DENSE_TYPES:
        raise ValueError(f"dtype: found {dtype}, expected {' or '.join(map(str, _DENSE_TYPES))}")
    return device, dtype


def open_model(
    file: WeightFile,
    device: torch.device,
    dtype: torch.dtype,
    max_seq_len: int,
    *,
    fuse: bool,
    dequantize: bool,
    per_layer_table: Literal["device", "host"],
    kv_cache: CacheKind,
) -> tuple[TextModel, LoadPlan]:
    """The model of an open file, its weights loaded; arguments as those of `Gemma4.from_gguf`.

    Raises a Gemma4Error; DoesNotFitError before anything is loaded.
    """
    config = Gemma4Config.from_gguf(file)
    plan = plan_load(file, config, fuse=fuse)
    for fusion in plan.fusions:
        logger.info("%s", fusion)
    if dequantize:
        plan = plan.dense(_DENSE_TYPES[dtype])
    if per_layer_table == "host":
        plan = plan.with_host_memory(PER_LAYER_TABLE)
    require_memory(config, plan, device, dtype, max_seq_len, file.path, kv_cache)
    model = TextModel(config, plan, dtype, device)
    with progress_bar(f"loading {file.path.name}", sum(entry.file_bytes for entry in plan.entries)) as progress:
        load_weights(model, plan, file, device, progress)
    return model.eval(), plan


def require_memory(
    config: Gemma4Config,
    plan: LoadPlan,
    device: torch.device,
    dtype: torch.dtype,
    max_seq_len: int,
    path: Path,
    kv_cache: CacheKind,
    drafter: tuple[Gemma4Config, LoadPlan] | None = None,
    held_bytes: int = 0,
) -> None:
    """Raises DoesNotFitError where a GPU has too little for a generation of max_seq_len tokens. Elsewhere nothing.

    drafter: configuration and plan of one beside the model. held_bytes: what of all that is on the GPU already.
    """
    if device.type == "cuda":
        memory = MemoryModel(config, plan, kv_cache, dtype.itemsize, drafter)
        available = available_gpu_bytes(device) + held_bytes
        check_fits(memory, min(max_seq_len, config.context_length), available, path)


def available_gpu_bytes(device: torch.device) -> int:
    """What a plan may take: the free memory, what PyTorch holds unused, and what CUDA has taken for itself by now."""
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free) + unused + CONTEXT_BYTES
