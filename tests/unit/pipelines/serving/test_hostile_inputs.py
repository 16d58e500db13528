"""Inputs that never end, block or are huge cost one row and little time."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from pipelines.data.tokenizer.training import train_tokenizer
from pipelines.data.transforms.text import encode_captions, encode_texts
from pipelines.serving.inputs import MAX_FILE_BYTES, read_input_item, read_input_rows
from skillnet_platform.errors import UserError

#: 30 MB of text, one word or many.
HUGE = {"one word": "x" * 30_000_000, "many words": "一个 red heart " * 2_500_000}


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe.txt")
    return tmp_path / "pipe.txt"


def rows_of(tmp_path: Path, *files: str) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "a heart"}, *({"file": file} for file in files)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_rows_that_name_a_pipe_or_a_device_are_rejected(tmp_path: Path, pipe: Path) -> None:
    files = (pipe.name, "/dev/zero", "/dev/tty")
    first, *others = read_input_rows(rows_of(tmp_path, *files), None)
    assert not first.reason
    for row in others:
        assert "a pipe, device or socket; expected a regular file" in row.reason


def test_a_file_that_grows_without_end_is_read_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    with path.open("wb") as stream:
        stream.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(UserError, match=r"large\.png: larger than"):
        read_input_item(path)


def test_the_rows_of_a_prediction_may_come_through_a_pipe(pipe: Path) -> None:
    """``--input /dev/stdin`` and process substitution name a pipe on purpose."""
    writer = threading.Thread(target=pipe.write_text, args=[json.dumps({"text": "a heart"})])
    writer.start()
    (row,) = read_input_rows(pipe, None)
    writer.join()
    assert row.item.text == "a heart"


def test_endless_input_is_rejected_by_its_kind() -> None:
    with pytest.raises(UserError, match="/dev/zero: a device or socket"):
        read_input_rows(Path("/dev/zero"), None)


@pytest.mark.parametrize("kind", HUGE)
def test_a_text_of_30_mb_is_cut_before_it_is_tokenized(kind: str) -> None:
    from tokenizers import Tokenizer

    texts = [*(f"the red heart number {n} of a 大 tree" for n in range(50)), "一个"] * 4
    tokenizer = Tokenizer.from_str(train_tokenizer(texts, [], [], 400))
    begin = time.process_time()
    tokens = encode_texts(tokenizer, [HUGE[kind]], 64)[0].as_py()
    assert encode_captions(tokenizer, [[HUGE[kind]]], 64)[0].as_py() == [tokens]
    assert time.process_time() - begin < 2
    assert tokens == encode_texts(tokenizer, [HUGE[kind][:15_000]], 64)[0].as_py()
    assert len(tokens) == 64
