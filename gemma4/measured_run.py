"""Loading a model and generating with it, with the time each phase took. What `gemma4 generate` and `chat` run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal

from gemma4.api import Gemma4
from gemma4.config import CacheKind, Gemma4Config
from gemma4.drafter import Drafter
from gemma4.fit_report import plan_drafter_for
from gemma4.open_weights import open_weights
from gemma4.printable import printable
from gemma4.sampling import SamplingParams
from gemma4.speculate import NUM_DRAFT_TOKENS, Speculation
from gemma4.text_stream import stream_text


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a file becomes a model; see `Gemma4.from_gguf`. device: None for cuda if there is one. draft: its drafter."""

    device: torch.device | None
    dtype: torch.dtype | None
    max_seq_len: int
    fuse: bool
    dequantize: bool
    draft: Path | None = None
    kv_cache: CacheKind = CacheKind.LOSSLESS


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How text is generated. sampling: settings that replace the file's own. stop: strings that end a text."""

    max_new_tokens: int
    sampling: dict[str, float | None]
    seed: int
    stop: tuple[str, ...]
    num_draft_tokens: int = NUM_DRAFT_TOKENS

    def __post_init__(self) -> None:
        """Raises ValueError naming the setting."""
        SamplingParams().override(**self.sampling)
        if "" in self.stop:
            raise ValueError("stop: found an empty string")


@dataclass(slots=True)
class Run:
    """A loaded model, its drafter if there is one, and how long that took, the tokenizer included."""

    model: Gemma4
    load_s: float
    drafter: Drafter | None = None

    @classmethod
    def load(cls, path: Path, options: LoadOptions) -> Run:
        """Raises the errors of `Gemma4.from_gguf` and `Drafter.from_gguf`, and TokenizerError for a file without a
        usable tokenizer.
        """
        begin = time.perf_counter()
        if options.draft is not None:
            with open_weights(path) as file:  # refuses a wrong pair before anything is loaded
                plan_drafter_for(options.draft, Gemma4Config.from_gguf(file), file)
        model = Gemma4.from_gguf(
            path,
            device=options.device,
            dtype=options.dtype,
            max_seq_len=options.max_seq_len,
            fuse=options.fuse,
            dequantize=options.dequantize,
            kv_cache=options.kv_cache,
        )
        drafter = None
        if options.draft is not None:
            fuse, dequantize = options.fuse, options.dequantize
            drafter = Drafter.from_gguf(options.draft, model, fuse=fuse, dequantize=dequantize)
        _ = model.tokenizer
        return cls(model, time.perf_counter() - begin, drafter)

    def describe(self) -> str:
        """What was loaded: one line, then one for each fusion."""
        model, plan = self.model, self.model.plan
        parameters = sum(entry.numel for entry in plan.entries)
        size = decimal(sum(entry.file_bytes for entry in plan.entries))
        is_dense = any(entry.type is not entry.file_type for entry in plan.entries)
        dtype = str(model.model.dtype).removeprefix("torch.")
        device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
        name = f"{printable(model.config.name)} ({model.config.architecture})"
        loaded = (
            f"{name}: {parameters / 1e6:,.0f} M parameters, {size} packed"
            f"{', held dense' if is_dense else ''}; {dtype} on {device}, context {model.max_seq_len:,}"
        )
        return "\n".join([loaded, *map(str, plan.fusions), *self._describe_drafter()])

    def _describe_drafter(self) -> Iterator[str]:
        if self.drafter is not None:
            entries = self.drafter.plan.entries
            size = decimal(sum(entry.file_bytes for entry in entries))
            name = f"{printable(self.drafter.config.name)} ({self.drafter.config.architecture})"
            yield f"drafter {name}: {sum(entry.numel for entry in entries) / 1e6:,.0f} M parameters, {size} packed"

    def peak_gpu_bytes(self) -> int | None:
        """Most GPU memory that tensors took since the program began; None on a CPU."""
        device = self.model.device
        return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

    def text(self, ids: Sequence[int], options: TextOptions) -> TimedText:
        return TimedText(self.model, ids, options, self.drafter)


