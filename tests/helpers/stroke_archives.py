"""Archives of ``strokes`` with a few characters of horizontal pen paths."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.data.corpora.base import SourceArchives
from pipelines.data.corpora.builtin.strokes import StrokesCorpus
from tests.helpers.archive_files import tarred

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
        (name,) = [a.file for a in StrokesCorpus.archives if a.file.startswith(start)]
        (folder / name).write_bytes(data)
    return SourceArchives(folder, StrokesCorpus.archives)
