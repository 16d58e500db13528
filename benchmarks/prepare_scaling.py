"""How preparing grows with CPUs, and how many CPUs the one task that reads a corpus can feed.

``skillnet prepare`` on an embedded Ray of one CPU, of two, of four, as far as the machine goes: the
same files, in turns, each a process of its own with its Ray. What a row costs is the difference
of a pass over few rows and one over many, as in ``prepare_speed``. Beside it as many processes that
decode and keep nothing: cores that share caches or memory do less than their number says.

The reading task alone: its rows are read, checked, cut into blocks and packed as in a prepare, and
nothing transforms them. What a CPU needs for a row by what the reading task needs for it is the
number of CPUs that one such task keeps busy.
"""

import gzip
import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import process_time

from benchmarks import reader_memory
from benchmarks.measure import Result, ratio, side, spread
from benchmarks.media_corpus import files
from benchmarks.prepare_speed import FILES, PAGES, Work, beyond, engine, loop, passes
from benchmarks.reader_memory import MediaMaker

CLOCK = "wall of the rows of a prepare, cpu of a reading task"
KINDS = ("image", "sound")
#: Rows of a pass over few and of one over many, in shards that are small, so that both are short.
FEW, MANY, SHARD_ROWS = 128, 768, 64
MOST_ROUNDS = 5
#: Rows of a corpus that is only read; of tars, which hold what they refer to.
READ_ROWS, TAR_ROWS = 20_000, 1_000


def run(rounds: int, threads: int) -> list[Result]:
    """Throughput by CPUs, and what reading costs beside it."""
    rounds = min(rounds, MOST_ROUNDS)
    every = len(os.sched_getaffinity(0))
    steps = [cpus for cpus in (1, 2, 4, 8, 16, 32, 64) if cpus <= every]
    results = []
    per_row = {}
    for kind in KINDS:
        found, per_row[kind] = _growth(kind, steps, rounds)
        results += found
    return [*results, *_reading(per_row["image"], rounds)]


def _growth(kind: str, steps: list[int], rounds: int) -> tuple[list[Result], float]:
    """Ratios of throughput, and seconds of CPU of a row."""
    paths = files(kind, FILES[kind])
    makers = {"prepare": engine, "bare decoding": loop}
    with ExitStack() as stack:
        sides = {
            (name, cpus): stack.enter_context(
                side(maker, Work(kind, paths, cpus, SHARD_ROWS), without=PAGES)
            )
            for name, maker in makers.items()
            for cpus in steps
        }
        for one in sides.values():
            one(FEW)  # starts its Ray, or its pool
        few, many = passes(sides, rounds, FEW, MANY)
    wall = {each: beyond(few[each], many[each], "wall") for each in sides}
    setting = f"{MANY - FEW} rows beyond the first {FEW}, shards of {SHARD_ROWS}"
    results = [
        Result(f"{name}, {kind}, {cpus} CPUs", "1 CPU", "times as fast",
               *ratio(wall[name, 1], wall[name, cpus]), "", rounds, setting,
               "" if name == "prepare" else "processes that decode and keep nothing: the machine's")
        for name in makers
        for cpus in steps[1:]
    ]  # fmt: skip
    alone = ("prepare", 1)
    cost = spread([s / (MANY - FEW) for s in beyond(few[alone], many[alone], "cpu")])
    results.append(
        Result(f"prepare, {kind}, 1 CPU", "", "s/row", *cost, "", rounds, setting, "cpu time")
    )
    return results, cost.median


def _reading(per_row: float, rounds: int) -> list[Result]:
    """What a row costs the reading task, in each layout."""
    results = []
    pictures = files("image", FILES["image"])

    def link_picture(path: Path, number: int) -> None:
        path.hardlink_to(pictures[number % len(pictures)])

    for name, (write, rows) in LAYOUTS.items():
        with tempfile.TemporaryDirectory(dir=pictures[0].parent) as folder:
            write(Path(folder) / "corpus", rows, link_picture)
            seconds = [_read(name, Path(folder), rows) / rows for _ in range(rounds + 1)][1:]
        setting = f"{rows} rows on a disk, read once before"
        results += [
            Result(f"reading rows, {name}", "", "s/row", *spread(seconds), "", rounds, setting,
                   "cpu time"),
            Result(f"CPUs that reading {name} feeds", "", "CPUs",
                   *spread([per_row / each for each in seconds]), "", rounds, setting,
                   "cpu time of a picture's row in prepare by that of reading a row"),
        ]  # fmt: skip
    return results


def _read(reader: str, folder: Path, rows: int) -> float:
    """Seconds of CPU that the reading task takes for a corpus, beyond finding it."""
    from pipelines.data.corpora import open_external_corpus
    from pipelines.data.corpora.base import SourceArchives
    from pipelines.data.preprocessing.jobs import CorpusJob, read_units

    corpus = open_external_corpus("read", f"{reader}:{folder / 'corpus'}")
    job = CorpusJob(corpus, SourceArchives(folder, ()), folder, staging_dir=folder)
    begin = process_time()
    last = None
    for unit in read_units(0, job):
        last = unit
    took = process_time() - begin
    assert last is not None
    reported = json.loads(last["raw"][0].as_py())
    assert sum(reported["split_rows"].values()) == rows, reported
    return took


def _write_folder(folder: Path, rows: int, make: MediaMaker) -> None:
    """Captions in metadata.jsonl, and as many names of pictures as rows."""
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(rows):
            name = f"{number:08d}.jpg"
            make(folder / name, number)
            stream.write(json.dumps({"file_name": name, "text": f"第{number}张图"}) + "\n")


def _write_codesearchnet(folder: Path, rows: int, make: MediaMaker) -> None:
    """A compressed file of functions, without media."""
    home = folder / "python" / "final" / "jsonl" / "train"
    home.mkdir(parents=True)
    source, said = inspect.getsource(shutil.move), inspect.getdoc(shutil.move)
    row = {"func_name": "move", "language": "python", "original_string": source, "code": source,
           "code_tokens": source.split(), "docstring": said}  # fmt: skip
    with gzip.open(home / "python_train_0.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for _ in range(rows))


LAYOUTS: dict[str, tuple[Callable[[Path, int, MediaMaker], None], int]] = {
    "folder": (_write_folder, READ_ROWS),
    "aic_icc": (reader_memory.aic_icc, READ_ROWS),
    "vatex": (reader_memory.vatex, READ_ROWS),
    "aishell1": (reader_memory.aishell1, READ_ROWS),
    "codesearchnet": (_write_codesearchnet, READ_ROWS),
    "webdataset": (reader_memory.webdataset, TAR_ROWS),
}
