"""Where the gradient goes: the share of each skill, stem and head in a task's squared gradient.

Of training batches, in evaluation mode (no dropout) and without augmentation. A share is a sum of
squares over batches divided by that of all parts, so large parts count by their size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.config.run import TaskTraining
from pipelines.evaluation.evaluator import corpus_path
from pipelines.evaluation.tables import HEADLINE, in_order
from pipelines.loading.dataloader import MultiTaskDataLoader
from pipelines.shards.dataset import open_corpus
from pipelines.training.loop import task_loss
from skillnet.metrics import ConfidenceInterval, bootstrap_interval, ratio_of_sums
from skillnet.model import SkillNet
from skillnet.precision import choose_precision
from skillnet.skills import find_task

#: Keys of a row of :func:`measure_gradient_share`.
COLUMNS = (
    "task",
    "kind",
    "part",
    "share",
    "low",
    "high",
    "of_skills",
    "of_skills_low",
    "of_skills_high",
    "parameters",
    "batches",
)


def measure_gradient_share(
    model: SkillNet,
    data: str | Path,
    tasks: Sequence[str] | None = None,
    split: str = "train",
    *,
    corpora: Mapping[str, str] | None = None,
    limits: Mapping[str, int | None] | None = None,
    batches: int = 8,
    batch: int = 64,
    seed: int = 0,
    bootstrap_samples: int = 1000,
    precision: str = "auto",
) -> list[dict[str, Any]]:
    """Share of the squared gradient norm by part, for every task.

    Args:
        model: a trained model; nothing of it changes.
        data: directory of prepared corpora.
        tasks: names; none takes all that are measured by a headline figure.
        split: the batches are of.
        corpora: task -> corpus, where it is not the built-in one.
        limits: task -> longest sequence, as in training.
        batches: number of batches of a task.
        batch: rows of each.
        seed: of the choice of rows, and of the resampling.
        bootstrap_samples: resamplings of each interval, which is over batches.
        precision: as in training.

    Returns:
        Rows with the keys ``COLUMNS``: one for every skill (0 where it is not active), for what
        is shared, for the task's stems and for its head. ``share`` is of all parts, ``of_skills``
        of all skills (None for other parts); each adds up to 1 over a task. ``parameters`` is
        how many the task touches of that part.

    Raises:
        UserError: an unknown task, a corpus that is missing or does not fit it.
    """
    names = in_order(model.config.tasks) if tasks is None else list(tasks)
    found = []
    for name in names:
        if find_task(name, model.config.tasks).objective not in HEADLINE:
            continue
        corpus = open_corpus(corpus_path(data, name, corpora))
        settings = TaskTraining(
            corpus.name, batch=batch, split=split, max_length=(limits or {}).get(name)
        )
        settings = replace(settings, first_caption=1.0)
        stream = MultiTaskDataLoader({corpus.name: corpus}, {name: settings}, model.config, seed)
        squares, sizes = _squared_norms(model, name, stream, batches, precision)
        whole = np.sum(list(squares.values()), 0)
        skills = np.sum([x for (kind, _), x in squares.items() if kind == "skill"], 0)
        for (kind, part), values in squares.items():
            row: dict[str, Any] = {"task": name, "kind": kind, "part": part, "batches": batches}
            row["parameters"] = sizes[kind, part]
            keys = ("share", "low", "high")
            row |= zip(keys, _share_interval(values, whole, seed, bootstrap_samples), strict=True)
            if kind == "skill":
                keys = ("of_skills", "of_skills_low", "of_skills_high")
                row |= zip(
                    keys, _share_interval(values, skills, seed, bootstrap_samples), strict=True
                )
            found.append({column: row.get(column) for column in COLUMNS})
    return found


def _share_interval(
    values: np.ndarray, whole: np.ndarray, seed: int, bootstrap_samples: int
) -> ConfidenceInterval:
    rows_N2 = np.stack([values, whole], 1)
    return bootstrap_interval(rows_N2, ratio_of_sums, seed=seed, samples=bootstrap_samples)


ModelPart = tuple[str, str]


def _squared_norms(
    model: SkillNet, task: str, stream: MultiTaskDataLoader, batches: int, precision: str
) -> tuple[dict[ModelPart, np.ndarray], dict[ModelPart, int]]:
    """(kind, part) -> squared gradient norm of each batch, and the parameters it is over."""
    named = list(model.active_parameters(task))
    parts: dict[ModelPart, int] = {("skill", skill): 0 for skill in model.config.skills}
    parts |= {(kind, kind): 0 for kind in ("shared", "stem", "head")}
    owners = [_parse_part(model.file_of(name)) for name, _ in named]
    for owner, (_, parameter) in zip(owners, named, strict=True):
        parts[owner] += parameter.numel()
    squares = {part: np.zeros(batches) for part in parts}
    first = next(model.parameters())
    frozen = [parameter for _, parameter in named if not parameter.requires_grad]
    numbers = choose_precision("fp64" if first.dtype == torch.float64 else precision, first.device)
    training = model.training
    model.eval()
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for step in range(batches):
            batch = stream.batch(step).to(first.device, first.dtype)
            with numbers.autocast():
                outputs = model(task, batch.towers)
            loss = task_loss(model.config.tasks[task], outputs, batch)
            gradients = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
            for owner, gradient in zip(owners, gradients, strict=True):
                if gradient is not None:
                    squares[owner][step] += float(gradient.double().square().sum())
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        model.train(training)
    return squares, parts


def _parse_part(file: str) -> ModelPart:
    kind, _, name = file.partition("-")
    return (kind, name) if kind == "skill" else (kind, kind)
