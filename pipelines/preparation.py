"""Preparing corpora with Ray: read rows to blocks, transform blocks, write shards, commit.

    archives --read (a task a corpus)--> blocks --map_batches--> blocks --ArrowShards--> shards
                                           |                        |
                                           +--> tokenizer           +--> rejected rows

A block holds rows of one split in the order of the corpus, ``shard_rows`` of them: how rows fall
into shards is settled before anything runs in parallel.
"""

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines import tokenizer as tokenizers
from pipelines.corpora.base import Corpus, Rejected, Row, Sources
from pipelines.datasink import REJECTED, SHARD, SPLIT, ArrowShards
from pipelines.shards import FORMAT_VERSION, MANIFEST, QUARANTINE, manifest_digest
from skillnet_platform.storage import atomic_write, require_space, staging, write_json

MADE_WITH = ("pyarrow", "numpy", "pillow", "resvg_py", "av", "tokenizers", "ray")


@dataclass
class Blocks:
    """What reading a corpus gave: blocks in Ray's store, and the rows set aside while reading."""

    refs: list[Any]
    rejected: list[dict[str, str]]
    counts: dict[str, int]


def start_reading(corpus: Corpus, directory: Path) -> Any:
    """Start a task that reads the corpus; give what it returns to ``finish_reading``."""
    import ray

    task = ray.remote(num_cpus=1, num_returns="streaming", max_retries=0)(read_blocks)
    return task.remote(corpus, Sources(directory, corpus.archives))


def finish_reading(generator: Any) -> Blocks:
    """Wait for a reading task."""
    import ray

    refs = list(generator)
    summary = ray.get(refs[-1])
    return Blocks(refs[:-1], summary["rejected"], summary["counts"])


def read_blocks(corpus: Corpus, sources: Sources) -> Iterator[pa.Table | dict[str, Any]]:
    """Blocks of raw rows, and last a summary: rows rejected while reading, blocks' counts."""
    waiting: dict[str, list[Row]] = defaultdict(list)
    shards, counts = Counter[str](), Counter[str]()
    rejected: list[dict[str, str]] = []
    keys: set[str] = set()
    for row in corpus.rows(sources):
        key = row.key if isinstance(row, Rejected) else row["key"]
        assert key not in keys, f"{corpus.name}: the key {key} comes twice"
        keys.add(key)
        if isinstance(row, Rejected):
            rejected.append({"key": row.key, "reason": row.reason})
            continue
        split = row["split"]
        waiting[split].append(row)
        counts[split] += 1
        if len(waiting[split]) == corpus.shard_rows:
            yield _block(corpus, split, shards[split], waiting.pop(split))
            shards[split] += 1
    for split in sorted(waiting):
        yield _block(corpus, split, shards[split], waiting[split])
    yield {"rejected": rejected, "counts": dict(counts)}


def train_tokenizer(parts: Sequence[tuple[Corpus, Blocks]], path: Path) -> None:
    """Learn the tokenizer from the blocks of those corpora, and write it."""
    import ray

    task = ray.remote(num_cpus=1, max_retries=0)(_train_tokenizer)
    plain = [(corpus, blocks.refs) for corpus, blocks in parts]
    learnt = ray.get(task.remote(plain))
    with atomic_write(path, "w") as stream:
        stream.write(learnt)


def write_corpus(
    corpus: Corpus,
    blocks: Blocks,
    final: Path,
    identity: dict[str, Any],
    tokenizer: Path | None,
) -> dict[str, Any]:
    """Transform blocks, write shards and manifest aside, and put the directory in place.

    Args:
        corpus: what to prepare.
        blocks: its raw rows.
        final: the corpus directory.
        identity: the part of the manifest that was known before: see ``prepare.identity_of``.
        tokenizer: file of the tokenizer, if the corpus needs one.

    Returns:
        The manifest.

    Raises:
        UserError: the disk is full.
    """
    splits = sorted(blocks.counts)
    schemas = {split: corpus.schema(split) for split in splits}
    require_space(final, _estimate(blocks))
    with staging(final) as aside:
        results = _run(corpus, blocks, ArrowShards(aside, schemas), tokenizer)
        manifest = _manifest(corpus, blocks, schemas, results, identity)
        _write_quarantine(aside / QUARANTINE, manifest.pop("_set_aside"))
        manifest["digest"] = manifest_digest(manifest)
        write_json(aside / MANIFEST, manifest)
    return manifest


