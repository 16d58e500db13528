"""Staging of a corpus in an object store: each shard is uploaded as soon as it is complete.

    <data>/.<name>.partial-<digest of the identity>/
        train-00000.arrow     a shard
        train-00000.json      uploaded after it: its manifest entry and its rejected rows
    <data>/<name>/            the corpus, copied from there inside the store, its manifest last

The disk of a node holds only the shards that the node writes; the disk of the driver holds the
small entries of all shards. A killed ``prepare`` resumes on any machine with the shards that the
store has. An existing corpus stays valid until all shards of the new one have arrived.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.data.shards.format import MANIFEST, QUARANTINE, SHARD_TABLE, read_shard_names
from pipelines.data.tokenizer.selection import lock_tokenizer
from pipelines.data.tokenizer.training import TOKENIZER, TOKENIZER_MANIFEST
from skillnet_platform import console, storage
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories, run_root
from skillnet_platform.storage.location import Location, SyncedFolder, read_if_exists

#: Files that the corpora of a folder share. They are uploaded first: manifests name their hash.
SHARED_FILES = (TOKENIZER_MANIFEST, TOKENIZER)
#: Small objects that are read at once.
MAX_ENTRY_READS = 16


@contextlib.contextmanager
def stage_locally(data: Location) -> Iterator[Path]:
    """Provide the local directory to prepare in.

    A path is returned as it is. For a URI the directory lies below the run root and holds the
    tokenizer and unfinished work; shards are uploaded from it one by one. It may be removed at
    any time.

    Args:
        data: directory or URI of the prepared corpora.

    Raises:
        UserError: the store denies access, or another process of this machine replaces its
            tokenizer; raised before the block starts.
        StoreUnavailableError: the store does not answer.
    """
    if isinstance(data, Path):
        yield data
        return
    folder = local_staging_dir(data)
    folder.mkdir(parents=True, exist_ok=True)
    # The lock protects files that another prepare of this machine has not uploaded yet.
    with lock_tokenizer(folder):
        shared = SyncedFolder(data, folder)
        for name in SHARED_FILES:
            # The store's copy replaces a local one: its corpora use that tokenizer, and another
            # machine may have uploaded it after the last prepare on this one.
            if not shared.has(name):
                (folder / name).unlink(missing_ok=True)
        shared.download(*SHARED_FILES)
    yield folder


def local_staging_dir(uri: str) -> Path:
    """Return the local directory for corpora that are prepared into a URI."""
    key = hashlib.sha256(uri.encode()).hexdigest()[:12]
    return storage.run_root() / "staging" / f"{directories.last_name(uri)}-{key}"


def upload_shared_files(folder: Path, uri: str) -> None:
    """Upload the tokenizer and its manifest if the store's copies differ.

    Args:
        folder: local directory of the files.
        uri: URI of the folder of prepared corpora.
    """
    shared = SyncedFolder(uri, folder)
    for name in SHARED_FILES:
        path = folder / name
        if path.is_file() and read_if_exists(shared.uri_of(name)) != path.read_bytes():
            shared.upload(name)


@dataclass(frozen=True)
class RemoteStaging:
    """Destination of one corpus in an object store.

    Args:
        uri: URI of the finished corpus.
        staging_uri: URI of the folder of its shards until all are finished.
        tokenizer_sha256: hash of the tokenizer beside the corpus, if the corpus needs one.
    """

    uri: str
    staging_uri: str
    tokenizer_sha256: str | None = None

    @classmethod
    def create(
        cls, data: str, name: str, folder: Path, tokenizer_sha256: str | None = None
    ) -> "RemoteStaging":
        """Return the destination of a corpus below a URI.

        Args:
            data: URI of the folder of prepared corpora.
            name: name of the corpus.
            folder: local staging directory of the corpus; see
                :func:`pipelines.data.preprocessing.staging.staging_dir`.
            tokenizer_sha256: hash of the tokenizer beside the corpus.
        """
        staging_uri = directories.join_uri(data, folder.name)
        return cls(directories.join_uri(data, name), staging_uri, tokenizer_sha256)

    def fetch_tokenizer(self) -> Path | None:
        """Return the tokenizer file on this node, downloaded if necessary; ``None`` if unused."""
        if self.tokenizer_sha256 is None:
            return None
        path = run_root() / "cache" / "tokenizers" / f"{self.tokenizer_sha256}.json"
        if not path.is_file():
            remote = directories.join_uri(self.uri, "..", TOKENIZER)
            directories.get_file(remote, path, sha256=self.tokenizer_sha256)
        return path

    def scratch_dir(self, folder: Path) -> Path:
        """Return the directory for shards on this node: ``folder`` if this node has it."""
        if not folder.is_dir():
            folder = run_root() / "staging" / "visiting" / folder.name
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finished_shards(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Return the entries of all complete shards in the store by stem.

        The entries are also written to ``folder``. A shard without an entry, or of another size
        than its entry states, is prepared again.
        """
        existing = {entry.name: entry.bytes for entry in directories.list_files(self.staging_uri)}
        for path in folder.glob("*-*.json"):
            path.unlink()
        stems = [n.removesuffix(".json") for n in existing if n.endswith(".json") and "/" not in n]
        with ThreadPoolExecutor(MAX_ENTRY_READS, "entries") as pool:
            entries = dict(zip(stems, pool.map(self._read_entry, stems), strict=True))
        complete = {}
        for stem, entry in entries.items():
            recorded = (entry or {}).get("file")
            if entry is None or (recorded and existing.get(recorded["file"]) != recorded["bytes"]):
                directories.remove_file(directories.join_uri(self.staging_uri, f"{stem}.json"))
                continue
            (folder / f"{stem}.json").write_text(json.dumps(entry), encoding="utf-8")
            complete[stem] = entry
        return complete

    def _read_entry(self, stem: str) -> dict[str, Any] | None:
        try:
            uri = directories.join_uri(self.staging_uri, f"{stem}.json")
            entry = json.loads(directories.read_bytes(uri))
            recorded = entry["file"]
            valid = recorded is None or recorded["file"] == f"{stem}.arrow"
            return entry if valid and {"keys", "rejected", "checks"} <= entry.keys() else None
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def upload_shard(self, folder: Path, stem: str) -> None:
        """Upload a finished shard, then its entry, and delete both on this disk.

        Args:
            folder: local directory of the files.
            stem: name of the files without their suffixes.
        """
        # A shard without accepted rows has no file.
        SyncedFolder(self.staging_uri, folder).upload(f"{stem}.arrow", f"{stem}.json", move=True)

    def commit(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Publish the finished corpus and remove all staging files, local and remote.

        The tokenizer of the store is compared once more, because a lock on this machine does not
        stop another machine from replacing it.

        Args:
            folder: local staging directory with the manifest and the quarantine.
            manifest: manifest of the corpus.

        Raises:
            UserError: the store has another tokenizer now.
        """
        name = directories.last_name(self.uri)
        tokenizer = directories.join_uri(self.uri, "..", TOKENIZER)
        if self.tokenizer_sha256 is not None and self.tokenizer_sha256 != _sha256(
            read_if_exists(tokenizer)
        ):
            raise UserError(
                f"{tokenizer}: the tokenizer was replaced by another `skillnet prepare` while this "
                f"one ran; {name} was not published. Run prepare again"
            )
        shards = read_shard_names(folder)
        staging = SyncedFolder(self.staging_uri, folder)
        with console.show_progress(f"publishing {name}", len(shards), "shards") as bar:
            local = (QUARANTINE, SHARD_TABLE, MANIFEST)
            staging.publish(self.uri, shards, local, lambda _: bar.advance(1, name))


def _sha256(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


def clear_staging(data: str, name: str, keep: str = "") -> None:
    """Remove the remote staging folders of a corpus.

    Args:
        data: URI of the folder of prepared corpora.
        name: name of the corpus.
        keep: name of the staging folder that stays.
    """
    for folder in directories.list_folders(data):
        if folder.startswith(f".{name}.partial-") and folder != keep:
            directories.remove_directory(directories.join_uri(data, folder))
