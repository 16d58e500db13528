"""A decoder that fails, is too slow or has ended workers costs only its own row."""

import ast
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.data.io.source_file import SourceReadError
from pipelines.data.modalities import code as code_files
from pipelines.data.transforms import decode_guard
from pipelines.data.transforms.decode_guard import (
    CRASHES_WORKER,
    TOO_LARGE,
    DecodeAttempts,
    decode_each,
)
from skillnet.modality import find_modality
from skillnet_platform.storage.retry import StoreUnavailableError


def refuse(value: int) -> int:
    if value == 1:
        raise ValueError("a damaged one")
    if value == 2:
        raise MemoryError
    if value == 3:
        while True:
            time.sleep(0.01)
    return value


def test_each_row_gets_its_result_or_its_reason() -> None:
    found = list(decode_each(range(5), refuse, seconds=0.2))
    assert found == [
        (0, None),
        (None, "a damaged one"),
        (None, TOO_LARGE),
        (None, "longer than 0.2 s"),
        (4, None),
    ]


def test_unexpected_decoder_error_rejects_one_row_with_its_type() -> None:
    found = list(decode_each([1, 0, 2, None], lambda value: 2 // value))  # type: ignore[operator]
    assert found == [
        (2, None),
        (None, "the decoder failed (ZeroDivisionError)"),
        (1, None),
        (None, "the decoder failed (TypeError)"),
    ]


@pytest.mark.parametrize(
    "problem", [SourceReadError("a disk fails"), StoreUnavailableError("away")]
)
@pytest.mark.parametrize("within", [True, False])
def test_store_failure_is_not_a_bad_row(problem: Exception, within: bool) -> None:
    def fail(value: int) -> int:
        raise problem

    with pytest.raises(type(problem)):
        list(decode_each([0], fail) if within else decode_each(map(fail, [0]), int))


def test_signal_handlers_and_timers_are_restored() -> None:
    before = signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGPROF)
    list(decode_each(range(3), refuse, seconds=0.2))
    assert before == (signal.getsignal(signal.SIGALRM), signal.getsignal(signal.SIGPROF))
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)


def test_decoding_works_in_a_thread_without_signals() -> None:
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.extend(decode_each(range(2), refuse)))
    thread.start()
    thread.join()
    assert found == [(0, None), (None, "a damaged one")]


CRASH = """
import os, sys
from pipelines.data.transforms.decode_guard import decode_each, watch_block
def read(value):
    if value == 3:
        os._exit(9)
    return value
with watch_block("test-" + sys.argv[1], "train-00000"):
    print(list(decode_each(range(5), read)))
"""


def test_row_that_ended_two_processes_is_skipped(tmp_path: Path) -> None:
    name = tmp_path.name
    run = [subprocess.run([sys.executable, "-c", CRASH, name], capture_output=True, text=True,
                          check=False) for _ in range(3)]  # fmt: skip
    assert [done.returncode for done in run] == [9, 9, 0], run[-1].stderr
    assert ast.literal_eval(run[-1].stdout) == [
        (0, None),
        (1, None),
        (2, None),
        (None, CRASHES_WORKER),
        (4, None),
    ]
    assert list(decode_guard.attempts_dir(f"test-{name}").iterdir()) == []  # the block is done
    decode_guard.remove_attempts(f"test-{name}")
    assert not decode_guard.attempts_dir(f"test-{name}").exists()


def test_worker_that_ends_between_rows_blames_no_row() -> None:
    first = DecodeAttempts("between", "block")
    assert not first.must_skip_next()
    first.end_row()
    second = DecodeAttempts("between", "block")
    assert not second.must_skip_next()
    assert second._crashes == {}
    second.close()
    decode_guard.remove_attempts("between")


def test_code_that_cannot_be_read_rejects_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def strip(source: str) -> str:
        if source == "deep":
            raise RecursionError
        return source

    monkeypatch.setattr(code_files.code, "remove_docstring", strip)
    monkeypatch.setattr(
        code_files.text, "encode_texts", lambda tokenizer, texts, longest: pa.array(texts)
    )
    block = pa.table({"code": ["a = 1", "deep", " ", "b = 2"]})
    half = find_modality("code").file_half
    made = half.build_columns(block, None, code_files.CodeOptions(), 0)
    assert made["code"].to_pylist() == ["a = 1", "", "", "b = 2"]
    assert made["rejected"].to_pylist() == [
        None,
        "the decoder failed (RecursionError)",
        "no code beside the docstring",
        None,
    ]
