"""Inspection of a path: find its format, and read and decode a sample without preparing it.

:func:`inspect_corpus` is the library of ``skillnet inspect``. Rows are read as ``skillnet prepare``
reads them, for ``READ_TIMEOUT_S`` at most. Files are counted for ``COUNT_TIMEOUT_S`` at most.
"""

import contextlib
import itertools
import json
import re
import shlex
import threading
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

from pipelines.data.corpora import (
    ExternalCorpus,
    detect_reader,
    explain_unread,
    is_built_in,
    list_formats,
    open_external_corpus,
    parse_reader_prefix,
)
from pipelines.data.corpora.base import (
    JOINED_ROW,
    RejectedRow,
    Row,
    SourceArchives,
    is_empty_folder,
    list_archives,
    unpack_hint,
)
from pipelines.data.corpora.readers.base import (
    RunningMoments,
    count_labels,
    describe_numeric_labels,
)
from pipelines.data.io.directory import SourceDirectory, to_printable
from pipelines.data.io.key_set import KeySet
from pipelines.data.io.media import describe_bytes, read_media
from pipelines.data.io.source_file import is_remote
from pipelines.data.preprocessing.blocks import check_row
from pipelines.data.preprocessing.media_sample import describe_media, format_range, run_within
from pipelines.data.preprocessing.prepare import MAX_ERROR_RATE
from pipelines.data.shards.row_checks import ROW_CHECKS, describe_row_checks
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import human_bytes
from skillnet_platform.terminal_text import shorten_text

#: Seconds. Rows that were not read by then are not counted.
READ_TIMEOUT_S = 8.0
#: Seconds. Files that were not listed by then are not counted.
COUNT_TIMEOUT_S = 3.0
#: Seconds. Media that were not read by then are not compared.
COMPARE_TIMEOUT_S = 4.0
#: Longest suggested name of a corpus, in characters.
MAX_NAME = 40
#: Rows that are kept to be analysed, and examples that are shown.
SAMPLE_ROWS, SHOWN_ROWS = 1000, 3
SHOWN_LABELS = 20
#: Media whose content is compared between splits.
COMPARED_MEDIA = 100_000


