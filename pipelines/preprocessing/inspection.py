"""Inspection of a path: find its format, and read and decode a sample without preparing it.

:func:`inspect_corpus` is the library of ``skillnet inspect``. Rows are read as ``skillnet prepare``
reads them, for ``READ_TIMEOUT_S`` at most. Files are counted for ``COUNT_TIMEOUT_S`` at most.
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

from pipelines.corpora import (
    READERS,
    ExternalCorpus,
    detect_reader,
    open_external_corpus,
    parse_reader_prefix,
)
from pipelines.corpora.base import RejectedRow, Row, SourceArchives
from pipelines.corpora.formats.packed_archives import unpack_hint
from pipelines.corpora.formats.record_reader import read_json_entries, read_records
from pipelines.corpora.readers.fields import RecordCorpus
from pipelines.corpora.readers.folder import FolderCorpus
from pipelines.corpora.readers.label_values import count_labels, describe_numeric_labels
from pipelines.io.directory import SourceDirectory, to_printable
from pipelines.io.media import MediaReadError, read_media
from pipelines.transforms.decode_guard import decode_each
from pipelines.transforms.decoder_process import DecoderEndedError, decode_media
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import human_bytes

#: Seconds. Rows that were not read by then are not counted.
READ_TIMEOUT_S = 8.0
#: Seconds. Files that were not listed by then are not counted.
COUNT_TIMEOUT_S = 3.0
#: Media files that are decoded at most, and seconds that decoding may take.
MAX_DECODED, DECODE_TIME_S = 24, 6.0
#: Rows that are kept to be analysed, and examples that are shown.
SAMPLE_ROWS, SHOWN_ROWS = 1000, 3


def inspect_corpus(path: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a report of the content of a directory, file or URI.

    Args:
        path: path or URI, or ``reader:path``.
        options: reader -> its options.

    Returns:
        Plain values by name: path, reader, evidence (why this reader was chosen), modality, task,
        rows, complete (all rows were read), splits, named_splits (splits that the corpus names;
        others are made by a hash), rejected, columns (after preparation), source (fields of one
        record in the file), captions, texts, labels, numeric_labels (a sentence if labels are
        numbers), media, example, examples, files, bytes, counted (all files were counted) and
        unread (annotation files that the reader does not read).

    Raises:
        UserError: the path is missing or of an unknown format, or the options are those of
            another reader.
    """
    reader, location, evidence = _find_reader(path)
    if others := sorted(set(options or {}) - {reader}):
        raise UserError(
            f"options.{others[0]}: {path} is read as {reader} ({evidence}); give "
            f"--options.{reader}.…, or name the reader: {others[0]}:{location}"
        )
    name = reader if reader.isidentifier() else "mine"
    corpus = open_external_corpus(name, f"{reader}:{location}", (options or {}).get(reader))
    sample = _read_sample(corpus)
    files, size, counted = _count_files(corpus)
    rows = sample.rows
    labels = count_labels(row["label"] for row in rows if row.get("label"))
    has_media = "media" in corpus.raw_schema.names
    return {
        "path": corpus.source.uri,
        "reader": reader,
        "evidence": evidence,
        "modality": corpus.modality,
        "task": corpus.task,
        "rows": sample.splits.total() + sample.rejections.total(),
        "complete": sample.complete,
        "splits": dict(sorted(sample.splits.items())),
        "named_splits": sorted(corpus.named_splits) if isinstance(corpus, RecordCorpus) else None,
        "rejected": dict(sample.rejections.most_common()),
        "columns": {field.name: str(field.type) for field in corpus.columns},
        "source": sample.record,
        "captions": _describe_captions(rows),
        "texts": _describe_texts(rows),
        "labels": dict(labels.most_common(20)),
        "numeric_labels": None if corpus.labels else describe_numeric_labels(labels),
        "media": _describe_media(corpus, rows) if has_media else {},
        "example": _make_example(rows[0]) if rows else {},
        "examples": [_make_example(row) for row in _choose_examples(rows)],
        "files": files,
        "bytes": size,
        "counted": counted,
        "unread": corpus.unread_files.describe(),
    }


