"""Preparing media beside Hugging Face ``datasets.map`` and beside the bare loop that decodes.

All three decode the same files with the same function in as many processes: ``skillnet prepare``
on its embedded Ray (rows watched one by one, shards written, synced and hashed; as many rows in a
shard as it chooses itself), ``map`` as its users do (a row at a time, ``num_proc``, as many rows
at once written to its cache), and a pool of processes that decode and keep nothing. Pixels are
stored raw by either.

Each contender is a process of its own with those that it starts, and takes turns with the others.
Each round has one pass over few rows and one over many. The cost of a row is their difference, so
it excludes the start of a pass. The starts of a pass and of Ray are reported separately. CPU time
is that of all processes of a contender, without Ray's dashboard.
"""

import multiprocessing
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from benchmarks.measure import (
    Result,
    Took,
    alternate,
    clock_for,
    in_turns,
    plain,
    ratio,
    side,
    spread,
)
from benchmarks.media_corpus import CLIP, FRAMES, PICTURE, decode, files

#: Different files; rows go round in them.
FILES = {"image": 256, "sound": 128, "video": 128}
#: Shards for each process of a pass over few rows and of one over many.
FEW, MANY = 1, 4
#: Largest number of rounds: a round has many thousand rows.
MOST_ROUNDS = 3
OPTIONS: dict[str, dict[str, Any]] = {
    "image": {"size": PICTURE, "storage": "raw"},
    "sound": {"max_seconds": FRAMES / 100},
    "video": {"video_size": CLIP, "storage": "raw"},
}
#: In the command lines of processes that draw pages for people: no part of preparing.
PAGES = ("dashboard", "Agent", "monitor.py")
CLOCK = "cpu and wall, see the rows"

Pass = Callable[[int], object]
#: What a side goes by.
Side = TypeVar("Side", str, tuple[str, int])


def run(rounds: int, threads: int) -> list[Result]:
    """Ratios of the three, for each kind of media."""
    results = []
    for kind in FILES:
        results += _kind(kind, min(rounds, MOST_ROUNDS))
    return [*results, _code(rounds, threads)]


class Work(NamedTuple):
    """What a contender prepares.

    Args:
        kind: ``image``, ``sound`` or ``video``.
        paths: locations of different files; rows go round in them.
        processes: to do it in.
        shard_rows: rows that are written at once.
    """

    kind: str
    paths: list[Path]
    processes: int
    shard_rows: int


def _kind(kind: str, rounds: int) -> list[Result]:
    paths = files(kind, FILES[kind])
    processes = len(os.sched_getaffinity(0))
    given = Work(kind, paths, processes, corpus_of(kind, paths).shard_rows)
    rows = FEW * processes * given.shard_rows, MANY * processes * given.shard_rows
    makers = {"engine": engine, "map": map_of, "loop": loop}
    with ExitStack() as stack:
        sides = {
            name: stack.enter_context(side(maker, given, without=PAGES))
            for name, maker in makers.items()
        }
        starts = {name: one(rows[0]).wall for name, one in sides.items()}
        few, many = passes(sides, rounds, *rows)
    setting = (
        f"{rows[1] - rows[0]} rows beyond the first {rows[0]}, files of {_mean_size(paths):.2f} "
        f"MB, shards of {given.shard_rows}, {processes} processes"
    )
    costs = _costs(kind, few, many, rows, setting, starts)
    return [*_ratios(kind, few, many, rows[1], setting), *costs]


def _ratios(
    kind: str, few: dict[str, list[Took]], many: dict[str, list[Took]], rows: int, setting: str
) -> list[Result]:
    results = []
    for clock in Took._fields:
        more = {name: beyond(few[name], many[name], clock) for name in few}
        whole = {name: [getattr(took, clock) for took in each] for name, each in many.items()}
        for theirs, reported, target in (
            ("map", "datasets.map", ">= 1.2"),
            ("loop", "bare decoding", ">= 0.85"),
        ):
            name, rounds = f"prepare, {kind}, {clock} time", len(few[theirs])
            found = ratio(more[theirs], more["engine"])
            results.append(Result(name, reported, "times as fast", *found, target, rounds, setting))
            found = ratio(whole[theirs], whole["engine"])
            results.append(
                Result(f"{name}, with the start of a pass", reported, "times as fast", *found, "",
                       rounds, f"a pass over {rows} rows")
            )  # fmt: skip
    return results


def _costs(
    kind: str,
    few: dict[str, list[Took]],
    many: dict[str, list[Took]],
    rows: tuple[int, int],
    setting: str,
    starts: dict[str, float],
) -> list[Result]:
    results = []
    beyond_few = rows[1] - rows[0]
    names = {"engine": "prepare", "map": "datasets.map", "loop": "bare decoding"}
    for name, reported in names.items():
        rounds = len(few[name])
        cost = spread([s / beyond_few for s in beyond(few[name], many[name], "cpu")])
        results.append(
            Result(f"{reported}, {kind}", "", "s/row", *cost, "", rounds, setting, "cpu time")
        )
        begin = spread([
            small.wall - (large.wall - small.wall) * rows[0] / beyond_few
            for small, large in zip(few[name], many[name], strict=True)
        ])  # fmt: skip
        results.append(
            Result(f"start of a pass, {reported}, {kind}", "", "s", *begin, "", rounds, setting,
                   "wall time of a pass that its rows do not explain")
        )  # fmt: skip
    first = starts["engine"] - statistics.median(took.wall for took in few["engine"])
    note = "wall time of the first pass beyond a later one"
    return [*results, plain(f"start of Ray, {kind}", "s", first, note=note)]


