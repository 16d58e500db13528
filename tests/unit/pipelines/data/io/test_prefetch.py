"""Prefetching: in order, several at once, within its memory, and without leftover threads."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

from pipelines.data.io import media
from pipelines.data.io.media import MediaReadError, MediaRef, OrderedPrefetcher, read_media


def test_results_and_errors_are_returned_in_order() -> None:
    def fetch(number: int, grant: Callable[[int], None]) -> int:
        grant(1)
        if number == 5:
            raise ValueError("five")
        return number * number

    ahead = OrderedPrefetcher(20, fetch, streams=4)
    found: list[object] = []
    for _ in range(20):
        try:
            found.append(ahead.next_result())
        except ValueError as error:
            found.append(str(error))
    ahead.close()
    assert found == [n * n if n != 5 else "five" for n in range(20)]


def test_several_results_are_fetched_at_once() -> None:
    together = threading.Barrier(3)

    def fetch(number: int, grant: Callable[[int], None]) -> int:
        together.wait(timeout=300)  # broken unless three of them meet
        return number

    ahead = OrderedPrefetcher(6, fetch, streams=3)
    assert [ahead.next_result() for _ in range(6)] == list(range(6))
    ahead.close()


def test_waiting_bytes_are_limited() -> None:
    sizes = [3, 4, 4, 9, 30, 4, 4, 4, 2, 8]
    lock, waiting, most = threading.Lock(), 0, 0

    def fetch(number: int, grant: Callable[[int], None]) -> int:
        nonlocal waiting, most
        grant(sizes[number])
        with lock:
            waiting += sizes[number]
            most = max(most, waiting - (sizes[number] if sizes[number] > 10 else 0))
        return number

    ahead = OrderedPrefetcher(len(sizes), fetch, streams=5, held=10)
    for number in range(len(sizes)):
        # What is taken next counts no longer: its successors may come before it is looked at.
        with lock:
            waiting -= sizes[number]
        assert ahead.next_result() == number
    ahead.close()
    # The one whose turn it is needs no room: of those that fit, the largest has 9.
    assert most <= 10 + 9


def test_close_releases_threads_that_wait_for_room() -> None:
    let_go = threading.Event()

    def fetch(number: int, grant: Callable[[int], None]) -> int:
        try:
            grant(10)
        except media.PrefetchClosedError:
            let_go.set()
            raise
        return number

    ahead = OrderedPrefetcher(3, fetch, streams=3, held=10)
    assert ahead.next_result() == 0
    ahead.close()
    assert let_go.wait(timeout=300)


def test_advice_ignores_missing_files_and_pipes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"abc")
    for name in ("pipe", "none", "file", "with\0null"):
        media.advise_kernel(f"{tmp_path}/{name}", 0, None)
    media.advise_kernel(f"{tmp_path}/file", 2**62, 2**62)


def test_files_and_objects_in_one_block_are_read(tmp_path, monkeypatch):
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe_file("/read-ahead/one", b"one")
    store.pipe_file("/read-ahead/both", b"..two..")
    (tmp_path / "three").write_bytes(b"three")
    references = [
        MediaRef("memory://read-ahead/one"),
        MediaRef(f"{tmp_path}/three"),
        MediaRef("memory://read-ahead/none"),
        MediaRef(f"{tmp_path}/none"),
        MediaRef("memory://read-ahead/both", 2, 3),
    ]
    reported: list[str] = []
    monkeypatch.setattr(media, "advise_kernel", lambda path, *_: reported.append(path))
    found = list(read_media([None, *(reference.row() for reference in references)]))
    missing = MediaReadError("the media file is missing")
    assert found == [MediaReadError("no media file"), b"one", b"three", missing, missing, b"two"]
    assert reported == [f"{tmp_path}/three", f"{tmp_path}/none"]
