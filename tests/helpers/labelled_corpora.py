"""Readable corpora whose rows have every kind of target, for tests of objectives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.data.shards.dataset import open_corpus
from pipelines.data.shards.format import manifest_digest, write_shard
from pipelines.data.tokenizer.training import load_tokenizer
from pipelines.data.transforms.text import encode_captions
from tests.helpers.readable_corpora import MODALITY, write_corpora

LABELS = ("odd", "third", "late")


def write_labelled_corpora(folder: Path) -> Path:
    """Write the five readable corpora, with classes, sets of classes, a number and captions.

    The targets of a row follow from its place, so that each split has all of them.
    """
    write_corpora(folder)
    for name in MODALITY:
        _add_targets(folder, name)
    return folder


def _add_targets(folder: Path, name: str) -> None:
    corpus = open_corpus(folder / name)
    manifest, splits = corpus.manifest, {}
    for split, opened in corpus.splits.items():
        if split == "pretrain":
            splits[split] = manifest["splits"][split]
            continue
        table = opened.table().combine_chunks()
        for column, values in _targets(folder, len(table)).items():
            # The given groups have too few rows per split, and captions of no other corpus.
            if column in ("group", "captions", "caption_tokens") and column in table.column_names:
                table = table.set_column(table.column_names.index(column), column, values)
            elif column not in table.column_names:
                table = table.append_column(column, values)
        shard = write_shard(table, folder / name / f"{split}-labelled.arrow")
        splits[split] = {"rows": len(table), "shards": [shard]}
    values = _targets(folder, splits["train"]["rows"])["value"].to_numpy().astype(float)
    manifest |= {
        "splits": splits,
        "labels": manifest.get("labels", list(LABELS)),
        "value_scale": [float(values.mean()), float(values.std())],
        "pretraining": ["train"],
    }
    manifest["digest"] = manifest_digest(manifest)
    (folder / name / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def _targets(folder: Path, rows: int) -> dict[str, Any]:
    numbers = np.arange(rows)
    sets = [[kind for kind in range(3) if number % (kind + 2) == 0] for number in numbers]
    captions = [[f"第{number // 3}个的说明"] for number in numbers]
    tokens = encode_captions(load_tokenizer(folder / "tokenizer.json"), captions)
    return {
        "group": pa.array(numbers // 3, pa.int64()),
        "label": pa.array(numbers % 3, pa.int32()),
        "label_set": pa.array(sets, pa.list_(pa.int32())),
        "value": pa.array(100 + 10.0 * numbers, pa.float32()),
        "captions": pa.array(captions),
        "caption_tokens": tokens,
    }
