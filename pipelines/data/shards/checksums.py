"""Verification of local shards by hash before they are read, once per change of a file.

A verified shard is recorded in ``.verified.json`` beside the shards, with size, time of the last
change and inode. While all three are equal, the shard is not hashed again. So the next run detects
a bit that a program or a copy changed. A bit that the disk itself changed is detected by
``skillnet verify``, which ignores the records.
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
#: Each thread hashes on one core. More threads would be limited by the disk.
THREADS = 4


def check_shards(directory: Path, shards: Sequence[Mapping[str, Any]]) -> None:
    """Hash the shards that were not verified before.

    Args:
        directory: directory of the corpus.
        shards: their entries in its manifest.

    Raises:
        UserError: a shard is missing or was altered; names the first one.
    """
    known = _read_verified(directory)
    new = [shard for shard in shards if known.get(shard["file"]) != _read_state(directory, shard)]
    if not new:
        return
    with ThreadPoolExecutor(min(THREADS, len(new))) as pool:
        verified = dict(
            zip(
                (shard["file"] for shard in new),
                pool.map(lambda shard: _hash_shard(directory, shard), new),
                strict=True,
            )
        )
    # Another process may have recorded other shards meanwhile. A lost record only costs time.
    with (
        contextlib.suppress(OSError, UserError),
        atomic_write(directory / VERIFIED_NOTES, "w") as stream,
    ):
        json.dump(_read_verified(directory) | verified, stream, indent=1, sort_keys=True)


def _hash_shard(directory: Path, shard: Mapping[str, Any]) -> list[Any]:
    path = directory / shard["file"]
    # The state is read before hashing: a later change of the file then invalidates the record.
    before = _read_state(directory, shard)
    sha256 = sha256_file(path)
    if sha256 != shard["sha256"]:
        raise UserError(
            f"{path}: this shard was altered: sha256 {sha256}, expected {shard['sha256']}. "
            f"Delete {directory} and run `skillnet prepare {directory.name}`."
        )
    return before


def _read_state(directory: Path, shard: Mapping[str, Any]) -> list[Any]:
    path = directory / shard["file"]
    try:
        info = path.stat()
    except FileNotFoundError:
        raise UserError(
            f"{path}: this shard is missing. Run `skillnet prepare {directory.name}`."
        ) from None
    return [info.st_size, info.st_mtime_ns, info.st_ino, shard["sha256"]]


def _read_verified(directory: Path) -> dict[str, Any]:
    try:
        verified = json.loads((directory / VERIFIED_NOTES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return verified if isinstance(verified, dict) else {}
