"""Files that no reader reads, so that a command can name them with the remedy.

:func:`describe_unread_format` names the format of a path; :class:`UnreadFiles` collects annotation
files beside the files that are read. :func:`missing_format_error` names archives that must be
unpacked first.
"""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice

from pipelines.data.corpora.base import is_empty_folder, list_archives, unpack_hint
from pipelines.data.io.directory import DAMAGE_ERRORS, SourceDirectory
from skillnet_platform.errors import UserError

_AS_PARQUET = "write its rows as Parquet, or as JSON lines beside their media files"
_AS_CSV = "save it as CSV"
_PICKLED = "it can run code when it is loaded. Where you trust it, " + _AS_PARQUET
#: Endings of files -> (format, remedy).
_UNREAD_FORMATS = {
    **dict.fromkeys((".xlsx", ".xls", ".xlsm", ".xlsb"), ("Excel", _AS_CSV)),
    **dict.fromkeys((".ods", ".numbers"), ("a spreadsheet", _AS_CSV)),
    **dict.fromkeys(
        (".sqlite", ".sqlite3", ".db", ".db3", ".duckdb"),
        ("SQLite or DuckDB", 'save a table as CSV (sqlite3 FILE -header -csv "SELECT * FROM …")'),
    ),
    **dict.fromkeys((".tfrecord", ".tfrecords"), ("TFRecord", _AS_PARQUET)),
    **dict.fromkeys((".mdb", ".lmdb"), ("LMDB", _AS_PARQUET)),
    **dict.fromkeys(
        (".pkl", ".pickle", ".pt", ".pth", ".joblib", ".dill"), ("a pickle", _PICKLED)
    ),
    **dict.fromkeys((".npz", ".npy"), ("NumPy", _AS_PARQUET)),
    ".mat": ("MATLAB", _AS_PARQUET),
    **dict.fromkeys((".h5", ".hdf5", ".hdf"), ("HDF5", _AS_PARQUET)),
    **dict.fromkeys(
        (".feather", ".arrow", ".ipc"),
        ("Arrow or Feather", "save it as Parquet (pyarrow.feather.read_table, write_table)"),
    ),
    ".orc": ("ORC", _AS_PARQUET),
    ".avro": ("Avro", _AS_PARQUET),
    **dict.fromkeys((".rec", ".recordio"), ("RecordIO", _AS_PARQUET)),
    **dict.fromkeys((".msgpack", ".beton", ".mds"), ("a packed format", _AS_PARQUET)),
    ".sav": ("SPSS", _AS_CSV),
    ".dta": ("Stata", _AS_CSV),
    **dict.fromkeys((".rds", ".rda", ".rdata"), ("R data", _AS_CSV)),
    ".zst": ("Zstandard", "unpack it (unzstd), or compress it with gzip"),
    **dict.fromkeys((".bz2", ".xz", ".lz4"), ("compressed", "unpack it, or compress it with gzip")),
    "-ubyte": ("IDX", "write its images as files in folders of classes"),
}  # fmt: skip
#: Folders whose files are searched, their levels, and files that are looked at.
_SEARCHED_LEVELS, _SEARCHED_FILES = 2, 2000
_DETECTION_NAME = re.compile(
    r"(instances|person_keypoints|panoptic|stuff)_\w+\.json|.*\.coco\.json"
)
#: A box of YOLO: class, and four or more numbers.
_YOLO_LINE = re.compile(rb"\d+( +-?[0-9.eE+-]+){4,}\s*")
BOXES = (
    "boxes and masks are not read. To classify the images, write metadata.csv with the fields "
    "file_name and label; captions of COCO (captions_….json) are read"
)

#: Endings of files that can hold labels, captions or transcripts.
ANNOTATION_SUFFIXES = (
    ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt", ".token", ".parquet", ".xml",
    ".lst", ".lab", ".textgrid", ".srt", ".vtt", *_UNREAD_FORMATS,
)  # fmt: skip
#: Windows writes it into folders of images.
_THUMBNAILS = "thumbs.db"
#: Names of texts about a corpus.
_DOCUMENTATION = ("readme", "license", "licence", "changelog", "changes", "about", "requirements")
#: Files of a folder that are named; more of them are counted. COCO has six beside its captions.
_MAX_NAMED = 8


def is_annotation_name(file: str) -> bool:
    """Return whether a file can hold annotations, by its name."""
    name = file.rpartition("/")[2].lower()
    is_other = name.startswith(_DOCUMENTATION) or name == _THUMBNAILS
    return name.removesuffix(".gz").endswith(ANNOTATION_SUFFIXES) and not is_other


