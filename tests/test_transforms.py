"""Transforms by themselves: when they apply, which rows they fill, and what the registry does with new ones."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from math import prod

import pytest

from gemma4.quant import transforms
from gemma4.quant.errors import UnexpectedTensorError
from gemma4.quant.ggml_types import GGMLType, row_bytes
from gemma4.quant.gguf_file import TensorInfo
from gemma4.quant.plan import LoadPlan, make_plan
from gemma4.quant.transforms import (
    Part,
    Transform,
    concat_rows,
    read_by_config,
    register_transforms,
    rename,
    transforms_for,
)

Q4_K, Q6_K, F32 = GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.F32
QKV = concat_rows(
    "blk.{layer}.q",
    "blk.{layer}.k",
    "blk.{layer}.v",
    target="layers.{layer}.qkv",
    types=frozenset({Q4_K, Q6_K}),
    scope="attention",
    label="q+k+v",
)


def tensor(name: str, *shape: int, kind: GGMLType = Q4_K) -> TensorInfo:
    nbytes = row_bytes(kind, shape[-1]) * prod(shape[:-1])
    return TensorInfo(name, shape, kind, nbytes, 0, 0)


def plan(*tensors: TensorInfo, using: tuple[Transform, ...], num_layers: int = 2, fuse: bool = True) -> LoadPlan:
    return make_plan(
        "test",
        {t.name: t for t in tensors},
        {t.name: t.shape for t in tensors},
        using,
        num_layers=num_layers,
        is_head_tied=False,
        fuse=fuse,
    )


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, tuple[Transform, ...]]]:
    copy = dict(transforms._REGISTRY)
    monkeypatch.setattr(transforms, "_REGISTRY", copy)
    return copy


def test_rows_are_stacked_in_the_order_of_sources() -> None:
    sources = [tensor("q", 64, 256), tensor("k", 32, 256), tensor("v", 16, 256)]
    assert QKV.place(sources) == (Part("q", 0, 64), Part("k", 64, 96), Part("v", 96, 112))
    assert QKV.place(sources[::-1]) == (Part("v", 0, 16), Part("k", 16, 48), Part("q", 48, 112))


def test_a_vector_is_one_row_and_a_stack_is_all_its_rows() -> None:
    assert rename("norm", "norm").place([tensor("norm", 256, kind=F32)]) == (Part("norm", 0, 1),)
    assert rename("experts", "experts").place([tensor("experts", 8, 64, 256)]) == (Part("experts", 0, 512),)
    assert plan(tensor("experts", 8, 64, 256), using=(rename("experts", "e"),)).entries[0].shape == (512, 256)


@pytest.mark.parametrize(
    ("shapes", "kinds", "applies"),
    [
        ([(64, 256), (32, 256), (32, 256)], [Q4_K, Q4_K, Q4_K], True),
        ([(64, 256), (32, 256), (32, 256)], [Q6_K, Q6_K, Q6_K], True),
        ([(64, 256), (32, 256), (32, 256)], [Q4_K, Q4_K, Q6_K], False),
        ([(64, 256), (32, 256), (32, 256)], [F32, F32, F32], False),
        ([(64, 256), (32, 512), (32, 256)], [Q4_K, Q4_K, Q4_K], False),
        ([(256,), (256,), (256,)], [Q4_K, Q4_K, Q4_K], False),
        ([(64, 256), (32, 256), (256,)], [Q4_K, Q4_K, Q4_K], False),
    ],
)
def test_what_may_be_stacked(shapes: list[tuple[int, ...]], kinds: list[GGMLType], applies: bool) -> None:
    sources = [
        tensor(name, *shape, kind=kind) for name, shape, kind in zip(("q", "k", "v"), shapes, kinds, strict=True)
    ]
    assert QKV.applies(sources) == applies


def test_transforms_are_values() -> None:
    again = concat_rows(
        *QKV.sources, target=str(QKV.target), types=frozenset({Q6_K, Q4_K}), scope="attention", label="q+k+v"
    )
    assert again == QKV
    assert hash(QKV) == hash(again)
    assert pickle.loads(pickle.dumps(QKV)) == QKV
    with pytest.raises(AttributeError):
        QKV.label = ""  # type: ignore[misc]


def test_a_new_architecture_takes_a_few_lines(registry: dict[str, tuple[Transform, ...]]) -> None:
    register_transforms(
        "test",
        QKV,
        *(rename(f"blk.{{layer}}.{name}", f"layers.{{layer}}.{name}_proj") for name in "qkv"),
        rename("embed", "embed_tokens"),
        read_by_config("freqs"),
    )
    layers = [tensor(f"blk.{i}.{name}", n, 256) for i in range(2) for name, n in (("q", 64), ("k", 32), ("v", 32))]
    layers[-1] = tensor("blk.1.v", 32, 256, kind=Q6_K)
    made = plan(*layers, tensor("embed", 8, 256), tensor("freqs", 4, kind=F32), using=transforms_for("test"))
    assert {entry.target: entry.shape for entry in made.entries} == {
        "layers.0.qkv": (128, 256),
        "layers.1.q_proj": (64, 256),
        "layers.1.k_proj": (32, 256),
        "layers.1.v_proj": (32, 256),
        "embed_tokens": (8, 256),
    }
    assert made.in_config == ("freqs",)
    assert (made.fusions[0].fused, made.fusions[0].left) == ((0,), ((1, "Q4_K+Q4_K+Q6_K"),))


def test_what_is_registered_later_is_tried_first(registry: dict[str, tuple[Transform, ...]]) -> None:
    assert transforms_for("test") == ()
    register_transforms("test", rename("a", "old"))
    register_transforms("test", rename("a", "new"))
    assert [t.target for t in transforms_for("test")] == ["new", "old"]
    assert plan(tensor("a", 8, 256), using=transforms_for("test")).entries[0].target == "new"


def test_a_transform_of_one_tensor_keeps_to_its_types() -> None:
    using = (Transform(("a",), "packed", frozenset({Q4_K})), rename("a", "plain"))
    assert plan(tensor("a", 8, 256), using=using).entries[0].target == "packed"
    assert plan(tensor("a", 8, 256, kind=F32), using=using).entries[0].target == "plain"
    assert plan(tensor("a", 8, 256), using=using, fuse=False).entries[0].target == "packed"


def test_the_wildcard_is_the_layer_and_nothing_else() -> None:
    using = (rename("blk.{layer}.q", "layers.{layer}.q"),)
    assert [e.target for e in plan(tensor("blk.1.q", 8, 256), using=using).entries] == ["layers.1.q"]
    for name in ("blk.2.q", "blk.01.q", "blk.x.q", "blk.1.qq", "xblk.1.q", "blk.{layer}.q"):
        with pytest.raises(UnexpectedTensorError) as caught:
            plan(tensor(name, 8, 256), using=using)
        assert caught.value.field == name


def test_a_source_without_layer_can_stand_beside_one_with() -> None:
    using = (
        concat_rows(
            "shared", "blk.{layer}.q", target="layers.{layer}.q", types=frozenset({Q4_K}), scope="attention", label=""
        ),
    )
    made = plan(tensor("shared", 8, 256), tensor("blk.1.q", 8, 256), using=using)
    assert made.entries[0].parts == (Part("shared", 0, 8), Part("blk.1.q", 8, 16))


def test_unclaimed_tensors_and_double_targets_are_refused() -> None:
    with pytest.raises(UnexpectedTensorError, match=r"no transform .* takes b, c") as caught:
        plan(tensor("a", 8, 256), tensor("b", 8, 256), tensor("c", 8, 256), using=(rename("a", "x"),))
    assert caught.value.field == "b"
    with pytest.raises(UnexpectedTensorError, match="several transforms fill x") as caught:
        plan(tensor("a", 8, 256), tensor("b", 8, 256), using=(rename("a", "x"), rename("b", "x")))
    assert caught.value.field == "x"
    with pytest.raises(UnexpectedTensorError, match="several transforms fill x"):
        plan(tensor("blk.0.q", 8, 256), tensor("blk.1.q", 8, 256), using=(rename("blk.{layer}.q", "x"),))