def _run(
    corpus: Corpus, blocks: Blocks, sink: ArrowShards, tokenizer: Path | None
) -> list[dict[str, Any]]:
    import ray

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    dataset = ray.data.from_arrow_refs(blocks.refs).map_batches(
        partial(transform_block, corpus, tokenizer),
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
    )
    dataset.write_datasink(sink)
    return sink.results


def transform_block(corpus: Corpus, tokenizer: Path | None, block: pa.Table) -> pa.Table:
    """The finished block: the columns of the corpus and those that the sink reads."""
    made = corpus.transform(block, tokenizers.load(tokenizer) if tokenizer else None)
    assert made.num_rows == block.num_rows, f"{corpus.name}: the transform lost rows"
    if REJECTED not in made.column_names:
        made = made.append_column(REJECTED, pa.nulls(made.num_rows, pa.string()))
    for name in ("key", "group", SPLIT, SHARD):
        made = made.append_column(name, block[name])
    return made


def _block(corpus: Corpus, split: str, shard: int, rows: list[Row]) -> pa.Table:
    schema = pa.schema([("key", pa.string()), ("group", pa.int64()), *corpus.raw])
    table = pa.Table.from_pylist(rows, schema=schema)
    table = table.append_column(SPLIT, pa.repeat(pa.scalar(split), len(rows)))
    return table.append_column(SHARD, pa.repeat(pa.scalar(shard, pa.int32()), len(rows)))


def _train_tokenizer(parts: list[tuple[Corpus, list[Any]]]) -> str:
    import ray

    terms = [term for corpus, _ in parts for term in corpus.terms]
    task: list[str] = []
    other: list[str] = []
    for corpus, refs in parts:
        for block in ray.get(refs):
            split = block[SPLIT][0].as_py()
            if split not in ("pretrain", "train"):
                continue
            for name in corpus.text_columns:
                values = block[name]
                flat = pa.compute.list_flatten(values) if _is_list(values.type) else values
                (task if split == "train" else other).extend(flat.to_pylist())
    return tokenizers.train(task, other, terms)


def _is_list(dtype: pa.DataType) -> bool:
    return pa.types.is_list(dtype) or pa.types.is_large_list(dtype)


def _manifest(
    corpus: Corpus,
    blocks: Blocks,
    schemas: dict[str, pa.Schema],
    results: list[dict[str, Any]],
    identity: dict[str, Any],
) -> dict[str, Any]:
    splits: dict[str, Any] = {name: {"rows": 0, "shards": []} for name in schemas}
    set_aside = list(blocks.rejected)
    for entry in results:
        if entry["file"] is not None:
            splits[entry["split"]]["rows"] += entry["file"]["rows"]
            splits[entry["split"]]["shards"].append(entry["file"])
        set_aside += [{"key": r["key"], "reason": r[REJECTED]} for r in entry["rejected"]]
    rows_in = sum(blocks.counts.values()) + len(blocks.rejected)
    rows_out = sum(entry["rows"] for entry in splits.values())
    if rows_in != rows_out + len(set_aside):
        raise RuntimeError(
            f"{corpus.name}: {rows_in} rows in, but {rows_out} out and {len(set_aside)} set "
            "aside; nothing was written"
        )
    columns = {field.name: str(field.type) for schema in schemas.values() for field in schema}
    return {
        "format_version": FORMAT_VERSION,
        "corpus": corpus.name,
        "modality": corpus.modality,
        "task": corpus.task,
        "pretraining": [name for name in corpus.pretraining if name in splits],
        "schema": columns,
        "splits": splits,
        **identity,
        **corpus.facts(),
        "rows_in": rows_in,
        "rows_out": rows_out,
        "quarantine": dict(sorted(Counter(r["reason"] for r in set_aside).items())),
        "made_with": {name: version(name) for name in MADE_WITH},
        "_set_aside": set_aside,
    }


def _write_quarantine(path: Path, set_aside: list[dict[str, str]]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in set_aside]
    with atomic_write(path, "w") as stream:
        stream.writelines(lines)


def _estimate(blocks: Blocks) -> int:
    """A lower bound of the bytes that the shards take."""
    return 2**20 + 64 * sum(blocks.counts.values())
