"""A `FileReport` as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from gemma4.config import TARGET, Gemma4Config, LayerConfig, LayerKind
from gemma4.drafter_config import DrafterConfig
from gemma4.inspect_file import MAX_LISTED, FileReport, element_type
from gemma4.printable import printable
from gemma4.quant.ggml_types import BLOCK_FORMATS
from gemma4.quant.gguf_file import MetadataValue

if TYPE_CHECKING:
    from gemma4.quant.non_finite import NonFinite

_MAX_CHARACTERS: Final = 72


def print_report(console: Console, report: FileReport, *, list_tensors: bool = False) -> None:
    """Summary, metadata, tensors by type, and for a model this library runs its configuration and load plan.

    list_tensors: also every tensor. Where the weights were read, what was found in them comes last.
    """
    _pairs(console, "File", _summary(report))
    _pairs(console, "Metadata", ((key, _value(value)) for key, value in report.metadata.items()))
    if list_tensors:
        _print_tensors(console, report)
    if report.config is not None:
        _pairs(console, "Model", _config(report.config))
    if report.plan is not None:
        # The plan's table holds the same totals by type.
        console.print(Text("Weights", style="bold"))
        console.print(Text(report.plan.describe()))
    else:
        _print_types(console, report)
    if report.unsupported is not None:
        where = f"{report.unsupported.field}: " if report.unsupported.field else ""
        reason = printable(f"[{report.unsupported.code}] {where}{report.unsupported.message}")
        console.print(Text.assemble(("Not a model this library runs: ", "bold yellow"), reason), soft_wrap=True)
    if report.non_finite is not None:
        _print_check(console, report.non_finite)


def _summary(report: FileReport) -> Iterable[tuple[str, str]]:
    yield "path", printable(str(report.path))
    yield "architecture", printable(report.architecture or "not given")
    if report.name is not None:
        yield "name", printable(report.name)
    if report.gguf_version is None:
        yield "format", "Hugging Face checkpoint"
    else:
        yield "GGUF version", str(report.gguf_version)
    if len(report.paths) > 1:
        yield "split parts", str(len(report.paths))
    yield "file size", _size(report.file_bytes)
    yield "tensors", f"{len(report.tensors):,} of {_size(report.bytes)}"
    yield "parameters", f"{report.parameters:,}"
    if report.bits_per_weight is not None:
        yield "bits per weight", f"{report.bits_per_weight:.3f}"


def _config(config: Gemma4Config) -> Iterable[tuple[str, str]]:
    if isinstance(config, DrafterConfig):
        yield "drafts for", f"a gemma4 model of hidden size {config.backbone_hidden_size}, with which it is loaded"
    yield "hidden size", str(config.hidden_size)
    yield "vocabulary", f"{config.vocab_size:,}"
    yield "context", f"{config.context_length:,} tokens"
    yield "layers", str(config.num_hidden_layers)
    for kind in LayerKind:
        layers = [layer for layer in config.layers if layer.kind is kind]
        if layers:
            reach = f" (window {config.sliding_window})" if kind is LayerKind.SLIDING else ""
            yield f"{kind} layers", f"{len(layers)}{reach}: {_shapes(layers)}"
    yield "intermediate size", _distinct(layer.intermediate_size for layer in config.layers)
    if config.num_experts:
        chosen, size = config.num_experts_per_tok, config.moe_intermediate_size
        yield "experts", f"{config.num_experts}, {chosen} for a token, intermediate size {size}"
    if config.hidden_size_per_layer_input:
        yield "per-layer inputs", f"of size {config.hidden_size_per_layer_input}"
    scaling = f", positions / {config.rope_scaling_factor:g}" if config.rope_scaling_factor != 1 else ""
    proportional = ", proportional" if config.rope_freq_factors is not None else ""
    yield "RoPE base", f"{config.rope_theta_sliding:g} sliding, {config.rope_theta_full:g} full{proportional}{scaling}"
    cap = config.final_logit_softcapping
    yield "logit softcap", "none" if cap is None else f"{cap:g}"
    yield "output head", "tied to the embeddings" if config.tie_word_embeddings else "has its own weights"


def _shapes(layers: list[LayerConfig]) -> str:
    heads = _distinct(layer.num_attention_heads for layer in layers)
    kv_heads = _distinct(layer.num_key_value_heads for layer in layers)
    sizes = _distinct(layer.head_dim for layer in layers)
    k_eq_v = sum(layer.k_eq_v for layer in layers)
    of_target = sum(layer.kv_source == TARGET for layer in layers)
    shared = sum(layer.kv_source is not None for layer in layers) - of_target
    return (
        f"{heads} heads, {kv_heads} KV heads, head size {sizes}"
        + (f", K = V on {k_eq_v}" if k_eq_v else "")
        + (f", {shared} read another layer's KV" if shared else "")
        + (f", {of_target} read the target's KV" if of_target else "")
    )


def _distinct(values: Iterable[int]) -> str:
    return " or ".join(f"{value}" for value in sorted(set(values)))


def _value(value: MetadataValue) -> str:
    """One line for a metadata value: long strings cut, long arrays counted."""
    if isinstance(value, str):
        text, count = printable(value), f"{len(value):,} characters"
    elif isinstance(value, int | float):
        return f"{value:g}" if isinstance(value, float) else str(value)
    elif len(value) > MAX_LISTED:
        return f"[{len(value)} {element_type(value)}s]"
    else:
        text, count = f"[{', '.join(map(_value, value))}]", f"{len(value)} entries"
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}… ({count})"


def _size(count: int) -> str:
    return f"{decimal(count)} ({count:,} bytes)"


def _pairs(console: Console, title: str, rows: Iterable[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(Text(printable(key)), Text(value))
    console.print(Text(title, style="bold"))
    console.print(table)
    console.print()


def _print_types(console: Console, report: FileReport) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("type")
    for column in ("tensors", "parameters", "bytes", "bits/weight"):
        table.add_column(column, justify="right")
    for kind, total in report.types.items():
        bits = f"{total.bits_per_weight:.3f}"
        table.add_row(kind.name, f"{total.tensors}", f"{total.parameters:,}", f"{total.bytes:,}", bits)
    console.print(Text("Tensors by type", style="bold"))
    console.print(table if report.types else "none")


def _print_tensors(console: Console, report: FileReport) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("tensor", "type", "shape"):
        table.add_column(column, overflow="fold")
    table.add_column("bytes", justify="right")
    for tensor in report.tensors:
        shape = " × ".join(map(str, tensor.shape))
        table.add_row(Text(printable(tensor.name)), tensor.type.name, shape, f"{tensor.nbytes:,}")
    console.print(Text("Tensors", style="bold"))
    console.print(table)


def _print_check(console: Console, found: tuple[NonFinite, ...]) -> None:
    console.print()
    if not found:
        console.print(Text("All weights are finite.", style="bold"))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("tensor", "type", "infinite or not a number"):
        table.add_column(column, overflow="fold")
    for tensor in found:
        what = "values" if BLOCK_FORMATS[tensor.type].block_size == 1 else "blocks"
        table.add_row(Text(printable(tensor.name)), tensor.type.name, f"{tensor.blocks:,} of {tensor.total:,} {what}")
    console.print(Text("Weights that are not finite", style="bold red"))
    console.print(table)
