"""A file that hangs its decoder or takes all memory costs itself, not the process that asks."""

import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from pipelines.data.transforms import image
from pipelines.data.transforms.decode_guard import WorkBudget
from pipelines.data.transforms.decoder_process import (
    DecoderEndedError,
    DecoderPool,
    decode_media,
    find_decoder,
)
from tests.helpers.hostile_corpora import SLOW_SVG, picture
from tests.helpers.waiting import wait_until


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
    with pytest.raises(DecoderEndedError, match=r"longer than 0\.5 s"):
        pool.decode("image", SLOW_SVG, (64,), 0.5)
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
