"""A pattern of a tokenizer costs at most the limit of a request, with any syntax and any text."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.data.tokenizer import guarded_loader
from pipelines.data.tokenizer.guarded_loader import (
    BoundedTokenizer,
    largest_token_id,
    parse_tokenizer,
)
from pipelines.data.tokenizer.training import train_tokenizer
from pipelines.data.transforms import decoder_process
from pipelines.data.transforms.text import encode_texts

#: Patterns that the check of their syntax accepts, and texts that take them minutes. The library
#: itself ends a match after ten million steps, but not a search with a match at each character.
COSTLY = {
    r"\p{L}{1,4096}\p{L}{1,4096}\d": "a" * 4000,
    r"\p{L}+\p{L}+\p{L}+\d": ("é" * 380 + " ") * 50,
    "(?x)(a+ # ( \n)+b": ("a" * 22 + " ") * 800,
    "(?x:(a+#(\n)+)b": ("a" * 22 + " ") * 800,
    r"(?:a+a+a+|b)(?=c)": ("a" * 380 + " ") * 50,
}


@pytest.fixture(scope="module")
def text() -> str:
    return train_tokenizer(["readFile 红色 red"], [], size=300)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A pool that the test ends, and short limits: an honest text takes microseconds."""
    pool = decoder_process.DecoderPool()
    monkeypatch.setattr(decoder_process, "_shared", pool)
    monkeypatch.setattr(decoder_process, "GRACE_S", 0.2)
    monkeypatch.setattr(guarded_loader, "SECONDS", 20.0)
    yield
    pool.close()


def with_pattern(text: str, part: str, pattern: str) -> dict[str, Any]:
    tree = json.loads(text)
    tree[part] = {
        "pre_tokenizer": {"type": "Split", "behavior": "Isolated", "invert": False},
        "normalizer": {"type": "Replace", "content": " "},
    }[part] | {"pattern": {"Regex": pattern}}
    return tree


@pytest.mark.usefixtures("children")
@pytest.mark.parametrize("pattern", COSTLY)
def test_a_costly_pattern_is_an_error_of_its_text(text, pattern, monkeypatch):
    part = "normalizer" if "#" in pattern else "pre_tokenizer"
    made = parse_tokenizer(with_pattern(text, part, pattern))
    (honest,) = encode_texts(made, ["红 read 1"], 9).to_pylist()
    monkeypatch.setattr(guarded_loader, "SECONDS", 0.5)
    with pytest.raises(
        ValueError, match=r"cannot be tokenized: its tokenizer took longer than 0\.5 s"
    ):
        encode_texts(made, ["red", COSTLY[pattern]], 9)
    monkeypatch.setattr(guarded_loader, "SECONDS", 20.0)
    assert encode_texts(made, ["红 read 1"], 9).to_pylist() == [honest]


@pytest.mark.usefixtures("children")
def test_ids_are_those_of_the_library(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenizers import Tokenizer

    tree = with_pattern(text, "pre_tokenizer", r"\p{L}+|\d")
    made, own = parse_tokenizer(tree), Tokenizer.from_str(json.dumps(tree))
    assert isinstance(made, BoundedTokenizer)
    monkeypatch.setattr(guarded_loader, "REQUEST_CHARACTERS", 20)
    texts = ["readFile 12", "红色 🎉", "", "a" * 50, "\n"]
    expected = encode_texts(own, texts, 12)
    assert encode_texts(made, texts, 12).equals(expected)
    assert encode_texts(copy.deepcopy(made), texts, 12).equals(expected)
    assert largest_token_id(made) == largest_token_id(own)
    assert made.get_vocab_size() == own.get_vocab_size()
    assert made.token_to_id("[UNK]") == own.token_to_id("[UNK]")


@pytest.mark.usefixtures("children")
def test_a_pattern_that_the_library_rejects_is_an_error_when_the_tokenizer_is_read(text):
    with pytest.raises(ValueError, match=r"[Rr]egex|group|parenthesis"):
        parse_tokenizer(with_pattern(text, "pre_tokenizer", "(a"))
