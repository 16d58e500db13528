"""Preparing media beside Hugging Face ``datasets.map`` and beside the bare loop that decodes.

All three decode the same files with the same function, one process each: the engine as one of its
workers does (a unit of work in, rows watched one by one, a shard written, hashed and synced),
``map`` as its users do (an example at a time, written to its cache), and a loop that decodes and
keeps nothing. Pixels are stored raw by either. What Ray itself takes is not in it.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import Result, clock_for, in_turns, ratio, spread
from benchmarks.media import CLIP, FRAMES, PICTURE, decode, files

ROWS = {"image": 16, "sound": 16, "video": 8}
SHARD_ROWS = 8
OPTIONS = {
    "image": {"size": PICTURE, "storage": "raw", "task": "captions"},
    "sound": {"max_seconds": FRAMES / 100},
    "video": {"video_size": CLIP, "storage": "raw"},
}


def run(rounds: int, threads: int) -> list[Result]:
    """Ratios of the three, for each kind of media."""
    results = []
    for kind, rows in ROWS.items():
        paths = files(kind, rows)
        with tempfile.TemporaryDirectory() as folder:
            contenders = {
                "engine": _engine(kind, paths, Path(folder) / "engine"),
                "map": _map(kind, paths, Path(folder) / "map"),
                "loop": _loop(kind, paths),
            }
            seconds = in_turns(contenders, rounds, clock_for(threads), warmup=1)
        setting = f"{rows} files of {_mean_size(paths):.2f} MB, shards of {SHARD_ROWS}"
        against_map = ratio(seconds["map"], seconds["engine"])
        against_loop = ratio(seconds["loop"], seconds["engine"])
        name = f"prepare, {kind}"
        faster = "times as fast"
        results += [
            Result(name, "datasets.map", faster, *against_map, ">= 1.2", rounds, setting),
            Result(name, "bare decoding", faster, *against_loop, ">= 0.85", rounds, setting),
            Result(name, "", "s/row", *spread([s / rows for s in seconds["engine"]]), "", rounds,
                   setting, "cpu time of one process"),
            Result(f"bare decoding, {kind}", "", "s/row",
                   *spread([s / rows for s in seconds["loop"]]), "", rounds, setting,
                   "cpu time of one process"),
        ]  # fmt: skip
    return [*results, _code(rounds, threads)]


def _code(rounds: int, threads: int) -> Result:
    """Tokens of functions of Python's own library: what a row of code costs."""
    import argparse
    import inspect

    from tokenizers import Tokenizer

    from pipelines import tokenizer as tokenizers
    from pipelines.transforms import code, text

    modules = (argparse, inspect, shutil, tempfile)
    sources = [inspect.getsource(module) for module in modules]
    functions = [found.code for source in sources for found in code.functions(source)]
    tokenizer = Tokenizer.from_str(tokenizers.train(functions, [], size=2_000))
    seconds = in_turns(
        {"code": lambda: text.encode(tokenizer, functions, text.CODE_TOKENS)},
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


def _loop(kind: str, paths: list[Path]) -> Callable[[], object]:
    return lambda: [decode(kind, path.read_bytes()) for path in paths] and None


def _map(kind: str, paths: list[Path], folder: Path) -> Callable[[], object]:
    import datasets

    datasets.disable_progress_bars()
    shape = {"image": (PICTURE, PICTURE, 3), "video": (8, CLIP, CLIP, 1)}
    pixels: Any = {
        "image": lambda: datasets.Array3D(shape["image"], "uint8"),
        "video": lambda: datasets.Array4D(shape["video"], "uint8"),
        "sound": lambda: datasets.List(datasets.List(datasets.Value("float32"))),
    }[kind]()
    features = datasets.Features({"path": datasets.Value("string"), "made": pixels})
    rows = datasets.Dataset.from_dict({"path": [str(path) for path in paths]})

    def one(row: dict[str, Any]) -> dict[str, Any]:
        return {"made": decode(kind, Path(row["path"]).read_bytes())}

    def work() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        rows.map(
            one,
            features=features,
            cache_file_name=str(folder / "made.arrow"),
            load_from_cache_file=False,
            writer_batch_size=SHARD_ROWS,
            new_fingerprint="made",
        )

    return work


def _engine(kind: str, paths: list[Path], folder: Path) -> Callable[[], object]:
    import pyarrow as pa

    from pipelines.blocks import Summary, read_blocks
    from pipelines.corpora.base import Sources
    from pipelines.corpora.folder import Folder
    from pipelines.corpora.placed import media_row
    from pipelines.datasource import Job, pack
    from pipelines.media import MediaRef
    from pipelines.preparation import write_block

    place = paths[0].parent.parent
    options = {key: value for key, value in OPTIONS[kind].items() if key != "task"}
    corpus = Folder(str(place), Folder.Options(**options))
    # The pixels or frames alone, as the other two: no tokens, no symbols.
    corpus.has, corpus.shard_rows = (), SHARD_ROWS
    corpus.settle()
    corpus.shard_rows = SHARD_ROWS
    rows = [media_row("train", path.name, MediaRef(str(path))) for path in paths]
    corpus.rows = lambda sources: iter(rows)  # type: ignore[method-assign]

    def work() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        jobs = [Job(corpus, Sources(place, ()), folder)]
        for part in read_blocks(corpus, jobs[0].sources, folder / "rejected.jsonl"):
            if not isinstance(part, Summary):
                unit = pack(part)
                unit = unit.set_column(0, unit.schema.field(0), pa.array([0], pa.int32()))
                write_block(jobs, "benchmark", unit)

    return work
