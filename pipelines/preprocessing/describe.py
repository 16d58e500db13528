"""``skillnet prepare --describe``: what a folder holds, found out in seconds, without preparing.

Rows are read as preparing reads them, for ``SECONDS`` at most; some of the first are decoded too.
Files are counted for ``COUNTING`` at most. Finding the format lists the upper folders.
"""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.corpora import READERS, PlacedCorpus, guess_reader, named_reader, place_corpus
from pipelines.corpora.base import Rejected, Row, Sources
from pipelines.corpora.formats.packed import unpack_hint
from pipelines.corpora.formats.record_reader import entries, records
from pipelines.corpora.readers.fields import FieldedCorpus
from pipelines.io.directory import Place, printable
from pipelines.io.media import Unreadable, read_media
from pipelines.transforms.decode_guard import read_each
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import human_bytes

#: Reading rows stops after so long; what follows is not counted.
SECONDS = 8.0
#: So does counting files.
COUNTING = 3.0
#: So many media files are decoded, and for so many seconds.
DECODED, DECODING = 24, 6.0
#: So many rows are kept to look at, and shown.
LOOKED_AT, SHOWN = 1000, 3


def describe(place: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a folder or URI holds.

    Args:
        place: path or URI, or ``reader:path``.
        options: reader -> its options.

    Returns:
        place, reader, evidence, modality, task, rows, complete (whether all rows were read),
        splits, given (those that the corpus names, of a format that may name none; the others are
        made), set_aside, fields (columns that would be made), source (fields of a record as it
        lies there), captions, texts, labels, media, example and examples, files, bytes and counted
        (whether all files were): plain values.

    Raises:
        UserError: there is nothing, or nothing that is known; or options of another reader.
    """
    reader, path, evidence = _reader_of(place)
    if others := sorted(set(options or {}) - {reader}):
        raise UserError(
            f"options.{others[0]}: {place} is read as {reader} ({evidence}); give "
            f"--options.{reader}.…, or name the reader: --describe {others[0]}:{path}"
        )
    name = reader if reader.isidentifier() else "mine"
    corpus = place_corpus(name, f"{reader}:{path}", (options or {}).get(reader))
    found = _read(corpus)
    files, size, counted = _files(corpus)
    return {
        "place": corpus.place.uri,
        "reader": reader,
        "evidence": evidence,
        "modality": corpus.modality,
        "task": corpus.task,
        "rows": found.splits.total() + found.reasons.total(),
        "complete": found.complete,
        "splits": dict(sorted(found.splits.items())),
        "given": sorted(corpus.given) if isinstance(corpus, FieldedCorpus) else None,
        "set_aside": dict(found.reasons.most_common()),
        "fields": {field.name: str(field.type) for field in corpus.columns},
        "source": found.source,
        "captions": _captions(found.sample),
        "texts": _texts(found.sample),
        "labels": dict(Counter(r["label"] for r in found.sample if r.get("label")).most_common(20)),
        "media": _media(corpus, found.sample) if "media" in corpus.raw.names else {},
        "example": _example(found.sample[0]) if found.sample else {},
        "examples": [_example(row) for row in _different(found.sample)],
        "files": files,
        "bytes": size,
        "counted": counted,
    }


def _reader_of(place: str) -> tuple[str, str, str]:
    """(Reader, path, what shows it)."""
    named = named_reader(place)
    if named is not None and not Path(place).exists():
        return *named, "named"
    found = guess_reader(Place(place))
    if found is None:
        raise UserError(
            f"{place}: no known format; known are {', '.join(READERS)}. Name one with "
            f"--describe folder:{place} to be told what it lacks{unpack_hint(Place(place))}"
        )
    return found[0], place, found[1]


def show(found: dict[str, Any]) -> None:
    """Print a description for people."""
    more = "" if found["complete"] else " or more"
    size = f", {human_bytes(found['bytes'])}" if found["bytes"] else ""
    lines: list[list[Any]] = [
        ["format", f"{found['reader']} ({found['evidence']})"],
        ["modality, task", f"{found['modality']}, {found['task']}"],
        ["files", f"{found['files']}{size}{'' if found['counted'] else ' or more'}"],
        ["rows", f"{found['rows']}{more}"],
        ["splits", ", ".join(f"{name} {rows}" for name, rows in found["splits"].items())],
        ["columns made", ", ".join(found["fields"])],
    ]
    if found["given"] is not None:
        given = ", ".join(found["given"]) or "none: they are made by a hash"
        lines.insert(5, ["splits given", given])
    if not found["complete"]:
        lines[3][1] += f" (read for {SECONDS:.0f} s)"
    if found["captions"]:
        lines.append(["captions", "{per_row} a row, {characters} characters".format_map(
            found["captions"])])  # fmt: skip
    lines += [[key, value] for key, value in found["texts"].items()]
    if found["labels"]:
        lines.append(["labels", ", ".join(f"{k} ({v})" for k, v in found["labels"].items())])
    media = found["media"]
    for key in [
        key for key in ("file size", "seconds", "width", "height", "frames") if key in media
    ]:
        lines.append([f"{key} (of {media['decoded']})", media[key]])
    lines += [["", ""]] + [[f"source: {k}", str(v)] for k, v in found["source"].items()]
    for example in found["examples"]:
        lines += [["", ""]] + [[f"example: {k}", str(v)] for k, v in example.items()]
    console.table(found["place"], ["", ""], lines)
    aside = [[count, reason] for reason, count in found["set_aside"].items()]
    aside += [[f"{n} of {media['decoded']}", why] for why, n in media.get("set_aside", {}).items()]
    if aside:
        console.table("Would be set aside", ["rows", "reason"], aside)
    name = found["reader"] if found["reader"].isidentifier() else f"mine={found['reader']}"
    mark = "=" if name == found["reader"] else ":"
    console.note(f"to prepare it: skillnet prepare --corpus {name}{mark}{found['place']}")


@dataclass
class _Found:
    """What was read until the time was up."""

    splits: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    sample: list[Row] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)
    complete: bool = False


def _read(corpus: PlacedCorpus) -> _Found:
    """Rows of a corpus, for so long: some readers list all of their files before the first one."""
    found = _Found()

    def work(late: threading.Event) -> None:
        found.source.update(_record(corpus))
        for row in corpus.rows(Sources.none()):
            if late.is_set():
                return
            if isinstance(row, Rejected):
                found.reasons[row.reason] += 1
                continue
            found.splits[row["split"]] += 1
            if len(found.sample) < LOOKED_AT:
                found.sample.append(row)

    found.complete = _within(SECONDS, work)
    return found


def _within(seconds: float, work: Callable[[threading.Event], None]) -> bool:
    """Whether work ended in that time. It is told when it is late; what hangs is left behind."""
    late, problems = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            work(late)
        except BaseException as problem:
            problems.append(problem)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    in_time = not thread.is_alive()
    late.set()
    thread.join(0.5)  # it looks after each row: what is counted stands still then
    if problems:
        raise problems[0]
    return in_time


def _files(corpus: PlacedCorpus) -> tuple[int, int, bool]:
    """(Files, their bytes, whether all were counted)."""
    if corpus.place.is_file:
        return 1, 0, True
    files = [0, 0]

    def work(late: threading.Event) -> None:
        for entry in corpus.place.walk():
            if late.is_set():
                return
            files[0], files[1] = files[0] + 1, files[1] + (entry.size or 0)

    counted = _within(COUNTING, work)
    return files[0], files[1], counted


def _record(corpus: PlacedCorpus) -> dict[str, Any]:
    """Fields of one record as it lies there, before a reader chooses among them."""
    record: Any = None
    files = corpus.annotations()
    if isinstance(corpus, FieldedCorpus) and not files:  # of tars and saved datasets
        told: list[Any] = []
        choose = corpus.row

        def listen(key: str, fields: Mapping[str, Any], *rest: Any) -> Row:
            told.append(dict(fields))
            return choose(key, fields, *rest)

        corpus.row = listen  # type: ignore[method-assign, assignment]
        try:
            next((row for row in corpus.rows(Sources.none()) if told), None)
        finally:
            del corpus.row
        record = told[0] if told else None
    elif files:
        record = next(records(corpus.place, files[0]), (None,))[-1]
        if not isinstance(record, dict) or all(isinstance(v, dict) for v in record.values()):
            record = next(entries(corpus.place, files[0]), (None,))[-1]
    return _short(record) if isinstance(record, dict) else {}


def _different(sample: list[Row]) -> list[Row]:
    """A few rows to show, of different splits first."""
    firsts = {row["split"]: row for row in reversed(sample)}
    rest = (row for row in sample if firsts[row["split"]] is not row)
    return list(itertools.islice(itertools.chain(reversed(firsts.values()), rest), SHOWN))


def _texts(sample: list[Row]) -> dict[str, str]:
    """How long texts, transcripts and functions are."""
    found = {}
    for key, name in (("text", "texts"), ("code", "code")):
        written = [row[key] for row in sample if row.get(key)]
        if written:
            found[name] = f"{_span([len(each) for each in written])} characters"
        if written and key == "code":
            found["lines of code"] = _span([each.count("\n") + 1 for each in written])
    return found


def _captions(sample: list[Row]) -> dict[str, Any]:
    counts = [len(row["captions"]) for row in sample if row.get("captions")]
    if not counts:
        return {}
    lengths = [len(caption) for row in sample for caption in row["captions"]]
    return {"per_row": _span(counts), "characters": _span(lengths)}


def _media(corpus: PlacedCorpus, sample: list[Row]) -> dict[str, Any]:
    """Sizes and lengths of some media files, spread over the first rows."""
    step = max(1, len(sample) // DECODED)
    measured: dict[str, list[float]] = {}
    reasons = Counter[str]()
    chosen, start, decoded = sample[::step][:DECODED], time.monotonic(), 0
    for row, data in zip(chosen, read_media([row["media"] for row in chosen]), strict=True):
        if time.monotonic() - start > DECODING:
            break
        decoded += 1
        if isinstance(data, Unreadable):
            reasons[data.reason] += 1
            continue
        [(found, reason)] = read_each([row], partial(_looked_at, corpus, data))
        if found is None:
            reasons[str(reason)] += 1
            continue
        facts, why = found
        if why is not None:
            reasons[why] += 1
        for key, value in (facts | {"file size": float(len(data))}).items():
            measured.setdefault(key, []).append(value)
    spans = {key: _span(values) for key, values in measured.items() if key != "file size"}
    if "file size" in measured:
        low, high = min(measured["file size"]), max(measured["file size"])
        spans["file size"] = f"{human_bytes(low)} to {human_bytes(high)}"
    return {"decoded": decoded, **spans, "set_aside": dict(reasons)}


def _looked_at(corpus: PlacedCorpus, data: bytes, row: Row) -> tuple[dict[str, float], str | None]:
    """Facts of a row's media file, and why the row would be set aside."""
    facts = _facts(corpus.modality, data)
    block = pa.Table.from_pylist([row], schema=corpus.raw)
    return facts, corpus.finish(block)["rejected"][0].as_py()


def _facts(modality: str, data: bytes) -> dict[str, float]:
    """Length or size of a media file, from its head."""
    if modality == "image":
        from pipelines.transforms.image import size_of

        size = size_of(data)
        return {"width": float(size[0]), "height": float(size[1])} if size else {}
    import av

    from pipelines.transforms import containers, video

    try:
        with containers.opened(data) as container:
            facts = {"seconds": (container.duration or 0) / av.time_base}
            if modality == "video" and container.streams.video:
                stream = container.streams.video[0]
                facts["frames"] = float(stream.frames)
                width, height = video.size_of(data)
                facts |= {"width": float(width), "height": float(height)}
            return facts
    except av.FFmpegError as problem:
        raise ValueError(f"cannot be read ({problem.strerror})") from None


def _example(row: Row) -> dict[str, Any]:
    hidden = {"group", "file"} if "media" in row else {"group"}
    shown = {k: v for k, v in row.items() if k not in hidden and v not in (None, [])}
    if "media" in shown:
        shown["media"] = {k: v for k, v in shown["media"].items() if v is not None}
    return dict(_short(shown))


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {_short(name): _short(inner) for name, inner in value.items()}
    if isinstance(value, str):
        return printable(value if len(value) <= 200 else value[:199] + "…")
    return [_short(v) for v in value[:5]] if isinstance(value, list) else value


def _span(values: list[Any]) -> str:
    """``"3"``, or ``"1 to 9, median 4"``."""
    low, middle, high = (float(np.quantile(values, q)) for q in (0, 0.5, 1))
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}, median {middle:.4g}"
