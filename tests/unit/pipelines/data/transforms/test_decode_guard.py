"""A decoder that fails, is too slow or has ended workers costs only its own row.

A file that hangs its decoder or takes all memory costs itself, not the process that asks.
"""

import ast
import io
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.data.io.source_file import SourceReadError
from pipelines.data.modalities import code as code_files
from pipelines.data.transforms import decode_guard, image
from pipelines.data.transforms.decode_guard import (
    CRASHES_WORKER,
    TOO_LARGE,
    DecodeAttempts,
    WorkBudget,
    decode_each,
)
from pipelines.data.transforms.decoder_process import (
    DecoderEndedError,
    DecoderPool,
    decode_media,
    find_decoder,
)
from skillnet.modality import find_modality
from skillnet_platform.storage.retry import StoreUnavailableError
from tests.helpers.hostile_corpora import SLOW_SVG, picture
from tests.helpers.processes import run_python
from tests.helpers.waiting import wait_until


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
    found = list(decode_each([1, 0, 2, None], lambda value: 2 // value))
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
    run = [run_python("-c", CRASH, name) for _ in range(3)]
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


@pytest.fixture
def pool() -> Iterator[DecoderPool]:
    made = DecoderPool()
    yield made
    made.close()


def test_result_equals_that_of_the_decoder() -> None:
    data = picture("PNG")
    found = decode_media("image", data, 32, "crop")
    assert np.array_equal(found, image.load_pixels(data, 32, "crop"))
    found[0] = 0  # a copy of its own
    (function,) = decode_media("code", "def f(x):\n    return '红'\n".encode())
    assert (function["name"], function["line"]) == ("f", 1)


def test_reasons_of_bad_files_are_those_of_the_decoder() -> None:
    for kind, data in (("image", b"x"), ("sound", b"x"), ("video", b"x"), ("code", b"def")):
        with pytest.raises(ValueError) as own:  # noqa: PT011
            find_decoder(kind)(data)
        with pytest.raises(ValueError) as others:  # noqa: PT011
            decode_media(kind, data)
        assert str(others.value) == str(own.value)


def hang_renderer(pool: DecoderPool) -> None:
    for seconds in (0.5, 4.0, 32.0):
        try:
            pool.decode("image", SLOW_SVG, (64,), seconds)
        except DecoderEndedError:
            raise
        except ValueError:
            # On a busy machine the time of the child is over before its renderer begins.
            continue


def test_filter_that_hangs_the_renderer_ends_only_the_child(pool: DecoderPool) -> None:
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(0.02):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    pool.decode("image", picture("PNG"), (32,), 60.0)  # a child has started
    begin = time.monotonic()
    with pytest.raises(DecoderEndedError, match=r"longer than [\d.]+ s"):
        hang_renderer(pool)
    stop.set()
    thread.join()
    # Other threads were not stopped: the renderer held the lock of the child only.
    assert len([each for each in ticks if each > begin]) > 2
    assert pool.decode("image", picture("PNG"), (32,), 60.0).shape == (32, 32, 3)


def test_child_that_ended_while_idle_is_replaced(pool: DecoderPool) -> None:
    first = pool.decode("image", picture("PNG"), (32,), 60.0)
    child = pool._idle.queue[0]
    child._process.kill()
    child._process.wait()
    assert np.array_equal(pool.decode("image", picture("PNG"), (32,), 60.0), first)


def test_file_that_needs_too_much_memory_is_rejected() -> None:
    target = io.BytesIO()
    Image.new("RGB", (7000, 7000)).save(target, "PNG")
    small = DecoderPool(memory=96 * 2**20)
    with pytest.raises(ValueError, match="memory"):
        small.decode("image", target.getvalue(), (64,), 60.0)
    small.close()


def test_threads_get_their_own_results() -> None:
    pictures = [picture("PNG", (40 + number, 40)) for number in range(24)]
    with ThreadPoolExecutor(24) as threads:
        found = list(threads.map(lambda data: decode_media("image", data, 16), pictures))
    for data, pixels in zip(pictures, found, strict=True):
        assert np.array_equal(pixels, image.load_pixels(data, 16))


def test_a_budget_shortens_the_time_of_a_file(pool: DecoderPool) -> None:
    pool.decode("image", picture("PNG"), (32,), 60.0)  # a child has started
    with pytest.raises(DecoderEndedError, match=r"longer than 0\.\d+ s"):
        pool.decode("image", SLOW_SVG, (64,), 60.0, WorkBudget(0.3))
    with pytest.raises(ValueError, match="time of the request is over"):
        pool.decode("image", picture("PNG"), (32,), 60.0, WorkBudget(0.0))


def test_work_that_is_stopped_ends_its_child(pool: DecoderPool) -> None:
    pool.decode("image", picture("PNG"), (32,), 60.0)
    budget = WorkBudget(600.0)
    (child,) = pool._idle.queue
    with ThreadPoolExecutor(1) as threads:
        found = threads.submit(pool.decode, "image", SLOW_SVG, (64,), 600.0, budget)
        wait_until(lambda: not pool._idle.qsize(), 60)
        budget.part(0.5).stop()
        with pytest.raises(DecoderEndedError):
            found.result(timeout=60)
    assert child._process.poll() is not None


def test_nested_functions_do_not_multiply_without_end() -> None:
    body = "x = '" + "a" * 4_000_000 + "'"
    source = "".join(f"{' ' * depth}def f{depth}():\n" for depth in range(40)) + " " * 40 + body
    with pytest.raises(ValueError, match="larger than 64 MiB together"):
        decode_media("code", source.encode())
