"""A tokenizer.json of a few bytes must not exhaust memory or time, and damage is an error."""

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.tokenizer import training as tokenizers
from pipelines.data.tokenizer.guarded_loader import (
    MAX_FILE_BYTES,
    check_pattern,
    largest_token_id,
    parse_tokenizer,
)
from pipelines.data.tokenizer.selection import convert_tokenizer
from pipelines.data.transforms import text

Tree = dict[str, Any]
Change = Callable[[Tree], Any]


def tree() -> Tree:
    return json.loads(tokenizers.train_tokenizer(["红色 red"], [], size=300))


def replace(pattern: Tree, content: str) -> Tree:
    return {"type": "Replace", "pattern": pattern, "content": content}


def charsmap(replacement: bytes, trie_bytes: int = 8) -> Tree:
    data = struct.pack("<I", trie_bytes) + bytes(8) + replacement + b"\0"
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def nest(levels: int) -> Tree:
    part: Tree = {"type": "Lowercase"}
    for _ in range(levels):
        part = {"type": "Sequence", "normalizers": [part]}
    return part


PADDING = {
    "strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0,
    "pad_type_id": 0, "pad_token": "[PAD]",
}  # fmt: skip
TEMPLATE = {
    "type": "TemplateProcessing", "pair": [], "special_tokens": {},
    "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 9,
}  # fmt: skip


def part(name: str, value: Tree) -> Change:
    return lambda t: t.update({name: value})


def normal(value: Tree) -> Change:
    return part("normalizer", value)


DOUBLING = {"type": "Sequence", "normalizers": [replace({"String": "a"}, "aa")] * 40}
SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}
BOMBS: dict[str, tuple[Change, str]] = {
    "padding": (part("padding", PADDING), "padding must be null"),
    "template": (part("post_processor", TEMPLATE), "post_processor must be null"),
    "truncation": (part("truncation", {"max_length": 0}), "truncation must be null"),
    "doubling": (normal(DOUBLING), "lengthens texts more than 16 times"),
    "insertion": (normal(replace({"Regex": ""}, "x" * 4000)), "lengthens texts more than 16 times"),
    "long text": (normal(replace({"String": "a" * 9999}, "")), "a text of 9999 characters"),
    "prepend": (normal({"type": "Prepend", "prepend": "x" * 100}), "lengthens texts"),
    "precompiled": (normal(charsmap(b"x" * 9999)), "with a long replacement"),
    "precompiled trie": (normal(charsmap(b"x", 2**31)), "a damaged precompiled normalizer"),
    "nesting": (normal(nest(200)), "more than 64 components"),
    "pattern": (part("pre_tokenizer", SPLIT), "repeats an ambiguous group"),
    "unknown component": (part("pre_tokenizer", {"type": "Wasm"}), "'Wasm' is no known component"),
    "unknown key": (lambda t: t.update(plugin="x"), "unknown keys: plugin"),
    "model type": (lambda t: t["model"].update(type="Python"), "'Python' is none of BPE"),
    "dropout": (lambda t: t["model"].update(dropout=0.5), "dropout"),
    "suffix": (lambda t: t["model"].update(end_of_word_suffix="x" * 10**6), "end_of_word_suffix"),
    "id": (lambda t: t["model"]["vocab"].update(z=2**32 - 1), "has the id 4294967295"),
    "negative id": (lambda t: t["model"]["vocab"].update(z=-1), "has the id -1"),
    "empty vocabulary": (lambda t: t["model"].update(vocab={}), "expected 1 to"),
    "merges": (lambda t: t["model"].update(merges=[["a"]]), "expected pairs"),
    "foreign merge": (lambda t: t["model"].update(merges=[["龘", "龘"]]), "龘"),
    "empty added token": (
        lambda t: t["added_tokens"].append({"content": "", "id": 5}),
        "added_tokens: '' is no token",
    ),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_file_that_would_exhaust_memory_or_time_is_rejected(kind: str, tmp_path: Path) -> None:
    change, message = BOMBS[kind]
    changed = tree()
    change(changed)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        tokenizers.load_tokenizer(path)
    assert str(caught.value).startswith(f"{path}: not a tokenizer (")


def test_file_of_more_than_the_largest_vocabulary_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as stream:
        stream.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(ValueError, match="at most 67108864 are read"):
        tokenizers.load_tokenizer(path)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{", "{}", '{"model": 3}', "\ufeff{}"])
def test_file_without_a_model_is_rejected(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="not a tokenizer"):
        tokenizers.load_tokenizer(path)


def test_padding_of_another_library_s_tokenizer_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tree() | {"padding": PADDING}), encoding="utf-8")
    converted = parse_tokenizer(json.loads(convert_tokenizer(path)))
    assert len(converted.encode("红色").ids) == 6  # the bytes of both characters


def test_pattern_bomb_is_not_converted(tmp_path: Path) -> None:
    changed = tree()
    changed["normalizer"] = replace({"Regex": "(a|a)*b"}, "")
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(ValueError, match="repeats an ambiguous group"):
        convert_tokenizer(path)


def test_largest_id_covers_added_tokens() -> None:
    changed = tree()
    assert largest_token_id(parse_tokenizer(changed)) < 400
    changed["model"]["vocab"]["z9"] = 5000
    assert largest_token_id(parse_tokenizer(changed)) == 5000


#: Patterns of GPT-2, GPT-4, Qwen 2, o200k and CLIP, and one that groups digits by threes.
KNOWN_PATTERNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
)
COSTLY_PATTERNS = (
    "(a+)+b", "(a|a)*b", "((a+))*", "(a?){50}", "(a{1,2})+", "a{2,}{2,}", "(a+)?*", "(?:x*y?)*z",
    "a{9999}", "a{1,3}+",
)  # fmt: skip


@pytest.mark.parametrize("pattern", KNOWN_PATTERNS)
def test_patterns_of_known_tokenizers_are_accepted(pattern: str) -> None:
    check_pattern("pattern", pattern)


@pytest.mark.parametrize("pattern", COSTLY_PATTERNS)
def test_patterns_of_exponential_cost_are_rejected(pattern: str) -> None:
    with pytest.raises(ValueError, match="repeats"):
        check_pattern("pattern", pattern)


def test_tokenizer_that_fails_for_a_text_is_an_error_of_that_text() -> None:
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match=r"cannot be tokenized \(.*Missing"):
        text.encode_texts(Tokenizer(models.WordLevel({"a": 0}, unk_token="z")), ["b"], 9)
    with pytest.raises(ValueError, match=r"a lone surrogate \(.ud83d\)"):
        text.encode_texts(parse_tokenizer(tree()), ["好", "\ud83d"], 9)
