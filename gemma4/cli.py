"""The `gemma4` command: look into a model's file, see whether it fits a GPU, generate text with it, talk to it.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 unexpected failure, or weights that are not
finite, 2 wrong usage, 3 a file or request that was refused (one line `error [code]: message` says why), 4 more memory
needed than there is, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from gemma4 import __version__
from gemma4.config import CacheKind
from gemma4.export.command import export
from gemma4.printable import printable
from gemma4.quant.errors import DoesNotFitError, Gemma4Error

if TYPE_CHECKING:
    from gemma4.measured_run import LoadOptions, TextOptions

EXIT_FOUND: Final = 1
EXIT_USAGE: Final = 2
EXIT_REFUSED: Final = 3
EXIT_DOES_NOT_FIT: Final = 4

app = typer.Typer(
    help="Gemma 4 GGUF files: look into one, see whether it fits a GPU, generate text with it, talk to it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class DType(StrEnum):
    """What matrix products are computed in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help="A GGUF file, any part of a split one, or a directory with a Hugging Face checkpoint.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(help="0 always picks the likeliest token. Default: the file's.")]
TopK = Annotated[int | None, typer.Option(help="Likeliest tokens to choose from, 0 for all. Default: the file's.")]
TopP = Annotated[float | None, typer.Option(help="Probability mass to choose from. Default: the file's.")]
MinP = Annotated[
    float | None, typer.Option(help="Least probability, relative to the likeliest token. Default: the file's.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same text.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N. Default: cuda if there is one.")]
DTypeOption = Annotated[
    DType | None, typer.Option("--dtype", help="Of matrix products. Default: float32 on cpu, bfloat16 on cuda.")
]
MaxSeqLen = Annotated[int, typer.Option(min=1, help="Tokens of prompt and answer together, at most the model's own.")]
KVCache = Annotated[CacheKind, typer.Option("--kv-cache", help="How full layers keep keys and values.")]
Dequantize = Annotated[bool, typer.Option("--dequantize", help="Hold dense weights: more memory, faster on a CPU.")]
NoFuse = Annotated[bool, typer.Option("--no-fuse", help="Keep gate and up projections apart.")]
Draft = Annotated[
    Path | None,
    typer.Option("--draft", metavar="FILE", help="The model's drafter: its guesses are checked several at a time."),
]
NumDraftTokens = Annotated[int, typer.Option(min=1, max=7, help="Tokens that a drafter guesses at a time.")]


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line `args`, by default the program's own. Always ends in SystemExit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(args=args, prog_name="gemma4")
    except DoesNotFitError as error:
        print(f"{error.table}\nerror [{error.code}]: {printable(error.summary)}", file=sys.stderr)
        sys.exit(EXIT_DOES_NOT_FIT)
    except Gemma4Error as error:
        print(f"error [{error.code}]: {printable(str(error))}", file=sys.stderr)
        sys.exit(EXIT_REFUSED)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"gemma4 {__version__}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("inspect")
def inspect(
    file: ModelPath,
    json_: Json = False,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Read all weights; ends with 1 if some are not finite.")
    ] = False,
) -> None:
    """Show what a GGUF file of any architecture or a checkpoint holds, and how this library would load it."""
    from gemma4.inspect_file import inspect_file

    report = inspect_file(file, check=check)
    if json_:
        print(json.dumps(report.to_json(list_tensors=tensors), indent=2), flush=True)
    else:
        from rich.console import Console

        from gemma4.inspect_tables import print_report

        console = Console(width=None if sys.stdout.isatty() else 132, highlight=False, markup=False, emoji=False)
        print_report(console, report, list_tensors=tensors)
    if report.non_finite:
        raise typer.Exit(EXIT_FOUND)


@app.command("fit")
def fit(
    file: ModelPath,
    context: Annotated[int, typer.Option(min=1, help="Tokens of prompt and answer together.")] = 4096,
    kv_cache: KVCache = CacheKind.LOSSLESS,
    gpu_memory: Annotated[
        str | None, typer.Option(metavar="G", help="Of the GPU, in GiB. Default: what is free on the first one here.")
    ] = None,
    draft: Draft = None,
    json_: Json = False,
) -> None:
    """Show the GPU memory a model takes, by purpose. Ends with 0 if it fits, 4 if not, 2 if there is no GPU to ask."""
    from gemma4.fit_report import fit_report, parse_memory

    try:
        gpu_bytes = None if gpu_memory is None else parse_memory(gpu_memory)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--gpu-memory") from error
    report = fit_report(file, context, kv_cache, gpu_bytes, draft)
    print(json.dumps(report.to_json(), indent=2) if json_ else report.describe(), flush=True)
    raise typer.Exit({True: 0, False: EXIT_DOES_NOT_FIT, None: EXIT_USAGE}[report.fits])


