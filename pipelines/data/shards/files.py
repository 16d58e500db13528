"""Files of a prepared corpus: in a directory, or in an object store behind the cache.

Local shards are verified by hash before they are read, once per change of a file. A verified shard
is recorded in ``.verified`` beside the shards, with size, time of the last change and inode. While
all three are equal, the shard is not hashed again. So the next run detects a bit that a program or
a copy changed. A bit that the disk itself changed is detected by ``skillnet verify``, which ignores
the records. A record has a fixed size and its place, so that a shard among a million is looked up
without reading the others.
"""

import contextlib
import hashlib
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import pyarrow as pa

from skillnet_platform.errors import UserError, first_line
from skillnet_platform.storage import directories, sha256_file
from skillnet_platform.storage.cache import CacheHandle, CacheKey, FileCache, shared_cache
from skillnet_platform.storage.location import Location, join_location
from skillnet_platform.storage.retry import StoreUnavailableError

_BYTES_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
)
#: A shard's entry: file, rows, bytes, sha256, and its number if it is one of a corpus.
ShardEntry = Mapping[str, Any]

VERIFIED_NOTES = ".verified"
#: Bytes, time of the last change, inode and SHA-256 of a shard that was verified.
_RECORD = struct.Struct("<qqQ32s")
#: Each thread hashes on one core. More threads would be limited by the disk.
THREADS = 4


@dataclass(frozen=True)
class OpenShard:
    """Memory-mapped rows of a shard. Its file stays in the cache while this object exists."""

    table: pa.Table
    handle: CacheHandle | None = None


class ShardStore(Protocol):
    """Access to the shards of one corpus.

    Attributes:
        location: directory or URI of the corpus.
        repair_hint: instruction that repairs a damaged corpus, for error messages.
        remote: whether opening a shard may download it.
    """

    location: Location
    repair_hint: str
    remote: bool

    def open(self, shard: ShardEntry) -> OpenShard:
        """Open a shard. Raises UserError: it is missing, altered or not an Arrow file."""

    def prefetch(self, shards: Iterable[ShardEntry]) -> None:
        """Prepare shards that are opened soon, in this order."""

    def check_sizes(self, sizes: Iterable[tuple[str, int]]) -> None:
        """Compare files with their bytes. Raises UserError: one is missing or has another size."""

    def hash_file(self, name: str) -> str:
        """Return the SHA-256 of a file. Raises FileNotFoundError: there is none."""

    def manifest(self, name: str) -> bytes:
        """Return the bytes of the manifest. Raises FileNotFoundError: there is none."""

    def exists(self) -> bool:
        """Return whether there are any files, even of a damaged corpus."""

    def check_digests(self, shards: Iterable[ShardEntry]) -> None:
        """Hash shards without a copy. Raises UserError: a shard is missing or altered."""
        for shard in shards:
            try:
                found = self.hash_file(shard["file"])
            except FileNotFoundError:
                raise self.make_error(shard["file"], "this shard is missing") from None
            if found != shard["sha256"]:
                problem = f"this shard was altered: sha256 {found}, expected {shard['sha256']}"
                raise self.make_error(shard["file"], problem)

    def compare_sizes(
        self, sizes: Iterable[tuple[str, int]], find_size: Callable[[str], int | None]
    ) -> None:
        """Compare files with their bytes; ``find_size`` returns None for a missing one."""
        for name, size in sizes:
            if (found := find_size(name)) != size:
                altered = f"this shard was altered: {found} bytes, expected {size}"
                raise self.make_error(name, "this shard is missing" if found is None else altered)

    def map_shard(
        self, path: Path, shard: ShardEntry, handle: CacheHandle | None = None
    ) -> OpenShard:
        """Map the local file of a shard. Raises UserError: it cannot be read."""
        try:
            # With a map, ``read_all`` reads only metadata; pages are loaded when rows are used.
            table = _copy_table_offsets(pa.ipc.open_file(pa.memory_map(str(path))).read_all())
            if table.num_rows != shard["rows"]:
                raise pa.ArrowInvalid(f"{table.num_rows} rows, expected {shard['rows']}")
            # An attacker who writes a shard also writes its digest: offsets that lead outside of
            # the file must not be followed. Pixels and frames have none: their pages stay unread.
            table.validate(full=True)
            return OpenShard(table, handle)
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            problem = f"not a readable shard ({first_line(error)})"
            raise self.make_error(shard["file"], problem) from None

    def make_error(self, name: str, problem: str) -> UserError:
        """Return the error about a file, with the instruction that repairs the corpus."""
        return UserError(f"{join_location(self.location, name)}: {problem}. {self.repair_hint}")