def passes(
    sides: Mapping[Side, Callable[[int], Took]], rounds: int, few_rows: int, many_rows: int
) -> tuple[dict[Side, list[Took]], dict[Side, list[Took]]]:
    """What a pass over few rows and one over many took each side, in each round, in turns."""
    few: dict[Side, list[Took]] = {name: [] for name in sides}
    many: dict[Side, list[Took]] = {name: [] for name in sides}
    for _, name in alternate(sides, rounds):
        few[name].append(sides[name](few_rows))
        many[name].append(sides[name](many_rows))
    return few, many


def beyond(few: list[Took], many: list[Took], clock: str) -> list[float]:
    """Seconds of the rows beyond the first few, of each round."""
    pairs = zip(few, many, strict=True)
    return [getattr(large, clock) - getattr(small, clock) for small, large in pairs]


def _rows(paths: list[Path], rows: int) -> list[Path]:
    return list(islice(cycle(paths), rows))


def _one(job: tuple[str, Path]) -> None:
    decode(job[0], job[1].read_bytes())


def loop(given: Work, folder: Path, stack: ExitStack) -> Pass:
    """A pool of processes that decode and keep nothing, as a side."""
    pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(given.processes))

    def work(rows: int) -> None:
        jobs = ((given.kind, path) for path in _rows(given.paths, rows))
        for _ in pool.imap_unordered(_one, jobs, chunksize=given.shard_rows // 4):
            pass

    return work


def map_of(given: Work, folder: Path, stack: ExitStack) -> Pass:
    """``datasets.map`` as its users call it, as a side."""
    import datasets

    datasets.disable_progress_bars()
    shape = {"image": (PICTURE, PICTURE, 3), "video": (8, CLIP, CLIP, 1)}
    pixels: Any = {
        "image": lambda: datasets.Array3D(shape["image"], "uint8"),
        "video": lambda: datasets.Array4D(shape["video"], "uint8"),
        "sound": lambda: datasets.List(datasets.List(datasets.Value("float32"))),
    }[given.kind]()
    features = datasets.Features({"path": datasets.Value("string"), "made": pixels})

    def one(row: dict[str, Any]) -> dict[str, Any]:
        return {"made": decode(given.kind, Path(row["path"]).read_bytes())}

    def work(rows: int) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        table = {"path": [str(path) for path in _rows(given.paths, rows)]}
        datasets.Dataset.from_dict(table).map(
            one,
            features=features,
            cache_file_name=str(folder / "made.arrow"),
            load_from_cache_file=False,
            writer_batch_size=given.shard_rows,
            num_proc=given.processes,
            new_fingerprint="made",
        )

    return work


def corpus_of(kind: str, paths: list[Path]) -> Any:
    """A user's folder of those files, with the pixels or frames alone, as the others have them:
    no tokens, no symbols."""
    from skillnet_corpora.readers.folder import FolderCorpus

    corpus = FolderCorpus(str(paths[0].parent.parent), FolderCorpus.Options(**OPTIONS[kind]))
    corpus.annotations_present = ()
    corpus.finalize_schema()
    return corpus


def engine(given: Work, folder: Path, stack: ExitStack) -> Pass:
    """Return ``skillnet prepare`` on Ray as a contender; its first pass starts Ray."""
    from pipelines.data.corpora.base import SourceArchives
    from pipelines.data.corpora.readers.row_builders import media_row
    from pipelines.data.io.media import MediaRef
    from skillnet_platform import cluster

    corpus = corpus_of(given.kind, given.paths)
    corpus.shard_rows = given.shard_rows
    opened: list[Any] = []

    def work(rows: int) -> None:
        if not opened:
            opened.append(stack.enter_context(cluster.ray_session(given.processes)))
        from pipelines.data.preprocessing.jobs import CorpusJob
        from pipelines.data.preprocessing.pipeline import write_corpora
        from pipelines.data.preprocessing.prepare import build_corpus_identity
        from pipelines.data.preprocessing.ray_tasks import RayTasks

        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        made = [
            media_row("train", f"{number}", MediaRef(str(path)))
            for number, path in enumerate(_rows(given.paths, rows))
        ]
        corpus.rows = lambda sources: iter(made)
        identity = build_corpus_identity(corpus, [], folder)
        job = CorpusJob(corpus, SourceArchives.none(), folder / "made", identity)
        for manifest in write_corpora([job], 0.0, RayTasks()):
            assert manifest["rows_out"] == rows, manifest["quarantine"]

    return work


def _code(rounds: int, threads: int) -> Result:
    """Tokens of functions of Python's own library: what a row of code costs."""
    import argparse
    import inspect

    from tokenizers import Tokenizer

    from pipelines.data.tokenizer import training as tokenizers
    from pipelines.data.transforms import code, text

    modules = (argparse, inspect, shutil, tempfile)
    sources = [inspect.getsource(module) for module in modules]
    functions = [found.code for source in sources for found in code.parse_functions(source)]
    tokenizer = Tokenizer.from_str(tokenizers.train_tokenizer(functions, [], size=2_000))
    seconds = in_turns(
        {"code": lambda: text.encode_texts(tokenizer, functions, text.CODE_TOKENS)},
        rounds,
        clock_for(threads),
        warmup=1,
    )
    per_row = spread([s / len(functions) for s in seconds["code"]])
    size = sum(map(len, functions)) / len(functions)
    setting = f"{len(functions)} functions of {size:.0f} characters"
    note = "cpu time of one process; tokens alone"
    return Result("prepare, code", "", "s/row", *per_row, "", rounds, setting, note)


def _mean_size(paths: list[Path]) -> float:
    return sum(path.stat().st_size for path in paths) / len(paths) / 1e6
