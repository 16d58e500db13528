"""Prepared corpora: open a manifest, verify shards, and read rows of a split.

The format of shards and manifests is described in :mod:`pipelines.data.shards.format`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.data.shards.files import OpenShard, ShardStore, open_shard_store
from pipelines.data.shards.format import FORMAT_VERSION, MANIFEST, SHARD_TABLE, manifest_digest
from pipelines.data.shards.id_columns import IdRange, check_ids, manifest_id_ranges
from pipelines.data.shards.shard_list import SelectedShards, ShardList
from skillnet_files.entry_points import find_entries
from skillnet_platform.errors import UserError, find_nearest_name
from skillnet_platform.storage.cache import FileCache
from skillnet_platform.storage.location import Location, join_location, parse_location

#: Attributes of a split that hold its open shards.
_OPENED = ("schema", "_open_shards")


@dataclass(frozen=True)
class CorpusSplit:
    """Shards of one split of a corpus, in order."""

    name: str
    files: ShardStore
    shards: ShardList | SelectedShards
    #: Column -> range of its ids, from the manifest.
    id_ranges: Mapping[str, IdRange] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the files itself: a copy would hold all rows.
        return {key: value for key, value in self.__dict__.items() if key not in _OPENED}

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self.shards.rows.sum())

    @property
    def bytes(self) -> int:
        """Bytes of its shards."""
        return int(self.shards.bytes.sum())

    def open_shard(
        self, shard: Mapping[str, Any], ranges: Mapping[str, IdRange] | None = None
    ) -> OpenShard:
        """Open a shard and check its ids.

        Args:
            shard: one of ``shards``.
            ranges: ranges of the reader, in addition to those of the manifest.

        Raises:
            UserError: the shard is missing, was altered, is not an Arrow file, or has an id
                outside of its range.
        """
        opened = self.files.open(shard)
        location = join_location(self.files.location, shard["file"])
        check_ids(opened.table, self.id_ranges, location, self.files.repair_hint)
        remedy = "Change that setting, or give the task another corpus."
        check_ids(opened.table, ranges or {}, location, remedy)
        return opened

    def table(self) -> pa.Table:
        """Return all rows, memory-mapped, with one chunk per shard.

        Shards in an object store are downloaded first. They stay in the cache while this split
        is in use.

        Raises:
            UserError: see :meth:`open_shard`.
        """
        return pa.concat_tables([shard.table for shard in self._open_shards])

    def column(self, name: str) -> pa.ChunkedArray:
        """Return one column of ``table()``.

        Raises:
            UserError: there is no such column.
        """
        table = self.table()
        if name not in table.column_names:
            raise UserError(
                f"{self.files.location}: split {self.name} has no column {name!r}; "
                f"known: {', '.join(table.column_names)}"
            )
        return table.column(name)

    @cached_property
    def schema(self) -> pa.Schema:
        """Columns of its rows; opens one shard."""
        return self.open_shard(self.shards[0]).table.schema

    @cached_property
    def _open_shards(self) -> list[OpenShard]:
        self.files.prefetch(self.shards)
        return [self.open_shard(shard) for shard in self.shards]


@dataclass(frozen=True)
class PreparedCorpus:
    """Open prepared corpus: its manifest and its splits."""

    path: Location
    manifest: dict[str, Any]
    splits: dict[str, CorpusSplit] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the corpus, for example "headings"."""
        return str(self.manifest["corpus"])

    @property
    def modality(self) -> str:
        """Modality of its rows: text, sound, image, video or code."""
        return str(self.manifest["modality"])

    @property
    def task(self) -> str:
        """Kind of task that the corpus is made for."""
        return str(self.manifest["task"])

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the prepared corpora that its rows come from: its own, another one, or two."""
        made = self.manifest.get("paired") or self.manifest.get("labelled") or {}
        return tuple(made.get("corpora") or (self.name,))

    @property
    def digest(self) -> str:
        """Digest of the manifest, which covers every byte of the shards."""
        return str(self.manifest["digest"])

    @property
    def rows(self) -> int:
        """Rows of all splits."""
        return sum(split.rows for split in self.splits.values())

    @property
    def schema(self) -> pa.Schema:
        """Columns of the training split, or of the first split if there is none."""
        return (self.splits.get("train") or next(iter(self.splits.values()))).schema


def open_corpus(
    path: str | Path, verify: bool = False, cache: FileCache | None = None
) -> PreparedCorpus:
    """Open a prepared corpus.

    From an object store only the manifest and the table of shards are read. Shards are downloaded
    to the cache when they are opened.

    Args:
        path: directory or URI of the corpus.
        verify: hash every shard first, without a copy, and check the ids of local shards.
        cache: cache for an object store; ``None`` for the shared cache of the node.

    Raises:
        UserError: there is no manifest, it has another version, or it or the table of shards was
            edited, or a shard is missing, has another size or (with ``verify``) another content or
            wrong ids.
        StoreUnavailableError: the store does not answer.
    """
    files = open_shard_store(parse_location(path, Path()), cache)
    manifest = _read_manifest(files)
    shards = ShardList(files, manifest["shards"])
    divided = _divide_shards(files, manifest, shards)
    # Sizes cost one listing and detect most incomplete copies; hashing costs a full read.
    files.check_sizes(shards.iter_sizes())
    if verify:
        files.check_digests(chain([manifest["shards"]], shards))
    ranges = manifest_id_ranges(manifest)
    splits = {name: CorpusSplit(name, files, divided[name], ranges) for name in manifest["splits"]}
    if verify and not files.remote:
        for split in splits.values():
            for shard in split.shards:
                split.open_shard(shard)
    return PreparedCorpus(files.location, manifest, splits)


def verify_corpus(path: str | Path) -> dict[str, Any]:
    """Hash every shard of a prepared corpus; return its manifest.

    Raises:
        UserError: names the first shard that is missing or was altered.
    """
    return open_corpus(path, verify=True).manifest


def _read_manifest(files: ShardStore) -> dict[str, Any]:
    named = join_location(files.location, MANIFEST)
    name = str(files.location).rsplit("/", 1)[-1]
    own = f"for your own files `skillnet prepare --corpus {name}=PATH`"
    hint = files.repair_hint if files.remote else f"Run `skillnet prepare {name}`, or {own}."
    state = "not a prepared corpus (no manifest.json)"
    try:
        manifest = json.loads(files.manifest(MANIFEST).decode("utf-8"))
    except FileNotFoundError:
        if not files.exists():
            state = "missing"
            hint = hint if files.remote else _suggest_corpora(Path(files.location))
        raise UserError(f"{files.location}: {state}. {hint}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{named}: not JSON ({error}). {files.repair_hint}") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{named}: format version {version}, this program reads {FORMAT_VERSION}. {hint}"
        )
    # An edited manifest could name other hashes, so its own digest is checked before the shards.
    if manifest_digest(manifest) != manifest.get("digest"):
        raise UserError(f"{named}: changed after it was written. {files.repair_hint}")
    key = _find_invalid_key(manifest)
    if key:
        raise UserError(f"{named}: {key} is missing or damaged. {files.repair_hint}")
    return manifest


def _suggest_corpora(missing: Path) -> str:
    """Return a remedy for a missing corpus; a command in it never has a name that nothing has."""
    own = "`skillnet prepare --corpus NAME=PATH` for your own files"
    beside = sorted(manifest.parent.name for manifest in missing.parent.glob(f"*/{MANIFEST}"))
    if close := find_nearest_name(missing.name, beside):
        return f"Did you mean {close!r}, which is prepared? If not: run {own}."
    known = list(find_entries("skillnet.corpora"))
    close = find_nearest_name(missing.name, known)
    listed = f" Prepared are: {', '.join(beside)}." if beside else ""
    run = f"`skillnet prepare {close}`, or {own}" if close else own
    return f"Run {run}.{listed}"


def _divide_shards(
    files: ShardStore, manifest: dict[str, Any], shards: ShardList
) -> dict[str, ShardList]:
    """Return the shards of each split.

    Raises:
        UserError: the table of shards and the manifest differ, or the table is not valid.
    """
    shards.check()
    splits = sorted(manifest["splits"].items())
    divided: dict[str, ShardList] = {}
    if sum(entry["shards"] for _, entry in splits) == len(shards):
        start = 0
        for name, entry in splits:
            divided[name] = shards.select(start, start + entry["shards"])
            start += entry["shards"]
    if any(
        name not in divided or divided[name].rows.sum() != entry["rows"] for name, entry in splits
    ):
        raise UserError(
            f"{join_location(files.location, SHARD_TABLE)}: has other shards or rows than the "
            f"manifest. {files.repair_hint}"
        )
    return divided


def _find_invalid_key(manifest: dict[str, Any]) -> str | None:
    """Return the first required key that is missing or has a wrong type."""
    for key in ("corpus", "modality", "task"):
        if not isinstance(manifest.get(key), str):
            return key
    splits = manifest.get("splits")
    if not isinstance(splits, dict) or not splits:
        return "splits"
    tables = {f"splits.{name}": entry for name, entry in splits.items()}
    for name, entry in (tables | {"shards": manifest.get("shards")}).items():
        if not isinstance(entry, dict):
            return name
        # ``isinstance`` would accept a bool as an int.
        for key in ("rows", "bytes", *(["shards"] if name in tables else [])):
            if type(entry.get(key)) is not int or entry[key] < (key == "shards"):
                return f"{name}.{key}"
    if manifest["shards"].get("file") != SHARD_TABLE:
        return "shards.file"
    if not re.fullmatch("[0-9a-f]{64}", str(manifest["shards"].get("sha256"))):
        return "shards.sha256"
    return _find_invalid_size(manifest)


def _find_invalid_size(manifest: dict[str, Any]) -> str | None:
    """Return the first key with a damaged size of a table of ids; absent keys are valid."""
    tokenizer = manifest.get("tokenizer")
    if tokenizer is not None:
        size = tokenizer.get("vocab_size") if isinstance(tokenizer, dict) else None
        if type(size) is not int or size < 1:
            return "tokenizer.vocab_size"
    for key in ("labels", "symbols"):
        names = manifest.get(key, [])
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return key
    return None
