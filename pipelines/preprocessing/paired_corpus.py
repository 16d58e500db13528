"""Corpora whose rows have two media: rows of one prepared corpus, each with a row of another one.

    drawings: heart.png  "red heart"   ─┐
    sounds:   heart.wav  "red heart"   ─┴─>  a row with the columns of both

Rows pair by their group, which is a hash of the label of ``task: pairs`` or of the first caption.
``skillnet prepare --pair`` calls :func:`write_paired_corpus`. Training reads the result as any
corpus: the second medium is a column more.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.loading.task_columns import INPUT_COLUMNS, PAIRED_PREFIX
from pipelines.shards.columns import FixedColumn, open_column
from pipelines.shards.dataset import PreparedCorpus, open_corpus
from pipelines.shards.format import MANIFEST, manifest_digest, write_shard
from skillnet.skills import check_names
from skillnet_platform.errors import UserError
from skillnet_platform.storage import staging_directory, write_json

#: Rows of a shard.
SHARD_ROWS = 512
#: Keys of a manifest that describe the rows of one corpus as a whole.
_DROPPED_KEYS = ("preprocessing_digest", "queries", "truncated_files", "made_with", "digest")


def write_paired_corpus(name: str, pair: str, data: Path) -> dict[str, Any]:
    """Write a corpus of the rows of one corpus that have a partner in another one.

    An older corpus of such pairs is replaced.

    Several partners of a group are dealt to its rows in turn.

    Args:
        name: of the new corpus.
        pair: ``FIRST+SECOND``, names of prepared corpora; the candidate tower of a task reads the
            medium of the first one, the query tower that of the second one.
        data: directory of prepared corpora.

    Returns:
        The manifest.

    Raises:
        UserError: a corpus is missing, both have one modality, no rows pair, or the name belongs to
            another corpus.
    """
    names = pair.split("+")
    if len(names) != 2 or not all(names):
        raise UserError(f"--pair {name}: {pair!r} is no pair. Give FIRST+SECOND")
    check_names((name,), "--pair")
    if (data / name / MANIFEST).is_file() and "paired" not in open_corpus(data / name).manifest:
        raise UserError(f"--pair {name}: {data / name} is another corpus. Give another name")
    first, second = (open_corpus(data / each) for each in names)
    _require_two_media(name, first, second)
    column = INPUT_COLUMNS[second.modality]
    splits, schema = {}, None
    with staging_directory(data / name) as folder:
        for split in (each for each in first.splits if each in second.splits):
            rows, partners = (corpus.splits[split].table() for corpus in (first, second))
            partner = match_groups(
                _read_groups(rows, f"{first.name}/{split}"),
                _read_groups(partners, f"{second.name}/{split}"),
            )
            (kept,) = np.nonzero(partner >= 0)
            if not len(kept):
                continue
            columns = partners.select([column, "key"])
            shards = []
            for number, start in enumerate(range(0, len(kept), SHARD_ROWS)):
                chosen = kept[start : start + SHARD_ROWS]
                table = _join_columns(rows.take(chosen), columns.take(partner[chosen]))
                schema = table.schema
                shards.append(write_shard(table, folder / f"{split}-{number:05d}.arrow"))
            splits[split] = {"rows": len(kept), "shards": shards}
        if schema is None:
            raise UserError(
                f"--pair {name}: no row of {first.name} has the group of a row of {second.name} in "
                "the same split. Rows pair by equal labels (task pairs) or first captions"
            )
        manifest = _describe(name, first, second, splits, schema)
        write_json(folder / MANIFEST, manifest)
    return manifest


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
    if media[0] == media[1] or "text" in media:
        raise UserError(
            f"--pair {name}: {first.name} holds {media[0]}, {second.name} {media[1]}. Give corpora "
            "of two media; rows with captions need no pair"
        )
    theirs, ours = (each.manifest.get("tokenizer") or {} for each in (second, first))
    if theirs and ours and theirs["sha256"] != ours["sha256"]:
        raise UserError(
            f"--pair {name}: {first.name} and {second.name} have other tokenizers. Prepare both "
            "with one"
        )


def _read_groups(table: pa.Table, where: str) -> np.ndarray:
    column = open_column(table, "group", where)
    assert isinstance(column, FixedColumn)
    return column.take(np.arange(len(table)))


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
    manifest = {
        **{key: value for key, value in manifests[0].items() if key not in _DROPPED_KEYS},
        "corpus": name,
        "task": f"{second.modality}_to_{first.modality}",
        "paired": {
            "modality": second.modality,
            "preprocessing": second.manifest["preprocessing"],
            "corpora": {corpus.name: corpus.digest for corpus in (first, second)},
        },
        "pretraining": [],
        "preprocessing": {**manifests[1]["preprocessing"], **manifests[0]["preprocessing"]},
        "tokenizer": manifests[0].get("tokenizer") or manifests[1].get("tokenizer"),
        "schema": {field.name: str(field.type) for field in schema},
        "splits": splits,
        "sources": [*manifests[0].get("sources", []), *manifests[1].get("sources", [])],
        "rows_in": sum(split.rows for split in first.splits.values()),
        "rows_out": rows,
        "quarantine": {},
    }
    manifest["digest"] = manifest_digest(manifest)
    return manifest
