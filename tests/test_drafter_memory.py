"""A plan that knows the drafter: what a round takes, `gemma4 fit --draft`, and refusal before a drafter loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma4 import Gemma4, memory_plan
from gemma4.cache import KVCache
from gemma4.cli import main
from gemma4.config import Gemma4Config
from gemma4.drafter import Drafter, DrafterModel
from gemma4.drafter_config import DrafterConfig, plan_drafter
from gemma4.kernels.packed_matvec import MAX_ROWS
from gemma4.mapping import plan_load
from gemma4.memory_plan import CONTEXT_BYTES, MemoryModel
from gemma4.model import TextModel
from gemma4.quant.errors import DoesNotFitError
from gemma4.quant.gguf_file import GGUFFile
from gemma4.quant.plan import LoadPlan
from gemma4.speculate import TokenByToken
from gemma4.workspace import Workspace
from tests.drafter_gguf import drafter_for
from tests.family_gguf import FULL_SIZE, quantize
from tests.live_memory import peak_live_bytes
from tests.tiny_gguf import Model, gemma4

pytestmark = pytest.mark.usefixtures("one_thread")

META = torch.device("meta")
CUDA = torch.device("cuda")
Plans = tuple[tuple[Gemma4Config, LoadPlan], tuple[DrafterConfig, LoadPlan]]


def e2b(folder: Path, kind: str) -> tuple[Path, Path]:
    """Headers of E2B in the Q4_K_M mix and of a drafter for it."""
    target = quantize(FULL_SIZE["E2B"](), "Q4_K_M")
    drafter = drafter_for(target, hidden=256, heads=4, kind=kind)
    return target.write_sparse(folder / "target.gguf"), drafter.write_sparse(folder / f"{kind}.gguf")


def read(target: Path, drafter: Path) -> Plans:
    with GGUFFile.open(target) as file:
        config = Gemma4Config.from_gguf(file)
        own = config, plan_load(file, config)
    with GGUFFile.open(drafter) as file:
        draft_config = DrafterConfig.from_gguf(file)
        return own, (draft_config, plan_drafter(file, draft_config))


# Parts


@pytest.mark.parametrize("kind", ["Q8_0", "BF16", "F16"])
def test_a_pass_of_the_drafter(kind: str, tmp_path: Path) -> None:
    (config, plan), (draft_config, draft_plan) = read(*e2b(tmp_path, kind))
    target = TextModel(config, plan, torch.bfloat16, META)
    model = DrafterModel(draft_config, draft_plan, torch.bfloat16, META)
    model.max_packed_rows = 8 if kind == "Q8_0" else 0
    drafter = Drafter(model, draft_plan, target, tmp_path)
    cache = KVCache(config, 1024, torch.bfloat16, META)
    token, hidden = torch.zeros(1, dtype=torch.int64, device=META), torch.empty(1, config.hidden_size, device=META)
    known = [token, hidden, *model.parameters(), *target.parameters(), *cache.tensors()]
    peak = peak_live_bytes(lambda: drafter.propose(token, hidden, token, cache, 2), known)
    planned = Workspace(draft_config, draft_plan, 2).decode_bytes()
    assert peak - 1e5 <= planned
    if kind == "F16":
        assert planned > 1.5 * Workspace(*read(*e2b(tmp_path, "BF16"))[1], 2).decode_bytes()


def test_a_check_of_drafts(tmp_path: Path) -> None:
    config, plan = read(*e2b(tmp_path, "Q8_0"))[0]
    model = TextModel(config, plan, torch.bfloat16, META)
    model.max_packed_rows = 8
    cache = KVCache(config, 1024, torch.bfloat16, META)
    caches = [TokenByToken(layer) for layer in cache.layers]
    tokens = torch.arange(3, device=META)

    def check() -> object:
        passes = [
            model.head(*model.run(tokens, tokens, caches, model.rows_for(3)), model.rows_for(3)) for _ in range(3)
        ]
        return torch.cat([logits for logits, _ in passes])

    peak = peak_live_bytes(check, [tokens, *model.parameters(), *cache.tensors()])
    assert memory_plan.CHECKED_TOKENS == MAX_ROWS
    assert peak <= 12 * memory_plan.CHECKED_TOKENS * config.vocab_size


def test_a_drafter_adds_to_a_plan(tmp_path: Path) -> None:
    own, drafter = read(*e2b(tmp_path, "Q8_0"))
    alone, both = MemoryModel(*own).at(4096), MemoryModel(*own, drafter=drafter).at(4096)
    weights = sum(p.nbytes for p in DrafterModel(*drafter, torch.bfloat16, META).parameters() if p.is_meta)
    assert alone.drafter_bytes == 0
    assert "drafter" not in alone.describe()
    assert weights < both.drafter_bytes < weights + (40 << 20)
    assert both.total_bytes == alone.total_bytes + both.drafter_bytes
    assert alone.allocated_bytes + weights <= both.allocated_bytes <= alone.allocated_bytes + both.drafter_bytes
    assert f"{both.drafter_bytes:,} bytes" in next(line for line in both.describe().splitlines() if "drafter" in line)


# gemma4 fit --draft


def fit(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["fit", *map(str, args)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, drafter = e2b(tmp_path, "Q8_0")
    plain = json.loads(fit(capsys, target, "--gpu-memory", 24, "--json")[1])
    code, out, _ = fit(capsys, target, "--gpu-memory", 24, "--draft", drafter, "--json")
    drafted = json.loads(out)
    own, draft = read(target, drafter)
    assert code == 0
    assert drafted["drafter_bytes"] == MemoryModel(*own, drafter=draft).at(4096).drafter_bytes > 0
    assert drafted["total_bytes"] == plain["total_bytes"] + drafted["drafter_bytes"]
    gib = plain["total_bytes"] / 2**30 + 0.01
    assert fit(capsys, target, "--gpu-memory", f"{gib:.6f}")[0] == 0
    code, out, _ = fit(capsys, target, "--gpu-memory", f"{gib:.6f}", "--draft", drafter)
    assert code == 4
    assert any(line.startswith("drafter, with its workspace  ") for line in out.splitlines())


def test_fit_refuses_a_wrong_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, _ = e2b(tmp_path, "Q8_0")
    other = drafter_for(gemma4()).write_sparse(tmp_path / "other.gguf")
    code, out, err = fit(capsys, target, "--gpu-memory", 24, "--draft", other)
    assert (code, out) == (3, "")
    assert err.startswith(f"error [drafter_mismatch]: {other}: ")
    assert fit(capsys, target, "--draft", tmp_path / "gone.gguf")[0] == 3


# Refusal before loading


@pytest.fixture(scope="module")
def model() -> Model:
    return gemma4()


@pytest.fixture(scope="module")
def target(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Gemma4:
    path = model.write(tmp_path_factory.mktemp("target") / "target.gguf")
    return Gemma4.from_gguf(path, device="cpu", max_seq_len=128)


def test_what_a_model_holds(target: Gemma4) -> None:
    weights = sum(parameter.nbytes for parameter in target.model.parameters())
    assert target.held_bytes == weights
    target.generate_ids([1, 2, 3], 2)
    assert target.held_bytes == weights + KVCache(target.config, 128, target.model.dtype, target.device).nbytes
    target.forget()
    assert target.held_bytes == weights


def test_a_drafter_that_does_not_fit(
    target: Gemma4, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loading(Exception):
        pass

    def begin(*_: Any) -> None:
        raise Loading

    drafter = drafter_for(model, kind="Q8_0").write(tmp_path / "drafter.gguf")
    with GGUFFile.open(drafter) as file:
        config = DrafterConfig.from_gguf(file)
        both = MemoryModel(target.config, target.plan, itemsize=4, drafter=(config, plan_drafter(file, config))).at(128)
    monkeypatch.setattr(Gemma4, "device", property(lambda _: CUDA))
    monkeypatch.setattr(Gemma4, "held_bytes", property(lambda _: 1 << 20))
    monkeypatch.setattr("gemma4.drafter.DrafterModel", begin)
    free = both.total_bytes - CONTEXT_BYTES - (1 << 20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 << 30))
    with pytest.raises(Loading):
        Drafter.from_gguf(drafter, target)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free - 1, 80 << 30))
    with pytest.raises(DoesNotFitError, match="128 positions need") as caught:
        Drafter.from_gguf(drafter, target)
    assert (caught.value.path, caught.value.field) == (drafter, "max_seq_len")
    assert both.describe() in str(caught.value)
