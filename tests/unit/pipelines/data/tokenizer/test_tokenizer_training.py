"""Training the tokenizer: deterministic, and without unknown tokens."""

import json

import pytest
from tokenizers import Tokenizer

from pipelines.data.tokenizer import training as tokenizers
from pipelines.data.transforms import text

TASK = ["红色的心", "竖、横折、横"]
OTHER = ["def get_stock_data(code):\n    return load_data(code)"] * 9 + ["罕见：" + "常" * 12]


@pytest.fixture(scope="module")
def learnt() -> Tokenizer:
    return Tokenizer.from_str(tokenizers.train_tokenizer(TASK, OTHER, ("横折",), size=500))


def test_training_does_not_depend_on_order_or_run() -> None:
    first = tokenizers.train_tokenizer(TASK, OTHER, ("横折", "横折钩"), size=500)
    assert first == tokenizers.train_tokenizer(
        TASK[::-1], OTHER[::-1], ("横折钩", "横折"), size=500
    )


def test_special_tokens_come_first(learnt: Tokenizer) -> None:
    ids = [learnt.token_to_id(name) for name in ("[PAD]", "[UNK]", "[MASK]", "[CLS]")]
    assert ids == [0, 1, 2, 3]


def test_every_chinese_character_is_a_token_and_terms_are_one(learnt: Tokenizer) -> None:
    assert learnt.encode("红色的心").tokens == ["红", "色", "的", "心"]
    assert learnt.encode("竖、横折、横").tokens == ["竖", "、", "横折", "、", "横"]


def test_identifiers_are_split_and_lower_cased(learnt: Tokenizer) -> None:
    snake, camel = learnt.encode("get_stock_data").tokens, learnt.encode("getStockData").tokens
    assert [t for t in snake if t != "_"] == camel
    assert "stock" in camel
    assert learnt.encode("HTTPServer").ids == learnt.encode("http server").ids


def test_byte_token_names_in_a_text_are_ordinary_text(learnt: Tokenizer) -> None:
    assert learnt.encode("<0x41>").tokens != ["<0x41>"]


def test_rare_characters_of_other_texts_are_encoded_as_bytes(learnt: Tokenizer) -> None:
    vocabulary = learnt.get_vocab()
    assert "常" in vocabulary
    assert "罕" not in vocabulary


def test_the_vocabulary_is_not_larger_than_asked(learnt: Tokenizer) -> None:
    assert learnt.get_vocab_size() <= 500
    assert max(learnt.get_vocab().values()) < 500
    assert json.loads(learnt.to_str())["model"]["byte_fallback"]


def test_tokens_are_truncated_and_captions_keep_their_rows(learnt: Tokenizer) -> None:
    assert text.encode_texts(learnt, ["红" * 9, ""], 4).to_pylist() == [
        [learnt.token_to_id("红")] * 4,
        [],
    ]
    rows = text.encode_captions(learnt, [["红", "心"], [], ["色"]], 8).to_pylist()
    ids = {char: learnt.token_to_id(char) for char in "红心色"}
    assert rows == [[[ids["红"]], [ids["心"]]], [], [[ids["色"]]]]


def test_missing_tokenizer_is_reported(tmp_path) -> None:
    with pytest.raises(ValueError, match="no such tokenizer"):
        tokenizers.load_tokenizer(tmp_path / "tokenizer.json")
