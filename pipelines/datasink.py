"""Where Ray Data's blocks go: a block becomes one shard, its rejected rows are handed back."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray.data import Datasink
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import WriteResult

from pipelines.shards import write_shard

#: Columns that travel beside those of the corpus: where the row goes, or why it goes nowhere.
SPLIT, SHARD, REJECTED = "split", "shard", "rejected"


class ArrowShards(Datasink[list[dict[str, Any]]]):
    """Writes each block as ``<split>-<number>.arrow``.

    Names and content depend on the block alone, never on the task that writes it, so neither
    the order nor the number of tasks shows in the files, and a repeated task overwrites its own.

    Args:
        directory: where to write; it exists, and all nodes see it.
        schemas: columns of each split, by name of the split.
    """

    def __init__(self, directory: Path, schemas: dict[str, pa.Schema]) -> None:
        self.directory = directory
        self.schemas = schemas
        self.results: list[dict[str, Any]] = []

    def write(self, blocks: Iterable[Block], ctx: Any) -> list[dict[str, Any]]:
        """Write some blocks; returns an entry for each, with its shard and rejected rows."""
        return [self._write(BlockAccessor.for_block(block).to_arrow()) for block in blocks]

    def on_write_complete(self, write_result: WriteResult[list[dict[str, Any]]]) -> None:
        """Keep what the tasks returned, in the order of splits and shards."""
        entries = [entry for part in write_result.write_returns for entry in part]
        self.results = sorted(entries, key=lambda entry: (entry["split"], entry["shard"]))

    def _write(self, block: pa.Table) -> dict[str, Any]:
        split, number = block[SPLIT][0].as_py(), block[SHARD][0].as_py()
        bad = block.filter(pa.compute.is_valid(block[REJECTED]))
        good = block.filter(pa.compute.is_null(block[REJECTED])) if bad.num_rows else block
        schema = self.schemas[split]
        table = good.select(schema.names).cast(schema)
        entry = {
            "split": split,
            "shard": number,
            "rejected": bad.select(["key", REJECTED]).to_pylist(),
            "file": None,
        }
        if table.num_rows:
            entry["file"] = write_shard(table, self.directory / f"{split}-{number:05d}.arrow")
        return entry
