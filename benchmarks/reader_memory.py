"""What a corpus' reading task holds and spools for each row: bytes, the same on every machine.

    python -m benchmarks.reader_memory

Trees of empty media with annotations of the usual length, in two sizes: the difference of the peaks
(tracemalloc) over the difference of the rows, so that what does not grow is not in it. Media are
not opened by readers. A spool is written where a tokenizer is learnt.
"""

import io
import json
import sys
import tarfile
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from benchmarks.measure import Result, write
from pipelines.data.corpora import ExternalCorpus, open_external_corpus
from pipelines.data.corpora.base import SourceArchives
from pipelines.data.preprocessing.blocks import write_spool

SIZES = (1_000, 7_000)
#: A caption of AIC-ICC has 17 characters on average, an utterance of AISHELL-1 14.
SENTENCE = "两个穿着运动服的人在球场上打着网球呢"
#: URIs are longer than paths of a test's folder, and stand in every row of a spool.
NAMES = {"aic_icc": "AIC-ICC", "vatex": "VATEX", "aishell1": "AISHELL-1", "webdataset": "tars"}


def aic_icc(folder: Path, rows: int) -> None:
    """Pictures named by 40 digits, five captions each."""
    home = folder / "ai_challenger_caption_train_20170902"
    images = home / "caption_train_images_20170902"
    images.mkdir(parents=True)
    records = []
    for number in range(rows):
        name = f"{number:040x}.jpg"
        (images / name).touch()
        captions = [f"{SENTENCE}{each}{number}" for each in range(5)]
        records.append({"url": "http://x/1", "image_id": name, "caption": captions})
    text = json.dumps(records, ensure_ascii=False)
    (home / "caption_train_annotations_20170902.json").write_text(text, encoding="utf-8")


def vatex(folder: Path, rows: int) -> None:
    """Clips named by YouTube's ids, ten captions in each language."""
    (folder / "clips").mkdir(parents=True)
    records = []
    for number in range(rows):
        name = f"{number:011x}_000122_000132"
        (folder / "clips" / f"{name}.mp4").touch()
        captions = [f"{SENTENCE}{each}{number}" for each in range(10)]
        records.append({"videoID": name, "enCap": captions, "chCap": captions})
    text = json.dumps(records, ensure_ascii=False)
    (folder / "vatex_training_v1.0.json").write_text(text, encoding="utf-8")


def aishell1(folder: Path, rows: int) -> None:
    """Speakers of 360 utterances."""
    lines = []
    for number in range(rows):
        speaker, each = divmod(number, 360)
        home = folder / "data_aishell" / "wav" / "train" / f"S{speaker:04d}"
        home.mkdir(parents=True, exist_ok=True)
        name = f"BAC009S{speaker:04d}W{each:04d}"
        (home / f"{name}.wav").touch()
        lines.append(f"{name} {SENTENCE[:4]} {SENTENCE[4:14]}\n")
    (folder / "data_aishell" / "transcript").mkdir()
    reported = folder / "data_aishell" / "transcript" / "aishell_transcript_v0.8.txt"
    reported.write_text("".join(lines), encoding="utf-8")


def webdataset(folder: Path, rows: int) -> None:
    """Pictures with a caption each, a thousand in a tar."""
    folder.mkdir(parents=True)
    for first in range(0, rows, 1_000):
        with tarfile.open(folder / f"train-{first // 1_000:06d}.tar", "w") as out:
            for number in range(first, min(first + 1_000, rows)):
                for ending, data in (("jpg", b"x"), ("txt", f"{SENTENCE}{number}".encode())):
                    entry = tarfile.TarInfo(f"{number:09d}.{ending}")
                    entry.size = len(data)
                    out.addfile(entry, io.BytesIO(data))


MAKERS: tuple[Callable[[Path, int], None], ...] = (aic_icc, vatex, aishell1, webdataset)


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
            results.append(Result(name, "", unit, value, value, value, setting=setting))
    return results


def main() -> int:
    """Measure, and write the CSV."""
    with tempfile.TemporaryDirectory() as folder:
        results = measured(Path(folder))
    for result in results:
        print(f"{result.measured}: {result.value:.0f} {result.unit}", flush=True)
    print(write("reader-memory", results, 1, clock="none: bytes"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