def inspect_corpus(path: str, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return a report of the content of a directory, file or URI.

    Args:
        path: path or URI, or ``reader:path``.
        options: reader -> its options.

    Returns:
        Plain values by name: path, name (of the prepared corpus), reader, evidence (why this
        reader was chosen), modality, task, rows, complete (all rows were read), splits,
        named_splits (splits that the corpus names; others are made by a hash), joined (rows whose
        captions the first row of their media file holds), rejected (other rows that give no item),
        errors (rejected rows that count towards max_error_rate), duplicates (rows that equal an
        earlier row except for their key), sampled (the first rows, which captions, texts and
        examples are of), shared (split -> other split -> rows whose input the other split has),
        compared (all inputs were compared), warnings (why splits prove less than they seem to),
        columns (after preparation), preprocessing (as in the manifest), source (fields of one
        record in the file), captions, texts, labels (the most frequent ones), num_labels (number
        of all labels), numeric_labels (a sentence if labels are numbers), values (range and mean
        of a regression), media, example, examples, files, bytes, counted (all files were counted),
        unread (annotation files that the reader does not read), archives (packed files that it
        does not read) and command (which prepares the corpus; "" if no row could be used).

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
    corpus.is_preview = True
    sample = _read_sample(corpus)
    files, size, counted = _count_files(corpus)
    rows, num_read = sample.rows, sample.splits.total() + sample.rejections.total()
    # Joined rows are not lost: their captions are in the row of their media file.
    joined = sample.rejections.pop(JOINED_ROW, 0)
    labels = count_labels(sample.labels)
    media = describe_media(corpus, rows) if "media" in corpus.raw_schema.names else {}
    undecodable = media and 0 < media["decoded"] == sum(media["rejected"].values())
    shared, compared = _count_shared(sample)
    # A slow listing can end the sample before its first row.
    is_unknown = not sample.complete and not sample.rejections
    is_usable = is_unknown or bool(rows and not undecodable)
    return {
        "path": corpus.source.uri,
        "name": _suggest_name(reader, corpus),
        "reader": reader,
        "evidence": evidence,
        "modality": corpus.modality,
        "task": corpus.task,
        "rows": num_read,
        "complete": sample.complete,
        "splits": dict(sorted(sample.splits.items())),
        "named_splits": None if corpus.named_splits is None else sorted(corpus.named_splits),
        "joined": joined,
        "rejected": dict(sample.rejections.most_common()),
        "errors": sample.errors,
        "duplicates": sample.duplicates,
        "sampled": len(rows),
        "shared": shared,
        "compared": compared,
        "warnings": _describe_splits(corpus, sample, shared),
        "columns": {field.name: str(field.type) for field in corpus.columns},
        "preprocessing": corpus.preprocessing(),
        "source": sample.record,
        "captions": _describe_captions(rows),
        "texts": _describe_texts(rows),
        "labels": dict(labels.most_common(SHOWN_LABELS)),
        "num_labels": len(labels),
        "numeric_labels": (
            None if corpus.labels or corpus.has_class_names else describe_numeric_labels(labels)
        ),
        "values": _describe_values(sample.values),
        "media": media,
        "example": _make_example(rows[0]) if rows else {},
        "examples": [_make_example(row) for row in _choose_examples(rows)],
        "files": files,
        "bytes": size,
        "counted": counted,
        "unread": corpus.describe_unread(),
        "archives": _list_unread_archives(corpus),
        "command": _suggest_command(reader, corpus, options or {}) if is_usable else "",
    }


def _find_reader(path: str) -> tuple[str, str, str]:
    """Return reader, path without the reader's prefix, and the evidence for the reader."""
    named = parse_reader_prefix(path)
    if named is not None and not Path(path).exists():
        return *named, "named"
    source = SourceDirectory(path)
    if is_empty_folder(source):
        raise UserError(f"{path}: an empty folder; give the folder that holds the corpus")
    detected = detect_reader(source)
    if detected is None:
        if not list_archives(source) and (problem := explain_unread(source)):
            raise UserError(f"{path}: {problem}")
        raise UserError(
            f"{path}: no known format; known are {', '.join(list_formats())}. To see what a format "
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
    ]
    if report["joined"]:
        items = sum(report["splits"].values())
        lines.append(["items", f"{items}: {report['joined']} rows are further captions of an item"])
    splits = ", ".join(f"{name} {rows}" for name, rows in report["splits"].items())
    lines.append(["splits", splits or "none"])
    if report["named_splits"] is not None:
        named = ", ".join(report["named_splits"]) or "none: splits are made by a hash"
        lines.append(["named splits", named])
    if report["duplicates"]:
        lines.append(["duplicate rows", f"{report['duplicates']} (equal content, other keys)"])
    for split, others in report["shared"].items():
        at_least = "" if report["compared"] else "at least "
        counts = ", ".join(f"{at_least}{count} in {other}" for other, count in others.items())
        lines.append([f"rows of {split} also in", counts])
    lines.append(["columns after preparation", ", ".join(report["columns"])])
    if report["unread"]:
        lines.append(["annotations not read", report["unread"]])
    if report["archives"]:
        names = ", ".join(report["archives"])
        lines.append(["archives not read", f"{names}: unpack them (unzip, or tar xf)"])
    is_part = report["sampled"] < report["rows"]
    of = f" (of the first {report['sampled']:,} rows)" if is_part else ""
    if report["captions"]:
        text = "{per_row} per row, {characters} characters".format_map(report["captions"])
        lines.append([f"captions{of}", text])
    lines += [[f"{key}{of}", value] for key, value in report["texts"].items()]
    if report["labels"]:
        more = report["num_labels"] - len(report["labels"])
        named = ", ".join(f"{k} ({v})" for k, v in report["labels"].items())
        lines.append(["labels", named + (f", and {more} more" if more else "")])
    if report["values"]:
        lines.append(["values", report["values"]])
    media = report["media"]
    measured = ("file size", "seconds", "width", "height", "frames")
    lines += [[f"{key} (of {media['decoded']})", media[key]] for key in measured if key in media]
    lines += [["", ""]] + [[f"source: {k}", str(v)] for k, v in report["source"].items()]
    for example in report["examples"]:
        shown = {k: _format_media(v) if k == "media" else str(v) for k, v in example.items()}
        lines += [["", ""]] + [[f"example: {key}", text] for key, text in shown.items()]
    console.print_table(report["path"], ["", ""], lines)
    rejected = [[count, reason] for reason, count in report["rejected"].items()]
    undecoded = media.get("rejected", {}).items()
    rejected += [[f"{count} of {media['decoded']}", reason] for reason, count in undecoded]
    if rejected:
        console.print_table("Rows that prepare would reject", ["rows", "reason"], rejected)
    for warning in (report["numeric_labels"], *report["warnings"]):
        if warning:
            console.print_warning(warning)
    if not report["command"]:
        console.print_warning(
            "prepare would fail: no row can be used. Fix the reasons above, or see "
            "docs/own-corpora.md"
        )
        return
    if report["errors"] > MAX_ERROR_RATE * report["rows"]:
        console.print_warning(
            f"prepare would stop: {report['errors']} of {report['rows']} rows are damaged, more "
            f"than {MAX_ERROR_RATE:.1%}. Fix them, or raise the limit: --max_error_rate"
        )
    console.print_note(f"to prepare it: {report['command']}")


def _suggest_command(reader: str, corpus: ExternalCorpus, options: Mapping[str, Any]) -> str:
    """Return the command that prepares an inspected corpus with the same options."""
    name, place = _suggest_name(reader, corpus), corpus.source.uri
    given = f"{name}={place}" if name == reader else f"{name}={reader}:{place}"
    words = ["skillnet", "prepare", "--corpus", given]
    for key, value in (options.get(reader) or {}).items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        words += [f"--options.{name}.{key}", text]
    return shlex.join(words)


def _suggest_name(reader: str, corpus: ExternalCorpus) -> str:
    """Return a name for a prepared corpus: of its format, or of its directory or file.

    Many directories have a general format. Under one name, each would replace the one before.
    """
    if not corpus.is_general:
        return corpus.name
    stem = corpus.source.uri.rstrip("/").rpartition("/")[2].split(".")[0]
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_")[:MAX_NAME] or "mine"
    taken = is_built_in(name) or name in list_formats()
    return f"my-{name}" if taken else name


def _list_unread_archives(corpus: ExternalCorpus) -> list[str]:
    """Return the archives of a directory, unless its format consists of them."""
    if corpus.source.is_file or type(corpus).name == "webdataset":
        return []
    return [to_printable(name) for name in list_archives(corpus.source)]


@dataclass
class _Sample:
    """Rows that were read before the time limit.

    Args:
        splits: rows by split.
        rejections: rejected rows by reason.
        errors: rejected rows that should have been readable.
        duplicates: rows whose content an earlier row has.
        labels: label -> rows.
        values: numbers that a regression predicts.
        inputs: split -> digests of its texts or functions.
        media: references to the first ``COMPARED_MEDIA`` media, each with its split.
        targets: split -> up to two different targets of its rows.
        rows: the first ``SAMPLE_ROWS`` rows.
        record: fields of one record in the source file.
        complete: whether all rows were read.
    """

    splits: Counter[str] = field(default_factory=Counter)
    rejections: Counter[str] = field(default_factory=Counter)
    errors: int = 0
    duplicates: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    values: RunningMoments = field(default_factory=RunningMoments)
    inputs: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    media: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    targets: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    rows: list[Row] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)
    complete: bool = False

    def note_content(self, row: Row) -> None:
        """Count the annotations of a row, and keep what is compared between splits."""
        self.labels.update(_list_labels(row))
        if row.get("value") is not None:
            self.values.add(row["value"])
        target = [row.get("label"), row.get("label_set"), row.get("value")]
        if any(target) and len(seen := self.targets[row["split"]]) < 2:
            seen.add(repr(target))
        content = row.get("code") or (row.get("text") if "media" not in row else None)
        if content:
            self.inputs[row["split"]].append(_digest(content.encode("utf-8", "replace")))
        elif row.get("media") is not None and len(self.media) < COMPARED_MEDIA:
            self.media.append((row["split"], row["media"]))


