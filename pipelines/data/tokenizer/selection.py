"""Selection of the tokenizer for external corpora: the existing one, a given one, or a new one.

A directory of prepared corpora has one tokenizer, because one model reads them all. An existing
tokenizer therefore stays: later corpora are tokenized with it, and text that its vocabulary lacks
is encoded as bytes.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pipelines.data.shards.format import MANIFEST
from pipelines.data.tokenizer import training as tokenizers
from pipelines.data.tokenizer.conversion import convert_tokenizer
from pipelines.data.tokenizer.training import TOKENIZER_MANIFEST
from skillnet_files.kernel_lock import lock_file
from skillnet_platform import config, storage
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories
from skillnet_platform.storage.location import Location, join_location, read_if_exists

#: Value of ``--tokenizer``: train a new tokenizer on these corpora, even if one exists.
LEARN = "learn"
#: Key of the tokenizer's manifest: names of its training corpora, or of the file it was copied
#: from. The tokenizer of the built-in corpora has no such key.
TRAINED_ON = "trained_on"
#: Key of the tokenizer's manifest: digest of all that decides a trained tokenizer.
FINGERPRINT = "fingerprint"
LOCK = ".tokenizer.lock"


@dataclass(frozen=True)
class TokenizerPolicy:
    """Rule by which external corpora get a tokenizer.

    Args:
        retrain: train a new tokenizer on them, even if one exists.
        vocabulary: number of tokens of a new tokenizer.
        lock: lock on the tokenizer of the directory; ``None`` if no other process can use it.
    """

    retrain: bool = False
    vocabulary: int = tokenizers.VOCABULARY_SIZE
    lock: "TokenizerLock | None" = None


class TokenizerLock:
    """Lock on a directory's tokenizer: shared while tokenizing, exclusive while replacing it.

    It ensures that all corpora in the directory use one tokenizer.
    """

    def __init__(self, data: Path, lock: IO[bytes] | None) -> None:
        self._data, self._lock = data, lock

    def exclusive(self) -> None:
        """Make the lock exclusive, so that this process may replace the tokenizer.

        Raises:
            UserError: another process prepares corpora with the tokenizer.
        """
        self._acquire(
            False,
            "prepares corpora with the tokenizer of this directory, which this one would replace",
        )

    def _acquire(self, shared: bool, reason: str) -> None:
        if self._lock is not None and not lock_file(self._lock, shared=shared):
            raise UserError(
                f"{self._data}: another process {reason}. Wait for it, or give --data another "
                "directory."
            )


@contextlib.contextmanager
def lock_tokenizer(data: Path) -> Iterator[TokenizerLock]:
    """Hold a shared lock on a directory's tokenizer while the block runs.

    Args:
        data: directory of prepared corpora; created if it is missing.

    Raises:
        UserError: another process replaces the tokenizer.
    """
    try:
        data.mkdir(parents=True, exist_ok=True)
        lock = (data / LOCK).open("ab")
    except OSError:  # a read-only directory is reported by the code that writes to it
        yield TokenizerLock(data, None)
        return
    with lock:
        held = TokenizerLock(data, lock)
        held._acquire(True, "replaces the tokenizer of this directory now")
        yield held


def install_tokenizer(
    path: str, tokenizer: Path, manifest: Path, replaced: set[str], data: Location
) -> None:
    """Convert a given tokenizer and write it to a directory of prepared corpora.

    Args:
        path: a ``tokenizer.json``, or the directory of a saved transformers tokenizer.
        tokenizer: file to write.
        manifest: manifest of the tokenizer to write.
        replaced: names of corpora that are prepared again in this run.
        data: directory or URI of the prepared corpora.

    Raises:
        UserError: the tokenizer cannot be used, or other corpora depend on the existing one.
    """
    text = convert_tokenizer(path)
    sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()
    if not tokenizer.is_file() or storage.sha256_file(tokenizer) != sha256:
        check_replaceable(tokenizer, replaced, data)
        with storage.atomic_write(tokenizer, "w") as stream:
            stream.write(text)
    storage.write_json(manifest, {TRAINED_ON: [Path(path).name], "sha256": sha256})


def check_replaceable(tokenizer: Path, replaced: set[str], data: Location) -> None:
    """Check that no other corpus depends on the existing tokenizer.

    Args:
        tokenizer: existing tokenizer; for an object store, its local copy.
        replaced: names of corpora that are prepared again in this run.
        data: directory or URI of the prepared corpora.

    Raises:
        UserError: names the corpora that depend on it.
    """
    if others := _corpora_using(tokenizer, replaced, data):
        raise UserError(
            f"{join_location(data, tokenizer.name)}: {', '.join(others)} there are prepared with "
            "it; a model reads corpora of one tokenizer. Give another --data, or prepare them "
            "again in the same call"
        )


def is_leftover_tokenizer(tokenizer: Path, data: Location) -> bool:
    """Return whether an interrupted run left this tokenizer.

    Such a tokenizer was trained on external corpora, and no prepared corpus uses it.

    Args:
        tokenizer: existing tokenizer; for an object store, its local copy.
        data: directory or URI of the prepared corpora.
    """
    try:
        manifest = storage.read_json(tokenizer.with_name(TOKENIZER_MANIFEST))
    except UserError:
        return False
    trained = isinstance(manifest, dict) and {TRAINED_ON, FINGERPRINT} <= manifest.keys()
    return trained and not _corpora_using(tokenizer, set(), data)


def _corpora_using(tokenizer: Path, excluded: set[str], data: Location) -> list[str]:
    """Return the names of prepared corpora that use a tokenizer, without excluded ones."""
    if not tokenizer.is_file():
        return []
    sha256 = storage.sha256_file(tokenizer)
    return [
        name
        for name in _list_folders(data)
        if name not in excluded and _tokenizer_of(join_location(data, name, MANIFEST)) == sha256
    ]


def _list_folders(data: Location) -> list[str]:
    if isinstance(data, str):
        return directories.list_folders(data)
    return sorted(entry.name for entry in data.iterdir() if entry.is_dir())


def _tokenizer_of(manifest: Location) -> str | None:
    """Return the SHA-256 of a corpus' tokenizer; ``None`` if the folder is not a corpus."""
    try:
        recorded = json.loads(read_if_exists(manifest) or b"{}")
        return str(recorded["tokenizer"]["sha256"])
    except (ValueError, KeyError, TypeError):
        return None


def is_custom_tokenizer(manifest: Path) -> bool:
    """Return whether the existing tokenizer is not that of the built-in corpora.

    Args:
        manifest: manifest of the tokenizer.
    """
    try:
        return TRAINED_ON in storage.read_json(manifest)
    except UserError:
        return False


def matches_fingerprint(tokenizer: Path, fingerprint: dict[str, Any]) -> bool:
    """Return whether the existing tokenizer was trained on exactly these inputs.

    Args:
        tokenizer: existing tokenizer.
        fingerprint: all that decides a trained tokenizer.
    """
    try:
        entry = storage.read_json(tokenizer.with_name(TOKENIZER_MANIFEST))
        same = entry[FINGERPRINT] == config.digest_config(fingerprint)
        return bool(same and entry["sha256"] == storage.sha256_file(tokenizer))
    except (UserError, OSError, KeyError, TypeError):
        return False
