"""A corpus that is prepared into a store: each shard goes there as soon as it is whole.

    <data>/.<name>.partial-<digest of what decides the bytes>/
        train-00000.arrow     a shard
        train-00000.json      put after it: what the manifest will say of it, and its rejected rows
    <data>/<name>/            the corpus, copied from there within the store, its manifest last

A host's disk holds the shards that it makes, that of the driver small entries of all. A prepare
that was killed goes on with the shards that the store has, on any machine. A
corpus that is there already stays whole until all shards of the new one have arrived.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.shards.format import MANIFEST, QUARANTINE
from pipelines.tokenizer.selection import claimed
from pipelines.tokenizer.training import TOKENIZER, TOKENIZER_MANIFEST
from skillnet_platform import console, storage
from skillnet_platform.errors import UserError
from skillnet_platform.storage import directories, run_root
from skillnet_platform.storage.location import Place, content

#: What corpora share; sent before them, since their manifests name its hash.
SHARED = (TOKENIZER, TOKENIZER_MANIFEST)


@contextlib.contextmanager
def staged(data: Place) -> Iterator[Path]:
    """The folder to prepare in.

    For a path it is that path. For a URI it is a folder below the run root, for the tokenizer and
    what is in the making: shards leave it one by one (``pipelines/preprocessing/remote_staging.py``). It may be removed
    at any time.

    Raises:
        UserError: the store refuses, or another process of this machine puts a tokenizer there;
            found before the block starts.
        StoreUnavailable: it does not answer.
    """
    if isinstance(data, Path):
        yield data
        return
    folder = staging_folder(data)
    folder.mkdir(parents=True, exist_ok=True)
    with claimed(folder):  # what another prepare of this machine has not sent yet is its own
        for name in SHARED:
            # As the store has it, whatever an earlier prepare left here: its corpora are spelt so,
            # and other hosts may have put it there since.
            there = directories.join(data, name)
            if directories.exists(there):
                directories.get_file(there, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    yield folder


def staging_folder(uri: str) -> Path:
    """Where corpora are prepared on their way to a URI."""
    key = hashlib.sha256(uri.encode()).hexdigest()[:12]
    return storage.run_root() / "staging" / f"{directories.name_of(uri)}-{key}"


def send_shared(folder: Path, uri: str) -> None:
    """Send what the corpora of a folder share, where the store has it otherwise."""
    for name in SHARED:
        there = directories.join(uri, name)
        if (folder / name).is_file() and content(there) != (folder / name).read_bytes():
            directories.put_file(folder / name, there)


#: Small objects read at once.
STREAMS = 16


@dataclass(frozen=True)
class Delivery:
    """Where the shards of a corpus go.

    Args:
        uri: of the corpus.
        making: URI of the folder of its shards in the making.
        words: hash of the tokenizer beside the corpus, if it needs one.
    """

    uri: str
    making: str
    words: str | None = None

    @classmethod
    def into(cls, data: str, name: str, folder: Path, words: str | None = None) -> "Delivery":
        """Of a corpus below a URI.

        Args:
            data: that URI.
            name: of the corpus.
            folder: of the corpus in the making here; see ``pipelines/preprocessing/staging.py``.
            words: hash of the tokenizer beside the corpus.
        """
        return cls(directories.join(data, name), directories.join(data, folder.name), words)

    def tokenizer(self) -> Path | None:
        """The tokenizer on this host, fetched if it is not here yet; none if none is needed."""
        if self.words is None:
            return None
        path = run_root() / "cache" / "tokenizers" / f"{self.words}.json"
        if not path.is_file():
            directories.get_file(
                directories.join(self.uri, "..", TOKENIZER), path, sha256=self.words
            )
        return path

    def workplace(self, folder: Path) -> Path:
        """Where a shard is written on this host: in ``folder``, if this host has it."""
        if not folder.is_dir():
            folder = run_root() / "staging" / "visiting" / folder.name
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def finished(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Entries of the shards that are in the store and whole, by stem; they are in ``folder``
        then. A shard without its entry, or of another size, is made again.
        """
        there = {entry.name: entry.bytes for entry in directories.list_files(self.making)}
        for path in folder.glob("*-*.json"):
            path.unlink()
        stems = [n.removesuffix(".json") for n in there if n.endswith(".json") and "/" not in n]
        with ThreadPoolExecutor(STREAMS, "entries") as pool:
            entries = dict(zip(stems, pool.map(self._entry, stems), strict=True))
        found = {}
        for stem, entry in entries.items():
            said = (entry or {}).get("file")
            if entry is None or (said and there.get(said["file"]) != said["bytes"]):
                directories.remove_file(directories.join(self.making, f"{stem}.json"))
                continue
            (folder / f"{stem}.json").write_text(json.dumps(entry), encoding="utf-8")
            found[stem] = entry
        return found

    def _entry(self, stem: str) -> dict[str, Any] | None:
        try:
            entry = json.loads(
                directories.read_bytes(directories.join(self.making, f"{stem}.json"))
            )
            said = entry["file"]
            whole = said is None or said["file"] == f"{stem}.arrow"
            return entry if whole and {"keys", "rejected"} <= entry.keys() else None
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def send(self, folder: Path, stem: str) -> None:
        """Send a finished shard, then its entry. Neither is on this disk any longer then."""
        for name in (f"{stem}.arrow", f"{stem}.json"):
            if (folder / name).is_file():
                directories.put_file(folder / name, directories.join(self.making, name))
                (folder / name).unlink()

    def commit(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Put the finished corpus in place, and leave nothing of its making here or there.

        A lock of this machine keeps no other one from replacing the tokenizer of the store: so it
        is looked at once more.

        Args:
            folder: of the corpus in the making here, with its manifest and its quarantine.
            manifest: of the corpus.

        Raises:
            UserError: the store has another tokenizer by now.
        """
        words = directories.join(self.uri, "..", TOKENIZER)
        if self.words is not None and self.words != _sha256(content(words)):
            raise UserError(
                f"{words}: another prepare replaced it meanwhile. {directories.name_of(self.uri)} is "
                "spelt with the one before, and was not put in place; prepare it again"
            )
        shards = [s["file"] for split in manifest["splits"].values() for s in split["shards"]]
        there = {entry.name for entry in directories.list_files(self.uri)}
        directories.remove_file(directories.join(self.uri, MANIFEST))
        name = directories.name_of(self.uri)
        with console.progress(f"putting {name} in place", len(shards), "shards") as bar:
            directories.copy_files(self.making, self.uri, shards, lambda _: bar.advance(1, name))
        directories.put_file(folder / QUARANTINE, directories.join(self.uri, QUARANTINE))
        for left in there - {*shards, QUARANTINE, MANIFEST}:
            directories.remove_file(directories.join(self.uri, left))
        directories.put_file(folder / MANIFEST, directories.join(self.uri, MANIFEST))
        directories.remove_directory(self.making)
        shutil.rmtree(folder)


def _sha256(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


def clear_making(data: str, name: str, but: str = "") -> None:
    """Remove what is left of a corpus in the making.

    Args:
        data: URI that the corpus lies below.
        name: of the corpus.
        but: name of the folder that stays.
    """
    for found in directories.list_folders(data):
        if found.startswith(f".{name}.partial-") and found != but:
            directories.remove_directory(directories.join(data, found))
