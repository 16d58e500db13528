"""Words that are encoded apart give the ids of the whole text."""

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, normalizers

from pipelines.data.tokenizer import training
from pipelines.data.transforms import text
from pipelines.data.transforms.own_words import find_word_pattern

#: Characters that Unicode composes, reorders, decomposes or divides, and parts of added tokens.
HOSTILE = [
    *"aAbBzZ09_-.,!?'\"()[]{}<>:;/\\ \n\t\r\x0b\x1c\x85\u00a0\u3000\u2028\0",
    *"好的红龘齾横折钩\u3400\u4db5\u4db6\u4dbf\u4e00\u9fcc\u9fcd\u9fff\u3007\u2e80\uf900\ufa0e",
    *"\U00020000\U0002f800ΣσςİßéＡ１，：①Ⅳ가ำ\ufb01\ufdfa\u00a8\u200b\u200d\ufeff\U0001f600",
    *"\u0301\u0308\u0327\u0340\u3099\u1100\u1161\u11a8\ufe00\U000e0100",
    *("e\u0301", "か\u3099", "[UNK]", "[MASK]", "<0x41>", "横折钩", "read file", "HTTPServer"),
]
TERMS: list[list[str]] = [[], ["横折钩", "横 折", "read file", "ＡＢ", "é折"], ["\n好"]]


def make_texts(seed: int) -> list[str]:
    choose = random.Random(seed)  # noqa: S311
    return ["".join(choose.choices(HOSTILE, k=choose.randint(0, 40))) for _ in range(1_500)]


def make_own(terms: list[str]) -> Any:
    texts = make_texts(0)
    return Tokenizer.from_str(training.train_tokenizer(texts, make_texts(1), terms, size=700))


@pytest.mark.parametrize("terms", TERMS)
def test_words_apart_give_the_ids_of_the_whole_text(terms: list[str]) -> None:
    own, texts = make_own(terms), make_texts(2)
    expected = [ids[:24] for ids in text._list_all_ids(own, texts)]
    assert find_word_pattern(own) is not None
    assert text.list_ids(own, texts, 24) == expected
    assert [text.list_ids(own, [each], 24)[0] for each in texts[:300]] == expected[:300]


def test_equal_words_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    own, encoded = make_own([]), list[str]()
    encode = text._list_all_ids

    def record(tokenizer: Any, texts: Any) -> list[list[int]]:
        encoded.extend(texts)
        return encode(tokenizer, texts)

    monkeypatch.setattr(text, "_list_all_ids", record)
    text.list_ids(own, ["the 红 horse,", "红红 the horse"], 9)
    assert sorted(encoded) == ["horse", "horse,", "the", "红"]


def test_only_the_divisions_of_the_own_tokenizer_are_known() -> None:
    own, other, single = (make_own([]) for _ in range(3))
    other.normalizer = normalizers.NFKC()
    single.add_tokens([AddedToken("red", single_word=True)])
    assert find_word_pattern(own) is not None
    assert find_word_pattern(other) is find_word_pattern(single) is None
    texts = ["好red好", "red"]
    assert text.list_ids(single, texts, 9) == [each.ids for each in single.encode_batch(texts)]
