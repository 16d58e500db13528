"""Shards are compared with the manifest's hashes before they are read, and paid for once.

What was found whole is noted beside the shards, in ``.verified.json``, with size, time of the last
change and inode: a shard for which all three still hold is not hashed again. So a bit that a
program or a copy turned over is found by the next run; one that the disk itself turned over
afterwards, by ``skillnet verify``, which asks no notes.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from skillnet_platform.errors import UserError
from skillnet_platform.storage import atomic_write, sha256_file

VERIFIED_NOTES = ".verified.json"
#: Hashing is bound by one core each, or by the disk.
THREADS = 4


def check_shards(directory: Path, shards: Sequence[Mapping[str, Any]]) -> None:
    """Hash the shards that were not found whole before.

    Args:
        directory: of the corpus.
        shards: their entries in its manifest.

    Raises:
        UserError: a shard is missing or was altered; names the first one.
    """
    known = _read_notes(directory)
    new = [shard for shard in shards if known.get(shard["file"]) != _state(directory, shard)]
    if not new:
        return
    with ThreadPoolExecutor(min(THREADS, len(new))) as pool:
        whole = dict(
            zip(
                (shard["file"] for shard in new),
                pool.map(lambda shard: _hashed(directory, shard), new),
                strict=True,
            )
        )
    # Another process may have noted others meanwhile. Notes that cannot be kept only cost time.
    with (
        contextlib.suppress(OSError, UserError),
        atomic_write(directory / VERIFIED_NOTES, "w") as stream,
    ):
        json.dump(_read_notes(directory) | whole, stream, indent=1, sort_keys=True)


def _hashed(directory: Path, shard: Mapping[str, Any]) -> list[Any]:
    path = directory / shard["file"]
    before = _state(directory, shard)
    found = sha256_file(path)
    if found != shard["sha256"]:
        raise UserError(
            f"{path}: this shard was altered: sha256 {found}, expected {shard['sha256']}. "
            f"Delete {directory} and run `skillnet prepare {directory.name}`."
        )
    return before


def _state(directory: Path, shard: Mapping[str, Any]) -> list[Any]:
    path = directory / shard["file"]
    try:
        found = path.stat()
    except FileNotFoundError:
        raise UserError(
            f"{path}: this shard is missing. Run `skillnet prepare {directory.name}`."
        ) from None
    return [found.st_size, found.st_mtime_ns, found.st_ino, shard["sha256"]]


def _read_notes(directory: Path) -> dict[str, Any]:
    try:
        notes = json.loads((directory / VERIFIED_NOTES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return notes if isinstance(notes, dict) else {}