class UnreadFiles:
    """Files by folder and ending. A folder can hold one file per image, so few names are kept."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], list[str]] = {}
        self._counts = Counter[tuple[str, str]]()

    def __bool__(self) -> bool:
        return bool(self._counts)

    def add(self, file: str) -> None:
        """Add a file by its path."""
        folder, slash, name = file.rpartition("/")
        group = (folder + slash, name.lower().removesuffix(".gz").rpartition(".")[2])
        self._counts[group] += 1
        kept = self._names.setdefault(group, [])
        if len(kept) < _MAX_NAMED:
            kept.append(file)

    def describe(self) -> str:
        """Return the files as ``"a.json, b.json, labels/*.xml (5,011 files)"``."""
        parts = []
        for (folder, extension), count in self._counts.items():
            known = _UNREAD_FORMATS.get(f".{extension}")
            remedy = f"{known[0]}: {known[1]}" if known else ""
            if count <= _MAX_NAMED:
                shown = f" ({remedy})" if remedy else ""
                parts += [f"{name}{shown}" for name in self._names[folder, extension]]
            else:
                shown = f"; {remedy}" if remedy else ""
                parts.append(f"{folder}*.{extension} ({count:,} files{shown})")
        return ", ".join(parts)


def refuse_unread_table(source: SourceDirectory) -> None:
    """Refuse a file of a format that is not read, and a table whose files hold removed rows.

    Args:
        source: the path that was given.

    Raises:
        UserError: it is one of them; the message has the remedy.
    """
    if source.is_file:
        name = source.name
        problem = _describe_name(name)
        if _DETECTION_NAME.fullmatch(name.lower()):
            problem = f"COCO with boxes or masks; {BOXES}"
    else:
        problem = _describe_versioned_table(source)
    if problem:
        raise UserError(f"{source.uri}: {problem}")


def refuse_unread_layout(source: SourceDirectory) -> None:
    """Refuse a directory of Kaldi, YOLO or boxes of COCO, whose files would be misunderstood.

    Args:
        source: the directory, in which no table of rows was found.

    Raises:
        UserError: it is one of them; the message has the remedy.
    """
    if problem := _describe_layout(source):
        raise UserError(f"{source.uri}: {problem}")


def describe_unread_format(source: SourceDirectory) -> str:
    """Return the format of a path that no reader reads, and the remedy; "" if it is not known.

    Args:
        source: the path that was given.
    """
    if source.is_file:
        return _describe_name(source.name)
    if problem := _describe_versioned_table(source) or _describe_layout(source):
        return problem
    return next(filter(None, map(_describe_name, _list_files(source))), "")


def _describe_name(file: str) -> str:
    """Return the format of a file by its name, and the remedy; "" for another one."""
    name = file.rpartition("/")[2].lower().removesuffix(".gz")
    # Parts of a set are numbered behind the ending: train.tfrecord-00000-of-00004.
    name = re.sub(r"-\d+-of-\d+$", "", name)
    if name == _THUMBNAILS:
        return ""
    known = next((each for end, each in _UNREAD_FORMATS.items() if name.endswith(end)), None)
    return f"{file} is not read ({known[0]}): {known[1]}" if known else ""


def _list_files(source: SourceDirectory) -> Iterator[str]:
    return (e.name for e in islice(source.walk(depth=_SEARCHED_LEVELS), _SEARCHED_FILES))


def _describe_versioned_table(source: SourceDirectory) -> str:
    is_delta, kind = source.exists("_delta_log"), "a Delta table"
    if not is_delta and source.exists("metadata") and source.exists("data"):
        kind = "an Iceberg table"
        inside = [entry.name for entry in source.entries("metadata")]
        is_delta = any(name.endswith(".metadata.json") for name in inside)
    if not is_delta:
        return ""
    return (
        f"{kind}, whose files also hold removed rows, is not read. Write its current version as "
        "Parquet: one file per split, such as train.parquet"
    )


def _describe_layout(source: SourceDirectory) -> str:
    for file in _list_files(source):
        folder, slash, name = file.rpartition("/")
        if name == "wav.scp" and source.exists(f"{folder}{slash}text"):
            return (
                f"Kaldi ({file}) is not read. Write metadata.jsonl into the folder of each split, "
                'with a line {"file_name": …, "transcription": …} per utterance'
            )
        if _DETECTION_NAME.fullmatch(name.lower()):
            return f"COCO with boxes or masks ({file}): {BOXES}"
        if "labels" in folder.split("/") and name.endswith(".txt") and _is_yolo(source, file):
            return f"YOLO ({file}): {BOXES}"
    return ""


def _is_yolo(source: SourceDirectory, file: str) -> bool:
    try:
        lines = list(islice(source.lines(file), 5))
    except DAMAGE_ERRORS:
        return False
    return bool(lines) and all(_YOLO_LINE.fullmatch(line) for _, line in lines)


def missing_format_error(source: SourceDirectory, reason: str) -> UserError:
    """Return the error for a path that does not hold a format, with a hint about archives.

    Args:
        source: the path that was given.
        reason: which file or folder is missing.
    """
    if not list_archives(source) and (problem := describe_unread_format(source)):
        return UserError(f"{source.uri}: {problem}")
    empty = "an empty folder; " if is_empty_folder(source) else ""
    return UserError(f"{source.uri}: {empty}{reason}{unpack_hint(source)}")
