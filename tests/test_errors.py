"""The error classes: one base, stable codes, a readable sentence, and survival of copy and pickle."""

from __future__ import annotations

import copy
import errno
import pickle
from pathlib import Path

import pytest

from gemma4.quant import errors
from gemma4.quant.errors import DoesNotFitError, FileMissingError, FileUnreadableError, Gemma4Error, MalformedError

CODES = {
    "NotGGUFError": "not_gguf",
    "TruncatedError": "truncated",
    "MalformedError": "malformed",
    "UnsupportedTypeError": "unsupported_type",
    "UnsupportedArchitectureError": "unsupported_architecture",
    "UnsupportedFeatureError": "unsupported_feature",
    "MissingPartError": "missing_part",
    "MissingTensorError": "missing_tensor",
    "UnexpectedTensorError": "unexpected_tensor",
    "ShapeError": "shape",
    "MetadataError": "metadata",
    "TokenizerError": "tokenizer",
    "TemplateError": "template",
    "ContextError": "context",
    "DrafterMismatchError": "drafter_mismatch",
    "DoesNotFitError": "does_not_fit",
    "FileUnreadableError": "file_unreadable",
    "FileMissingError": "file_missing",
}


def all_classes() -> list[type[Gemma4Error]]:
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, Gemma4Error) and value is not Gemma4Error
    ]


def test_every_class_has_its_own_documented_code() -> None:
    assert {cls.__name__: cls.code for cls in all_classes()} == CODES
    assert len(set(CODES.values())) == len(CODES)


@pytest.mark.parametrize("cls", all_classes(), ids=lambda cls: cls.__name__)
def test_error_keeps_its_parts_through_copy_and_pickle(cls: type[Gemma4Error]) -> None:
    error = cls("found 3, expected 4", path="dir/model.gguf", field="blk.0.attn_q.weight", offset=96)
    for same in (error, copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert type(same) is cls
        assert isinstance(same, ValueError)
        assert str(same) == "dir/model.gguf: blk.0.attn_q.weight: found 3, expected 4 (at byte 96)"
        assert (same.path, same.field, same.offset) == (Path("dir/model.gguf"), "blk.0.attn_q.weight", 96)


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ({}, "wrong"),
        ({"path": "m.gguf"}, "m.gguf: wrong"),
        ({"field": "key"}, "key: wrong"),
        ({"offset": 0}, "wrong (at byte 0)"),
        ({"path": Path("m.gguf"), "offset": 7}, "m.gguf: wrong (at byte 7)"),
    ],
)
def test_absent_parts_are_left_out_of_the_sentence(parts: dict[str, object], text: str) -> None:
    assert str(MalformedError("wrong", **parts)) == text  # type: ignore[arg-type]


def test_a_missing_file_is_also_the_builtin_error() -> None:
    error = FileMissingError("there is no file", path="gone.gguf")
    assert isinstance(error, FileNotFoundError)
    for same in (error, pickle.loads(pickle.dumps(error))):
        assert (same.errno, same.filename) == (errno.ENOENT, "gone.gguf")
    denied = pickle.loads(pickle.dumps(FileUnreadableError("denied", path="a", os_errno=errno.EACCES)))
    assert denied.errno == errno.EACCES


def test_what_does_not_fit_comes_with_a_table() -> None:
    error = DoesNotFitError("found 3, needed 4", path="m.gguf", field="max_seq_len", table="weights 3\ntotal 4")
    for same in (error, copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert same.summary == "m.gguf: max_seq_len: found 3, needed 4"
        assert str(same) == f"{same.summary}\nweights 3\ntotal 4"
