"""Whether a file fits a GPU: what `gemma4 fit` prints. From the header alone, without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gemma4.config import CacheKind, Gemma4Config
from gemma4.drafter_config import DrafterConfig, check_pair, plan_drafter
from gemma4.gpu_memory import first_gpu
from gemma4.mapping import plan_load
from gemma4.memory_plan import MemoryModel, MemoryPlan, gib
from gemma4.open_weights import open_weights
from gemma4.printable import printable
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.plan import LoadPlan
from gemma4.quant.weight_file import WeightFile

_UNITS: Final = {"": 1 << 30, "GIB": 1 << 30, "GB": 10**9}
_NUMBER: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


@dataclass(frozen=True, slots=True)
class FitReport:
    """A plan and the memory it is held against.

    available_bytes: None where no GPU was found and none was given. longest_context: the most tokens that fit it.
    """

    path: Path
    plan: MemoryPlan
    gpu: str | None
    available_bytes: int | None
    longest_context: int | None

    @property
    def fits(self) -> bool | None:
        """None where there is nothing to hold the plan against."""
        return None if self.available_bytes is None else self.plan.total_bytes <= self.available_bytes

    def describe(self) -> str:
        """The plan's table, then verdict and longest context."""
        plan = self.plan
        lines = [f"{printable(plan.name)}, context {plan.context:,}, {plan.kv_cache} KV cache", plan.describe(), ""]
        if self.available_bytes is None:
            return "\n".join([*lines, "no NVIDIA GPU found; --gpu-memory gives a verdict"])
        spare = self.available_bytes - plan.total_bytes
        verdict = f"fits, {gib(spare)} left" if spare >= 0 else f"does not fit, {gib(-spare)} too much"
        longest = f"{self.longest_context:,} tokens" if self.longest_context else "none"
        return "\n".join([*lines, f"{self.gpu}: {verdict}", f"longest context that fits: {longest}"])

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            **self.plan.to_json(),
            "gpu": self.gpu,
            "available_bytes": self.available_bytes,
            "fits": self.fits,
            "longest_context": self.longest_context,
        }


def fit_report(
    path: str | Path, context: int, kv_cache: CacheKind, gpu_bytes: int | None, draft: Path | None = None
) -> FitReport:
    """Plans `context` tokens of the model at `path`. gpu_bytes: of a GPU, by default what is free on the first one.

    draft: a drafter's GGUF file. Raises the errors of `open_weights`, `plan_load` and `check_pair`, and ContextError.
    """
    with open_weights(path) as file:
        config = Gemma4Config.from_gguf(file)
        drafter = None if draft is None else plan_drafter_for(draft, config, file)
        model = MemoryModel(config, plan_load(file, config), kv_cache, drafter=drafter)
    plan = model.at(context)
    if gpu_bytes is not None:
        gpu = f"a GPU of {gib(gpu_bytes)}"
    elif (found := first_gpu()) is not None:
        gpu, gpu_bytes = f"{found.name}, {gib(found.free_bytes)} of {gib(found.total_bytes)} free", found.free_bytes
    else:
        return FitReport(file.path, plan, None, None, None)
    return FitReport(file.path, plan, gpu, gpu_bytes, model.longest_context(gpu_bytes))


def plan_drafter_for(path: Path, target: Gemma4Config, target_file: WeightFile) -> tuple[DrafterConfig, LoadPlan]:
    """Configuration and load plan of the drafter at `path`. Raises DrafterMismatchError, and errors of the file."""
    with GGUFFile.open(path) as file:
        config = DrafterConfig.from_gguf(file)
        check_pair(config, file.metadata, target, target_file.metadata, file.path)
        return config, plan_drafter(file, config)


def parse_memory(text: str) -> int:
    """Bytes of "24", "24GiB" or "24GB"; a bare number counts GiB, as cards are labelled. Raises ValueError."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None or match[2].upper() not in _UNITS or not float(match[1]):
        raise ValueError(f"found {text!r}, expected a number of GiB, such as 24, 24GiB or 25.8GB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
