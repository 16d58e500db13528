"""Lines of scores that every reader returns, and helpers for JSON files of other tools."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from skillnet_evidence.errors import EvidenceError

#: Bytes of one file of results, or of one member of an archive, once unpacked.
MAX_BYTES = 2**30


#: Columns that the readers of other tools fill.
PEER_COLUMNS = ("system", "seed", "task", "row", "score", "unit", "weight", "metric", "errors")


@dataclass(frozen=True)
class ReadOptions:
    """What a reader takes from files of results.

    Args:
        file_format: name of a reader; "" finds it by the content.
        metrics: metrics of rows, the preferred one first; empty takes the first that a task has.
        unit: key of a row's document or metadata whose value is its unit; "task" makes the tasks
            of a group in lm-eval its units.
        system: key of a run's description whose value names the system; "" takes the model.
        tasks: tasks that count; empty takes all.
    """

    file_format: str = ""
    metrics: Sequence[str] = ()
    unit: str = ""
    system: str = ""
    tasks: Sequence[str] = ()


class ScoreLines(NamedTuple):
    """Lines of scores as texts, with the place of each for messages.

    Args:
        source: what was read, for messages about all of it.
        file_format: name of the reader.
        columns: names of the columns.
        rows: texts of each line.
        places: file and line, or key, of each.
        notes: sentences about what the reader chose or left out.
    """

    source: str
    file_format: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    places: Sequence[str]
    notes: Sequence[str] = ()


class PeerLines:
    """Lines that a reader collects from another tool's results."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []
        self.places: list[str] = []
        self.notes: dict[str, list[str]] = {}

    def add(self, place: str, values: Mapping[str, Any]) -> None:
        """Add a line.

        Args:
            place: file and line, or key.
            values: column -> value; others take the default of the column.
        """
        texts = ["" if values.get(name) is None else str(values[name]) for name in PEER_COLUMNS]
        self.rows.append(texts)
        self.places.append(place)

    def note(self, text: str, name: str) -> None:
        """Keep a sentence about one of several names, which are listed before it."""
        names = self.notes.setdefault(text, [])
        if name not in names:
            names.append(name)

    def finish(self, *notes: str) -> ScoreLines:
        """Return all lines.

        Args:
            notes: sentences about all of them.
        """
        texts = [f"{', '.join(names)}: {text}." for text, names in self.notes.items()]
        return ScoreLines("", "", PEER_COLUMNS, self.rows, self.places, [*notes, *texts])


def walk_files(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder that may have scores, in the order of their names."""
    for root, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.endswith((".csv", ".parquet", ".jsonl", ".json", ".eval", ".db")):
                yield Path(root, name)


def list_files(sources: Iterable[str], *suffixes: str) -> Iterator[tuple[Path, bool]]:
    """Yield the files of sources, and whether each was named itself rather than its folder."""
    for source in sources:
        path = Path(source)
        if path.is_dir():
            yield from ((file, False) for file in walk_files(path) if file.suffix in suffixes)
        else:
            yield path, True


def load_json(path: Path) -> Any:
    """Return the content of a JSON file of at most ``MAX_BYTES``."""
    with path.open(encoding="utf-8", errors="replace") as stream:
        return parse_json(stream.read(MAX_BYTES + 1), str(path))


def parse_json(text: str | bytes, place: str) -> Any:
    """Return the value of a text of JSON."""
    if len(text) > MAX_BYTES:
        raise EvidenceError(f"{place}: more than {MAX_BYTES // 2**20} MiB of JSON")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EvidenceError(f"{place}: not JSON ({error})") from None


def name_format(tree: Any) -> str:
    """Return the format of a JSON file by its keys; "" for another one."""
    if isinstance(tree, dict):
        for name, keys in (
            ("mteb", {"task_name", "scores"}),
            ("mteb", {"mteb_dataset_name"}),
            ("inspect", {"eval", "status"}),
            ("lm-eval", {"results", "configs"}),
        ):
            if keys <= set(tree):
                return name
    return ""


def find_value(tree: Any, key: str) -> Any:
    """Return the value at a key, or at keys joined by dots; None if it is absent."""
    for name in [key] if isinstance(tree, dict) and key in tree else key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def require_value(tree: Any, key: str, place: str, option: str) -> str:
    """Return the text or number at a key as text.

    Args:
        tree: value of JSON.
        key: name, or names joined by dots.
        place: file and line, for the message.
        option: option that named the key.
    """
    value = find_value(tree, key)
    if isinstance(value, str | int | float):
        return str(value)
    known = ", ".join(sorted(tree)) if isinstance(tree, dict) and tree else "none"
    raise EvidenceError(f"{place}: {option} {key}: no text or number; keys: {known}")


def require_dict(tree: Any, place: str) -> dict[str, Any]:
    """Return a value of JSON that must be an object."""
    if not isinstance(tree, dict):
        raise EvidenceError(f"{place}: expected a JSON object, got {type(tree).__name__}")
    return tree


def forbid_options(options: ReadOptions, name: str, **reasons: str) -> None:
    """Raise EvidenceError for an option that a format has no use for.

    Args:
        options: all options.
        name: noun of the format.
        reasons: option -> reason.
    """
    for option, reason in reasons.items():
        if getattr(options, option):
            raise EvidenceError(f"--{option.removesuffix('s')}: {name} {reason}; leave it out")
