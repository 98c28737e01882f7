"""Loads and runs a full-size file of random weights of each size and recipe, one after another, and measures.

    for result in measure_pairs([("E2B", "Q8_0")], Path("/dev/shm"), torch.device("cuda")):
        print(json.dumps(result))

All files are one: random bytes as many as the largest needs are written once, and each file's header over their
beginning, from the largest file to the smallest. Before each, a small file with the same types is loaded, so that no
load waits for CUDA to load its kernels.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from triton.errors import TritonError

from benchmarks.synthesize import write, write_header, write_random_bytes
from gemma4 import Gemma4, __version__
from gemma4.cache import KVCache
from gemma4.decode_loop import DecodeLoop
from gemma4.generate import prefill
from gemma4.memory_plan import MemoryModel
from gemma4.quant.loader import GPU_WORKERS, SLICE_BYTES
from gemma4.sampling import SamplingParams
from tests.family_gguf import FULL_SIZE, SHRUNKEN, quantize
from tests.tiny_gguf import Model

MAX_SEQ_LEN = 8192
HEADER_BYTES = 64 << 20  # most that a header takes
ROUND_S = 0.1  # of decode steps that are timed together
MOST_STEPS = 16
ROUNDS = 3


def measure_pairs(
    pairs: Sequence[tuple[str, str]],
    folder: Path,
    device: torch.device,
    sizes: Mapping[str, Callable[[], Model]] = FULL_SIZE,
    *,
    decodes: bool = True,
) -> Iterator[dict[str, Any]]:
    """One result for each (size, recipe), JSON data; of a pair that fails it holds `error` beside what names it.

    The largest file comes first. folder: where that finds room, best in memory; nothing stays there. decodes: time
    decoding, too, for which each pair compiles kernels of its own.
    """
    versions = {"torch": torch.__version__, "triton": triton.__version__, "gemma4": __version__}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    if device.type == "cuda":
        # PyTorch keeps what it has pinned: no load waits for that.
        _ = [torch.empty(SLICE_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(GPU_WORKERS)]
        del _
    models = {(size, recipe): quantize(sizes[size](), recipe) for size, recipe in pairs}
    with TemporaryDirectory(dir=folder) as scratch:
        room = max(map(_nbytes, models.values()))
        body = write_random_bytes(Path(scratch) / "model.gguf", room + room // 100 + HEADER_BYTES)
        for (size, recipe), model in sorted(models.items(), key=lambda item: -_nbytes(item[1])):
            result: dict[str, Any] = {"size": size, "recipe": recipe, "device": name, **versions}
            try:
                small = write(Path(scratch) / "small.gguf", quantize(SHRUNKEN[size](), recipe))
                Gemma4.from_gguf(small, device=device)
                result |= measure(write_header(body, model), device, decodes=decodes)
            except (OSError, RuntimeError, ValueError, TritonError) as error:
                result["error"] = f"{type(error).__name__}: {error}"
            yield result


def _nbytes(model: Model) -> int:
    return sum(tensor.nbytes for tensor in model.tensors.values())


def measure(path: Path, device: torch.device, *, decodes: bool) -> dict[str, Any]:
    """What loading and running the file takes.

    GPU memory is None on a CPU. gpu_peak_bytes: of the whole process, what earlier files left behind included; how much
    that was is gpu_before_bytes.
    """
    is_cuda = device.type == "cuda"
    gc.collect()
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    before = used_bytes(device)
    begin = time.perf_counter()
    model = Gemma4.from_gguf(path, device=device, max_seq_len=MAX_SEQ_LEN)
    synchronize(device)
    load_s = time.perf_counter() - begin
    plan = MemoryModel(model.config, model.plan, model.kv_cache, model.model.dtype.itemsize).at(model.max_seq_len)
    decode_s, peak = run(model, plan.chunk, decodes=decodes)
    return {
        "file_bytes": path.stat().st_size,
        "context": plan.context,
        "load_s": load_s,
        "decode_s": decode_s,
        "planned_allocated_bytes": plan.allocated_bytes,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device) if is_cuda else None,
        "planned_total_bytes": plan.total_bytes,
        "gpu_peak_bytes": peak,
        "gpu_before_bytes": before,
    }


@torch.inference_mode()
def run(model: Gemma4, tokens: int, *, decodes: bool) -> tuple[float | None, int | None]:
    """Prefills one chunk of random ids, then decodes.

    Returns seconds per decoded token, the median of some rounds, and the most bytes of the GPU that were in use.
    """
    device, text = model.device, model.model
    cache = KVCache(model.config, model.max_seq_len, text.dtype, device, model.kv_cache)
    ids = torch.randint(0, model.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    text.reserve_workspace(tokens)
    logits = prefill(text, cache, ids)
    if not decodes:
        synchronize(device)
        return None, peak_bytes(device)
    loop = DecodeLoop(text, cache, SamplingParams(temperature=0))
    loop.start(logits, tokens, seed=0)
    loop.advance()  # compiles and captures

    def seconds(steps: int) -> float:
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(steps):
            loop.advance()
        synchronize(device)
        return (time.perf_counter() - begin) / steps

    steps = max(1, min(MOST_STEPS, int(ROUND_S / seconds(1))))
    return statistics.median(seconds(steps) for _ in range(ROUNDS)), peak_bytes(device)


def used_bytes(device: torch.device) -> int | None:
    """What all processes take of a GPU; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return int(total) - int(free)


def peak_bytes(device: torch.device) -> int | None:
    """The most of a GPU since PyTorch's statistics were reset, by the memory that it has given back meanwhile."""
    used = used_bytes(device)
    if used is None:
        return None
    return used + torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
