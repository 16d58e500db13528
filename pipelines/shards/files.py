"""Where the files of a prepared corpus come from: a folder, or a store behind the cache."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from pipelines.shards.checksums import check_shards
from skillnet_platform.errors import UserError, first_line
from skillnet_platform.storage import directories, sha256_file
from skillnet_platform.storage.cache import FileCache, Held, Wanted, shared_cache
from skillnet_platform.storage.location import Place
from skillnet_platform.storage.retry import StoreUnavailable

#: A shard's entry in the manifest: file, rows, bytes, sha256.
ShardEntry = Mapping[str, Any]


class OpenShard(Protocol):
    """An open shard: its rows, memory-mapped, and the file's right to stay while they are used."""

    @property
    def table(self) -> pa.Table:
        """Its rows."""


class ShardStore(Protocol):
    """Opens the shards of one corpus."""

    location: Place
    #: Whether opening a shard may mean to download it.
    remote: bool

    def open(self, shard: ShardEntry) -> OpenShard:
        """Raises UserError: it is missing, altered or no Arrow file."""

    def prefetch(self, shards: Iterable[ShardEntry]) -> None:
        """These are wanted soon, in this order."""

    def check_sizes(self, shards: Iterable[ShardEntry]) -> None:
        """Raises UserError: naming a shard that is missing or has another size."""

    def check_digests(self, shards: Iterable[ShardEntry]) -> None:
        """Hash them where they lie. Raises UserError: naming one that is missing or altered."""

    def manifest(self, name: str) -> bytes:
        """The bytes of the manifest. Raises FileNotFoundError: there is none."""

    def is_there(self) -> bool:
        """Whether there is anything, if only remains."""

    @property
    def repair_hint(self) -> str:
        """What to do about a corpus that is damaged."""


class _Open:
    def __init__(self, table: pa.Table, held: Held | None = None) -> None:
        self.table, self._held = table, held


class LocalShardStore:
    """Shards in a folder; each is compared with its hash before it is opened, once
    (:mod:`pipelines.shards.checksums`)."""

    remote = False

    def __init__(self, location: Path) -> None:
        self.location: Place = location
        self._folder = location
        self._whole: set[str] = set()

    @property
    def repair_hint(self) -> str:
        return f"Delete {self._folder} and run `skillnet prepare {self._folder.name}`."

    def is_there(self) -> bool:
        return self._folder.is_dir()

    def manifest(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def open(self, shard: ShardEntry) -> OpenShard:
        path = self._folder / shard["file"]
        if not path.is_file():
            raise UserError(
                f"{path}: this shard is missing. Run `skillnet prepare {self._folder.name}`."
            )
        self.prefetch([shard])
        return _Open(_mapped(path, path, shard, self.repair_hint))

    def prefetch(self, shards: Iterable[ShardEntry]) -> None:
        """They are here; they are hashed if they were not before."""
        new = [shard for shard in shards if shard["file"] not in self._whole]
        if new:
            check_shards(self._folder, new)
            self._whole.update(shard["file"] for shard in new)

    def check_sizes(self, shards: Iterable[ShardEntry]) -> None:
        for shard in shards:
            path = self._folder / shard["file"]
            if not path.is_file():
                raise UserError(f"{path}: this shard is missing. {self.repair_hint}")
            _compare_size(path, path.stat().st_size, shard, self.repair_hint)

    def check_digests(self, shards: Iterable[ShardEntry]) -> None:
        for shard in shards:
            path = self._folder / shard["file"]
            _compare_digest(path, sha256_file(path), shard, self.repair_hint)
            try:
                # Who writes a shard may write its digest: offsets that lead astray are found here.
                _mapped(path, path, shard, self.repair_hint).validate(full=True)
            except (pa.ArrowException, ValueError) as problem:
                raise _unreadable(path, problem, self.repair_hint) from None


class RemoteShardStore:
    """Shards in a store, read through the host's cache.

    Args:
        where: URI of the corpus.
        cache: none takes the host's.
    """

    remote = True

    def __init__(self, location: str, cache: FileCache | None = None) -> None:
        self.location: Place = location
        self._uri, self._cache = location, cache or shared_cache()

    @property
    def repair_hint(self) -> str:
        above, _, name = self._uri.rpartition("/")
        return f"Put it there again: `skillnet prepare {name} --data {above}`."

    def is_there(self) -> bool:
        return bool(directories.list_files(self._uri))

    def manifest(self, name: str) -> bytes:
        return directories.read_bytes(directories.join(self._uri, name))

    def open(self, shard: ShardEntry) -> OpenShard:
        wanted = self._wanted(shard)
        held = self._cache.hold(wanted)
        return _Open(_mapped(held.path, wanted.uri, shard, self.repair_hint), held)

    def prefetch(self, shards: Iterable[ShardEntry]) -> None:
        self._cache.prefetch([self._wanted(shard) for shard in shards])

    def check_sizes(self, shards: Iterable[ShardEntry]) -> None:
        there = {entry.name: entry.bytes for entry in directories.list_files(self._uri)}
        for shard in shards:
            place = directories.join(self._uri, shard["file"])
            if shard["file"] not in there:
                raise UserError(f"{place}: this shard is missing. {self.repair_hint}")
            _compare_size(place, there[shard["file"]], shard, self.repair_hint)

    def check_digests(self, shards: Iterable[ShardEntry]) -> None:
        import hashlib

        for shard in shards:
            place = directories.join(self._uri, shard["file"])
            try:
                with directories.open_file(place) as stream:
                    found = hashlib.sha256()
                    while block := stream.read(1 << 22):
                        found.update(block)
            except FileNotFoundError:
                raise UserError(f"{place}: this shard is missing. {self.repair_hint}") from None
            except OSError as problem:
                raise StoreUnavailable(f"{place}: reading it broke off ({problem})") from problem
            _compare_digest(place, found.hexdigest(), shard, self.repair_hint)

    def _wanted(self, shard: ShardEntry) -> Wanted:
        uri = directories.join(self._uri, shard["file"])
        return Wanted(uri, shard["sha256"], shard["bytes"])


def open_shard_store(where: Place, cache: FileCache | None = None) -> ShardStore:
    """The files of the corpus at a path or URI."""
    return LocalShardStore(where) if isinstance(where, Path) else RemoteShardStore(where, cache)


def _mapped(path: Path, named: Place, shard: ShardEntry, again: str) -> pa.Table:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        if table.num_rows != shard["rows"]:
            raise pa.ArrowInvalid(f"{table.num_rows} rows, expected {shard['rows']}")
        return table
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as problem:
        raise _unreadable(named, problem, again) from None


def _unreadable(named: Place, problem: Exception, again: str) -> UserError:
    return UserError(f"{named}: not a readable shard ({first_line(problem)}). {again}")


def _compare_size(named: Place, size: int, shard: ShardEntry, again: str) -> None:
    if size != shard["bytes"]:
        raise UserError(
            f"{named}: this shard was altered: {size} bytes, expected {shard['bytes']}. {again}"
        )


def _compare_digest(named: Place, found: str, shard: ShardEntry, again: str) -> None:
    if found != shard["sha256"]:
        raise UserError(
            f"{named}: this shard was altered: sha256 {found}, expected {shard['sha256']}. {again}"
        )