def _find_reader(path: str) -> tuple[str, str, str]:
    """Return reader, path without the reader's prefix, and the evidence for the reader."""
    named = parse_reader_prefix(path)
    if named is not None and not Path(path).exists():
        return *named, "named"
    source = SourceDirectory(path)
    detected = detect_reader(source)
    if detected is None:
        raise UserError(
            f"{path}: no known format; known are {', '.join(READERS)}. To see what a format "
            f"lacks, name it: skillnet inspect folder:{path}{unpack_hint(source)}"
        )
    return detected[0], path, detected[1]


def show_inspection(report: dict[str, Any]) -> None:
    """Print a report of :func:`inspect_corpus` as tables."""
    size = f", {human_bytes(report['bytes'])}" if report["bytes"] else ""
    more_files = "" if report["counted"] else " or more"
    more_rows = "" if report["complete"] else f" or more (read for {READ_TIMEOUT_S:.0f} s)"
    lines: list[list[Any]] = [
        ["format", f"{report['reader']} ({report['evidence']})"],
        ["modality, task", f"{report['modality']}, {report['task']}"],
        ["files", f"{report['files']}{size}{more_files}"],
        ["rows", f"{report['rows']}{more_rows}"],
        ["splits", ", ".join(f"{name} {rows}" for name, rows in report["splits"].items())],
    ]
    if report["named_splits"] is not None:
        named = ", ".join(report["named_splits"]) or "none: splits are made by a hash"
        lines.append(["named splits", named])
    lines.append(["columns after preparation", ", ".join(report["columns"])])
    if report["unread"]:
        lines.append(["annotations not read", report["unread"]])
    if report["captions"]:
        text = "{per_row} per row, {characters} characters".format_map(report["captions"])
        lines.append(["captions", text])
    lines += [[key, value] for key, value in report["texts"].items()]
    if report["labels"]:
        lines.append(["labels", ", ".join(f"{k} ({v})" for k, v in report["labels"].items())])
    media = report["media"]
    measured = ("file size", "seconds", "width", "height", "frames")
    lines += [[f"{key} (of {media['decoded']})", media[key]] for key in measured if key in media]
    lines += [["", ""]] + [[f"source: {k}", str(v)] for k, v in report["source"].items()]
    for example in report["examples"]:
        lines += [["", ""]] + [[f"example: {k}", str(v)] for k, v in example.items()]
    console.print_table(report["path"], ["", ""], lines)
    rejected = [[count, reason] for reason, count in report["rejected"].items()]
    undecoded = media.get("rejected", {}).items()
    rejected += [[f"{count} of {media['decoded']}", reason] for reason, count in undecoded]
    if rejected:
        console.print_table("Rows that prepare would reject", ["rows", "reason"], rejected)
    if report["numeric_labels"]:
        console.print_warning(report["numeric_labels"])
    reader = report["reader"]
    named_path = f"{reader}=" if reader.isidentifier() else f"mine={reader}:"
    console.print_note(f"to prepare it: skillnet prepare --corpus {named_path}{report['path']}")


@dataclass
class _Sample:
    """Rows that were read before the time limit.

    Args:
        splits: rows by split.
        rejections: rejected rows by reason.
        rows: the first ``SAMPLE_ROWS`` rows.
        record: fields of one record in the source file.
        complete: whether all rows were read.
    """

    splits: Counter[str] = field(default_factory=Counter)
    rejections: Counter[str] = field(default_factory=Counter)
    rows: list[Row] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    complete: bool = False


