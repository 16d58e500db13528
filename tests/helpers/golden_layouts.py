"""What the readers make of a folder, as JSON: the cases of ``tests/golden/readers``."""

import csv
import gzip
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.data.corpora import detect_reader, open_external_corpus
from pipelines.data.corpora.base import RejectedRow, SourceArchives
from pipelines.data.io.directory import SourceDirectory
from pipelines.data.io.media import read_media
from skillnet_platform import console
from skillnet_platform.errors import UserError
from tests.helpers.archive_files import tarred

#: Files of cases, one per subject.
SUBJECTS = sorted((Path(__file__).parents[1] / "golden" / "readers").glob("*.json"))
#: Columns of a row that a case lists if they have a value.
SHOWN = ("split", "key", "label", "label_set", "value", "text", "code", "captions", "unit", "row")


def write_files(home: Path, files: dict[str, Any]) -> Path:
    """Write files: a text, rows in the form of the ending, or the members of a tar.

    A file of None is a medium that no reader opens; rows without an ending are a saved dataset.
    Rows can have ``features``, as the library ``datasets`` describes columns.
    """
    for name, content in files.items():
        path = home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            write_rows(path, content)
        elif isinstance(content, dict) and "features" in content:
            write_rows(path, content["rows"], content["features"])
        elif isinstance(content, dict):
            packed = tarred({member: text.encode() for member, text in content.items()})
            path.write_bytes(gzip.decompress(packed) if name.lower().endswith("tar") else packed)
        else:
            path.write_text("not looked at" if content is None else content, encoding="utf-8")
    return home


def write_rows(
    path: Path, rows: list[dict[str, Any]], features: dict[str, Any] | None = None
) -> None:
    """Write rows as Parquet, CSV, JSON lines, or with ``save_to_disk`` if there is no ending."""
    if path.suffix == ".parquet":
        table = pa.Table.from_pylist(rows)
        described = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(table.replace_schema_metadata(described if features else None), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    else:
        kinds = datasets.Features.from_dict(features) if features else None
        datasets.Dataset.from_list(rows, kinds).save_to_disk(str(path))


def read_cases(file: Path) -> dict[str, dict[str, Any]]:
    """Return name -> place, options, files and expected outcome of each case of a subject."""
    cases: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return cases


def describe_layout(home: Path, place: str, options: dict[str, Any]) -> Any:
    """Return detection, schema, classes, rows, rejected rows and messages of a folder.

    Args:
        home: folder of the corpus; messages have ``{home}`` for it.
        place: READER:PATH relative to it.
        options: settings that the reader gets.
    """

    def relative(value: Any) -> Any:
        if isinstance(value, str):
            return value.replace(str(home), "{home}")
        return [relative(each) for each in value] if isinstance(value, list) else value

    with mock.patch.object(console, "print_warning") as warn:
        reader, _, path = place.partition(":")
        below = f"{home}/{path}".rstrip("/")
        outcome: dict[str, Any] = {}
        try:
            found = detect_reader(SourceDirectory(below))
            outcome["detected"] = relative(list(found)) if found else None
            given = {k: v.format(home=home) if k == "media" else v for k, v in options.items()}
            corpus: Any = open_external_corpus("mine", f"{reader}:{below}", given)
            outcome["task"], outcome["named"] = corpus.task, sorted(corpus.named_splits or ())
            outcome["annotations"] = list(corpus.annotations_present)
            rows = list(corpus.rows(SourceArchives.none()))
            kept = [row for row in rows if not isinstance(row, RejectedRow)]
            outcome["rows"] = [
                {name: relative(row[name]) for name in SHOWN if row.get(name) not in (None, [])}
                | ({"media": _describe_media(row["media"], relative)} if row.get("media") else {})
                for row in kept
            ]
            reasons = Counter(row.reason for row in rows if isinstance(row, RejectedRow))
            outcome["rejected"] = dict(sorted(reasons.items()))
            outcome["errors"] = sum(isinstance(r, RejectedRow) and r.counts_as_error for r in rows)
            outcome["columns"] = {
                each: corpus.schema(each).names for each in corpus.unlabelled_splits
            }
            corpus.extra_sources()
            outcome["unread"] = corpus.describe_unread()
            corpus.scan_labels()
            outcome["labels"] = list(corpus.labels)
        except UserError as error:
            outcome["error"] = relative(str(error))
    outcome["warnings"] = [relative(call.args[0]) for call in warn.call_args_list]
    return {key: value for key, value in outcome.items() if value not in (None, [], {}, "", 0)}


def _describe_media(reference: dict[str, Any], relative: Any) -> str:
    """Return the file of a medium, with the content of a part of a file."""
    if reference["offset"] is None and reference["member"] is None:
        return str(relative(reference["path"]))
    (content,) = read_media([reference])
    assert isinstance(content, bytes), content
    return f"{relative(reference['path'])}: {content.decode()}"


def _write_cases(file: Path) -> None:
    """Write the outcomes of a file of cases again, a row per line."""
    cases = read_cases(file)
    for case in cases.values():
        with tempfile.TemporaryDirectory() as folder:
            home = write_files(Path(folder).resolve(), case["files"])
            case["expected"] = describe_layout(home, case["place"], case["options"])
    file.write_text(_format(cases, 3) + "\n", encoding="utf-8")


def _format(value: Any, depth: int, indent: str = "") -> str:
    """Return JSON with the entries of the outer levels on lines of their own."""
    inner = indent + " "
    if depth == 0 and isinstance(value, list) and value and isinstance(value[0], dict | str):
        lines = [inner + json.dumps(each, ensure_ascii=False) for each in value]
        return "[\n" + ",\n".join(lines) + f"\n{indent}]" if len(lines) > 1 else _plain(value)
    if depth == 0 or not isinstance(value, dict) or not value:
        return _plain(value)
    lines = [
        f"{inner}{_plain(key)}: {_format(each, depth - 1, inner)}" for key, each in value.items()
    ]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    for subject in SUBJECTS:
        _write_cases(subject)
