"""Gemma 4's vocabulary in Hugging Face's files, to and from the `tokenizer.ggml.*` metadata of a GGUF file.

Written are `tokenizer.json`, `tokenizer_config.json`, `generation_config.json` and `chat_template.jinja`. Tokens that a
caller must see (channels, tool calls) are written as added but not special, so that decoding keeps them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gemma4.chat import TEMPLATE_KEY
from gemma4.quant.errors import TokenizerError
from gemma4.vocabulary import (
    BPE_MODEL,
    EOS_IDS_KEY,
    MERGES_KEY,
    MODEL_KEY,
    SUPPRESS_KEY,
    TOKENS_KEY,
    TYPES_KEY,
    TokenType,
    Vocabulary,
)

_SAMPLING: Final = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p"}
_BOS, _EOS, _UNKNOWN, _PAD = "<bos>", "<eos>", "<unk>", "<pad>"


def metadata_from_files(files: Mapping[str, Any], vocab_size: int, path: Path) -> dict[str, Any]:
    """The `tokenizer.*` and `general.sampling.*` metadata that the files of a checkpoint directory stand for.

    files: parsed, by name: "tokenizer.json", "tokenizer_config.json", "generation_config.json" (objects) and
    "chat_template.jinja" (text), each where there is one. vocab_size: rows of the embeddings. path: of the directory.
    Raises TokenizerError.
    """
    generation, settings = files.get("generation_config.json", {}), files.get("tokenizer_config.json", {})
    metadata = {
        f"general.sampling.{ours}": generation[theirs]
        for theirs, ours in _SAMPLING.items()
        if isinstance(generation.get(theirs), int | float)
    }
    template = files.get("chat_template.jinja", settings.get("chat_template"))
    if isinstance(template, str):
        metadata[TEMPLATE_KEY] = template
    if "tokenizer.json" not in files:
        return metadata | {MODEL_KEY: "none"}
    tokens, types, merges = _vocabulary(files["tokenizer.json"], vocab_size, path / "tokenizer.json")
    ids = {text: i for i, text in enumerate(tokens)}
    ends = generation.get("eos_token_id", [])
    for name, text in (("bos", _BOS), ("eos", _EOS), ("unknown", _UNKNOWN), ("padding", _PAD)):
        if text in ids:
            metadata[f"tokenizer.ggml.{name}_token_id"] = ids[text]
    return metadata | {
        MODEL_KEY: BPE_MODEL,
        TOKENS_KEY: tokens,
        TYPES_KEY: types,
        MERGES_KEY: merges,
        EOS_IDS_KEY: ends if isinstance(ends, list) else [ends],
        SUPPRESS_KEY: generation.get("suppress_tokens") or [],
    }


def _vocabulary(stored: Any, vocab_size: int, path: Path) -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types, and merges of a tokenizer.json."""
    try:
        model, added = stored["model"], stored.get("added_tokens", [])
        ids: dict[str, int] = dict(model["vocab"]) | {token["content"]: token["id"] for token in added}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        special = {token["id"]: TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED for token in added}
    except (KeyError, TypeError, ValueError) as error:
        raise TokenizerError(f"not a byte-fallback BPE tokenizer: {error!r:.80}", path=path) from error
    by_id = {i: text for text, i in ids.items() if type(i) is int}
    if len(by_id) != len(ids) or not set(by_id) <= set(range(vocab_size)):
        raise TokenizerError(f"expected distinct ids below {vocab_size}, the rows of the embeddings", path=path)
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    types = [int(special.get(i, TokenType.NORMAL)) if i in by_id else int(TokenType.UNUSED) for i in range(vocab_size)]
    return tokens, types, merges


def tokenizer_files(vocabulary: Vocabulary, metadata: Mapping[str, Any]) -> dict[str, str]:
    """The text of each file, by name. metadata: of the GGUF file, for its template and sampling settings.

    Raises TokenizerError for a vocabulary other than Gemma 4's.
    """
    if vocabulary.model != BPE_MODEL:
        raise vocabulary.error(f"found a {vocabulary.model!r} vocabulary, expected {BPE_MODEL!r}", MODEL_KEY)
    tokens = vocabulary.tokens
    names = {"bos_token": tokens[vocabulary.bos_id], "eos_token": tokens[vocabulary.eos_id]}
    names |= {"unk_token": tokens[vocabulary.unknown_id]} | ({"pad_token": _PAD} if _PAD in tokens else {})
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    generation: dict[str, Any] = {
        "bos_token_id": vocabulary.bos_id,
        "eos_token_id": [vocabulary.eos_id, *sorted(vocabulary.eog_ids - {vocabulary.eos_id})],
        "do_sample": True,
    }
    generation |= {
        theirs: metadata[f"general.sampling.{ours}"]
        for theirs, ours in _SAMPLING.items()
        if f"general.sampling.{ours}" in metadata
    }
    if vocabulary.suppress_ids:
        generation["suppress_tokens"] = list(vocabulary.suppress_ids)
    files = {
        "tokenizer.json": json.dumps(_tokenizer(vocabulary), ensure_ascii=False),
        "tokenizer_config.json": json.dumps(settings, ensure_ascii=False, indent=2),
        "generation_config.json": json.dumps(generation, indent=2),
    }
    template = metadata.get(TEMPLATE_KEY)
    return files | ({"chat_template.jinja": template} if isinstance(template, str) else {})


def _tokenizer(vocabulary: Vocabulary) -> dict[str, Any]:
    """tokenizer.json: what `gemma4.bpe` does, and BOS in front, in the terms of the `tokenizers` package."""
    added = [
        {
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": vocabulary.types[i] != TokenType.USER_DEFINED,
        }
        for text, i in sorted(vocabulary.special.items(), key=lambda item: item[1])
    ]
    bos = vocabulary.tokens[vocabulary.bos_id]
    space: Sequence[dict[str, Any]] = (
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    )
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": bos, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [vocabulary.bos_id], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": list(space)},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": vocabulary.tokens[vocabulary.unknown_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {text: i for i, text in enumerate(vocabulary.tokens)},
            "merges": [[merge[: merge.index(" ", 1)], merge[merge.index(" ", 1) + 1 :]] for merge in vocabulary.merges],
        },
    }