class LocalShardStore(ShardStore):
    """Shards in a directory. Each is verified once before it is opened.

    See :mod:`pipelines.data.shards.files`.

    Args:
        location: directory of the corpus.
    """

    remote = False

    def __init__(self, location: Path) -> None:
        self.location, self._folder = location, location
        self.repair_hint = f"Delete {location} and run `skillnet prepare {location.name}`."
        #: Whether this process verified the shard of a record.
        self._verified = bytearray()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_verified": bytearray()}

    def exists(self) -> bool:
        return self._folder.is_dir()

    def manifest(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def hash_file(self, name: str) -> str:
        return sha256_file(self._folder / name)

    def open(self, shard: ShardEntry) -> OpenShard:
        path = self._folder / shard["file"]
        if not path.is_file():
            raise self.make_error(shard["file"], "this shard is missing")
        self.prefetch([shard])  # verifies the shard
        return self.map_shard(path, shard)

    def prefetch(self, shards: Iterable[ShardEntry]) -> None:
        """Hash the shards that were not verified before."""
        known = self._verified
        new = [s for s in shards if _place(s) >= len(known) or not known[_place(s)]]
        if new:
            self._verify(new)
            known.extend(bytes(max(0, max(map(_place, new)) + 1 - len(known))))
            for shard in new:
                known[_place(shard)] = 1

    def check_sizes(self, sizes: Iterable[tuple[str, int]]) -> None:
        # A path from the folder on is the fastest for the system.
        folder = os.open(self._folder, os.O_RDONLY)

        def find_size(name: str) -> int | None:
            try:
                found = os.stat(name, dir_fd=folder)
            except (FileNotFoundError, NotADirectoryError):
                return None
            return found.st_size if stat.S_ISREG(found.st_mode) else None

        try:
            self.compare_sizes(sizes, find_size)
        finally:
            os.close(folder)

    def _verify(self, shards: Sequence[ShardEntry]) -> None:
        """Hash the shards without a record, and record them."""
        known = self._read_records(shards)
        pairs = zip(shards, known, strict=True)
        new = [shard for shard, record in pairs if record != self._make_record(shard)]
        if not new:
            return
        with ThreadPoolExecutor(min(THREADS, len(new))) as pool:
            records = list(pool.map(self._hash_shard, new))
        # Another process may write the same record. A lost record only costs time.
        with (
            contextlib.suppress(OSError),
            _open_records(self._folder, os.O_WRONLY | os.O_CREAT) as file,
        ):
            for shard, record in zip(new, records, strict=True):
                os.pwrite(file, record, _place(shard) * _RECORD.size)

    def _hash_shard(self, shard: ShardEntry) -> bytes:
        # The state is read before hashing: a later change of the file invalidates the record.
        before = self._make_record(shard)
        self.check_digests([shard])
        return before

    def _make_record(self, shard: ShardEntry) -> bytes:
        try:
            info = (self._folder / shard["file"]).stat()
        except FileNotFoundError:
            raise self.make_error(shard["file"], "this shard is missing") from None
        sha256 = bytes.fromhex(shard["sha256"])
        return _RECORD.pack(info.st_size, info.st_mtime_ns, info.st_ino, sha256)

    def _read_records(self, shards: Sequence[ShardEntry]) -> list[bytes]:
        """Return the record of each shard; empty where there is none."""
        try:
            with _open_records(self._folder, os.O_RDONLY) as file:
                size = _RECORD.size
                return [os.pread(file, size, _place(shard) * size) for shard in shards]
        except OSError:
            return [b""] * len(shards)


class RemoteShardStore(ShardStore):
    """Shards in an object store, read through the cache of the node.

    Args:
        location: URI of the corpus.
        cache: cache to use; ``None`` for the shared cache of the node.
    """

    remote = True

    def __init__(self, location: str, cache: FileCache | None = None) -> None:
        self.location, self._uri, self._cache = location, location, cache or shared_cache()
        parent, _, name = location.rpartition("/")
        self.repair_hint = f"Prepare it again: `skillnet prepare {name} --data {parent}`."

    def exists(self) -> bool:
        return bool(directories.list_files(self._uri))

    def manifest(self, name: str) -> bytes:
        return directories.read_bytes(directories.join_uri(self._uri, name))

    def hash_file(self, name: str) -> str:
        uri = directories.join_uri(self._uri, name)
        try:
            with directories.open_file(uri) as stream:
                return hashlib.file_digest(cast("Any", stream), "sha256").hexdigest()
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StoreUnavailableError(f"{uri}: reading it broke off ({error})") from error

    def open(self, shard: ShardEntry) -> OpenShard:
        handle = self._cache.hold(self._cache_key(shard))
        return self.map_shard(handle.path, shard, handle)

    def prefetch(self, shards: Iterable[ShardEntry]) -> None:
        self._cache.prefetch([self._cache_key(shard) for shard in shards])

    def check_sizes(self, sizes: Iterable[tuple[str, int]]) -> None:
        existing = {entry.name: entry.bytes for entry in directories.list_files(self._uri)}
        self.compare_sizes(sizes, existing.get)

    def _cache_key(self, shard: ShardEntry) -> CacheKey:
        uri = directories.join_uri(self._uri, shard["file"])
        return CacheKey(uri, shard["sha256"], shard["bytes"])


def open_shard_store(location: Location, cache: FileCache | None = None) -> ShardStore:
    """Return the shards of the corpus at a path or URI.

    Args:
        location: directory or URI of the corpus.
        cache: cache for an object store; ``None`` for the shared cache of the node.
    """
    if isinstance(location, Path):
        return LocalShardStore(location)
    return RemoteShardStore(location, cache)


def _copy_table_offsets(table: pa.Table) -> pa.Table:
    """Return a mapped table whose offsets are in memory, so that no later change moves them.

    Arrow follows offsets without a check of each. Values stay mapped: wrong ones lead nowhere.

    Raises:
        ArrowInvalid: a column has a type that shards do not have.
    """
    columns = [
        pa.chunked_array([_copy_offsets(chunk) for chunk in column.chunks], type=column.type)
        for column in table.columns
    ]
    return pa.Table.from_arrays(columns, schema=table.schema)


def _copy_offsets(array: pa.Array) -> pa.Array:
    kind, buffers = array.type, array.buffers()
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if is_list or any(test(kind) for test in _BYTES_TYPES):
        offsets = pa.py_buffer(b"" if buffers[1] is None else buffers[1].to_pybytes())
        return pa.Array.from_buffers(
            kind,
            len(array),
            [buffers[0], offsets, *([] if is_list else buffers[2:])],
            array.null_count,
            array.offset,
            [_copy_offsets(array.values)] if is_list else None,
        )
    if pa.types.is_fixed_size_list(kind):
        inner = _copy_offsets(array.values)
        return pa.Array.from_buffers(
            kind, len(array), buffers[:1], array.null_count, array.offset, [inner]
        )
    is_plain = pa.types.is_primitive(kind) or pa.types.is_fixed_size_binary(kind)
    if not is_plain and not pa.types.is_null(kind):
        raise pa.ArrowInvalid(f"a column holds {kind}, which shards do not have")
    return array


def _place(shard: ShardEntry) -> int:
    """Return the place of a shard's record; the table of shards, without a number, has the first.

    Records of two corpora never meet: each has the digest of its shard.
    """
    return int(shard.get("number", -1)) + 1


@contextlib.contextmanager
def _open_records(directory: Path, flags: int) -> Iterator[int]:
    file = os.open(directory / VERIFIED_NOTES, flags, 0o666)
    try:
        yield file
    finally:
        os.close(file)