def _read_sample(corpus: ExternalCorpus) -> _Sample:
    """Read rows until the time limit, even if a reader lists all files before the first row."""
    sample = _Sample()

    def work(is_late: threading.Event) -> None:
        sample.record.update(_find_record(corpus))
        for row in corpus.rows(SourceArchives.none()):
            if is_late.is_set():
                return
            if isinstance(row, RejectedRow):
                sample.rejections[row.reason] += 1
                continue
            sample.splits[row["split"]] += 1
            if len(sample.rows) < SAMPLE_ROWS:
                sample.rows.append(row)

    sample.complete = _run_within(READ_TIMEOUT_S, work)
    return sample


def _run_within(seconds: float, work: Callable[[threading.Event], None]) -> bool:
    """Run work in a thread, and return whether it ended in time.

    After the time limit an event is set. A thread that does not check it is abandoned.
    """
    is_late, errors = threading.Event(), list[BaseException]()

    def run() -> None:
        try:
            work(is_late)
        except BaseException as error:
            errors.append(error)

    # A daemon thread does not keep the process alive if it hangs.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    in_time = not thread.is_alive()
    is_late.set()
    # The thread checks the event after each row. Then its counts no longer change.
    thread.join(0.5)
    if errors:
        raise errors[0]
    return in_time


def _count_files(corpus: ExternalCorpus) -> tuple[int, int, bool]:
    """Return the number of files, their bytes, and whether all were counted; note unread ones."""
    if corpus.source.is_file:
        return 1, 0, True
    files = [0, 0]

    def work(is_late: threading.Event) -> None:
        for entry in corpus.source.walk():
            if is_late.is_set():
                return
            corpus.note_unread(entry)
            files[0], files[1] = files[0] + 1, files[1] + (entry.size or 0)

    counted = _run_within(COUNT_TIMEOUT_S, work)
    return files[0], files[1], counted


def _find_record(corpus: ExternalCorpus) -> dict[str, Any]:
    """Return the fields of one record in the source, before a reader selects from them."""
    record: Any = None
    files = corpus.annotation_files()
    if isinstance(corpus, RecordCorpus) and not files:
        # Tars and saved datasets have no annotation file: record the fields that rows are made of.
        records: list[Any] = []
        build_row = corpus.build_row

        def record_fields(key: str, fields: Mapping[str, Any], *rest: Any) -> Row:
            records.append(dict(fields))
            return build_row(key, fields, *rest)

        corpus.build_row = record_fields  # type: ignore[method-assign, assignment]
        try:
            next((row for row in corpus.rows(SourceArchives.none()) if records), None)
        finally:
            del corpus.build_row
        record = records[0] if records else None
    elif isinstance(corpus, FolderCorpus):
        record = next(corpus.tables[0].records(corpus.source, 1), None)
    elif files:
        record = next(read_records(corpus.source, files[0]), (None,))[-1]
        if not isinstance(record, dict) or all(isinstance(v, dict) for v in record.values()):
            record = next(read_json_entries(corpus.source, files[0]), (None,))[-1]
    return _shorten(record) if isinstance(record, dict) else {}


def _choose_examples(rows: list[Row]) -> list[Row]:
    """Return a few rows, first one of each split."""
    first_of_split = {row["split"]: row for row in reversed(rows)}
    rest = (row for row in rows if first_of_split[row["split"]] is not row)
    ordered = itertools.chain(reversed(first_of_split.values()), rest)
    return list(itertools.islice(ordered, SHOWN_ROWS))


def _describe_texts(rows: list[Row]) -> dict[str, str]:
    """Return the lengths of texts, transcripts and functions."""
    lengths = {}
    for key, name in (("text", "texts"), ("code", "code")):
        texts = [row[key] for row in rows if row.get(key)]
        if texts:
            lengths[name] = f"{_format_range([len(text) for text in texts])} characters"
        if texts and key == "code":
            lines = [text.count("\n") + 1 for text in texts]
            lengths["lines of code"] = _format_range(lines)
    return lengths


def _describe_captions(rows: list[Row]) -> dict[str, Any]:
    counts = [len(row["captions"]) for row in rows if row.get("captions")]
    if not counts:
        return {}
    lengths = [len(caption) for row in rows for caption in row["captions"]]
    return {"per_row": _format_range(counts), "characters": _format_range(lengths)}


