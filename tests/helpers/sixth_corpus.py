"""A sixth corpus for tests of growth: the clips of ``strokes``, each with a class."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from pipelines.data.shards.dataset import open_corpus
from pipelines.training.config.growth import GrowConfig, NewSkill, NewTask
from pipelines.training.config.run import TaskTraining, TrainingConfig
from skillnet.skills import SkillPlan
from skillnet_platform.tracking import TrackingConfig
from tests.helpers.prepared_corpora import write_corpus

CLASSES = 3


def write_labelled_clips(data: Path, name: str = "counts", named: bool = True) -> Path:
    """Write the corpus beside ``strokes``; a class is a third of the clips by their ink.

    ``named`` gives the classes names.
    """
    strokes = open_corpus(data / "strokes")
    splits = {}
    for split in ("train", "validation", "test"):
        table = strokes.splits[split].table().combine_chunks()
        frames = table["frames"].combine_chunks()
        ink = frames.flatten().to_numpy().reshape(len(table), -1).mean(1)
        label = np.argsort(np.argsort(ink)) * CLASSES // len(table)
        made = table.select(["key", "group", "unit", "frames"])
        splits[split] = [made.append_column("label", pa.array(label, pa.int32()))]
    keys = ("modality", "pretraining", "preprocessing")
    same = {key: strokes.manifest[key] for key in keys if key in strokes.manifest}
    labels = ["little", "some", "much"] if named else []
    return write_corpus(data / name, splits, **same, corpus=name, task="counting", labels=labels)


def grow_config(source: str, data: Path, **training: object) -> GrowConfig:
    """Grow by a skill ``ink`` and a task ``counting``, in this process, in a few steps."""
    values = {"steps": 6, "log_every": 2, "precision": "fp32", "lr": 1e-2}
    return GrowConfig(
        skill=NewSkill("ink", init_from="video"),
        task=NewTask(
            "counting",
            {"input": SkillPlan(("general", "video", "ink"), "video")},
            TaskTraining("counts", batch_size=4),
        ),
        source=source,
        name="grown",
        data=str(data),
        training=TrainingConfig(**(values | training)),  # type: ignore[arg-type]
        references=[],
        tracking=TrackingConfig(register=False, system_metrics=False),
    )
