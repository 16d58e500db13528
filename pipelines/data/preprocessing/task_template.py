"""Configuration of one task, written for a prepared corpus or for a directory of user data.

:func:`describe_task` is the library of ``skillnet init-task``. The file names the task, its corpus
and its plan, and the input sizes of the model that differ from the defaults. The number of outputs
is left out: a run takes it from the manifest of the corpus.
"""

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.data.preprocessing.inspection import inspect_corpus
from pipelines.data.shards.dataset import open_corpus
from pipelines.data.shards.format import MANIFEST
from skillnet.config import SkillNetConfig
from skillnet.modality import Modality, find_modality
from skillnet.objectives.base import find_objective
from skillnet.skills import DEFAULT_SKILLS, check_names, known_tasks
from skillnet_platform.config import safe_yaml
from skillnet_platform.errors import UserError
from skillnet_platform.storage import data_root
from skillnet_platform.storage.location import parse_location
from skillnet_platform.terminal_text import escape_line

#: Rows of a global batch, if the training split has as many.
BATCH_ROWS = 64


@dataclass(frozen=True)
class TaskTemplate:
    """A task that can be trained, as a configuration.

    Args:
        name: key of the task in ``model.tasks``.
        objective: kind of the task.
        corpus: name of the corpus, once it is prepared.
        settings: the configuration as plain values.
        commands: that prepare the corpus, if it is not prepared, and train the task.
    """

    name: str
    objective: str
    corpus: str
    settings: dict[str, Any]
    commands: tuple[str, ...]

    def to_yaml(self) -> str:
        """Return the file: the commands as comments, then the settings."""
        # Names of files may hold line ends, which would end the comment.
        lines = [f"# Task {self.name}: {self.objective} on the corpus {escape_line(self.corpus)}."]
        lines += [f"#   {escape_line(each)}" for each in self.commands]
        return "\n".join(lines) + "\n" + safe_yaml.dump_plain_yaml(self.settings)


def describe_task(
    path: str, name: str | None, file: str, options: Mapping[str, Any] | None = None
) -> TaskTemplate:
    """Return the configuration of the task that a corpus is made for.

    Args:
        path: a prepared corpus, the name of one in the data directory, or user data that
            ``skillnet inspect`` reads.
        name: identifier of the task; None takes the usual one.
        file: path of the configuration, for the commands.
        options: format -> its options, for user data.

    Raises:
        UserError: nothing is there, no row can be used, no objective fits the rows, or a prepared
            corpus is given with options.
    """
    prepared = _find_prepared(path)
    commands: tuple[str, ...] = ()
    data: dict[str, str] = {}
    if prepared is not None:
        if options:
            raise UserError(
                f"options.{next(iter(options))}: {path} is prepared already. Give the options to "
                "skillnet prepare"
            )
        opened = open_corpus(prepared)
        kind, corpus, manifest = opened.task, opened.name, opened.manifest
        sizes = _input_sizes(opened.modality, manifest["preprocessing"])
        if paired := manifest.get("paired"):
            sizes |= _input_sizes(paired["modality"], paired["preprocessing"])
        vocabulary = (manifest.get("tokenizer") or {}).get("vocab_size", 0)
        sizes |= {"vocab_size": vocabulary} if vocabulary > SkillNetConfig.vocab_size else {}
        train = opened.splits["train"].rows if "train" in opened.splits else 0
        parent = str(prepared).rpartition("/")[0]
        data = {} if Path(parent) == data_root() else {"data": parent}
    else:
        report = inspect_corpus(path, options)
        if not report["command"]:
            raise UserError(
                f"{path}: no row can be used. See the reasons with skillnet inspect "
                f"{shlex.quote(path)}"
            )
        kind, corpus, commands = report["task"], report["name"], (report["command"],)
        sizes = _input_sizes(report["modality"], report["preprocessing"])
        train = report["splits"].get("train", 0)
    usual = known_tasks().get(kind)
    if usual is None:
        raise UserError(
            f"{path}: its task {kind!r} has no default plan; known are {', '.join(known_tasks())}. "
            "Write model.tasks as in docs/skills.md"
        )
    own = name or kind
    check_names((own,), "name")
    is_masked = not find_objective(usual.objective).has_labels
    batch = min(BATCH_ROWS, 1 << max(train.bit_length() - 1, 0))
    training: dict[str, Any] = {"corpus": corpus, "batch_size": batch}
    training |= {"split": "pretraining"} if is_masked else {}
    towers = {
        tower: {"modality": plan.modality, "skills": list(plan.skills)}
        for tower, plan in usual.towers.items()
    }
    task = {"objective": usual.objective, "towers": towers}
    # The skill of another package's modality.
    if new := [each for each in usual.skills if each not in DEFAULT_SKILLS]:
        sizes = {"skills": [*DEFAULT_SKILLS, *new], **sizes}
    settings = {
        **data,
        "tasks": {own: training},
        "model": {**sizes, "tasks": {own: task}},
    }
    stage = "pretrain" if is_masked else "finetune"
    train_command = f"skillnet {stage} --config small --config {shlex.quote(file)}"
    return TaskTemplate(own, usual.objective, corpus, settings, (*commands, train_command))


def _find_prepared(path: str) -> str | None:
    """Return the location of a prepared corpus: a path, or a name in the data directory."""
    location = parse_location(path, Path())
    if not isinstance(location, Path):
        return None  # a URI is inspected; a prepared corpus in a store is named by its copy here
    for folder in (location, data_root() / path):
        if (folder / MANIFEST).is_file():
            return str(folder.absolute())
    return None


def _find_default(modality: Modality, key: str) -> Any:
    """Return the default of a size of the model, of ``inputs.NAME`` for another package's."""
    owner = modality.options if key.startswith("inputs.") else None
    name = key.rpartition(".")[2]
    return next(each.default for each in fields(owner or SkillNetConfig) if each.name == name)


def _input_sizes(name: str, preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of a model that reads the rows, as far as they differ from the defaults."""
    modality, sizes = find_modality(name), dict[str, Any]()
    for size in modality.sizes:
        value, default = preprocessing.get(size.option), _find_default(modality, size.key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        value = math.ceil(size.factor * value)
        # A model may read longer rows than a corpus has, but pictures of one size only.
        if value > default if size.is_limit else value != default:
            sizes[size.key] = value
    modality.file_half.fit_grid(sizes, partial(_find_default, modality))
    nested: dict[str, Any] = {}
    for key, value in sizes.items():
        *path, last = key.split(".")
        part = nested
        for each in path:
            part = part.setdefault(each, {})
        part[last] = value
    return nested


def name_file(corpus: str) -> str:
    """Return a file name for the configuration of a corpus.

    Args:
        corpus: path or name that the user gave.
    """
    stem = corpus.rstrip("/").rpartition("/")[2].split(".")[0]
    return (re.sub(r"[^\w-]+", "-", stem).strip("-") or "task") + ".yaml"