@dataclass(slots=True)
class TimedText:
    """The text that continues `ids`, as an iterator of its pieces; the figures are final when it ends.

    prefill_s: from the start to the first new token. decode_s: in the model for the tokens after it.
    new_tokens: an end-of-generation token counts. is_complete: the model ended the text itself.
    """

    model: Gemma4
    ids: Sequence[int]
    options: TextOptions
    drafter: Drafter | None = None
    new_tokens: int = field(default=0, init=False)
    prefill_s: float = field(default=0.0, init=False)
    decode_s: float = field(default=0.0, init=False)
    is_complete: bool = field(default=False, init=False)

    def __iter__(self) -> Iterator[str]:
        return stream_text(self._timed_ids(), self.model.tokenizer, self.options.stop)

    @property
    def prefill_tokens_per_s(self) -> float | None:
        return len(self.ids) / self.prefill_s if self.new_tokens else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Without the first token, which prefill gives; None for fewer than two."""
        return (self.new_tokens - 1) / self.decode_s if self.new_tokens > 1 else None

    @property
    def speculation(self) -> Speculation | None:
        """What became of the drafts; None without a drafter."""
        return None if self.drafter is None else self.model.last_speculation

    def _timed_ids(self) -> Iterator[int]:
        model, options = self.model, self.options
        new_ids = model.stream_ids(
            self.ids,
            options.max_new_tokens,
            seed=options.seed,
            eog_ids=None,
            draft=self.drafter,
            num_draft_tokens=options.num_draft_tokens,
            **options.sampling,
        )
        while True:
            begin = time.perf_counter()
            new_id = next(new_ids, None)
            elapsed = time.perf_counter() - begin
            if new_id is None:
                return
            if self.new_tokens == 0:
                self.prefill_s = elapsed
            else:
                self.decode_s += elapsed
            self.new_tokens += 1
            self.is_complete = new_id in model.tokenizer.eog_ids
            yield new_id


def stats(run: Run, text: TimedText) -> dict[str, Any]:
    """The figures of one run under the names of `gemma4 generate --json`; None where there is none. Those of drafts
    stand only where there is a drafter.
    """
    drafts = text.speculation
    return {
        "prompt_tokens": len(text.ids),
        "new_tokens": text.new_tokens,
        "load_s": run.load_s,
        "prefill_tokens_per_s": text.prefill_tokens_per_s,
        "decode_tokens_per_s": text.decode_tokens_per_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_gpu_bytes": run.peak_gpu_bytes(),
        **({} if drafts is None else {**asdict(drafts), "acceptance_rate": drafts.acceptance_rate}),
    }


def stats_line(run: Run, text: TimedText) -> str:
    """The same figures as one line to read."""
    host, gpu = peak_rss_bytes(), run.peak_gpu_bytes()
    memory = [f"{decimal(size)} {where}" for size, where in ((host, "host"), (gpu, "GPU")) if size is not None]
    parts = [
        f"loaded in {run.load_s:.2f} s",
        f"prompt {len(text.ids)} tokens{_rate(text.prefill_tokens_per_s)}",
        f"generated {text.new_tokens} tokens{_rate(text.decode_tokens_per_s)}",
    ]
    if text.speculation is not None:
        parts += describe_drafts(text.speculation)
    return "; ".join([*parts, *([f"peak memory {' and '.join(memory)}"] if memory else [])])


def describe_drafts(drafts: Speculation) -> list[str]:
    """What became of drafts, as one item to read; none where there were no drafts."""
    if drafts.acceptance_rate is None:
        return []
    kept = f"{drafts.accepted} of {drafts.drafted} drafts accepted ({100 * drafts.acceptance_rate:.0f} %)"
    return [f"{kept} in {drafts.rounds} rounds"]


def peak_rss_bytes() -> int | None:
    """Most memory this process has had resident, mapped file pages included; None where Linux's /proc is missing."""
    try:
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:
        return None
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _rate(tokens_per_s: float | None) -> str:
    return "" if tokens_per_s is None else f" ({tokens_per_s:.1f}/s)"
