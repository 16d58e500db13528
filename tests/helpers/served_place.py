"""A model of every objective and modality with its corpora and its folder, made once a session."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path

import pytest
import torch
import yaml

from pipelines import skills
from pipelines.serving import bundle
from pipelines.serving.predictor import TaskPredictor
from pipelines.training.runs import model_source
from pipelines.training.runs.bundle_manifest import add_bundle_manifest
from skillnet.model import SkillNet
from skillnet.model_merging import add_skill, add_task
from skillnet.router import name_counts
from skillnet.serialization import write_model
from skillnet.skills import SkillPlan, Task, default_tasks, known_tasks
from skillnet.vocabulary import ModelVocabulary
from tests.helpers.readable_corpora import config, write_corpora, write_labelled_corpora

#: Classes of the task of the package ``shapes``.
NAMES = ("heart", "star", "sun")
#: Task of the model of every objective -> (corpus, outputs); None keeps the default number.
TASKS = {
    "text_classification": ("headings", 15),
    "image_classification": ("drawings", 3),
    "video_multi_label": ("strokes", 3),
    "code_regression": ("functions", 1),
    "speech_recognition": ("syllables", None),
    "text_to_image": ("drawings", None),
}


class ServedPlace:
    """Prepared corpora, a saved model and the folder that serves it, in a run root.

    Args:
        root: run root.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = write_corpora(root / "corpora")
        torch.manual_seed(0)
        SkillNet(config()).save_pretrained(root / "saved")
        self.source = model_source.resolve_model(str(root / "saved"))

    @cached_property
    def bundle(self) -> Path:
        """Folder of the model of the paper's five tasks."""
        return bundle.build_bundle(self.source, self.data, self.root / "bundle")

    @cached_property
    def predictor(self) -> TaskPredictor:
        """Predictor of :attr:`bundle`."""
        return bundle.open_bundle(self.bundle)

    @cached_property
    def every_objective(self) -> Path:
        """Folder of a model with the tasks ``TASKS``."""
        data = write_labelled_corpora(self.root / "labelled")
        known = known_tasks() | default_tasks()
        tasks = {
            name: known[name] if outputs is None else replace(known[name], outputs=outputs)
            for name, (_, outputs) in TASKS.items()
        }
        torch.manual_seed(0)
        run = self.root / "every"
        SkillNet(replace(config(), tasks=tasks)).save_pretrained(run / "model")
        settings = {
            "training": {},
            "tasks": {name: {"corpus": corpus} for name, (corpus, _) in TASKS.items()},
        }
        (run / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        source = model_source.resolve_model(str(run))
        return bundle.build_bundle(source, data, self.root / "every-bundle")


@lru_cache(maxsize=1)
def _made(root: Path) -> ServedPlace:
    return ServedPlace(root)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedPlace]:
    """The place, with the environment pointing at it."""
    root = tmp_path_factory.getbasetemp() / "served"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKILLNET_HOME", str(root))
        yield _made(root)


def pack_shapes(
    place: ServedPlace,
    folder: Path,
    package: str = "shapes",
    task: str = "shape",
    like: str = "text_to_image",
) -> Path:
    """Write a package of a classification into a folder, made from a model that grew.

    Args:
        place: with the base.
        folder: receives the package, and the grown model as ``grown``.
        package: name of the package.
        task: name of its task; its skill is ``counting``, or named after another task.
        like: task of the base whose rows it reads.
    """
    grown = folder / "grown"
    model = SkillNet.from_pretrained(place.bundle)
    torch.manual_seed(5)
    skill = "counting" if task == "shape" else f"{task}s"
    add_skill(model, skill)
    modality = model.config.tasks[like].towers[model.config.tasks[like].row_tower].modality
    plan = SkillPlan(tuple(sorted((skill, "general", modality))), modality)
    add_task(model, task, Task("classification", {"input": plan}, outputs=3))
    found = model.vocabulary
    model.vocabulary = ModelVocabulary(found.tokenizer, {**found.outputs, task: NAMES}, {})
    grown.mkdir(parents=True)
    write_model(model, grown)
    about = dict(bundle.check_bundle(place.bundle))
    files = list(about["files"])
    for name in files:
        shutil.copyfile(place.bundle / name, grown / name)
    # The task reads the inputs of another one.
    files.append(name_counts(task))
    shutil.copyfile(grown / name_counts(like), grown / name_counts(task))
    entry = about["tasks"][like] | {"names": list(NAMES), "limit": None}
    rows = [{"task": task, "split": "test", "metric": "accuracy", "value": 0.5}]
    about |= {
        "tasks": about["tasks"] | {task: entry},
        "evaluation": [row | {"low": 0.4, "high": 0.6} for row in rows],
        "settings": {
            "seed": 1,
            "tasks": {
                task: {"corpus": "a"},
                like: {"corpus": "drawings", "eval_only": True},
            },
        },
    }
    about = {key: value for key, value in about.items() if key not in ("digest", "files", "format")}
    add_bundle_manifest(grown, about, files)
    target = folder / f"{package}.skill"
    assert skills.pack_tasks([str(grown), "--output", str(target)]) == 0
    return target


@pytest.fixture(scope="module")
def shelf(place: ServedPlace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package ``shapes``, and with the model ``grown`` that it was made from."""
    return pack_shapes(place, tmp_path_factory.mktemp("shelf")).parent
