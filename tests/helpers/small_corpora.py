"""Tiny corpora in the format of prepared ones, for tests of the stream and of training.

The content is made up but learnable: a label, a caption, a symbol sequence follow from the row.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.training.config.run import (
    FinetuneConfig,
    PretrainConfig,
    TaskTraining,
    TrainingConfig,
    default_masked_training,
)
from skillnet.config import SkillNetConfig
from skillnet.skills import default_tasks
from skillnet_platform.tracking import TrackingConfig
from tests.helpers.prepared_corpora import change_corpus, write_corpus

VOCABULARY = 64
MODALITY = {
    "headings": ("text", "text_classification"),
    "syllables": ("sound", "speech_recognition"),
    "drawings": ("image", "text_to_image"),
    "strokes": ("video", "text_to_video"),
    "functions": ("code", "text_to_code"),
}


def write_corpora(
    folder: Path,
    rows: int = 45,
    test_rows: int = 14,
    shards: int = 2,
    pretrain: int = 0,
    video_channels: int = 1,
) -> Path:
    """Write all five corpora below ``folder``; the training split in several shards.

    With ``pretrain`` rows all but the recordings have a split of that name, whose pictures, clips
    and functions have no captions, and whose texts have one and no label, as the real ones.
    """
    for number, name in enumerate(MODALITY):
        random = np.random.default_rng(number)
        splits = {"train": (rows, shards), "validation": (test_rows, 1), "test": (test_rows, 1)}
        if pretrain and name != "syllables":
            splits["pretrain"] = (pretrain, 1)
        _write(folder / name, name, splits, random, video_channels)
    return folder


def small_config(data: Path, **training: object) -> FinetuneConfig:
    """A run of a few steps on those corpora in float64, with a model of a few thousand weights."""
    batches = {
        "text_classification": TaskTraining("headings", weight=1.0, batch_size=7),
        "speech_recognition": TaskTraining("syllables", weight=1.0, batch_size=5),
        "text_to_image": TaskTraining("drawings", weight=1.0, batch_size=6),
        "text_to_video": TaskTraining("strokes", weight=1.0, batch_size=3),
        "text_to_code": TaskTraining("functions", weight=1.0, batch_size=6, max_length=12),
    }
    model = SkillNetConfig(
        dim=16,
        num_layers=2,
        num_heads=2,
        ffn_dim=24,
        drop_path=0.0,
        vocab_size=VOCABULARY,
        max_tokens=24,
        max_frames=40,
        embedding_dim=8,
        patch_size=16,
        tubelet=(4, 16, 16),
        tasks=default_tasks(),
    )
    values = {"steps": 12, "precision": "fp64", "log_every": 5, "lr": 3e-3}
    return FinetuneConfig(
        name="test",
        data=str(data),
        model=model,
        tasks=batches,
        training=TrainingConfig(**(values | training)),  # type: ignore[arg-type]
        tracking=TrackingConfig(system_metrics=False),
        evaluate=False,
    )


def add_linear_paths(config: FinetuneConfig) -> FinetuneConfig:
    """The run with linear paths for images and code."""
    tasks = dict(config.model.tasks)
    for task in ("text_to_image", "text_to_code"):
        tasks[task] = replace(tasks[task], linear_path=True)
    return replace(config, model=replace(config.model, tasks=tasks))


def write_scaled_sound(source: Path, folder: Path, deviation: float) -> None:
    """Write a corpus of recordings again, its log-mel values divided by ``deviation``."""
    shutil.copytree(source, folder)

    def scale(_: str, table: pa.Table) -> pa.Table:
        (old,) = table.column("log_mel").chunks
        scaled = old.values.flatten().to_numpy() / np.float32(deviation)
        flat = pa.FixedSizeListArray.from_arrays(pa.array(scaled), 80)
        new = pa.ListArray.from_arrays(old.offsets, flat)
        return table.set_column(table.schema.get_field_index("log_mel"), "log_mel", new)

    change_corpus(folder, scale, preprocessing={"deviation": deviation})


def small_pretraining(data: Path, **training: object) -> PretrainConfig:
    """The masked tasks at those sizes."""
    config = small_config(data, **training)
    lengths = {"masked_text": 16, "masked_code": 16}
    tasks = {
        name: TaskTraining(task.corpus, 1.0, 5, "pretraining", max_length=lengths.get(name))
        for name, task in default_masked_training().items()
    }
    model = replace(config.model, tasks=PretrainConfig().model.tasks)
    kept = {f.name: getattr(config, f.name) for f in fields(FinetuneConfig)}
    return PretrainConfig(**(kept | {"model": model, "tasks": tasks, "name": "pretraining"}))


def _write(
    folder: Path,
    name: str,
    splits: dict[str, tuple[int, int]],
    random: np.random.Generator,
    video_channels: int,
) -> None:
    modality, task = MODALITY[name]
    tables = {}
    for split, (rows, shards) in splits.items():
        table = _table(name, split, rows, random, video_channels)
        parts = np.array_split(np.arange(rows), shards)
        tables[split] = [table.slice(int(part[0]), len(part)) for part in parts]
    write_corpus(
        folder,
        tables,
        corpus=name,
        modality=modality,
        task=task,
        pretraining=["train"] if name == "syllables" else ["pretrain", "train"],
        tokenizer={"file": "../tokenizer.json", "sha256": "", "vocab_size": VOCABULARY},
        labels=[f"class {index}" for index in range(15)],
        symbols=[f"symbol {index}" for index in range(61)],
    )


def _table(
    name: str, split: str, rows: int, random: np.random.Generator, video_channels: int
) -> pa.Table:
    kind = random.integers(0, 15, rows)
    columns: dict[str, pa.Array] = {
        "key": pa.array([f"{split}/{index}" for index in range(rows)]),
        "group": pa.array(np.where(random.random(rows) < 0.3, kind, -1), pa.int64()),
        # Two rows are a unit, and the last rows are units by themselves.
        "unit": pa.array([f"unit {n // 2}" if n < rows // 2 else None for n in range(rows)]),
    }
    shapes: dict[str, list[int]] = {}
    if name == "headings":
        columns["tokens"] = _tokens(kind, random, 3, 20)
        if split != "pretrain":
            columns["label"] = pa.array(kind, pa.int32())
    elif name == "functions":
        columns["tokens"] = _tokens(kind, random, 5, 24)
    elif name == "syllables":
        frames = random.integers(20, 34, rows)
        mel = [
            random.standard_normal((n, 80), dtype=np.float32) + k
            for n, k in zip(frames, kind, strict=True)
        ]
        flat = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(mel).ravel()), 80)
        columns["log_mel"] = pa.ListArray.from_arrays(_offsets(frames), flat)
        columns["frames"] = pa.array(frames, pa.int32())
        columns["symbols"] = pa.array(
            [[1 + k, 16 + k] for k in kind.tolist()], pa.list_(pa.int32())
        )
    else:
        field, shape = {
            "drawings": ("pixels", [48, 48, 3]),
            "strokes": ("frames", [8, 32, 32, video_channels]),
        }[name]
        width = int(np.prod(shape))
        pixels = random.integers(0, 40, (rows, width)) + 14 * kind[:, None]
        columns[field] = pa.FixedSizeListArray.from_arrays(
            pa.array(pixels.ravel().astype(np.uint8)), width
        )
        shapes[field] = shape
    if name != "syllables" and (name == "headings") == (split == "pretrain"):
        counts = random.integers(1, 4, rows)
        inner = _tokens(np.repeat(kind, counts), random, 2, 9)
        columns["caption_tokens"] = pa.ListArray.from_arrays(_offsets(counts), inner)
    return shaped_table(columns, shapes)


def shaped_table(columns: dict[str, pa.Array], shapes: Mapping[str, Sequence[int]]) -> pa.Table:
    """A table whose flat tensor columns carry their shape, as prepared shards do."""
    fields = [
        pa.field(
            key,
            column.type,
            metadata={b"shape": json.dumps(shapes[key]).encode()} if key in shapes else None,
        )
        for key, column in columns.items()
    ]
    return pa.Table.from_arrays(list(columns.values()), schema=pa.schema(fields))


def _tokens(kind: np.ndarray, random: np.random.Generator, least: int, most: int) -> pa.Array:
    lengths = random.integers(least, most + 1, len(kind))
    values = random.integers(20, VOCABULARY, int(lengths.sum()))
    starts = np.cumsum(lengths) - lengths
    values[starts] = 4 + kind
    return pa.ListArray.from_arrays(_offsets(lengths), pa.array(values, pa.int32()))


def _offsets(lengths: np.ndarray) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