def _describe_media(corpus: ExternalCorpus, rows: list[Row]) -> dict[str, Any]:
    """Return sizes and durations of media files that are spread over the first rows."""
    # Neighbouring rows are often similar, so the decoded rows are spread evenly.
    step = max(1, len(rows) // MAX_DECODED)
    measured: dict[str, list[float]] = {}
    rejections = Counter[str]()
    chosen, start, decoded = rows[::step][:MAX_DECODED], time.monotonic(), 0
    for row, data in zip(chosen, read_media([row["media"] for row in chosen]), strict=True):
        if time.monotonic() - start > DECODE_TIME_S:
            break
        decoded += 1
        if isinstance(data, MediaReadError):
            rejections[data.reason] += 1
            continue
        [(result, error)] = decode_each([row], partial(_check_media, corpus, data))
        if result is None:
            rejections[str(error)] += 1
            continue
        facts, rejection = result
        if rejection is not None:
            rejections[rejection] += 1
        for key, value in (facts | {"file size": float(len(data))}).items():
            measured.setdefault(key, []).append(value)
    ranges = {key: _format_range(v) for key, v in measured.items() if key != "file size"}
    if "file size" in measured:
        low, high = min(measured["file size"]), max(measured["file size"])
        ranges["file size"] = f"{human_bytes(low)} to {human_bytes(high)}"
    return {"decoded": decoded, **ranges, "rejected": dict(rejections)}


def _check_media(
    corpus: ExternalCorpus, data: bytes, row: Row
) -> tuple[dict[str, float], str | None]:
    """Return facts of a row's media file, and the reason if prepare would reject the row.

    Raises:
        ValueError: the file has no readable header, or its decoder does not return.
    """
    # First in a process of its own: a file that ends its decoder must not end this command.
    try:
        decode_media(corpus.modality, data)
    except DecoderEndedError:
        raise
    # The checks below give the same reason, and the facts of the file.
    except ValueError:
        pass
    facts = _measure_media(corpus.modality, data)
    block = pa.Table.from_pylist([row], schema=corpus.raw_schema)
    return facts, corpus.build_columns(block)["rejected"][0].as_py()


def _measure_media(modality: str, data: bytes) -> dict[str, float]:
    """Return duration in seconds or size in pixels of a media file, read from its header."""
    if modality == "image":
        from pipelines.transforms.image import read_image_size

        size = read_image_size(data)
        return {"width": float(size[0]), "height": float(size[1])} if size else {}
    import av

    from pipelines.transforms import containers, video

    try:
        with containers.open_container(data) as container:
            facts = {"seconds": (container.duration or 0) / av.time_base}
            if modality == "video" and container.streams.video:
                stream = container.streams.video[0]
                facts["frames"] = float(stream.frames)
                width, height = video.read_video_size(data)
                facts |= {"width": float(width), "height": float(height)}
            return facts
    except av.FFmpegError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from None


def _make_example(row: Row) -> dict[str, Any]:
    hidden = {"group", "file"} if "media" in row else {"group"}
    shown = {k: v for k, v in row.items() if k not in hidden and v not in (None, [])}
    if "media" in shown:
        shown["media"] = {k: v for k, v in shown["media"].items() if v is not None}
    return dict(_shorten(shown))


def _shorten(value: Any) -> Any:
    """Return a value with long strings and lists cut."""
    if isinstance(value, dict):
        return {_shorten(name): _shorten(inner) for name, inner in value.items()}
    if isinstance(value, str):
        return to_printable(value if len(value) <= 200 else value[:199] + "…")
    return [_shorten(v) for v in value[:5]] if isinstance(value, list) else value


def _format_range(values: list[Any]) -> str:
    """Return one number if all values are equal, else "1 to 9, median 4"."""
    low, middle, high = (float(np.quantile(values, q)) for q in (0, 0.5, 1))
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}, median {middle:.4g}"
