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
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import cycle, islice
from pathlib import Path
from time import process_time

from benchmarks.measure import Result, ratio, side, spread
from benchmarks.media_corpus import files
from benchmarks.prepare_speed import FILES, PAGES, Work, beyond, engine, loop, passes

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
    for name, (write, rows) in LAYOUTS.items():
        with tempfile.TemporaryDirectory(dir=pictures[0].parent) as folder:
            write(Path(folder) / "corpus", list(islice(cycle(pictures), rows)))
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


def _write_folder(folder: Path, pictures: list[Path]) -> None:
    """Captions in metadata.jsonl, and as many names of pictures as rows."""
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as stream:
        for name, caption in _linked(folder, pictures):
            stream.write(json.dumps({"file_name": name, "text": caption}) + "\n")


def _write_aic_icc(folder: Path, pictures: list[Path]) -> None:
    """AI Challenger's layout: one array of records, five captions each."""
    home = folder / "ai_challenger_caption_train_20170902"
    images = home / "caption_train_images_20170902"
    images.mkdir(parents=True)
    records = [
        {"image_id": name, "caption": [f"{caption}{n}" for n in range(5)]}
        for name, caption in _linked(images, pictures)
    ]
    (home / "caption_train_annotations_20170902.json").write_text(json.dumps(records))


def _write_tars(folder: Path, pictures: list[Path]) -> None:
    """Pictures and captions by turns in one tar."""
    folder.mkdir()
    caption = folder / "caption.txt"
    caption.write_text("一张图")
    with tarfile.open(folder / "train-000000.tar", "w") as tar:
        for number, picture in enumerate(pictures):
            tar.add(picture, f"{number:08d}.jpg")
            tar.add(caption, f"{number:08d}.txt")
    caption.unlink()


def _write_vatex(folder: Path, pictures: list[Path]) -> None:
    """An array of records with ten captions in either language, and as many names of clips."""
    clips = folder / "clips"
    clips.mkdir(parents=True)
    records = []
    for number, picture in enumerate(pictures):
        name = f"{number:011d}_000000_000010"
        (clips / f"{name}.mp4").hardlink_to(picture)
        record = {"videoID": name, "enCap": [f"A person shows picture {number}, {n}"
                                             for n in range(10)]}  # fmt: skip
        records.append(record | {"chCap": [f"有人拿出第{number}张图{n}" for n in range(10)]})
    (folder / "vatex_training_v1.0.json").write_text(json.dumps(records))


def _write_aishell1(folder: Path, pictures: list[Path]) -> None:
    """A transcript, and as many names of recordings, by speakers of 360."""
    lines = []
    for number, picture in enumerate(pictures):
        speaker = f"S{number // 360 + 2:04d}"
        name = f"BAC009{speaker}W{number % 360 + 122:04d}"
        home = folder / "data_aishell" / "wav" / "train" / speaker
        home.mkdir(parents=True, exist_ok=True)
        (home / f"{name}.wav").hardlink_to(picture)
        lines.append(f"{name} 广州市 房地产 中介 协会 分析\n")
    transcript = folder / "data_aishell" / "transcript" / "aishell_transcript_v0.8.txt"
    transcript.parent.mkdir()
    transcript.write_text("".join(lines), encoding="utf-8")


def _write_codesearchnet(folder: Path, pictures: list[Path]) -> None:
    """A compressed file of functions; pictures are none of its business."""
    home = folder / "python" / "final" / "jsonl" / "train"
    home.mkdir(parents=True)
    source, said = inspect.getsource(shutil.move), inspect.getdoc(shutil.move)
    row = {"func_name": "move", "language": "python", "original_string": source, "code": source,
           "code_tokens": source.split(), "docstring": said}  # fmt: skip
    with gzip.open(home / "python_train_0.jsonl.gz", "wt", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for _ in pictures)


def _linked(folder: Path, pictures: list[Path]) -> Iterator[tuple[str, str]]:
    """A name of its own for each row, and a caption."""
    for number, picture in enumerate(pictures):
        name = f"{number:08d}.jpg"
        (folder / name).hardlink_to(picture)
        yield name, f"第{number}张图"


LAYOUTS: dict[str, tuple[Callable[[Path, list[Path]], None], int]] = {
    "folder": (_write_folder, READ_ROWS),
    "aic_icc": (_write_aic_icc, READ_ROWS),
    "vatex": (_write_vatex, READ_ROWS),
    "aishell1": (_write_aishell1, READ_ROWS),
    "codesearchnet": (_write_codesearchnet, READ_ROWS),
    "webdataset": (_write_tars, TAR_ROWS),
}
