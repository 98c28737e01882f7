"""Imports go one way: kernels <- quant <- gemma4 <- export. What reads headers does without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("kernels", "quant", "gemma4", "export")
FILES = [path for layer in LAYERS for path in sorted((ROOT / layer).glob("*.py"))]
TORCH_FREE = (
    "gemma4.quant.errors",
    "gemma4.quant.ggml_types",
    "gemma4.quant.gguf_file",
    "gemma4.quant.transforms",
    "gemma4.quant.plan",
    "gemma4.config",
    "gemma4.drafter_config",
    "gemma4.mapping",
    "gemma4.memory_plan",
    "gemma4.fit_report",
    "gemma4.tokenizer",
    "gemma4.chat",
    "gemma4.cli",
)


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            in_package = node.module == "gemma4"
            yield from (f"gemma4.{alias.name}" if in_package else node.module for alias in node.names)


def layer_of(module: str) -> str:
    return next((layer for layer in LAYERS if f"{module}.".startswith(f"gemma4.{layer}.")), "gemma4")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    own = path.parent.name
    for module in imports(path):
        top = module.split(".")[0]
        assert top not in {"kernels", "quant", "export", "tests", "benchmarks"}, f"{module}: write gemma4.{module}"
        assert top != "libgguf", f"{module} is for tests"
        assert top != "gguf" or path.name == "codebooks.py", (
            "gguf-py is the source of codebooks, and otherwise for tests"
        )
        if top == "gemma4":
            # The program stands above all layers: its export command is the exporters' own.
            is_program = path.name == "cli.py" and module.startswith("gemma4.export.command")
            assert is_program or LAYERS.index(layer_of(module)) <= LAYERS.index(own), f"{own} imports {module}"
        elif own == "kernels":
            assert top in {"torch", "triton"} or top in sys.stdlib_module_names, f"kernels imports {module}"


def test_the_rule_can_fail(tmp_path: Path) -> None:
    source = tmp_path / "quant.py"
    source.write_text("def f():\n    from gemma4.export.aoti import g\n    import gemma4.kernels.dequant\n")
    assert [layer_of(module) for module in imports(source)] == ["export", "kernels"]
    source.write_text("from gemma4 import kernels, Gemma4\nfrom gemma4.exporter import x\n")
    assert [layer_of(module) for module in imports(source)] == ["kernels", "gemma4", "gemma4"]


def test_header_modules_do_without_torch() -> None:
    code = (
        f"import sys\nfor name in {TORCH_FREE}:\n    __import__(name)\n"
        "    loaded = {'torch', 'triton', 'gguf', 'libgguf'} & set(sys.modules)\n"
        "    assert not loaded, f'{name} imports {loaded}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
