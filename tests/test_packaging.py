"""The three links, and what a wheel and a source distribution built from them contain."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.tiny_gguf import gemma4

ROOT = Path(__file__).parent.parent
LINKED = ("quant", "kernels", "export")
SOURCES = {
    f"gemma4/{path.relative_to(ROOT)}" if path.parent.name in LINKED else str(path.relative_to(ROOT))
    for folder in ("gemma4", *LINKED)
    for path in (ROOT / folder).glob("*.py")
} | {"gemma4/py.typed"}
INSPECT = """
import importlib.util, sys
from pathlib import Path
import gemma4
from gemma4.config import Gemma4Config
from gemma4.mapping import plan_load
from gemma4.quant.gguf_file import GGUFFile

assert Path(gemma4.__file__).is_relative_to(sys.argv[1]), gemma4.__file__
assert not [name for name in ("quant", "kernels", "export") if importlib.util.find_spec(name)]
with GGUFFile.open(sys.argv[2]) as file:
    print(plan_load(file, Gemma4Config.from_gguf(file)).fusions[0])
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, target: Path) -> Path:
    """Builds a "wheel" or an "sdist" of `source` with its own backend, without network or isolation."""
    code = f"import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])"
    run(sys.executable, "-c", code, target, cwd=source)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A build leaves folders behind: it runs in a copy.
    copy = tmp_path_factory.mktemp("copy") / "repo"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("gemma4", *LINKED):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return build("sdist", copy, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked source distribution, as pip does."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.mark.parametrize("name", LINKED)
def test_the_links_are_relative(name: str) -> None:
    link = ROOT / "gemma4" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name)
    assert link.is_dir()
    assert not (ROOT / name / "__init__.py").exists()


def test_the_links_are_committed_as_links() -> None:
    listed = run("git", "ls-files", "--stage", *(f"gemma4/{name}" for name in LINKED), cwd=ROOT)
    assert sorted((line.split()[0], line.split()[-1]) for line in listed.splitlines()) == sorted(
        ("120000", f"gemma4/{name}") for name in LINKED
    )


def test_the_folders_are_no_packages_of_their_own(tmp_path: Path) -> None:
    """Elsewhere `kernels` may be another project's package: this one must not stand in its way."""
    code = "import importlib.util as u; print(*(u.find_spec(n) for n in ('quant', 'kernels', 'export')))"
    assert str(ROOT) not in run(sys.executable, "-I", "-c", code, cwd=tmp_path)


def test_source_distribution(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert set(members) >= SOURCES | {"LICENSE", "README.md", "pyproject.toml"}
    assert all(members[name].isfile() for name in SOURCES)


def test_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())
        for name in ("gemma4/quant/plan.py", "gemma4/kernels/dequant.py"):
            assert archive.read(name) == (ROOT / name).read_bytes()
    assert files == SOURCES


def test_an_installed_wheel_reads_a_header_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-index", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    model = gemma4(types={"matrix": "Q4_K"}).write_sparse(tmp_path / "model.gguf")
    code = f"import sys; sys.path.insert(0, sys.argv[1])\n{INSPECT}"
    output = run(sys.executable, "-I", "-c", code, site, model, cwd=tmp_path)
    assert output == "fused gate+up on 4 of 4 MLP layers (0 left)\n"
