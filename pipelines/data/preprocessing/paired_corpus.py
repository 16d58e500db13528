"""Corpora whose rows have two media: rows of one prepared corpus, each with a row of another one.

    drawings: heart.png  "red heart"   ─┐
    sounds:   heart.wav  "red heart"   ─┴─>  a row with the columns of both

Rows pair by a hash of their first caption, or of the label of ``task: pairs``.
``skillnet prepare --pair`` calls :func:`write_paired_corpus`. Training reads the result as any
corpus: the second medium is a column more.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.config.corpus_options import check_pairs
from pipelines.data.corpora.readers.row_builders import hash_caption_group
from pipelines.data.shards.columns import PAIRED_PREFIX, FixedColumn, open_column
from pipelines.data.shards.dataset import PreparedCorpus, open_corpus
from pipelines.data.shards.format import MANIFEST, write_corpus_manifest, write_shard
from pipelines.data.shards.row_checks import ROW_CHECKS, ShardDigests, check_rows, digest_shard
from skillnet.modality import CAPTION_MODALITY, find_modality
from skillnet_platform import console
from skillnet_platform.errors import UserError
from skillnet_platform.storage import staging_directory

#: Rows of a shard.
SHARD_ROWS = 512
#: Keys of a manifest that describe the rows of one corpus as a whole.
_DROPPED_KEYS = ("preprocessing_digest", "queries", "truncated_files", "made_with", "digest")


def write_paired_corpus(name: str, pair: str, data: Path) -> dict[str, Any]:
    """Write a corpus of the rows of one corpus that have a partner in another one.

    An older corpus of such pairs is replaced.

    Several partners of a group are dealt to its rows in turn.

    Args:
        name: folder of the new corpus below the prepared corpora.
        pair: ``FIRST+SECOND``, names of prepared corpora; the candidate tower of a task reads the
            medium of the first one, the query tower that of the second one.
        data: directory of prepared corpora.

    Returns:
        The manifest.

    Raises:
        UserError: a corpus is missing, both have one modality, no rows pair, or the name belongs to
            another directory.
    """
    names = check_pairs({name: pair}, ())[name]
    require_replaceable(f"--pair {name}", data / name, "paired", "no corpus of pairs")
    first, second = (open_corpus(data / each) for each in names)
    _require_two_media(name, first, second)
    groups, others = (
        {split: _read_groups(corpus, split) for split in corpus.splits}
        for corpus in (first, second)
    )
    modality = find_modality(second.modality)
    # The page of a search shows functions as text.
    wanted = list(dict.fromkeys([modality.column, "key", modality.content_column]))
    splits, schema = {}, None
    digests: list[tuple[str, ShardDigests]] = []
    with staging_directory(data / name) as folder:
        for split in (each for each in first.splits if each in second.splits):
            rows, partners = (corpus.splits[split].table() for corpus in (first, second))
            partner = match_groups(groups[split], others[split])
            (kept,) = np.nonzero(partner >= 0)
            if not len(kept):
                continue
            columns = partners.select(wanted)
            shards = []
            for number, start in enumerate(range(0, len(kept), SHARD_ROWS)):
                chosen = kept[start : start + SHARD_ROWS]
                table = _join_columns(take_rows(rows, chosen), take_rows(columns, partner[chosen]))
                schema = table.schema
                digests.append((split, digest_shard(table, first.modality)))
                shards.append(write_shard(table, folder / f"{split}-{number:05d}.arrow"))
            splits[split] = {"rows": len(kept), "shards": shards}
        hint = "Rows pair by equal labels (option task: pairs) or equal first captions"
        if divided := _count_divided(groups, others, splits):
            hint = (
                f"{divided} rows have their partner in another split. Prepare both corpora with "
                "the option task: pairs or split_by, so that equal items get equal splits"
            )
        if schema is None:
            raise UserError(
                f"--pair {name}: no row of {first.name} has a partner in the same split of "
                f"{second.name}. {hint}"
            )
        if divided:
            console.print_warning(f"{name}: {hint}")
        manifest = _describe(name, first, second, splits, schema)
        manifest[ROW_CHECKS] = check_rows(lambda: digests, manifest["rows_out"])
        return write_corpus_manifest(folder, manifest)


def take_rows(table: pa.Table, rows_B: np.ndarray) -> pa.Table:
    """Return rows of a table with one chunk per shard, in the given order.

    ``pyarrow.Table.take`` joins the shards in memory first, for each call.

    Args:
        table: rows of a split.
        rows_B: numbers of B rows.
    """
    starts = np.cumsum([0, *map(len, table.column(0).chunks)])
    order_B = np.argsort(rows_B, kind="stable")
    shard_B = np.searchsorted(starts, rows_B[order_B], "right") - 1
    parts = [
        table.slice(starts[shard], starts[shard + 1] - starts[shard]).take(
            rows_B[order_B[shard_B == shard]] - starts[shard]
        )
        for shard in np.unique(shard_B)
    ]
    return pa.concat_tables(parts).take(np.argsort(order_B))


def match_groups(groups_N: np.ndarray, others_M: np.ndarray) -> np.ndarray:
    """Return the partner (N,) of each row, of an equal group; -1 for a row without one.

    Args:
        groups_N: groups of the rows; -1 is no group.
        others_M: groups of the possible partners.
    """
    order_M = np.argsort(others_M, kind="stable")
    sorted_M = others_M[order_M]
    begin_N = np.searchsorted(sorted_M, groups_N, "left")
    count_N = np.searchsorted(sorted_M, groups_N, "right") - begin_N
    # Number of each row within its group.
    order_N = np.argsort(groups_N, kind="stable")
    ordered_N = groups_N[order_N]
    turn_N = np.empty(len(groups_N), np.int64)
    turn_N[order_N] = np.arange(len(groups_N)) - np.searchsorted(ordered_N, ordered_N, "left")
    has_partner_N = (count_N > 0) & (groups_N >= 0)
    places_N = np.where(has_partner_N, begin_N + turn_N % np.maximum(count_N, 1), 0)
    return np.where(has_partner_N, order_M[places_N] if len(order_M) else -1, -1)


def _require_two_media(name: str, first: PreparedCorpus, second: PreparedCorpus) -> None:
    media = (first.modality, second.modality)
    if media[0] == media[1] or CAPTION_MODALITY in media:
        raise UserError(
            f"--pair {name}: {first.name} holds {media[0]}, {second.name} {media[1]}. Give corpora "
            "of two media; rows with captions need no pair"
        )
    if joined := next((each for each in (first, second) if "paired" in each.manifest), None):
        raise UserError(
            f"--pair {name}: {joined.name} is a corpus of pairs itself. Give corpora of one medium "
            f"each, such as {joined.source_names[0]}"
        )
    theirs, ours = (each.manifest.get("tokenizer") or {} for each in (second, first))
    if theirs and ours and theirs["sha256"] != ours["sha256"]:
        raise UserError(
            f"--pair {name}: {first.name} and {second.name} have other tokenizers. Prepare both "
            "with one"
        )


def require_replaceable(option: str, folder: Path, key: str, problem: str) -> None:
    """Raise UserError if a directory holds anything but an older corpus of the same making.

    Args:
        option: option with the name of the new corpus, for the message.
        folder: its directory.
        key: entry of the manifests of such corpora.
        problem: says that the directory holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MANIFEST).is_file() or key not in open_corpus(folder).manifest:
        raise UserError(f"{option}: {folder} is {problem}. Give another name")


