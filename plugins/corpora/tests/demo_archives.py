"""Archives of the demo's corpora that a test writes, or the real ones, and the rows in them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.data.corpora import Corpus
from pipelines.data.corpora.base import Archive, RejectedRow, SourceArchives
from skillnet_corpora.demo.strokes import StrokesCorpus
from tests.helpers.archive_files import tarred

#: Archives of a checkout after ``skillnet fetch``.
REAL_ARCHIVES = Path(__file__).parents[3] / "runs" / "archives"


def read_rows(corpus: Corpus, directory: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return rows and reasons of rejected rows, by key."""
    rows: dict[str, dict[str, Any]] = {}
    rejected: dict[str, str] = {}
    for row in corpus.rows(SourceArchives(directory, corpus.archives)):
        if isinstance(row, RejectedRow):
            rejected[row.key] = row.reason
        else:
            rows[row["key"]] = row
    return rows, rejected


def write_archive(directory: Path, start: str, data: bytes, archives: tuple[Archive, ...]) -> None:
    """Write an archive under the name that a corpus expects."""
    (name,) = [archive.file for archive in archives if archive.file.startswith(start)]
    (directory / name).write_bytes(data)


def require_real_archives(corpus: Corpus) -> Path:
    """Return the directory of the downloads, or skip the test where one of them is missing."""
    for archive in corpus.archives:
        if not (REAL_ARCHIVES / archive.file).is_file():
            pytest.skip(f"{archive.file} is not downloaded: skillnet fetch {corpus.name}")
    return REAL_ARCHIVES


def made_classification() -> dict[str, dict[str, Any]]:
    """Return a subject tree: 16 classes of 24 subtrees with three headings each."""
    entries: dict[str, dict[str, Any]] = {}

    def add(code: str, name: str, level: int, up: str | None) -> None:
        entries[code] = {"name": name, "level": level, "up_level": up}

    for letter in "BDFGHJKOPQRSTUVZ":
        add(letter, f"{letter}类名称", 1, None)
        add(letter + "1", f"{letter}大类名称", 2, letter)
        for sub in range(24):
            root = f"{letter}1{sub:02d}"
            add(root, f"{letter}子树{sub}号", 3, letter + "1")
            for leaf in range(3):
                add(f"{root}.{leaf}", f"{letter}{sub}叶子{leaf}", 4, root)
    entries["B100.0"]["name"] = "短"
    entries["B100.1"]["name"] = entries["D100.1"]["name"] = "两处都有"
    entries["F100.1"]["name"] = entries["F100.2"]["name"] = "同类重复"
    return entries


STROKE_NAMES = {"j": "横", "s": "竖", "z": "横折"}


def write_stroke_archives(
    folder: Path,
    order: Mapping[str, str],
    drawn: Mapping[str, int],
    radicals: Mapping[str, Sequence[int]] | None = None,
) -> SourceArchives:
    """Write both archives.

    Args:
        folder: to write to.
        order: character -> letters of its strokes, keys of ``STROKE_NAMES``.
        drawn: character -> number of its pen paths.
        radicals: character -> numbers of the strokes of its radical, from 0.
    """
    names = {letter: {"name": name} for letter, name in STROKE_NAMES.items()}
    script = f"f(JSON.parse('{json.dumps(order)}'),JSON.parse('{json.dumps(names)}'))"
    files = {}
    for char, count in drawn.items():
        paths = [[[100, 800 - 90 * line], [900, 800 - 90 * line]] for line in range(count)]
        entry: dict[str, object] = {"medians": paths}
        if radicals and char in radicals:
            entry["radStrokes"] = list(radicals[char])
        files[f"package/draw/{char}.json"] = json.dumps(entry).encode()
    content = {
        "cnchar-order": tarred({"package/cnchar.order.min.js": script.encode()}),
        "cnchar-data": tarred(files),
    }
    for start, data in content.items():
        write_archive(folder, start, data, StrokesCorpus.archives)
    return SourceArchives(folder, StrokesCorpus.archives)
