"""A corpus that is prepared into a store: each shard goes there as soon as it is whole.

    <data>/.<name>.partial-<digest of what decides the bytes>/
        train-00000.arrow     a shard
        train-00000.json      put after it: what the manifest will say of it, and its rejected rows
    <data>/<name>/            the corpus, copied from there within the store, its manifest last

This machine's disk holds the shards that are being made and small entries, however large the
corpus is. A prepare that was killed goes on with the shards that the store has, on any machine. A
corpus that is there already stays whole until all shards of the new one have arrived.
"""

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.shards import MANIFEST, QUARANTINE
from skillnet_platform import console, remote

#: Small objects read at once.
STREAMS = 16


@dataclass(frozen=True)
class Delivery:
    """Where the shards of a corpus go.

    Args:
        uri: of the corpus.
        making: URI of the folder of its shards in the making.
    """

    uri: str
    making: str

    @classmethod
    def into(cls, data: str, name: str, folder: Path) -> "Delivery":
        """Of a corpus below a URI.

        Args:
            data: that URI.
            name: of the corpus.
            folder: of the corpus in the making here; see ``pipelines/partial.py``.
        """
        return cls(remote.join(data, name), remote.join(data, folder.name))

    def finished(self, folder: Path) -> dict[str, dict[str, Any]]:
        """Entries of the shards that are in the store and whole, by stem; they are in ``folder``
        then. A shard without its entry, or of another size, is made again.
        """
        there = {entry.name: entry.bytes for entry in remote.list_files(self.making)}
        for path in folder.glob("*-*.json"):
            path.unlink()
        stems = [n.removesuffix(".json") for n in there if n.endswith(".json") and "/" not in n]
        with ThreadPoolExecutor(STREAMS, "entries") as pool:
            entries = dict(zip(stems, pool.map(self._entry, stems), strict=True))
        found = {}
        for stem, entry in entries.items():
            said = (entry or {}).get("file")
            if entry is None or (said and there.get(said["file"]) != said["bytes"]):
                remote.remove_file(remote.join(self.making, f"{stem}.json"))
                continue
            (folder / f"{stem}.json").write_text(json.dumps(entry), encoding="utf-8")
            found[stem] = entry
        return found

    def _entry(self, stem: str) -> dict[str, Any] | None:
        try:
            entry = json.loads(remote.read_bytes(remote.join(self.making, f"{stem}.json")))
            said = entry["file"]
            whole = said is None or said["file"] == f"{stem}.arrow"
            return entry if whole and {"keys", "rejected"} <= entry.keys() else None
        except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def send(self, folder: Path, stem: str) -> None:
        """Send a finished shard, then its entry. The shard is then no longer on this disk."""
        shard = folder / f"{stem}.arrow"
        if shard.is_file():
            remote.put_file(shard, remote.join(self.making, shard.name))
            shard.unlink()
        remote.put_file(folder / f"{stem}.json", remote.join(self.making, f"{stem}.json"))

    def commit(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        """Put the finished corpus in place, and leave nothing of its making here or there.

        Args:
            folder: of the corpus in the making here, with its manifest and its quarantine.
            manifest: of the corpus.
        """
        shards = [s["file"] for split in manifest["splits"].values() for s in split["shards"]]
        there = {entry.name for entry in remote.list_files(self.uri)}
        remote.remove_file(remote.join(self.uri, MANIFEST))
        name = remote.name_of(self.uri)
        with console.progress(f"putting {name} in place", len(shards), "shards") as bar:
            remote.copy_files(self.making, self.uri, shards, lambda _: bar.advance(1, name))
        remote.put_file(folder / QUARANTINE, remote.join(self.uri, QUARANTINE))
        for left in there - {*shards, QUARANTINE, MANIFEST}:
            remote.remove_file(remote.join(self.uri, left))
        remote.put_file(folder / MANIFEST, remote.join(self.uri, MANIFEST))
        remote.remove_directory(self.making)
        shutil.rmtree(folder)


def clear_making(data: str, name: str, but: str = "") -> None:
    """Remove what is left of a corpus in the making.

    Args:
        data: URI that the corpus lies below.
        name: of the corpus.
        but: name of the folder that stays.
    """
    for found in remote.list_folders(data):
        if found.startswith(f".{name}.partial-") and found != but:
            remote.remove_directory(remote.join(data, found))