@app.command("generate")
def generate(
    file: ModelPath,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="The text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A file with it. Default: standard input.")
    ] = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = 0,
    stop: Stop = None,
    device: Device = None,
    dtype: DTypeOption = None,
    max_seq_len: MaxSeqLen = 4096,
    kv_cache: KVCache = CacheKind.LOSSLESS,
    dequantize: Dequantize = False,
    no_fuse: NoFuse = False,
    draft: Draft = None,
    num_draft_tokens: NumDraftTokens = 2,
    stats: Annotated[
        bool | None,
        typer.Option("--stats/--no-stats", help="Speed and memory, on stderr. Default: if that is a terminal."),
    ] = None,
    json_: Json = False,
) -> None:
    """Continue a text. Only the continuation goes to stdout."""
    text = _prompt(prompt, prompt_file)
    text_options = _text_options(max_new_tokens, temperature, top_k, top_p, min_p, seed, stop, num_draft_tokens)
    load_options = _load_options(device, dtype, max_seq_len, dequantize, no_fuse, draft, kv_cache)
    from gemma4 import measured_run

    run = measured_run.Run.load(file, load_options)
    print(run.describe(), file=sys.stderr, flush=True)
    pieces = run.text(run.model.tokenizer.encode(text), text_options)
    if json_:
        result = {"text": "".join(pieces), **measured_run.stats(run, pieces)}
        print(json.dumps(result, indent=2), flush=True)
    else:
        try:
            for piece in pieces:
                print(piece, end="", flush=True)
        finally:
            print(flush=True)
    if sys.stderr.isatty() if stats is None else stats:
        print(measured_run.stats_line(run, pieces), file=sys.stderr)


@app.command("chat")
def chat(
    file: ModelPath,
    system: Annotated[str | None, typer.Option(help="A system text.")] = None,
    think: Annotated[bool, typer.Option("--think", help="Let the model think first, if it can.")] = False,
    template: Annotated[
        str, typer.Option(metavar="file|builtin|PATH", help="The chat template: the file's, ours, or a text file's.")
    ] = "file",
    max_new_tokens: MaxNewTokens = 1024,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = 0,
    stop: Stop = None,
    device: Device = None,
    dtype: DTypeOption = None,
    max_seq_len: MaxSeqLen = 4096,
    kv_cache: KVCache = CacheKind.LOSSLESS,
    dequantize: Dequantize = False,
    no_fuse: NoFuse = False,
    draft: Draft = None,
    num_draft_tokens: NumDraftTokens = 2,
) -> None:
    """Talk to a model. On a pipe, each line of input is a message; only answers go to stdout."""
    text_options = _text_options(max_new_tokens, temperature, top_k, top_p, min_p, seed, stop, num_draft_tokens)
    load_options = _load_options(device, dtype, max_seq_len, dequantize, no_fuse, draft, kv_cache)
    from gemma4.measured_run import Run
    from gemma4.terminal_chat import Conversation, chat_loop

    run = Run.load(file, load_options)
    run.model.use_chat_template(template)
    print(run.describe(), file=sys.stderr, flush=True)
    chat_loop(Conversation(run, text_options, system, think))


@app.command("convert")
def convert(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A GGUF file, or any part of a split one.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Must not exist, or be empty.")],
    shard_size: Annotated[float, typer.Option(min=0.001, metavar="GB", help="Of one safetensors file at most.")] = 5.0,
) -> None:
    """Write a Gemma 4 GGUF file as a Hugging Face checkpoint in bfloat16, for vLLM, SGLang or transformers."""
    from gemma4.hf_export import export_hf

    export_hf(file, out, shard_bytes=int(shard_size * 1e9))


app.command("export")(export)


def _prompt(prompt: str | None, prompt_file: Path | None) -> str:
    if prompt is not None and prompt_file is not None:
        raise typer.BadParameter("give --prompt or --prompt-file, not both")
    if prompt is not None:
        return prompt
    if prompt_file is None and sys.stdin.isatty():
        raise typer.BadParameter("give --prompt, --prompt-file, or text on standard input")
    try:
        return (sys.stdin.buffer.read() if prompt_file is None else prompt_file.read_bytes()).decode()
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"the prompt is not UTF-8: {error}") from error


def _text_options(
    max_new_tokens: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int,
    stop: list[str] | None,
    num_draft_tokens: int,
) -> TextOptions:
    from gemma4.measured_run import TextOptions

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    try:
        return TextOptions(max_new_tokens, sampling, seed, tuple(stop or ()), num_draft_tokens)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _load_options(
    device: str | None,
    dtype: DType | None,
    max_seq_len: int,
    dequantize: bool,
    no_fuse: bool,
    draft: Path | None,
    kv_cache: CacheKind,
) -> LoadOptions:
    import torch

    from gemma4.measured_run import LoadOptions

    try:
        place = torch.device(device) if device is not None else None
    except RuntimeError as error:
        raise typer.BadParameter(f"found {device!r}, expected cpu, cuda or cuda:N") from error
    if place is not None and place.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"found {device!r}, expected cpu, cuda or cuda:N")
    if place is not None and place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(f"found {device!r}, this machine has {torch.cuda.device_count()} CUDA devices")
    dtypes = {None: None, DType.FLOAT32: torch.float32, DType.BFLOAT16: torch.bfloat16}
    return LoadOptions(place, dtypes[dtype], max_seq_len, not no_fuse, dequantize, draft, kv_cache)
