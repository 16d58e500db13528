"""What readers hold: bytes a row of a corpus' reading task, and a node's memory of open corpora.

    python -m benchmarks.reader_memory

Trees of empty media with annotations of the usual length, in two sizes: the difference of the peaks
(tracemalloc) over the difference of the rows, so that what does not grow is not in it. Media are
not opened by readers. A spool is written where a tokenizer is learnt.

Prepared corpora of up to a million shards are opened by one and by three processes of a node: CPU
time of each, the memory that all of them add together (proportional set size), and the bytes that
a loading process is sent. Their files have a size and no content. Beside them, what a list of the
same entries in JSON costs.
"""

import json
import multiprocessing
import shutil
import sys
import tarfile
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

from benchmarks.measure import Result, plain, spread, write
from pipelines.data.corpora import ExternalCorpus, open_external_corpus
from pipelines.data.corpora.base import SourceArchives
from pipelines.data.preprocessing.blocks import write_spool

SIZES = (1_000, 7_000)
#: A caption of AIC-ICC has 17 characters on average, an utterance of AISHELL-1 14.
SENTENCE = "两个穿着运动服的人在球场上打着网球呢"
#: URIs are longer than paths of a test's folder, and stand in every row of a spool.
NAMES = {"aic_icc": "AIC-ICC", "vatex": "VATEX", "aishell1": "AISHELL-1", "webdataset": "tars"}


#: Makes the media file of a row at a path.
MediaMaker = Callable[[Path, int], object]


def make_byte(path: Path, number: int) -> None:
    """Write a file that no reader opens."""
    path.write_bytes(b"x")


def aic_icc(folder: Path, rows: int, make: MediaMaker = make_byte) -> None:
    """Pictures named by 40 digits, five captions each."""
    home = folder / "ai_challenger_caption_train_20170902"
    images = home / "caption_train_images_20170902"
    images.mkdir(parents=True)
    records = []
    for number in range(rows):
        name = f"{number:040x}.jpg"
        make(images / name, number)
        captions = [f"{SENTENCE}{each}{number}" for each in range(5)]
        records.append({"url": "http://x/1", "image_id": name, "caption": captions})
    text = json.dumps(records, ensure_ascii=False)
    (home / "caption_train_annotations_20170902.json").write_text(text, encoding="utf-8")


def vatex(folder: Path, rows: int, make: MediaMaker = make_byte) -> None:
    """Clips named by YouTube's ids, ten captions in each language."""
    (folder / "clips").mkdir(parents=True)
    records = []
    for number in range(rows):
        name = f"{number:011x}_000122_000132"
        make(folder / "clips" / f"{name}.mp4", number)
        captions = [f"{SENTENCE}{each}{number}" for each in range(10)]
        records.append({"videoID": name, "enCap": captions, "chCap": captions})
    text = json.dumps(records, ensure_ascii=False)
    (folder / "vatex_training_v1.0.json").write_text(text, encoding="utf-8")


def aishell1(folder: Path, rows: int, make: MediaMaker = make_byte) -> None:
    """Speakers of 360 utterances."""
    lines = []
    for number in range(rows):
        speaker, each = divmod(number, 360)
        home = folder / "data_aishell" / "wav" / "train" / f"S{speaker:04d}"
        home.mkdir(parents=True, exist_ok=True)
        name = f"BAC009S{speaker:04d}W{each:04d}"
        make(home / f"{name}.wav", number)
        lines.append(f"{name} {SENTENCE[:4]} {SENTENCE[4:14]}\n")
    (folder / "data_aishell" / "transcript").mkdir()
    reported = folder / "data_aishell" / "transcript" / "aishell_transcript_v0.8.txt"
    reported.write_text("".join(lines), encoding="utf-8")


def webdataset(folder: Path, rows: int, make: MediaMaker = make_byte) -> None:
    """Pictures with a caption each, a thousand in a tar."""
    folder.mkdir(parents=True)
    media, caption = folder / "media.jpg", folder / "caption.txt"
    for first in range(0, rows, 1_000):
        path = folder / f"train-{first // 1_000:06d}.tar"
        with tarfile.open(path, "w", dereference=True) as out:  # bytes, also of a hard link
            for number in range(first, min(first + 1_000, rows)):
                make(media, number)
                caption.write_text(f"{SENTENCE}{number}", encoding="utf-8")
                for each in (media, caption):
                    out.add(each, f"{number:09d}{each.suffix}")
                    each.unlink()


MAKERS: tuple[Callable[..., None], ...] = (aic_icc, vatex, aishell1, webdataset)


def peak(corpus: ExternalCorpus) -> int:
    """Bytes held at most while its rows are read, each dropped at once."""
    tracemalloc.start()
    for _ in corpus.rows(SourceArchives.none()):
        pass
    _, found = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return found


def spooled(corpus: ExternalCorpus, path: Path) -> int:
    """Bytes of the file that its rows are spooled to."""
    write_spool(corpus, SourceArchives.none(), path)
    return path.stat().st_size