def _read_sample(corpus: ExternalCorpus) -> _Sample:
    """Read rows until the time limit, even if a reader lists all files before the first row."""
    sample = _Sample()

    def work(is_late: threading.Event) -> None:
        sample.record.update(_shorten(corpus.find_record()))
        with KeySet() as keys, KeySet() as contents:
            for row in corpus.rows(SourceArchives.none()):
                if is_late.is_set():
                    return
                row, _ = check_row(row, keys)
                if isinstance(row, RejectedRow):
                    sample.rejections[row.reason] += 1
                    sample.errors += row.counts_as_error
                    continue
                sample.splits[row["split"]] += 1
                sample.duplicates += not contents.add(_format_content(row))
                sample.note_content(row)
                if len(sample.rows) < SAMPLE_ROWS:
                    sample.rows.append(row)

    sample.complete = run_within(READ_TIMEOUT_S, work)
    return sample


def _list_labels(row: Row) -> list[str]:
    """Return the class of a row, or its classes."""
    return row.get("label_set") or ([row["label"]] if row.get("label") else [])


def _describe_values(values: RunningMoments) -> str:
    """Return range and mean of the numbers that a regression predicts, or "" without any."""
    if not values.count:
        return ""
    return f"{values.low:g} to {values.high:g}, mean {values.mean:g}"


def _digest(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest())


