"""Every recipe of llama.cpp's quantizer for every size of the family: its type mix, and a small file that runs."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from gemma4 import Gemma4
from gemma4.config import Gemma4Config
from gemma4.mapping import plan_load
from gemma4.quant.ggml_types import GGMLType
from gemma4.quant.gguf_file import GGUFFile
from tests.family_gguf import FULL_SIZE, RECIPES, SHRUNKEN, quantize
from tests.tiny_gguf import Model, Tensor

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = tuple(FULL_SIZE)
# How many tensors of each type the files that people download hold, norms and routers aside.
COUNTS = {
    "Q4_K_M": (
        {"Q4_K": 281, "Q6_K": 36},
        {"Q4_K": 336, "Q6_K": 44},
        {"Q4_K": 284, "Q6_K": 45},
        {"Q4_K": 192, "Q6_K": 14, "Q5_0": 32, "Q8_0": 28},
        {"Q4_K": 355, "Q6_K": 56},
    ),
    "Q4_K_S": (
        {"Q4_K": 307, "Q5_K": 8, "Q6_K": 2},
        {"Q4_K": 369, "Q5_K": 9, "Q6_K": 2},
        {"Q4_K": 318, "Q5_K": 10, "Q6_K": 1},
        {"Q4_K": 201, "Q5_K": 4, "Q5_1": 6, "Q5_0": 54, "Q6_K": 1},
        {"Q4_K": 399, "Q5_K": 11, "Q6_K": 1},
    ),
    "Q5_K_M": (
        {"Q5_K": 281, "Q6_K": 36},
        {"Q5_K": 336, "Q6_K": 44},
        {"Q5_K": 284, "Q6_K": 45},
        {"Q5_K": 192, "Q5_1": 32, "Q8_0": 28, "Q6_K": 14},
        {"Q5_K": 355, "Q6_K": 56},
    ),
    "Q6_K": ({"Q6_K": 317}, {"Q6_K": 380}, {"Q6_K": 329}, {"Q6_K": 206, "Q8_0": 60}, {"Q6_K": 411}),
    "Q8_0": ({"Q8_0": 317}, {"Q8_0": 380}, {"Q8_0": 329}, {"Q8_0": 266}, {"Q8_0": 411}),
    "Q4_0": (
        {"Q4_0": 311, "Q4_1": 4, "Q6_K": 2},
        {"Q4_0": 373, "Q4_1": 5, "Q6_K": 2},
        {"Q4_0": 322, "Q4_1": 6, "Q6_K": 1},
        {"Q4_0": 259, "Q4_1": 6, "Q6_K": 1},
        {"Q4_0": 403, "Q4_1": 7, "Q6_K": 1},
    ),
    "IQ4_XS": (
        {"IQ4_XS": 280, "Q5_K": 35, "Q6_K": 2},
        {"IQ4_XS": 336, "Q5_K": 42, "Q6_K": 2},
        {"IQ4_XS": 328, "Q6_K": 1},
        {"IQ4_XS": 205, "IQ4_NL": 60, "Q6_K": 1},
        {"IQ4_XS": 410, "Q6_K": 1},
    ),
    "MXFP4_MOE": ({"Q8_0": 317}, {"Q8_0": 380}, {"Q8_0": 329}, {"MXFP4": 60, "Q8_0": 206}, {"Q8_0": 411}),
}
TENSORS = {"E2B": 601, "E4B": 720, "12B": 667, "26B-A4B": 658, "31B": 833}
# GiB of all tensors, where the published files say it.
GIB = {
    ("Q4_K_M", "E2B"): 3.18,
    ("Q4_K_M", "E4B"): 4.95,
    ("Q4_K_M", "12B"): 6.86,
    ("Q4_K_M", "26B-A4B"): 15.63,
    ("Q4_K_M", "31B"): 17.38,
    ("Q6_K", "31B"): 23.45,
    ("Q8_0", "E2B"): 4.61,
    ("Q8_0", "E4B"): 7.46,
    ("Q8_0", "12B"): 11.78,
    ("Q8_0", "31B"): 30.37,
}


every_recipe = pytest.mark.parametrize("recipe", RECIPES)
every_size = pytest.mark.parametrize("size", SIZES)


def type_counts(model: Model) -> Counter[str]:
    return Counter(tensor.type for tensor in model.tensors.values() if tensor.type not in ("F32", "BF16"))


@every_size
@every_recipe
def test_mix_of_a_published_file(recipe: str, size: str, tmp_path: Path) -> None:
    model = quantize(FULL_SIZE[size](), recipe)
    assert type_counts(model) == COUNTS[recipe][SIZES.index(size)]
    assert sum(tensor.type == "BF16" for tensor in model.tensors.values()) == size.startswith("E")
    assert len(model.tensors) == TENSORS[size]
    if (recipe, size) in GIB:
        gib = sum(tensor.nbytes for tensor in model.tensors.values()) / 2**30
        assert gib == pytest.approx(GIB[recipe, size], abs=0.01)
    with GGUFFile.open(model.write_sparse(tmp_path / "model.gguf")) as file:
        plan = plan_load(file, Gemma4Config.from_gguf(file))
    read = {tensor.type for name, tensor in model.tensors.items() if name != "rope_freqs.weight"}
    assert {entry.file_type for entry in plan.entries} == {GGMLType[kind] for kind in read}
    if recipe == "MXFP4_MOE" and size == "26B-A4B":
        assert plan.decoded_types == (GGMLType.MXFP4,)


class Small(Model):
    """A model whose even layers hold equal weights, and whose odd ones: blocks are encoded and decoded once."""

    def encoded(self, name: str) -> np.ndarray:
        return self._blocks(name)[0]

    def exact(self, name: str) -> np.ndarray:
        """float32, decoded by gguf-py."""
        return self._blocks(name)[1]

    def _blocks(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        if name in self.values:
            return super().encoded(name), self.values[name]
        parts = name.split(".")
        if parts[0] == "blk":
            parts[1] = str(int(parts[1]) % 2)
        return encode_once(".".join(parts), self.tensors[name])


@functools.cache
def encode_once(name: str, tensor: Tensor) -> tuple[np.ndarray, np.ndarray]:
    blocks = Model({}, {name: tensor}).encoded(name)
    exact: np.ndarray = gguf.dequantize(blocks, gguf.GGMLQuantizationType[tensor.type])
    return blocks, exact.reshape(tensor.shape)


def as_float32(model: Small) -> Model:
    """The same model with the weights that its blocks stand for."""
    tensors = {name: Tensor(tensor.shape, "F32") for name, tensor in model.tensors.items()}
    return Model(model.metadata, tensors, {name: model.exact(name) for name in tensors})


def check_that_it_runs(made: Model, folder: Path) -> None:
    """Loads and runs the model: the logits of many tokens and of one are finite, and within 1e-4 of those of its exact
    weights, where they span from -30 to 30.
    """
    model = Small(made.metadata, made.tensors, made.values)
    packed = Gemma4.from_gguf(model.write(folder / "packed.gguf"), device="cpu")
    dense = Gemma4.from_gguf(as_float32(model).write(folder / "dense.gguf"), device="cpu")
    assert {entry.type for entry in packed.plan.entries} > {GGMLType.F32}
    ids = torch.randint(0, 64, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    for length in (20, 1):
        found, expected = packed.logits(ids[:length]), dense.logits(ids[:length])
        assert found.isfinite().all()
        assert expected.std() > 0.1
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@every_size
@every_recipe
def test_a_small_file_of_the_mix_runs(recipe: str, size: str, tmp_path: Path) -> None:
    model = quantize(SHRUNKEN[size](), recipe)
    assert set(type_counts(model)) == set(COUNTS[recipe][SIZES.index(size)])
    check_that_it_runs(model, tmp_path)


# What other uploaders make of a recipe: types by role.
VARIATIONS = {
    "token embeddings of Q4_K": ("12B", "Q4_K_M", {"token_embd": "Q4_K"}),
    "per-layer projections of Q5_K": ("E2B", "Q4_K_M", {"inp_gate": "Q5_K", "proj": "Q5_K"}),
    "Q4_0 throughout": ("26B-A4B", "Q4_0", {"token_embd": "Q4_0", "ffn_down": "Q4_0", "ffn_down_exps": "Q4_0"}),
    "quantization-aware Q4_0, some projections of F16": ("E4B", "Q4_0", {"inp_gate": "F16", "proj": "F16"}),
    "mixed fallbacks of Q6_K": ("26B-A4B", "Q6_K", {"blk.1.ffn_down": "Q5_1", "blk.2.ffn_down_exps": "IQ4_NL"}),
    "low bits": ("31B", "Q4_K_M", {"ffn_up": "Q3_K", "ffn_gate": "Q2_K", "attn_output": "IQ3_XXS"}),
    "a projection for all of q, k and v": ("31B", "Q5_K_M", {"attn_v": "Q5_K"}),
}


@pytest.mark.parametrize(("size", "recipe", "types"), VARIATIONS.values(), ids=VARIATIONS)
def test_a_small_file_of_another_uploader_runs(size: str, recipe: str, types: dict[str, str], tmp_path: Path) -> None:
    model = quantize(SHRUNKEN[size](), recipe)
    for name in model.tensors:
        tensor = name.removesuffix(".weight")
        kind = types.get(tensor, types.get(tensor.split(".")[-1]))
        if kind is not None:
            model.retype(name, kind)
    check_that_it_runs(model, tmp_path)
