"""Converted tokenizers: all kinds, no unknown tokens, and the model's four fixed ids."""

import json
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pipelines.data.tokenizer import training as tokenizers
from pipelines.data.tokenizer.selection import BYTE_TOKENS, convert_tokenizer
from pipelines.data.transforms import text
from skillnet_platform.errors import UserError

TEXTS = ["红色的心和蓝色的圆圈", "The reader reads the file", "def read_file(file):"] * 5
#: Rare characters, one of extension B, one of the compatibility block, emoji with a joiner.
STRANGE = ["龘靐齉", "\U00020000\U0002a6d6", "\uf900", "👩‍👩‍👧", "é Ω ≈", "\x00a"]


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # BERT's own order: padding, then others, the rest far behind.
    special = ["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(TEXTS, trainers.WordPieceTrainer(special_tokens=special))
    return made


def byte_level() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


KINDS = {"WordPiece": word_piece, "byte-level BPE": byte_level, "Unigram": unigram}


@pytest.fixture(params=KINDS)
def adopted(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tokenizer, Tokenizer]:
    """Return the original and the converted tokenizer."""
    before = KINDS[request.param]()
    before.save(str(tmp_path / "tokenizer.json"))
    return before, Tokenizer.from_str(convert_tokenizer(tmp_path))


def test_special_tokens_and_bytes_come_first(adopted: tuple[Tokenizer, Tokenizer]) -> None:
    _, made = adopted
    names = [*tokenizers.SPECIAL, *BYTE_TOKENS]
    assert [made.token_to_id(name) for name in names] == list(range(260))
    assert sorted(made.get_vocab().values()) == list(range(made.get_vocab_size()))


def test_known_texts_are_tokenized_as_before(adopted: tuple[Tokenizer, Tokenizer]) -> None:
    before, made = adopted
    for each in TEXTS[:3]:
        assert made.encode(each).tokens == before.encode(each).tokens
        assert min(made.encode(each).ids) >= 260


@pytest.mark.parametrize("strange", STRANGE)
def test_nothing_is_unknown_and_different_characters_stay_different(adopted, strange):
    _, made = adopted
    ids, other = text.encode_texts(made, [strange, strange[:-1] + "齾"], 64).to_pylist()
    assert ids
    assert tokenizers.UNKNOWN not in ids
    assert ids != other


def test_directory_of_transformers_is_converted(tmp_path: Path) -> None:
    from transformers import BertTokenizer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "红", "色", "read", "##er"]
    BertTokenizer(vocab={token: n for n, token in enumerate(vocabulary)}).save_pretrained(tmp_path)
    made = Tokenizer.from_str(convert_tokenizer(tmp_path))
    assert made.encode("红色reader").tokens == ["红", "色", "read", "##er"]
    (row,) = text.encode_texts(made, ["红龘"], 9).to_pylist()
    assert row == [made.token_to_id("红"), *(4 + byte for byte in "龘".encode())]


def test_own_tokenizer_is_not_changed(tmp_path: Path) -> None:
    ours = tokenizers.train_tokenizer(TEXTS, [], size=500)
    (tmp_path / "ours.json").write_text(ours, encoding="utf-8")
    assert convert_tokenizer(tmp_path / "ours.json") == ours


def test_trained_tokenizer_encodes_all_kinds_of_chinese_characters() -> None:
    learnt = Tokenizer.from_str(tokenizers.train_tokenizer(TEXTS, [], size=500))
    rows = text.encode_texts(learnt, STRANGE, 64).to_pylist()
    assert all(row and tokenizers.UNKNOWN not in row for row in rows)
    assert len({tuple(row) for row in rows}) == len(STRANGE)


def test_small_vocabulary_keeps_the_most_frequent_characters() -> None:
    many = "".join(chr(0x4E00 + n) for n in range(2000))
    learnt = json.loads(tokenizers.train_tokenizer([many, "的" * 50], [], size=1000))["model"][
        "vocab"
    ]
    assert len(learnt) <= 1000
    assert "的" in learnt


@pytest.mark.parametrize("file", ["vocab.txt", "spiece.model", "tokenizer_config.json"])
def test_a_directory_without_tokenizer_json_reaches_no_library(tmp_path, monkeypatch, file):
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / file).write_text('{"tokenizer_class": "BertTokenizer", "vocab": "x"}')
    with pytest.raises(UserError, match=r"it has no tokenizer\.json"):
        convert_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none", None, "no tokenizer there"),
        ("bad.json", "{}", "not a tokenizer"),
        ("folder/x.txt", "x", r"folder: it has no tokenizer\.json; .*save_pretrained"),
    ],
)
def test_invalid_tokenizer_is_reported(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        convert_tokenizer(path.parent if "folder" in name else path)