def _read_groups(corpus: PreparedCorpus, split: str) -> np.ndarray:
    """Return (N,) hashes of the captions or labels of rows; -1 for rows without them."""
    table = corpus.splits[split].table()
    if "captions" in table.column_names:
        captions = table.column("captions")
        return np.array([hash_caption_group(row.as_py() or ()) for row in captions], np.int64)
    # The groups of built-in corpora are numbers, which mean other rows in another corpus.
    if not len(table) or "reader" not in corpus.manifest["preprocessing"]:
        return np.full(len(table), -1)
    column = open_column(table, "group", f"{corpus.name}/{split}")
    assert isinstance(column, FixedColumn)
    return column.take(np.arange(len(table)))


def _count_divided(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray], splits: Mapping[str, Any]
) -> int:
    """Return the number of rows without a partner in their split that have one in another split."""
    every = np.concatenate(list(second.values()))
    found = 0
    for split, groups in first.items():
        present = np.isin(groups, every) & (groups >= 0)
        found += int(present.sum()) - splits.get(split, {"rows": 0})["rows"]
    return found


def _join_columns(rows: pa.Table, partners: pa.Table) -> pa.Table:
    """Return rows with the columns of their partners, under names with ``PAIRED_PREFIX``."""
    for field, values in zip(partners.schema, partners.columns, strict=True):
        rows = rows.append_column(field.with_name(PAIRED_PREFIX + field.name), values)
    return rows


def _describe(
    name: str,
    first: PreparedCorpus,
    second: PreparedCorpus,
    splits: dict[str, Any],
    schema: pa.Schema,
) -> dict[str, Any]:
    manifests = first.manifest, second.manifest
    rows = sum(entry["rows"] for entry in splits.values())
    return {
        **{key: value for key, value in manifests[0].items() if key not in _DROPPED_KEYS},
        "corpus": name,
        "task": f"{second.modality}_to_{first.modality}",
        "paired": {
            "modality": second.modality,
            "preprocessing": second.manifest["preprocessing"],
            "corpora": {corpus.name: corpus.digest for corpus in (first, second)},
        },
        "pretraining": [],
        "preprocessing": _join_settings(first, second),
        "tokenizer": manifests[0].get("tokenizer") or manifests[1].get("tokenizer"),
        "schema": {field.name: str(field.type) for field in schema},
        "splits": splits,
        "sources": [*manifests[0].get("sources", []), *manifests[1].get("sources", [])],
        "rows_in": sum(split.rows for split in first.splits.values()),
        "rows_out": rows,
        "quarantine": {},
    }


def _join_settings(first: PreparedCorpus, second: PreparedCorpus) -> dict[str, Any]:
    """Return the settings of a corpus, with those of the second medium from the other corpus."""
    # A corpus of the user records the settings of all media.
    moved = find_modality(second.modality).file_half.list_settings()
    kept, added = (each.manifest["preprocessing"].items() for each in (first, second))
    own = {key: value for key, value in kept if key not in moved}
    return own | {key: value for key, value in added if key in moved}