def _count_shared(sample: _Sample) -> tuple[dict[str, dict[str, int]], bool]:
    """Return split -> other split -> rows whose input the other has, and whether all were read.

    Local files are only read if their size occurs in several splits.
    """
    sizes: dict[int, set[str]] = defaultdict(set)
    plain: dict[int, int] = {}

    def work(is_late: threading.Event) -> None:
        for number, (split, reference) in enumerate(sample.media):
            if is_late.is_set():
                return
            size = _find_file_size(reference)
            if size is not None:
                plain[number] = size
                sizes[size].add(split)
        for number, (split, reference) in enumerate(sample.media):
            if number in plain and len(sizes[plain[number]]) == 1:
                continue
            if is_late.is_set():
                return
            [content] = read_media([reference])
            if isinstance(content, bytes):
                sample.inputs[split].append(_digest(content))

    is_single = len(sample.splits) < 2
    # A query per file would be slow in a store.
    has_remote = any(is_remote(reference["path"]) for _, reference in sample.media)
    compared = is_single or (not has_remote and run_within(COMPARE_TIMEOUT_S, work))
    # A copy, because a late reader still adds to the lists.
    inputs = {split: list(values) for split, values in list(sample.inputs.items())}
    found = {split: set(values) for split, values in inputs.items()}
    shared: dict[str, dict[str, int]] = {}
    for split, values in inputs.items():
        for other, known in found.items():
            if other != split and (count := sum(value in known for value in values)):
                shared.setdefault(split, {})[other] = count
    return shared, compared and len(sample.media) < COMPARED_MEDIA


def _find_file_size(reference: Mapping[str, Any]) -> int | None:
    """Return the size of a local media file; None for media in an archive, table or store."""
    if any(value is not None for key, value in reference.items() if key != "path"):
        return None
    with contextlib.suppress(OSError):
        return Path(reference["path"]).stat().st_size
    return None


def _describe_splits(
    corpus: ExternalCorpus, sample: _Sample, shared: dict[str, dict[str, int]]
) -> list[str]:
    """Return why splits prove less than they seem to, in the words of ``prepare``."""
    names = {"label_sets": "label_set", "values": "value"}
    kind = next((k for k in ("labels", *names) if k in corpus.annotations_present), None)
    constant = {
        split: [names.get(kind or "", "label")]
        for split, each in sample.targets.items()
        if len(each) == 1
    }
    has_one = kind == "labels" and sample.complete and len(sample.labels) == 1
    return describe_row_checks(
        {
            "splits": {split: {"rows": rows} for split, rows in sample.splits.items()},
            "schema": corpus.columns.names,
            **({"labels": list(sample.labels)} if has_one else {}),
            ROW_CHECKS: {"shared": shared, "constant": constant if sample.complete else {}},
        }
    )


def _format_content(row: Row) -> str:
    """Return a text that rows of equal content have in common."""
    names = ("text", "code", "label", "label_set", "value", "captions", "media")
    return repr([row.get(name) for name in names])


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

    counted = run_within(COUNT_TIMEOUT_S, work)
    return files[0], files[1], counted


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
            lengths[name] = f"{format_range([len(text) for text in texts])} characters"
        if texts and key == "code":
            lines = [text.count("\n") + 1 for text in texts]
            lengths["lines of code"] = format_range(lines)
    return lengths


def _describe_captions(rows: list[Row]) -> dict[str, Any]:
    counts = [len(row["captions"]) for row in rows if row.get("captions")]
    if not counts:
        return {}
    lengths = [len(caption) for row in rows for caption in row["captions"]]
    return {"per_row": format_range(counts), "characters": format_range(lengths)}


def _make_example(row: Row) -> dict[str, Any]:
    hidden = {"group", "file"} if "media" in row else {"group"}
    shown = {k: v for k, v in row.items() if k not in hidden and v not in (None, [])}
    if "media" in shown:
        [content] = read_media([row["media"]])
        shown["media"] = {k: v for k, v in shown["media"].items() if v is not None}
        if isinstance(content, bytes):
            shown["media"]["content"] = describe_bytes(content)
    return dict(_shorten(shown))


def _format_media(media: dict[str, Any]) -> str:
    """Return place and content of a media file: ``"/data/1.jpg (4,364 bytes, JPEG)"``."""
    # The number of a row of Parquet is shown as the example's row, from 1.
    hidden = ("path", "content", "row_number")
    place = "".join(f", {key} {value}" for key, value in media.items() if key not in hidden)
    return f"{media['path']}{place} ({media.get('content', 'unreadable')})"


def _shorten(value: Any) -> Any:
    """Return a value with long strings and lists cut, and bytes as their size and format."""
    if isinstance(value, bytes):
        return describe_bytes(value)
    if isinstance(value, dict):
        return {_shorten(name): _shorten(inner) for name, inner in value.items()}
    if isinstance(value, str):
        return to_printable(shorten_text(value, 200))
    return [_shorten(v) for v in value[:5]] if isinstance(value, list) else value
