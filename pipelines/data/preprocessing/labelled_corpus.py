"""Corpora that give the rows of a prepared corpus a label by a rule.

    strokes: 永  "点、横折钩、横撇、撇、捺"  ── column: captions, pattern: '^[^、]+' ──>  永  "点"

Inputs, keys, groups, units and splits stay those of the prepared corpus, so a new task holds out
the same rows. ``skillnet prepare --corpus NAME=labels:CORPUS`` calls
:func:`write_labelled_corpus`. The columns that a rule may read are not copied: a label is in no
input, except in a text or code that is the input itself.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.config.corpus_options import check_corpus_name
from pipelines.data.config.label_rule import LabelRule
from pipelines.data.corpora.base import ROW_COLUMNS, RejectedRow
from pipelines.data.corpora.readers.base import sort_labels
from pipelines.data.io.source_file import format_json_line
from pipelines.data.preprocessing.blocks import quarantine_record
from pipelines.data.preprocessing.paired_corpus import require_replaceable, take_rows
from pipelines.data.preprocessing.progress import make_unusable_error
from pipelines.data.shards.dataset import CorpusSplit, PreparedCorpus, open_corpus
from pipelines.data.shards.format import (
    FORMAT_VERSION,
    MANIFEST,
    QUARANTINE,
    write_corpus_manifest,
    write_shard,
)
from pipelines.data.shards.row_checks import ROW_CHECKS, ShardDigests, check_rows, digest_shard
from pipelines.data.tokenizer.guarded_loader import SECONDS, divide_texts
from pipelines.data.transforms.decoder_process import MATCHES, decode_media
from skillnet.modality import find_modality
from skillnet.skills import name_task
from skillnet_platform.config import digest_config
from skillnet_platform.errors import UserError, suggest_name
from skillnet_platform.storage import staging_directory

#: Increase it when equal rules give other labels.
RULES_VERSION = 1
#: Rows of a shard.
SHARD_ROWS = 512
#: Classes. A head of more outputs than rows learns nothing.
MAX_CLASSES = 10_000
#: Start of the names of splits for pretraining alone.
PRETRAINING = "pretrain"
NO_MATCH = "no match of the pattern"
NO_CLASS = "a label of no class"
#: Entries of a manifest that a corpus takes from its source.
_KEPT_KEYS = ("modality", "tokenizer", "sources")


def write_labelled_corpus(name: str, place: str, rule: LabelRule, data: Path) -> dict[str, Any]:
    """Write a corpus of the rows of a prepared corpus, with a label each.

    An older corpus of such labels is replaced. Rows for pretraining alone are left out.

    Args:
        name: folder of the new corpus below the prepared corpora.
        place: name of a prepared corpus, or its directory.
        rule: decides the labels.
        data: directory of prepared corpora.

    Returns:
        The manifest.

    Raises:
        UserError: the corpus or a column is missing, the pattern is wrong or too slow, a class has
            no training row, no row is left, or the name belongs to another directory.
    """
    option = f"--corpus {name}"
    check_corpus_name("--corpus", name)
    require_replaceable(option, data / name, "labelled", "no corpus of labels")
    named = data / place
    source = open_corpus(named if (named / MANIFEST).is_file() or "/" not in place else place)
    if "paired" in source.manifest or "labelled" in source.manifest:
        raise UserError(
            f"{option}: {source.name} is made from {' and '.join(source.source_names)}. Label the "
            "rows of one of them"
        )
    used = _find_splits(source, name, rule)
    found = {each.name: _read_labels(each, name, rule) for each in used}
    classes = _choose_classes(name, rule, found.get("train", []))
    splits: dict[str, Any] = {}
    digests: list[tuple[str, ShardDigests]] = []
    reasons, schema = Counter[str](), pa.schema([])
    with staging_directory(data / name) as folder:
        with (folder / QUARANTINE).open("w", encoding="utf-8") as rejected:
            for split in used:
                ids = _number_labels(found[split.name], classes, rule.other)
                keys = split.column("key").to_pylist()
                for key, label, each in zip(keys, found[split.name], ids, strict=True):
                    if each < 0:
                        reason = NO_MATCH if label is None else NO_CLASS
                        reasons[reason] += 1
                        line = quarantine_record(RejectedRow(key, reason))
                        rejected.write(format_json_line(line))
                shards = []
                for number, table in enumerate(_label_rows(split, source.modality, ids)):
                    schema = table.schema
                    digests.append((split.name, digest_shard(table, source.modality)))
                    shards.append(write_shard(table, folder / f"{split.name}-{number:05d}.arrow"))
                if shards:
                    splits[split.name] = {"rows": int((ids >= 0).sum()), "shards": shards}
        rows_in = sum(split.rows for split in used)
        counts = {split: entry["rows"] for split, entry in splits.items()}
        if "train" not in splits:
            raise make_unusable_error(name, counts, rows_in, reasons)
        # The place is no part of a manifest, because a manifest travels with its corpus.
        settings = source.manifest["preprocessing"] | {
            "label_rule": asdict(rule),
            "label_rules_version": RULES_VERSION,
        }
        manifest = {
            "format_version": FORMAT_VERSION,
            "corpus": name,
            "task": name_task(source.modality, ["labels"]),
            "labelled": {"corpora": {source.name: source.digest}},
            **{key: source.manifest.get(key) for key in _KEPT_KEYS},
            "pretraining": [],
            "preprocessing": settings,
            "preprocessing_digest": digest_config(settings),
            "schema": {field.name: str(field.type) for field in schema},
            "labels": classes,
            "splits": splits,
            "rows_in": rows_in,
            "rows_out": sum(counts.values()),
            "quarantine": dict(sorted(reasons.items())),
        }
        manifest[ROW_CHECKS] = check_rows(lambda: digests, manifest["rows_out"])
        return write_corpus_manifest(folder, manifest)


def _find_splits(source: PreparedCorpus, name: str, rule: LabelRule) -> list[CorpusSplit]:
    """Return the splits with the column of a rule, without those for pretraining alone."""
    splits = [each for split, each in source.splits.items() if not split.startswith(PRETRAINING)]
    found = [each for each in splits if rule.column in each.schema.names]
    if not found:
        columns = [field.name for field in source.schema if _is_readable(field.type)]
        raise UserError(
            f"options.{name}.column: {source.name} has no column {rule.column!r}"
            f"{suggest_name(rule.column, columns)}"
        )
    for split in found:
        kind = split.schema.field(rule.column).type
        if not _is_readable(kind):
            columns = [field.name for field in split.schema if _is_readable(field.type)]
            raise UserError(
                f"options.{name}.column: {rule.column} of {source.name} holds {kind}. Give a "
                f"column of texts, lists of texts or whole numbers: {', '.join(columns)}"
            )
    return found


def _is_readable(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) and pa.types.is_string(kind.value_type)
    return is_list or pa.types.is_string(kind) or pa.types.is_integer(kind)


def _read_labels(split: CorpusSplit, name: str, rule: LabelRule) -> list[str | None]:
    """Return the label of each row of a split, None for a row without a match."""
    found: list[str | None] = []
    for chunk in split.column(rule.column).chunks:
        texts = [
            "\n".join(value) if isinstance(value, list) else "" if value is None else str(value)
            for value in chunk.to_pylist()
        ]
        if rule.pattern is None:
            found += [text or None for text in texts]
            continue
        for part in divide_texts(texts):
            try:
                # A pattern can backtrack for hours, and no check of its syntax finds all of them.
                found += decode_media(
                    MATCHES, json.dumps(part).encode(), rule.pattern, rule.count, seconds=SECONDS
                )
            except ValueError as error:
                raise UserError(
                    f"options.{name}.pattern: {rule.pattern!r} cannot be searched in the column "
                    f"{rule.column}: {error}. Give another pattern"
                ) from None
    return found


def _choose_classes(name: str, rule: LabelRule, labels: Sequence[str | None]) -> list[str]:
    """Return the names of the classes in the order of their ids."""
    counts = Counter(label for label in labels if label is not None)
    if isinstance(rule.classes, list):
        classes = list(rule.classes)
        absent = [each for each in classes if not counts[each]]
        if absent or len(set(classes)) < len(classes):
            problem = f"no training row has the label {absent[0]!r}" if absent else "a name repeats"
            raise UserError(
                f"options.{name}.classes: {problem}. The labels of train are {_list_labels(counts)}"
            )
    else:
        frequent = sorted(counts, key=lambda label: (-counts[label], label))[: rule.classes]
        classes = _sort_counts(frequent) if rule.count else sort_labels(frequent)
    if rule.other is not None:
        if rule.other in classes:
            raise UserError(
                f"options.{name}.other: {rule.other!r} is the name of another class. Give one that "
                "no label has"
            )
        classes.append(rule.other)
    if len(classes) > MAX_CLASSES:
        raise UserError(
            f"options.{name}: the rule gives {len(classes)} classes; the limit is {MAX_CLASSES}. "
            "Give a pattern of fewer labels, or the number of classes"
        )
    return classes


def _sort_counts(labels: Sequence[str]) -> list[str]:
    """Return "3 or fewer", "4", … "19 or more" in the order of their numbers."""
    return sorted(labels, key=lambda label: int(label.split()[0]))


def _list_labels(counts: Counter[str], limit: int = 12) -> str:
    shown = ", ".join(repr(label) for label, _ in counts.most_common(limit))
    return f"{shown or 'none'}{' …' if len(counts) > limit else ''}"


def _number_labels(
    labels: Sequence[str | None], classes: Sequence[str], other: str | None
) -> np.ndarray:
    """Return the class id of each row (N,) int32; -1 for a row that is rejected."""
    numbers = {label: number for number, label in enumerate(classes)}
    rest = -1 if other is None else len(classes) - 1
    ids = [rest if label is None else numbers.get(label, rest) for label in labels]
    return np.array(ids, np.int32)


def _label_rows(split: CorpusSplit, modality: str, ids_N: np.ndarray) -> Iterator[pa.Table]:
    """Yield the rows with a class as tables of a shard: identity, input and label.

    Args:
        split: rows of the source.
        modality: medium of the source.
        ids_N: class of each row, -1 for none.
    """
    medium = find_modality(modality)
    wanted = {
        *(field.name for field in ROW_COLUMNS),
        *(medium.column, *medium.batch[1:], medium.content_column),
    }
    table = split.table()
    table = table.select([each for each in table.column_names if each in wanted])
    (kept,) = np.nonzero(ids_N >= 0)
    for start in range(0, len(kept), SHARD_ROWS):
        chosen = kept[start : start + SHARD_ROWS]
        labels = pa.array(ids_N[chosen], pa.int32())
        yield take_rows(table, chosen).append_column("label", labels)