def measured(folder: Path, sizes: tuple[int, int] = SIZES) -> list[Result]:
    """Bytes a row of each reader, in memory and in a spool."""
    results = []
    for make in MAKERS:
        held, kept = [], []
        for rows in sizes:
            place = folder / f"{make.__name__}-{rows}"
            make(place, rows)
            corpus = open_external_corpus(make.__name__, str(place))
            held.append(peak(corpus))
            kept.append(spooled(corpus, folder / "spool.arrows"))
        for what, unit, (few, many) in (
            ("read", "bytes/row", held),
            ("spool", "bytes/row on disk", kept),
        ):
            value = max(0.0, (many - few) / (sizes[1] - sizes[0]))
            name = f"{what}, {NAMES[make.__name__]}"
            setting = f"{sizes[0]} and {sizes[1]} rows"
            results.append(plain(name, unit, value, setting=setting))
    return results


#: Rows and bytes of each shard, bytes of a window, and rows of a batch.
SHARD_ROWS, SHARD_BYTES, WINDOW_BYTES, BATCH = 1_000, 1_000, 400_000, 256
ENTRIES = "entries.json"


def write_sharded_corpus(folder: Path, shards: int) -> None:
    """Write a corpus whose shards are holes of files, and its entries as JSON."""
    from pipelines.data.shards.format import FORMAT_VERSION, write_corpus_manifest

    folder.mkdir()
    entries = []
    for number in range(shards):
        name = f"train-{number:05d}.arrow"
        with (folder / name).open("wb") as stream:
            stream.truncate(SHARD_BYTES)
        digest = f"{number:064x}"
        entries.append({"file": name, "rows": SHARD_ROWS, "bytes": SHARD_BYTES, "sha256": digest})
    manifest = {
        "format_version": FORMAT_VERSION,
        "corpus": "made",
        "modality": "text",
        "task": "text_classification",
        "splits": {"train": {"rows": SHARD_ROWS * shards, "shards": entries}},
    }
    write_corpus_manifest(folder, manifest)
    (folder / ENTRIES).write_text(json.dumps(entries), encoding="utf-8")


def open_sharded_corpus(folder: Path) -> object:
    """Open the corpus as a training does, up to the shards of its first batch."""
    from pipelines.data.shards.dataset import open_corpus
    from pipelines.training.loading.samplers import WindowedShuffleSampler
    from pipelines.training.loading.task_columns import ShardTable

    table = ShardTable([open_corpus(folder).splits["train"]], "made")
    order = WindowedShuffleSampler(table.rows, table.bytes, BATCH, WINDOW_BYTES, (0, "order"))
    order.shards(0)
    return table, order


def read_entries(folder: Path) -> object:
    """Read the same entries from JSON."""
    return json.loads((folder / ENTRIES).read_text(encoding="utf-8"))


OPENERS: dict[str, Callable[[Path], object]] = {
    "open corpus": open_sharded_corpus,
    "entries in JSON": read_entries,
}


def _open_in_process(pipe: Any, name: str, folder: Path) -> None:

    pipe.send(None)
    pipe.recv()
    begin = time.process_time()
    opened = OPENERS[name](folder)
    took = time.process_time() - begin
    sent = opened[0] if isinstance(opened, tuple) else opened
    # Pickling first: what it makes is gone when the memory is read.
    size = len(ForkingPickler.dumps(sent))
    pipe.send((took, size))
    pipe.recv()


def _measure_set_size(process: Any) -> int:
    """Bytes of a process; what several processes share is divided among them."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def open_in_processes(name: str, folder: Path, count: int) -> tuple[list[float], int, int]:
    """Return CPU seconds of each process, the bytes that all add, and those sent to a loader."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(count):
        mine, theirs = context.Pipe()
        processes.append(context.Process(target=_open_in_process, args=(theirs, name, folder)))
        processes[-1].start()
        pipes.append(mine)
    for pipe in pipes:
        pipe.recv()
    before = sum(map(_measure_set_size, processes))
    for pipe in pipes:
        pipe.send(None)
    took = [pipe.recv() for pipe in pipes]
    added = sum(map(_measure_set_size, processes)) - before
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(None)
        process.join()
    return [seconds for seconds, _ in took], added, took[0][1]


def measure_shards(
    folder: Path, sizes: Sequence[int] = (10_000, 100_000, 1_000_000)
) -> list[Result]:
    """What opening corpora of these numbers of shards takes."""
    results = []
    for shards in sizes:
        place = folder / f"shards-{shards}"
        write_sharded_corpus(place, shards)
        for name in OPENERS:
            for count in (1, 3):
                seconds, added, size = open_in_processes(name, place, count)
                setting = f"{shards} shards, processes: {count}"
                target = name == "open corpus" and shards == max(sizes)
                results.append(
                    Result(name, "", "CPU s", *spread(seconds), "<= 3" * target, count, setting)
                )
                limit = "<= 300" * target
                results.append(plain(name, "MB of a node", added / 1e6, limit, setting))
                results.append(plain(f"{name}, sent", "MB to a loader", size / 1e6, "", setting))
        shutil.rmtree(place)
    return results


def main() -> int:
    """Measure, and write the two CSV files."""
    with tempfile.TemporaryDirectory() as folder:
        for name, clock, measure in (
            ("reader-memory", "none: bytes", measured),
            ("open-shards", "cpu", measure_shards),
        ):
            results = measure(Path(folder))
            for result in results:
                value = f"{result.value:.3g} {result.unit}"
                print(f"{result.measured}: {value}, {result.setting}", flush=True)
            print(write(name, results, 1, clock=clock))
    return 0


if __name__ == "__main__":
    sys.exit(main())
