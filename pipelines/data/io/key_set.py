"""Exact set of keys whose memory does not grow with their number."""

import sqlite3
import tempfile
from hashlib import blake2b
from pathlib import Path
from typing import Self

#: Digests that are kept in memory. More of them are moved to a file.
MAX_KEYS_IN_MEMORY = 1 << 16


class ScratchDatabase:
    """Database file that nobody reads after this process. Leave its ``with`` block to remove it.

    Args:
        table: SQL statement that creates the table.
    """

    def __init__(self, table: str) -> None:
        self._table = table
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.database: sqlite3.Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.database is not None:
            self.database.close()
        if self._folder is not None:
            self._folder.cleanup()

    def open(self) -> sqlite3.Connection:
        """Return the database; create its file at the first call, without a journal."""
        if self.database is None:
            self._folder = tempfile.TemporaryDirectory(prefix="skillnet-keys-")
            self.database = sqlite3.connect(Path(self._folder.name) / "keys", isolation_level=None)
            for setting in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -16384"):
                self.database.execute(f"PRAGMA {setting}")
            self.database.execute(self._table)
        return self.database


class KeySet(ScratchDatabase):
    """Set of any number of keys.

    The set stores digests of 128 bits: among 100 million keys, two different keys share a digest
    with a probability below 1e-22.

    Args:
        in_memory: digests that are kept in memory.
    """

    def __init__(self, in_memory: int = MAX_KEYS_IN_MEMORY) -> None:
        super().__init__("CREATE TABLE seen (key BLOB PRIMARY KEY) WITHOUT ROWID")
        self._recent: set[bytes] = set()
        self._in_memory = in_memory

    def add(self, key: str) -> bool:
        """Add a key; return ``False`` if the set had it already."""
        digest = digest_key(key)
        if digest in self._recent or self._is_in_file(digest):
            return False
        self._recent.add(digest)
        if len(self._recent) >= self._in_memory:
            self._flush()
        return True

    def __contains__(self, key: str) -> bool:
        digest = digest_key(key)
        return digest in self._recent or self._is_in_file(digest)

    def _is_in_file(self, digest: bytes) -> bool:
        if self.database is None:
            return False
        rows = self.database.execute("SELECT 1 FROM seen WHERE key = ?", (digest,))
        return rows.fetchone() is not None

    def _flush(self) -> None:
        database = self.open()
        database.execute("BEGIN")
        # Sorted keys fill the pages of the B-tree in order, which is much faster.
        rows = ((digest,) for digest in sorted(self._recent))
        database.executemany("INSERT INTO seen VALUES (?)", rows)
        database.execute("COMMIT")
        self._recent.clear()


def digest_key(key: str) -> bytes:
    """Return a digest of a key of 128 bits."""
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
