"""Load plans of real sizes: what is fused, that nothing is lost, and what is refused."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gemma4.config import Gemma4Config
from gemma4.mapping import expected_tensors, plan_load
from gemma4.quant import formats
from gemma4.quant.errors import (
    Gemma4Error,
    MissingTensorError,
    ShapeError,
    UnexpectedTensorError,
    UnsupportedTypeError,
)
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.gguf_file import GGUFFile, TensorInfo
from gemma4.quant.linear import LINEAR_OPS, MATVEC_OPS
from gemma4.quant.plan import KERNEL_TYPES, LOADABLE_TYPES, LoadPlan
from gemma4.quant.transforms import Part
from tests.tiny_gguf import GEMMA3_27B, GEMMA4_12B, GEMMA4_31B, Model, gemma3, gemma4, q4_k_m

Plan = Callable[..., LoadPlan]
MIXED = {"matrix": "Q4_K", "ffn_gate": "Q6_K", "ffn_up": "Q5_K", "attn_v": "Q8_0", "token_embd": "F16"}


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    def plan(model: Model, *, fuse: bool = True) -> LoadPlan:
        with GGUFFile.open(model.write_sparse(tmp_path / "model.gguf")) as file:
            return plan_load(file, Gemma4Config.from_gguf(file), fuse=fuse)

    return plan


def refused(plan: Plan, model: Model, error: type[Gemma4Error], field: str) -> str:
    with pytest.raises(error) as caught:
        plan(model)
    assert type(caught.value) is error
    assert caught.value.field == field
    assert caught.value.path is not None
    assert caught.value.path.name == "model.gguf"
    return str(caught.value)


@pytest.mark.parametrize(("sizes", "q4_k", "q6_k"), [(GEMMA4_31B, 355, 56), (GEMMA4_12B, 284, 45)], ids=["31B", "12B"])
def test_every_mlp_of_a_q4_k_m_file_is_fused(plan: Plan, sizes: object, q4_k: int, q6_k: int) -> None:
    model = gemma4(sizes, q4_k_m(sizes))
    made = plan(model)
    layers, ffn, hidden = sizes.layers, sizes.ffn, sizes.hidden
    assert Counter(tensor.type for tensor in model.tensors.values()) == {
        "Q4_K": q4_k,
        "Q6_K": q6_k,
        "F32": len(model.tensors) - q4_k - q6_k,
    }
    assert made.fusions[0].fused == tuple(range(layers))
    assert str(made.fusions[0]) == f"fused gate+up on {layers} of {layers} MLP layers (0 left)"
    entry = made.by_target()["layers.7.mlp.gate_up_proj.weight"]
    assert (entry.shape, entry.type, entry.file_type) == ((2 * ffn, hidden), GGMLType.Q4_K, GGMLType.Q4_K)
    assert entry.parts == (Part("blk.7.ffn_gate.weight", 0, ffn), Part("blk.7.ffn_up.weight", ffn, 2 * ffn))
    assert entry.file_bytes == 2 * ffn * hidden // 256 * 144
    assert "layers.7.mlp.gate_proj.weight" not in made
    joined = sum(len(entry.parts) - 1 for entry in made.entries)
    assert joined == sum(len(fusion.fused) for fusion in made.fusions) + len(made.fusions[1].fused)  # q+k+v are three
    assert len(made.entries) == len(model.tensors) - joined - 1
    assert sum(e.file_bytes for e in made.entries) + 4 * 256 == sum(t.nbytes for t in model.tensors.values())
    assert made.describe().splitlines()[-1] == "lm_head tied to embed_tokens"


def test_pairs_of_other_types_are_left_and_counted(plan: Plan) -> None:
    types = q4_k_m(GEMMA4_31B) | {"blk.3.ffn_up": "Q6_K", "blk.41.ffn_gate": "Q6_K", "blk.41.ffn_up": "Q6_K"}
    made = plan(gemma4(GEMMA4_31B, types))
    fusion = made.fusions[0]
    assert str(fusion) == "fused gate+up on 58 of 60 MLP layers (2 left: 1 Q4_K+Q6_K, 1 Q6_K+Q6_K)"
    assert str(fusion) in made.describe()
    assert fusion.left == ((3, "Q4_K+Q6_K"), (41, "Q6_K+Q6_K"))
    for layer in (3, 41):
        assert f"layers.{layer}.mlp.gate_proj.weight" in made
        assert f"layers.{layer}.mlp.up_proj.weight" in made
        assert f"layers.{layer}.mlp.gate_up_proj.weight" not in made


def test_fusing_can_be_turned_off(plan: Plan) -> None:
    model = gemma4(types={"matrix": "Q4_K"})
    made = plan(model, fuse=False)
    assert str(made.fusions[0]) == "fused gate+up on 0 of 4 MLP layers (4 left: 4 because fusing is off)"
    assert all(len(entry.parts) == 1 for entry in made.entries)
    assert len(made.entries) == len(model.tensors) - 1


@pytest.mark.parametrize("make", [gemma4, gemma3])
@pytest.mark.parametrize("types", [{}, {"matrix": "Q4_K"}, MIXED], ids=["F32", "Q4_K", "mixed"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_inverse_covers_every_tensor(
    plan: Plan, make: Callable[..., Model], types: dict[str, str], tied: bool
) -> None:
    model = make(types=types, tied=tied)
    made = plan(model)
    for name, tensor in model.tensors.items():
        if name in made.in_config:
            with pytest.raises(KeyError):
                made.source(name)
            continue
        entry, part = made.source(name)
        assert part in entry.parts
        assert part.source == name
        assert part.stop - part.start == (tensor.shape[0] if len(tensor.shape) > 1 else 1)
        assert entry.shape[1:] == tensor.shape[1:]
        assert entry.file_type.name == tensor.type
    for entry in made.entries:
        assert [part.start for part in entry.parts] == [0, *(part.stop for part in entry.parts[:-1])]
        assert entry.parts[-1].stop == (entry.shape[0] if len(entry.shape) > 1 else 1)
    placed = [part.source for entry in made.entries for part in entry.parts] + list(made.in_config)
    assert sorted(placed) == sorted(model.tensors)
    assert made.is_head_tied == tied
    assert ("lm_head.weight" in made) != tied


def test_gemma3_27b(plan: Plan) -> None:
    made = plan(gemma3(GEMMA3_27B, q4_k_m(GEMMA3_27B)))
    assert str(made.fusions[0]) == "fused gate+up on 62 of 62 MLP layers (0 left)"
    assert made.in_config == ()


def test_real_270m_is_planned_whole(real_gguf: Path) -> None:
    with GGUFFile.open(real_gguf) as file:
        made = plan_load(file, Gemma4Config.from_gguf(file))
        assert sum(entry.file_bytes for entry in made.entries) == sum(t.nbytes for t in file.tensors.values())
    assert str(made.fusions[0]) == "fused gate+up on 0 of 18 MLP layers (18 left: 18 Q5_0+Q5_0)"
    assert {entry.type for entry in made.entries} == {
        GGMLType.F32,
        GGMLType.Q4_K,
        GGMLType.Q5_0,
        GGMLType.Q6_K,
        GGMLType.Q8_0,
    }


def test_a_plan_is_pure_data(plan: Plan) -> None:
    made = plan(gemma4(types=MIXED))
    assert made == plan(gemma4(types=MIXED))
    assert hash(made) == hash(plan(gemma4(types=MIXED)))
    assert pickle.loads(pickle.dumps(made)) == made
    assert made != plan(gemma4())


def test_a_dense_plan_changes_matrices_only(plan: Plan) -> None:
    made = plan(gemma4(types=MIXED))
    dense = made.dense(GGMLType.BF16)
    for before, after in zip(made.entries, dense.entries, strict=True):
        assert after == replace(before, type=GGMLType.BF16 if len(before.shape) > 1 else before.type)
        assert after.file_bytes == before.file_bytes


def test_description_adds_up(plan: Plan) -> None:
    made = plan(gemma4(types=MIXED))
    rows = {line.split()[0]: line.split()[1:] for line in made.describe().splitlines()[1:7]}
    assert set(rows) == {"F16", "F32", "Q4_K", "Q5_K", "Q6_K", "Q8_0"}
    assert rows["Q6_K"] == ["4", f"{4 * 768 * 256:,}", f"{4 * 768 * 210:,}", "6.562"]
    total = made.describe().splitlines()[7].split()
    assert int(total[1]) == sum(int(row[0]) for row in rows.values())
    assert int(total[3].replace(",", "")) == sum(int(row[2].replace(",", "")) for row in rows.values())


def test_every_type_with_a_container_can_be_planned_and_no_other() -> None:
    assert frozenset(formats.registered_formats()) == LOADABLE_TYPES


def test_types_with_kernels_are_those_with_an_op_and_the_dense_ones() -> None:
    assert frozenset(LINEAR_OPS) | {GGMLType.F32, GGMLType.F16, GGMLType.BF16} == KERNEL_TYPES
    assert frozenset(MATVEC_OPS) <= KERNEL_TYPES < LOADABLE_TYPES


@pytest.mark.parametrize("make", [gemma4, gemma3])
def test_each_missing_tensor_is_named(plan: Plan, make: Callable[[], Model]) -> None:
    noticed_elsewhere = ("token_embd.weight", "rope_freqs.weight", "layer_output_scale.weight")
    for name in make().tensors:
        if not name.endswith(noticed_elsewhere):
            model = make()
            del model.tensors[name]
            refused(plan, model, MissingTensorError, name)


def test_misspelt_and_extra_tensors_are_named(plan: Plan) -> None:
    model = gemma4()
    model.rename("blk.1.attn_q.weight", "blk.1.attn_qq.weight")
    assert "the file lacks" in refused(plan, model, MissingTensorError, "blk.1.attn_q.weight")
    model = gemma4()
    for i in range(4):
        for suffix in ("bias", "scale", "weight.scale"):
            model.tensors[f"blk.{i}.ffn_up.{suffix}"] = model.tensors["output_norm.weight"]
    message = refused(plan, model, UnexpectedTensorError, "blk.0.ffn_up.bias")
    assert "blk.1.ffn_up.weight.scale" in message
    assert "and 4 more" in message


def test_attn_v_of_a_full_layer_is_extra_when_only_some_have_it(plan: Plan) -> None:
    model = gemma4()
    model.tensors["blk.1.attn_v.weight"] = model.tensors["blk.1.attn_k.weight"]
    refused(plan, model, MissingTensorError, "blk.3.attn_v.weight")


@pytest.mark.parametrize(
    "role",
    [name.removeprefix("blk.0.") for name in gemma4().tensors if name.startswith("blk.0.")]
    + ["output_norm.weight", "output.weight"],
)
def test_each_wrong_shape_is_named(plan: Plan, role: str) -> None:
    model = gemma4(tied=False)
    name = role if role in model.tensors else f"blk.0.{role}"
    shape = model.tensors[name].shape
    for wrong in {(*shape[:-1], 2 * shape[-1]), shape[::-1], (1, *shape), (2 * shape[0], *shape[1:])} - {shape}:
        model.reshape(name, *wrong)
        message = refused(plan, model, ShapeError, name)
        assert str(list(wrong)) in message
        assert str(list(shape)) in message


@pytest.mark.parametrize("swap", [("ffn_gate", "ffn_down"), ("attn_q", "attn_output"), ("attn_q_norm", "attn_norm")])
def test_swapped_tensors_are_noticed(plan: Plan, swap: tuple[str, str]) -> None:
    model = gemma4()
    first, second = (f"blk.2.{role}.weight" for role in swap)
    model.tensors[first], model.tensors[second] = model.tensors[second], model.tensors[first]
    with pytest.raises(ShapeError):
        plan(model)


def test_all_types_without_container_are_listed_at_once(plan: Plan) -> None:
    kinds = ("Q8_1", "I8", "I16", "I32", "I64", "F64")
    names = [f"blk.{i}.{role}.weight" for i in range(4) for role in ("ffn_up", "ffn_down")][: len(kinds)]
    model = gemma4()
    for name, kind in zip(names, kinds, strict=True):
        model.retype(name, kind)
    model.tensors["blk.0.ffn_up.scale"] = model.tensors["output_norm.weight"]
    message = refused(plan, model, UnsupportedTypeError, names[0])
    for name, kind in zip(names, kinds, strict=True):
        assert f"{kind}: {name}" in message
    for kind in LOADABLE_TYPES:
        assert kind.name in message


def test_many_names_are_cut_short(plan: Plan) -> None:
    message = refused(plan, gemma4(types={"matrix": "Q8_1"}), UnsupportedTypeError, "token_embd.weight")
    assert "and 19 more" in message
    assert len(message) < 600


def test_planning_reads_no_weights(tmp_path: Path) -> None:
    with GGUFFile.open(gemma4().write_sparse(tmp_path / "model.gguf")) as file:
        config = Gemma4Config.from_gguf(file)
        tensors: dict[str, TensorInfo] = dict(file.tensors)
    # The file is closed: reading data would raise.
    made = plan_load(file, config)
    assert len(made.entries) == len(tensors) - 1
    assert set(expected_tensors(config)) == set(tensors)
