"""What reading ahead is worth: files that are not in memory, and objects of a store that is far.

*Files.* ``prepare_speed`` reads files that the kernel has in its cache. Those of a corpus larger
than memory are not there: before each pass the kernel is made to forget the files, each of which is
read once. ``skillnet prepare`` tells the kernel which file it wants next; ``datasets.map`` and the
bare loop ask and wait. The disk is this machine's own, and others may use it too.

*Objects.* Of a file system that **simulates** a store: it answers from memory, ``LATENCY_S`` after
it is asked. One process reads and decodes pictures from it, with and without reading ahead.
"""

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fsspec.implementations.memory import MemoryFileSystem

from benchmarks.measure import Result, Took, in_turns, ratio, side
from benchmarks.media_corpus import decode, files
from benchmarks.prepare_speed import PAGES, Work, beyond, corpus_of, engine, loop, map_of

CLOCK = "wall"
KINDS = ("image", "video")
#: Shards for each process of a pass over few rows and of one over many.
FEW, MANY = 1, 3
MOST_ROUNDS = 3
#: Seconds that an object store takes to answer a request: 30 ms is usual within a region.
LATENCY_S = 0.03
OBJECTS = 128


def run(rounds: int, threads: int) -> list[Result]:
    """Ratios, for each kind of media."""
    rounds = min(rounds, MOST_ROUNDS)
    results = []
    for kind in KINDS:
        results += _files(kind, rounds)
    return [*results, _objects(rounds)]


def _files(kind: str, rounds: int) -> list[Result]:
    processes = len(os.sched_getaffinity(0))
    shard_rows = corpus_of(kind, files(kind, 1)).shard_rows
    rows = FEW * processes * shard_rows, MANY * processes * shard_rows
    paths = files(kind, sum(rows))
    few_paths, many_paths = paths[: rows[0]], paths[rows[0] :]
    contenders = {"engine": engine, "map": map_of, "loop": loop}
    few: dict[str, list[Took]] = {name: [] for name in contenders}
    many: dict[str, list[Took]] = {name: [] for name in contenders}
    with ExitStack() as stack:
        sides = {
            (name, size): stack.enter_context(
                side(maker, Work(kind, some, processes, shard_rows), without=PAGES)
            )
            for name, maker in contenders.items()
            for size, some in (("few", few_paths), ("many", many_paths))
        }
        for one in sides.values():
            one(processes)  # starts its Ray
        for number in range(rounds):
            for name in contenders if number % 2 == 0 else reversed(list(contenders)):
                forget(few_paths)
                few[name].append(sides[name, "few"](rows[0]))
                forget(many_paths)
                many[name].append(sides[name, "many"](rows[1]))
    size = sum(path.stat().st_size for path in paths) / len(paths) / 1e6
    setting = (
        f"{rows[1] - rows[0]} rows beyond the first {rows[0]}, files of {size:.2f} MB that are not "
        f"in memory, shards of {shard_rows}, {processes} processes"
    )
    more = {name: beyond(few[name], many[name], "wall") for name in contenders}
    return [
        Result(f"prepare, {kind}, from the disk", reported, "times as fast",
               *ratio(more[name], more["engine"]), "", rounds, setting)
        for name, reported in (("map", "datasets.map"), ("loop", "bare decoding"))
    ]  # fmt: skip


def forget(paths: list[Path]) -> None:
    """Have the kernel drop files from its cache."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


class Far(MemoryFileSystem):
    """A store that is far: each request takes a while."""

    protocol = "far"
    store: dict[str, Any] = {}  # noqa: RUF012 - fsspec's own way
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("far://").lstrip("/")

    def info(self, path: str, **more: Any) -> dict[str, Any]:
        """After a while."""
        time.sleep(LATENCY_S)
        return dict(super().info(path, **more))

    def cat_file(self, path: str, *args: Any, **more: Any) -> bytes:
        """After a while."""
        time.sleep(LATENCY_S)
        return bytes(super().cat_file(path, *args, **more))


def _objects(rounds: int) -> Result:
    import fsspec

    from pipelines.data.io.media import MediaRef, read_media

    fsspec.register_implementation("far", Far, clobber=True)
    system = fsspec.filesystem("far")
    for number, path in enumerate(files("image", OBJECTS)):
        MemoryFileSystem.pipe_file(system, f"/{number}.jpg", path.read_bytes())
    references = [MediaRef(f"far://{number}.jpg").row() for number in range(OBJECTS)]

    def one_by_one() -> Iterator[Any]:
        for reference in references:
            yield from read_media([reference])

    def ahead() -> Iterator[Any]:
        yield from read_media(references)

    runs = {
        name: lambda source=source: [decode("image", data) for data in source()]
        for name, source in (("one", one_by_one), ("ahead", ahead))
    }
    seconds = in_turns(runs, rounds, time.perf_counter, warmup=1)
    one, many = (statistics.median(seconds[name]) / OBJECTS * 1e3 for name in runs)
    found = ratio(seconds["one"], seconds["ahead"])
    far = f"a simulated store that answers after {LATENCY_S * 1e3:.0f} ms"
    setting = f"{OBJECTS} pictures, {far}, one process"
    note = f"{one:.0f} ms a picture one by one, {many:.0f} ahead"
    return Result("pictures out of a store, read ahead", "one by one", "times as fast", *found, "",
                  rounds, setting, note)  # fmt: skip
